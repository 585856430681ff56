"""Configuration: whatever is written, the answer is a RunConfig or one line that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import raygard
from raygard.config import RunConfig, config_hash, decides, flatten
from raygard.config_file import load_config
from raygard.errors import RaygardError

QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
ROOT = Path(raygard.__file__).parents[1]
SHIPPED = sorted([*(ROOT / "jobs" / "configs").rglob("*.yaml"), *(ROOT / "raygard" / "zoo").glob("*.yaml")])
KEYS = sorted(flatten(RunConfig()))


def refused(*overrides: str, path: Path | None = None) -> str:
    with pytest.raises(RaygardError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(tmp_path / "again.yaml") == config


def test_the_demo_is_shipped_in_both_places() -> None:
    assert {path.name for path in SHIPPED} >= {"demo.yaml"}
    assert len({config_hash(load_config(path)) for path in SHIPPED if path.name == "demo.yaml"}) == 1


def test_no_file_and_an_empty_file_are_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config() == load_config(tmp_path / "empty.yaml") == RunConfig()


def test_overrides_win_over_the_file_and_later_ones_over_earlier(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("mask: {freeze_ratio: 0.4}\nseed: 3\n")
    config = load_config(file, ["mask.freeze_ratio=0.5", "mask.freeze_ratio=0.6", "domain.illegal=[a, b]"])
    assert (config.mask.freeze_ratio, config.seed, config.domain.illegal) == (0.6, 3, ("a", "b"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("bilevel.user_lr=1e-4", 1e-4),
        ("engine.mixed_precision=no", "no"),
        ("adapt.mixed_precision=no", "no"),
        ("bilevel.snr_gamma=null", None),
        ("domain.data=/a=b", "/a=b"),
    ],
)
def test_values_are_yaml_as_people_write_it(override: str, expected: object) -> None:
    assert flatten(load_config(None, [override]))[override.split("=")[0]] == expected


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("mask.freze_ratio=0.5", ("unknown key 'mask.freze_ratio'", "did you mean 'mask.freeze_ratio'")),
        ("maks.freeze_ratio=0.5", ("unknown key 'maks'", "did you mean 'mask'")),
        ("freeze_ratio=0.5", ("unknown key 'freeze_ratio'", "did you mean 'mask.freeze_ratio'")),
        ("engine.zero_stge=1", ("did you mean 'engine.zero_stage'",)),
        ("bilevel.num_workers=2", ("did you mean 'engine.num_workers'",)),
        ("zzz=1", ("unknown key 'zzz'", "known: ", "tracking")),
        ("mask.freeze_ratio=0", ("mask.freeze_ratio", "greater than 0", "got 0")),
        ("mask.freeze_ratio=1", ("mask.freeze_ratio", "less than 1", "got 1")),
        ("mask.freeze_ratio=-0.1", ("mask.freeze_ratio", "greater than 0", "got -0.1")),
        ("mask.freeze_ratio=.nan", ("mask.freeze_ratio", "finite", "got nan")),
        ("mask.freeze_ratio=half", ("mask.freeze_ratio", "got 'half'")),
        ("mask.freeze_ratio=", ("mask.freeze_ratio", "got None")),
        ("mask.rule=budgets", ("mask.rule", "unknown rule 'budgets'", "did you mean 'budget'")),
        ("mask.sparsity_weight=1", ("mask.sparsity_weight has no effect with mask.rule=average",)),
        ("engine.zero_stage=4", ("engine.zero_stage", "0, 1, 2 or 3", "got 4")),
        ("engine.mixed_precision=fp8", ("engine.mixed_precision", "'no' or 'bf16'", "got 'fp8'")),
        ("engine.num_workers=0", ("engine.num_workers", "greater than or equal to 1", "got 0")),
        ("bilevel.train_batch_size=15", ("bilevel.train_batch_size 15 must be a multiple of 2 (2 roles)",)),
        ("engine.num_workers=9", ("bilevel.train_batch_size 16 must be at least 18",)),
        ("engine.min_workers=2", ("engine.min_workers 2 is above engine.num_workers 1",)),
        ("engine.stream_gradients=true", ("engine.num_workers=1 and engine.zero_stage=0",)),
        (
            "engine={stream_gradients: true, zero_stage: 0}",
            ("bilevel.max_grad_norm=0 and bilevel.gradient_accumulation_steps=1",),
        ),
        ("engine.offload_param_device=cpu", ("needs engine.zero_stage=3, not 2",)),
        ("engine={offload_optimizer_device: cpu, zero_stage: 0}", ("needs engine.zero_stage 1, 2 or 3, not 0",)),
        ("engine={offload_optimizer_device: cpu, theta_d_device: cpu}", ("engine.theta_d_device=cpu has no effect",)),
        ("engine={compile: true, zero_stage: 3}", ("engine.compile needs engine.zero_stage below 3",)),
        ("adapt.lr_scheduler=cosin", ("adapt.lr_scheduler", "'cosine'", "got 'cosin'")),
        ("domain.illegal=[]", ("domain.illegal", "at least 1", "got []")),
        ("domain.illegal=Fluent 3D", ("domain.illegal", "needs a list such as [a, b]", "got 'Fluent 3D'")),
        ("domain.illegal=[5]", ("domain.illegal.0", "string", "got 5")),
        ("domain.illegal=[EmojiOne Monotone]", ("class 'EmojiOne Monotone' is both illegal and legal",)),
        ("domain.general=[EmojiOne Monotone]", ("class 'EmojiOne Monotone' is both legal and general",)),
        ("domain.legal=[a, a]", ("domain.legal names a class twice",)),
        ("evaluation.defences=[none, freez]", ("unknown defence 'freez'", "did you mean 'freeze'")),
        ("evaluation.defences=[freeze]", ("defences must contain 'none'",)),
        ("evaluation.defences=[none, none]", ("evaluation.defences", "'none' twice")),
        ("evaluation.mask_seeds=[1, 1]", ("evaluation.mask_seeds", "1 twice")),
        ("seed=-1", ("seed", "greater than or equal to 0")),
        ("seed.x=1", ("seed", "got {'x': 1}")),
        ("mask=3", ("mask", "got 3")),
        ("nothing", ("'nothing' is not of the form key=value",)),
        ("=1", ("'=1' is not of the form key=value",)),
        ("seed=[1", ("'seed=[1'", "not valid YAML", "expected ',' or ']'")),
        ("seed=2020-13-45", ("not valid YAML", "month must be in 1..12")),
        ("seed=" + "9" * 5000, ("not valid YAML",)),
        ("seed=" + "[" * 3000, ("not valid YAML",)),
        ("seed=!!python/object:os.system x", ("not valid YAML",)),
        ("a\nb=1", ("unknown key 'a b'",)),
        ("seed=" + "x" * 3000, ("seed", "integer")),
    ],
)
def test_a_bad_override_is_one_line_that_names_the_key(override: str, parts: tuple[str, ...]) -> None:
    message = refused(override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("key", KEYS)
def test_one_wrong_letter_in_any_key_is_mended(key: str) -> None:
    section, _, name = key.rpartition(".")
    wrong = f"{name}q"
    message = refused(f"{section}.{wrong}=1" if section else f"{wrong}=1")
    assert f"did you mean '{key}'" in message


def test_an_override_below_a_value_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("mask: 3\n")
    assert "'mask' is not a section" in refused("mask.freeze_ratio=0.5", path=tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "expected a mapping of sections, found list"),
        (b"false\n", "expected a mapping of sections, found bool"),
        (b"seed: [1\nmask: 2\n", "line 2"),
        (b"\xff\xfe\x00", "cannot read configuration"),
        (b"seed: 2020-13-45\n", "month must be"),
        (b"mask: {freeze_ratio: 2}\n", "mask.freeze_ratio"),
        (b"1: 2\n", "1: keys should be strings"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    found = refused(path=file)
    assert message in found and str(file) in found
    assert "No such file" in refused(path=tmp_path / "none.yaml")
    assert "directory" in refused(path=tmp_path)


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
sections = st.dictionaries(
    st.sampled_from([key.rpartition(".")[2] for key in KEYS]) | scalars.filter(lambda x: x == x), values, max_size=4
)
mappings = st.dictionaries(st.sampled_from(list(RunConfig.model_fields)) | scalars, values | sections, max_size=4)


@QUICK
@given(data=mappings)
def test_any_mapping_is_a_configuration_or_one_line(tmp_path: Path, data: dict[Any, Any]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    try:
        config = load_config(file)
    except RaygardError as error:
        assert "\n" not in str(error)
    else:
        json.dumps(flatten(config), allow_nan=False)
        assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@QUICK
@given(key=st.sampled_from(KEYS) | st.text(max_size=12), text=st.text(max_size=20))
def test_any_override_is_a_configuration_or_one_line(key: str, text: str) -> None:
    try:
        config = load_config(None, [f"{key}={text}"])
    except RaygardError as error:
        assert "\n" not in str(error)
    else:
        assert flatten(config).keys() == flatten(RunConfig()).keys()


@settings(QUICK, max_examples=20)
@given(data=st.data())
def test_the_hash_does_not_depend_on_the_order_of_keys(data: st.DataObject) -> None:
    dumped = load_config(SHIPPED[0]).model_dump(mode="json")
    shuffled = {
        name: {key: dumped[name][key] for key in data.draw(st.permutations(list(dumped[name])))}
        if isinstance(dumped[name], dict)
        else dumped[name]
        for name in data.draw(st.permutations(list(dumped)))
    }
    config = RunConfig.model_validate(shuffled)
    assert config_hash(config) == config_hash(RunConfig.model_validate(dumped))
    assert flatten(config) == flatten(RunConfig.model_validate(dumped))


CHANGES = {
    "seed": 1, "model.pretrained_model_name_or_path": "other", "domain.illegal": "[x]", "domain.resolution": 32,
    "mask.freeze_ratio": 0.31, "mask.budget": "params", "mask.temperature": 0.3, "mask.mask_lr": 0.1,
    "relearn.learning_rate": 1e-4, "bilevel.inner_steps": 2, "bilevel.train_batch_size": 32,
    "engine.num_workers": 4, "engine.mixed_precision": "bf16", "adapt.snr_gamma": 5,
    "generation.guidance_scale": 1, "evaluation.mask_seeds": "[7]",
}  # fmt: skip


def test_every_changed_value_that_decides_changes_the_hash_and_one_flat_key() -> None:
    hashes, base = {config_hash(RunConfig())}, flatten(RunConfig())
    for key, value in CHANGES.items():
        config = load_config(None, [f"{key}={value}"])
        assert {name for name, found in flatten(config).items() if found != base[name]} == {key}
        assert decides(key)
        hashes.add(config_hash(config))
    assert len(hashes) == len(CHANGES) + 1


@pytest.mark.parametrize(
    "override",
    [
        "tracking.enabled=false",
        "evaluation.item_timeout_s=7",
        "search.max_concurrent_trials=3",
        "engine.min_workers=1",
        "engine.node_timeout_s=60",
        "engine.max_failures=9",
    ],
)
def test_a_resumed_run_may_be_scheduled_and_tracked_otherwise(override: str) -> None:
    assert config_hash(load_config(None, [override])) == config_hash(RunConfig())
    assert not decides(override.partition("=")[0])


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().mask.freeze_ratio = 0.5


def test_the_order_in_which_a_mapping_was_written_is_no_difference(tmp_path: Path) -> None:
    runs = []
    for number, entry in enumerate(("{name: a, method: full, times: 2}", "{times: 2, method: full, name: a}")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(f"domain: {{illegal: [Noto Line]}}\ncompare: {{adaptations: [{entry}]}}\n")
        runs.append(load_config(file, []))
    assert flatten(runs[0]) == flatten(runs[1]) and config_hash(runs[0]) == config_hash(runs[1])
