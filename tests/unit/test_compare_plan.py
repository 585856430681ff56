"""What a comparison consists of: names of defences, variants of adaptations, edits with settings of their own."""

from __future__ import annotations

import pytest

from raygard.baselines import DEFENCES
from raygard.compare.plan import Defence, edit_settings, parse_defences, variants
from raygard.config import RunConfig
from raygard.config_file import load_config
from raygard.errors import RaygardError


def config(*overrides: str) -> RunConfig:
    return load_config(None, list(overrides))


def test_defences_are_masks_edits_or_both() -> None:
    masks, edits = ["none", "freeze", "random"], ["uce", "imma"]
    found = parse_defences(["none", "freeze", "imma", "uce+random"], edits, masks)
    assert found == (
        Defence("none"),
        Defence("freeze", mask="freeze"),
        Defence("imma", edit="imma"),
        Defence("uce+random", edit="uce", mask="random"),
    )
    assert parse_defences(["freeze@0.5", "uce+random@0.25"], edits, masks) == (
        Defence("freeze@0.5", mask="freeze", ratio=0.5),
        Defence("uce+random@0.25", edit="uce", mask="random", ratio=0.25),
    )
    own, same, other = parse_defences(["freeze", "freeze@0.3", "freeze@0.30001"], edits, masks, own_ratio=0.3)
    assert own.key == same.key != other.key and same.name == "freeze@0.3"
    for wrong, message in (
        ("freeze@1", "between 0 and 1"),
        ("freeze@nan", "between 0 and 1"),
        ("freeze@", "between 0 and 1, got ''"),
        ("none@0.5", "'none' freezes nothing"),
        ("uce@0.5", "'uce' freezes nothing"),
        ("freze@0.5", "did you mean 'freeze'"),
        ("freze", "did you mean 'freeze'"),
        ("zzz", "known: freeze, imma, none, random, uce"),
        ("uc+freeze", "did you mean 'uce'"),
        ("uce+none", "no mask is called 'none'"),
        ("freeze+uce", "no edit is called 'freeze'"),
    ):
        with pytest.raises(RaygardError, match=message):
            parse_defences([wrong], edits, masks)


def test_variants_take_published_values_or_the_runs_own() -> None:
    settings = load_config(
        None,
        [
            "adapt.max_train_steps=40",
            "adapt.learning_rate=2e-3",
            "compare.adaptations=[full, lora, {name: longer, method: full, times: 5}, "
            "{name: lora-32, method: lora, rank: 32, learn_as: thing}]",
        ],
    )
    full, lora, longer, wide = (variant.config for variant in variants(settings))
    assert full == settings.adapt
    assert (lora.max_train_steps, lora.learning_rate, lora.rank) == (1000, 1e-4, 4)
    assert longer == settings.adapt.model_copy(update={"max_train_steps": 200})
    assert (wide.rank, wide.learn_as, wide.max_train_steps) == (32, "thing", 1000)
    assert RunConfig.model_validate(settings.model_dump(mode="json")) == settings


@pytest.mark.parametrize(
    ("variant", "run"),
    [
        ("{name: v, method: dreambooth, class_prompt: a dog}", ["adapt.method=dreambooth"]),
        ("{name: v, method: dreambooth, class_prompt: null}", ["adapt.method=dreambooth", "adapt.class_prompt=a dog"]),
        ("{name: v, method: dreambooth, instance_prompt: a photo of zwx dog}", ["adapt.method=dreambooth"]),
        ("{name: v, method: custom-diffusion, class_prompt: a dog}", ["adapt.method=custom-diffusion"]),
        ("{name: v, method: lora, rank: 8}", ["adapt.method=lora"]),
    ],
)
def test_a_variants_published_values_are_the_same_whatever_the_runs_own_method(variant: str, run: list[str]) -> None:
    own, other = (
        load_config(None, [f"compare.adaptations=[{variant}]", *overrides])
        for overrides in (run, ["adapt.method=full"])
    )
    assert variants(own)[0].config == variants(other)[0].config
    # The same when the configuration is read from a file that holds every setting.
    assert variants(RunConfig.model_validate(own.model_dump(mode="json"))) == variants(own)


def test_what_the_run_itself_sets_counts_for_variants_of_its_method() -> None:
    settings = load_config(
        None,
        [
            "adapt.method=dreambooth", "adapt.max_train_steps=30",
            "compare.adaptations=[{name: v, method: dreambooth, class_prompt: a dog}]",
        ],
    )  # fmt: skip
    (found,) = variants(settings)
    assert (found.config.max_train_steps, found.config.num_class_images) == (30, 200)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[lora, lora]", "names 'lora' twice"),
        ("[{name: a}]", "needs a name and a method"),
        ("[{name: a, method: full, rank: 3}]", "adapt.rank has no effect"),
        ("[{name: a, method: full, learning_rat: 3}]", "did you mean 'learning_rate'"),
        ("[{name: a, method: full, learning_rate: .nan}]", "finite"),
        ("[{name: a, method: full, times: 0}]", "times must be a number above 0"),
        ("[]", "names no adaptation"),
        ("[[1]]", "valid dictionary"),
    ],
)
def test_a_wrong_variant_is_one_line(value: str, message: str) -> None:
    with pytest.raises(RaygardError, match=message) as caught:
        load_config(None, [f"compare.adaptations={value}"])
    assert "\n" not in str(caught.value)


def test_edits_may_be_named_and_set() -> None:
    settings = config("compare.edits=[{name: imma-strong, method: imma, outer_lr: 0.1}]")
    assert edit_settings({"uce": 0, "imma": 0}, settings) == {
        "uce": ("uce", {}),
        "imma": ("imma", {}),
        "imma-strong": ("imma", {"outer_lr": 0.1}),
    }
    assert config("compare.edits=[{name: x, method: imma, outer_lr: 1e-4}]").compare.edits[0]["outer_lr"] == 1e-4
    with pytest.raises(RaygardError, match="must be finite"):
        config("compare.edits=[{name: x, method: imma, outer_lr: 1e999}]")
    with pytest.raises(RaygardError, match="unknown weight-editing defence 'imma'"):
        edit_settings({"uce": 0}, settings)
    with pytest.raises(RaygardError, match="that name is taken"):
        edit_settings({"uce": 0, "imma": 0}, config("compare.edits=[{name: uce, method: imma}]"))
    for name in ("base", *DEFENCES):
        with pytest.raises(RaygardError, match=f"cannot be called '{name}': that name is taken"):
            edit_settings({"uce": 0, "imma": 0}, config(f"compare.edits=[{{name: {name}, method: imma}}]"))
    with pytest.raises(RaygardError, match="must be a number or a word"):
        config("compare.edits=[{name: x, method: imma, rounds: [1]}]")
    for name in ("../x", "a/b", ".x", "uce+imma"):
        with pytest.raises(RaygardError, match="letters, digits"):
            config(f"compare.edits=[{{name: {name}, method: imma}}]")
