"""FreezeMask on disk and on a module: what is written comes back, what is torn or altered is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from raygard.editing import Edit
from raygard.editing.artifact import METADATA
from raygard.errors import RaygardError
from raygard.files import sha256_file
from raygard.mask import FreezeMask
from raygard.mask import artifact as artifact_module
from raygard.mask.artifact import ARRAYS, MANIFEST, VALUES
from raygard.mask.weights import read_safetensors

QUICK = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
FROZEN = ("0.weight", "2.bias")


def net(seed: int = 0, width: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 2))


def saved(folder: Path, **options: Any) -> Path:
    return FreezeMask.create(net(), FROZEN, base_model="net", **options).save(folder / "mask")


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def rehash(folder: Path) -> None:
    """Make the manifest agree with altered files, as a careful forger would."""
    edit(folder, lambda m: m["files"].update({name: sha256_file(folder / name) for name in m["files"]}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(folder: Path) -> str:
    with pytest.raises(RaygardError) as caught:
        FreezeMask.load(folder)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@st.composite
def modules(draw: st.DrawFn) -> tuple[nn.ParameterDict, Tensor]:
    shapes = draw(st.lists(st.lists(st.integers(1, 4), max_size=4), min_size=2, max_size=7))
    flags = draw(st.lists(st.booleans(), min_size=len(shapes), max_size=len(shapes)))
    flags[draw(st.integers(0, len(shapes) - 1))] = True
    if all(flags):
        flags[draw(st.integers(0, len(shapes) - 1))] = False
    parameters = {f"p{number}": nn.Parameter(torch.randn(shape)) for number, shape in enumerate(shapes)}
    return nn.ParameterDict(parameters), torch.tensor(flags)


@QUICK
@given(case=modules(), number=st.floats(-1e6, 1e6, width=32), text=st.text(max_size=20))
def test_round_trip(tmp_path: Path, case: tuple[nn.ParameterDict, Tensor], number: float, text: str) -> None:
    module, flags = case
    logits = torch.linspace(-1, 1, len(flags)) * number
    text = text.encode("utf-8", "ignore").decode()
    made = FreezeMask.create(
        module, flags, logits=logits, soft=torch.sigmoid(logits), domain=text, metrics={"x": number}, config={"k": text}
    )
    found = FreezeMask.load(made.save(tmp_path / "mask"))
    assert found.names == made.names == tuple(name for name, _ in module.named_parameters())
    assert found.shapes == made.shapes == tuple(tuple(p.shape) for p in module.parameters())
    for key in ("frozen", "logits", "soft"):
        assert torch.equal(getattr(found, key), getattr(made, key))
    assert (found.digests, found.domain, found.metrics, found.config) == (made.digests, text, made.metrics, {"k": text})
    assert found.sha256 == made.sha256 and found.manifest() == made.manifest()
    assert {p.name for p in tmp_path.iterdir()} == {"mask"}
    assert [p.requires_grad for p in found.apply(module).parameters()] == [not flag for flag in flags.tolist()]


def test_ratios_count_tensors_and_parameters(tmp_path: Path) -> None:
    ratio = FreezeMask.create(net(), FROZEN).manifest().ratio
    assert (ratio.frozen_tensors, ratio.num_tensors, ratio.by_count) == (2, 4, 0.5)
    assert (ratio.frozen_params, ratio.num_params, ratio.by_params) == (8, 17, 8 / 17)


def test_identity_follows_frozen_names_and_values() -> None:
    same = FreezeMask.create(net(), FROZEN).sha256
    assert FreezeMask.create(net(), FROZEN[::-1]).sha256 == same
    assert FreezeMask.create(net(), FROZEN[:1]).sha256 != same
    assert FreezeMask.create(net(seed=1), FROZEN).sha256 != same


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frozen": ["nothing"]}, "no parameter tensor 'nothing'"),
        ({"frozen": []}, "some of the 4 tensors, not 0"),
        ({"frozen": torch.ones(4)}, "some of the 4 tensors, not 4"),
        ({"frozen": torch.ones(5)}, r"shape \(5,\)"),
        ({"logits": torch.zeros(3)}, "logits must be 4 finite"),
        ({"soft": torch.full((4,), torch.nan)}, "soft must be 4 finite"),
        ({"values": {"0.bias": torch.zeros(3)}}, "'0.bias', which is not frozen"),
        ({"values": {"0.weight": torch.zeros(2, 3)}}, r"'0.weight' have shape \(2, 3\), the tensor has \(3, 2\)"),
    ],
)
def test_create_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RaygardError, match=message):
        FreezeMask.create(net(), **{"frozen": FROZEN, **options})


def test_metrics_that_are_not_finite_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RaygardError, match=r"metrics\.gap"):
        saved(tmp_path, metrics={"gap": float("nan")})
    assert not list(tmp_path.iterdir())


def test_logits_and_soft_may_be_one_tensor(tmp_path: Path) -> None:
    numbers = torch.arange(4.0)
    found = FreezeMask.load(saved(tmp_path, logits=numbers, soft=numbers))
    assert torch.equal(found.logits, numbers) and torch.equal(found.soft, numbers)


@pytest.mark.parametrize(("function", "call"), [("save_file", 1), ("rename", 1), ("rename", 2)])
def test_a_failure_while_saving_leaves_the_old_mask_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int
) -> None:
    before = contents(saved(tmp_path))
    owner: Any = Path if function == "rename" else artifact_module
    real, calls = getattr(owner, function), []

    def fail(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fail)
        with pytest.raises(KeyboardInterrupt):
            FreezeMask.create(net(seed=1), ["0.bias"]).save(tmp_path / "mask")
    assert contents(tmp_path / "mask") == before
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]


def test_an_old_mask_is_replaced_whole(tmp_path: Path) -> None:
    saved(tmp_path, values={"2.bias": torch.zeros(2)})
    FreezeMask.create(net(), ["0.bias"]).save(tmp_path / "mask")
    assert FreezeMask.load(tmp_path / "mask").frozen_names == ("0.bias",)
    assert set(contents(tmp_path / "mask")) == {MANIFEST, ARRAYS}
    assert [path.name for path in tmp_path.iterdir()] == ["mask"]


def test_a_link_to_a_mask_stays_a_link(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "mask")
    FreezeMask.create(net(), ["0.bias"]).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert FreezeMask.load(tmp_path / "mask").frozen_names == ("0.bias",)


@pytest.mark.parametrize("names", [["holiday.jpg"], [MANIFEST, "holiday.jpg"], [ARRAYS]])
def test_a_folder_that_is_no_mask_is_not_touched(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "mask"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("mine")
    before = contents(folder)
    with pytest.raises(RaygardError, match="exists and is not a mask"):
        saved(tmp_path)
    assert contents(folder) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RaygardError, match="exists and is not a mask"):
        FreezeMask.create(net(), FROZEN).save(tmp_path / "file")


@QUICK
@given(data=st.data())
def test_any_flipped_or_missing_byte_is_refused(tmp_path: Path, data: st.DataObject) -> None:
    folder = saved(tmp_path, values={"2.bias": torch.ones(2)})
    file = folder / data.draw(st.sampled_from([ARRAYS, VALUES]))
    whole = file.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        file.write_bytes(whole[:place])
    else:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :])
    assert file.name in refused(folder)
    file.unlink()
    assert file.name in refused(folder)


def set_tensor(index: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["tensors"][index].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_tensor(0, frozen=False), "carry a sha256"),
        (set_tensor(0, frozen=False, sha256=None), "ratio contradicts"),
        (set_tensor(0, frozen="yes"), "tensors.0.frozen"),
        (set_tensor(0, frozen=1), "tensors.0.frozen"),
        (set_tensor(0, sha256="0" * 64), "fingerprint"),
        (set_tensor(0, sha256="0" * 63), "sha256"),
        (set_tensor(0, shape=[3, 3]), "ratio contradicts"),
        (set_tensor(0, shape=[3, 0]), "shape"),
        (set_tensor(0, shape=[10**400]), "shape"),
        (set_tensor(0, name="0.bias"), "appears twice"),
        (set_tensor(0, name="0.wéight"), "name"),
        (set_tensor(0, name="other.weight"), "fingerprint"),
        (set_tensor(0, unit="channel"), "unit"),
        (set_tensor(0, **{"odd\nkey": 1}), "odd key"),
        (lambda m: m["tensors"].reverse(), "fingerprint"),
        (lambda m: m["tensors"].append(m["tensors"].pop(0)), "disagree on which tensors are frozen"),
        (lambda m: m["tensors"].clear(), "tensors"),
        (lambda m: m.pop("base"), "base"),
        (lambda m: m["base"].update(fingerprint="0" * 64), "fingerprint"),
        (lambda m: m["ratio"].update(by_params=0.4), "ratio contradicts"),
        (lambda m: m["ratio"].update(num_params=18), "ratio contradicts"),
        (lambda m: m["metrics"].update(x=float("nan")), "metrics.x"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.update(format_version=2), "format_version"),
        (lambda m: m["files"].clear(), "files must be"),
        (lambda m: m["files"].update({"other.safetensors": "0" * 64}), "files must be"),
        (lambda m: m["files"].update({"../mask.safetensors": "0" * 64}), "files"),
        (lambda m: m["files"].update({VALUES: "0" * 64}), "values.safetensors is missing"),
    ],
)
def test_an_edited_manifest_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    folder = saved(tmp_path)
    edit(folder, change)
    assert message in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "NaN", "[" * 5000, "\ufeff{}", '"\\ud800"'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    folder = saved(tmp_path)
    (folder / MANIFEST).write_text(text)
    assert MANIFEST in refused(folder)
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert MANIFEST in refused(folder)
    assert "is not a mask" in refused(tmp_path / "nothing")
    assert "is not a mask" in refused(folder / ARRAYS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(QUICK, max_examples=150)
@given(data=st.data())
def test_any_change_of_the_manifest_is_harmless_or_a_raygard_error(tmp_path: Path, data: st.DataObject) -> None:
    made = FreezeMask.create(net(), FROZEN)
    folder = made.save(tmp_path / "mask")
    manifest = json.loads((folder / MANIFEST).read_text())
    node: Any = manifest
    while True:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        key = data.draw(st.sampled_from(list(keys)))
        if isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        break
    if data.draw(st.booleans()):
        node[key] = data.draw(json_values)
    else:
        del node[key]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    try:
        found = FreezeMask.load(folder)
    except RaygardError as error:
        assert "\n" not in str(error)
    else:
        assert (found.names, found.digests) == (made.names, made.digests)
        assert torch.equal(found.frozen, made.frozen)


def test_files_of_another_mask_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    other = FreezeMask.create(net(), ["0.bias", "2.bias"]).save(tmp_path / "other")
    shutil.copy(other / ARRAYS, folder / ARRAYS)
    assert "differs from the hash" in refused(folder)
    rehash(folder)
    assert "disagree on which tensors are frozen" in refused(folder)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"logits": torch.zeros(3)}, "'logits' must hold 4"),
        ({"soft": torch.full((4,), torch.inf)}, "'soft' must hold 4 finite"),
        ({"mask": torch.zeros(4, 1)}, "'mask' must hold 4"),
        ({"mask": None}, "'mask' must hold 4"),
    ],
)
def test_arrays_of_the_wrong_form_are_refused(tmp_path: Path, arrays: dict[str, Tensor | None], message: str) -> None:
    folder = saved(tmp_path)
    found = {**load_file(str(folder / ARRAYS)), **arrays}
    save_file({key: value for key, value in found.items() if value is not None}, str(folder / ARRAYS))
    rehash(folder)
    assert message in refused(folder)


def strange(dtype: str, size_bytes: int, **metadata: str) -> bytes:
    """A safetensors file of one tensor of four numbers, of a type that `save_file` cannot write."""
    entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, size_bytes]}
    header = json.dumps({"__metadata__": metadata, "2.bias": entry}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size_bytes)


@pytest.mark.parametrize(("dtype", "size_bytes"), [("F4", 2), ("F6_E2M3", 3)])
def test_numbers_that_torch_cannot_read_are_one_line(tmp_path: Path, dtype: str, size_bytes: int) -> None:
    folder = saved(tmp_path, values={"2.bias": torch.tensor([5.0, 6.0])})
    for name in (VALUES, ARRAYS):
        (folder / name).write_bytes(strange(dtype, size_bytes))
        rehash(folder)
        assert str(folder) in refused(folder)
    file = tmp_path / "edit.safetensors"
    about = {"base_sha256": "", "method": "", "settings": {}}
    file.write_bytes(strange(dtype, size_bytes, **{METADATA: json.dumps(about)}))
    for read in (read_safetensors, Edit.load):
        with pytest.raises(RaygardError, match=r"cannot (be )?read"):
            read(file)


def test_garbage_with_a_correct_hash_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / ARRAYS).write_bytes(b"garbage" * 9)
    rehash(folder)
    assert "damaged safetensors" in refused(folder)


def test_carried_values_are_loaded_and_define_the_release(tmp_path: Path) -> None:
    new = torch.tensor([5.0, -0.0])
    mask = FreezeMask.load(saved(tmp_path, values={"2.bias": new}))
    module = mask.apply(net())
    assert torch.equal(module[2].bias, new) and torch.signbit(module[2].bias[1])
    base = net().state_dict()
    assert mask.audit(base, module.state_dict()).ok
    assert [moved.name for moved in mask.audit(base, base).moved] == ["2.bias"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"2.bias": torch.tensor([5.0, 7.0])}, "do not have the hash"),
        ({"2.bias": torch.tensor([[5.0, 6.0]])}, "does not have the shape"),
        ({"2.bias": torch.tensor([5, 6])}, "does not have the shape"),
        ({"2.bias": torch.tensor([5.0, 6.0]), "0.bias": torch.zeros(3)}, "'0.bias'"),
        ({"2.bias": torch.tensor([5.0, 6.0]), "nothing": torch.zeros(3)}, "'nothing'"),
    ],
)
def test_forged_values_are_refused(tmp_path: Path, values: dict[str, Tensor], message: str) -> None:
    folder = saved(tmp_path, values={"2.bias": torch.tensor([5.0, 6.0])})
    save_file(values, str(folder / VALUES))
    rehash(folder)
    assert message in refused(folder)


def test_apply_freezes_exactly_and_drops_gradients() -> None:
    module = net()
    module(torch.ones(1, 2)).sum().backward()
    assert FreezeMask.create(net(), FROZEN).apply(module) is module
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (name not in FROZEN)
        assert (parameter.grad is None) == (name in FROZEN)


def test_apply_also_opens_what_was_closed_before() -> None:
    module = net().requires_grad_(False)
    FreezeMask.create(net(), FROZEN).apply(module)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"0.bias", "2.weight"}


def altered(name: str, index: int, value: float) -> nn.Sequential:
    module = net()
    with torch.no_grad():
        dict(module.named_parameters())[name].view(-1)[index] = value
    return module


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (net(seed=1), "'0.weight' does not have the values"),
        (altered("2.bias", 1, 9.0), "'2.bias' does not have the values"),
        (net(width=4), r"'0.weight' has shape \(4, 2\), the mask says \(3, 2\)"),
        (nn.Sequential(*net(), nn.Linear(2, 1)), "does not know tensor '3.bias'"),
        (net()[:1], "the model has no tensor '2.weight'"),
        (net().half(), r"loaded as torch.float16; load it as float32"),
        (net().bfloat16(), r"loaded as torch.bfloat16; load it as float32"),
    ],
)
def test_apply_refuses_another_model_and_leaves_it_alone(module: nn.Module, message: str) -> None:
    mask = FreezeMask.create(net(), FROZEN, values={"2.bias": torch.zeros(2)}) if "2.bias" not in message else (
        FreezeMask.create(net(), FROZEN)
    )  # fmt: skip
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RaygardError, match=message):
        mask.apply(module)
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_tensor_that_is_not_frozen_may_differ() -> None:
    FreezeMask.create(net(), FROZEN).apply(altered("0.bias", 0, 9.0))


def test_verification_can_be_left_out() -> None:
    module = FreezeMask.create(net(), FROZEN).apply(net(seed=1), verify=False)
    assert not module[0].weight.requires_grad


def test_a_release_in_half_precision_is_applied_to_its_float32_copy() -> None:
    mask = FreezeMask.create(net().half(), FROZEN)
    assert mask.apply(net().half().float())[0].bias.requires_grad


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_training_under_a_mask_moves_no_frozen_bit_and_keeps_no_state(weight_decay: float) -> None:
    mask, module = FreezeMask.create(net(), FROZEN), net()
    mask.apply(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=weight_decay)
    for step in range(5):
        optimizer.zero_grad()
        module(torch.full((4, 2), float(step))).square().sum().backward()
        optimizer.step()
    stateful = {name for name, p in module.named_parameters() if p in optimizer.state}
    assert stateful == {"0.bias", "2.weight"}
    base, tuned = net().state_dict(), module.state_dict()
    assert mask.audit(base, tuned).ok
    assert all(not torch.equal(base[name], tuned[name]) for name in stateful)
