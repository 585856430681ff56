"""Edits as artifacts, the registry of weight-editing defences, and an edit followed by a mask."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from raygard.adaptation import full
from raygard.config import AdaptConfig, ModelConfig
from raygard.config_file import load_config
from raygard.diffusion.loss import DiffusionLoss
from raygard.diffusion.model import load_denoiser, load_noise_scheduler, load_text_encoder
from raygard.editing import (
    EDITS,
    Edit,
    EditMaterial,
    edit_model,
    freeze_after,
    register_edit,
    save_edited_model,
    save_guarded,
)
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.mask.weights import load_denoiser_state
from tests.latents import equal, flat_latents

EDITED = ("conv_out.weight", "conv_in.bias")


@pytest.fixture
def unet(tiny_model: ModelConfig) -> nn.Module:
    return load_denoiser(tiny_model)


@pytest.fixture
def edit(unet: nn.Module) -> Edit:
    parameters = dict(unet.named_parameters())
    return Edit.create(unet, {name: parameters[name].detach() + 1 for name in EDITED}, "plus-one", amount=1)


@pytest.fixture(scope="module")
def material(tiny_model: ModelConfig) -> EditMaterial:
    tokenizer, encoder = load_text_encoder(tiny_model)
    loss = DiffusionLoss(load_noise_scheduler(tiny_model))
    return EditMaterial(flat_latents(), ("abc",), ("xyz",), loss, tokenizer, encoder, retain=flat_latents(1))


def state(unet: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in unet.named_parameters()}


@pytest.mark.parametrize("name", sorted(EDITS))
def test_every_editing_defence_keeps_the_contract(
    name: str, unet: nn.Module, material: EditMaterial, tmp_path: Path
) -> None:
    before = state(unet)
    quick = {"rounds": 1} if "imma" in name else {"lamb": 0.1}
    first, again = (edit_model(name, unet, material, **quick) for _ in range(2))
    assert equal(state(unet), before) and equal(dict(first.values), dict(again.values))
    assert first.method == name and quick.items() <= first.settings.items()
    loaded = Edit.load(first.save(tmp_path / "edit.safetensors"))
    assert equal(dict(loaded.values), dict(first.values)) and loaded.settings == json.loads(json.dumps(first.settings))
    after = state(loaded.apply(unet))
    assert {n for n in after if not torch.equal(after[n], before[n])} == set(first.values)
    with pytest.raises(RaygardError, match=rf"'{name}' has no setting 'lam'"):
        edit_model(name, unet, material, lam=1)


def test_material_of_a_domain_is_of_its_illegal_classes_alone(tiny_model: ModelConfig) -> None:
    path = tiny_model.pretrained_model_name_or_path
    domain = ["domain.data=x", "domain.illegal=[a]", "domain.legal=[b]", "domain.general=[c]", "seed=3"]
    config = load_config(None, [f"model.pretrained_model_name_or_path={path}", *domain])
    learn = replace(flat_latents(count=4), classes=["a", "b", "a", "b"])
    material = EditMaterial.of(config, learn, flat_latents(1))
    assert torch.equal(material.illegal.mean, learn.mean[[0, 2]]) and material.seed == 3
    assert (material.illegal_prompts, material.legal_prompts) == (("a",), ("b", "c"))
    with pytest.raises(RaygardError, match="no pictures of the illegal class 'a'"):
        EditMaterial.of(config, learn.subset([1, 3]))


def test_unknown_and_double_names_are_refused(unet: nn.Module, material: EditMaterial) -> None:
    with pytest.raises(RaygardError, match="unknown weight-editing defence 'ima'; did you mean 'imma'"):
        edit_model("ima", unet, material)
    with pytest.raises(RaygardError, match="registered twice"):
        register_edit("uce", *EDITS["uce"])


def test_an_edit_fits_its_base_alone(unet: nn.Module, edit: Edit) -> None:
    before, other = state(unet), copy.deepcopy(unet)
    edit.apply(unet)
    assert all(torch.equal(p, before[name] + (name in EDITED)) for name, p in unet.named_parameters())
    with pytest.raises(RaygardError, match="or is edited already"):
        edit.apply(unet)
    with torch.no_grad():
        other.conv_in.bias[0] += 1
    with pytest.raises(RaygardError, match="does not have the values this edit was made for"):
        edit.apply(other)
    assert torch.equal(other.conv_out.weight, before["conv_out.weight"])
    with pytest.raises(RaygardError, match=r"made for another model: no tensor 'conv_out\.weight'"):
        edit.apply(nn.Linear(2, 2))


def test_a_damaged_or_foreign_file_is_refused(unet: nn.Module, edit: Edit, tmp_path: Path) -> None:
    file = edit.save(tmp_path / "edits" / "edit.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(RaygardError, match="cannot read"):
        Edit.load(file)
    save_file({"x": torch.ones(1)}, str(tmp_path / "plain.safetensors"))
    with pytest.raises(RaygardError, match="is not an edit"):
        Edit.load(tmp_path / "plain.safetensors")
    with pytest.raises(RaygardError, match=r"saved as a \.safetensors file"):
        edit.save(tmp_path / "edit.pt")
    for values, message in (
        ({}, "at least one"),
        ({"x": torch.ones(1)}, "no parameter tensor 'x'"),
        ({"conv_in.bias": torch.ones(1)}, "have shape"),
        ({"conv_in.bias": torch.full_like(unet.conv_in.bias, torch.nan)}, "not finite"),
    ):
        with pytest.raises(RaygardError, match=message):
            Edit.create(unet, values)


def test_a_mask_over_all_edited_tensors_carries_them(unet: nn.Module, edit: Edit) -> None:
    before = state(unet)
    guarded = freeze_after(unet, edit, [*EDITED, "conv_in.weight"], domain="d")
    assert not guarded.needs_edited_base and set(guarded.mask.values) == set(EDITED) and guarded.mask.domain == "d"
    assert equal(state(unet), before)
    released = copy.deepcopy(unet)
    guarded.mask.apply(released)
    assert equal(state(released), state(edit.apply(unet)))


def test_an_edited_tensor_that_stays_trainable_needs_the_edited_base(
    tiny_model: ModelConfig, unet: nn.Module, edit: Edit, tmp_path: Path
) -> None:
    before = state(unet)
    out = save_guarded(tiny_model, edit, ["conv_out.weight", "conv_in.weight"], tmp_path / "release", domain="d")
    edited = ModelConfig(pretrained_model_name_or_path=str(out / "model"))
    mask, base = FreezeMask.load(out / "mask"), load_denoiser_state(out / "model")
    assert not mask.values and mask.domain == "d" and mask.base_model.endswith("edited by plus-one")
    assert equal(base, {name: value + (name in EDITED) for name, value in before.items()})
    with pytest.raises(RaygardError, match=r"'conv_out\.weight' does not have the values this mask was made for"):
        mask.apply(unet)
    assert freeze_after(unet, edit, ["conv_out.weight"]).loose == ("conv_in.bias",)
    assert equal(state(unet), before)
    tuned = load_denoiser(edited)
    settings = AdaptConfig(max_train_steps=2, learning_rate=1e-3, train_batch_size=2)
    full(tuned, flat_latents(), settings, DiffusionLoss(load_noise_scheduler(tiny_model)), mask=mask, seed=0)
    assert mask.audit(base, state(tuned)).ok
    assert not torch.equal(tuned.conv_in.bias, base["conv_in.bias"])


def test_nothing_is_written_over_or_for_another_base(
    tiny_model: ModelConfig, unet: nn.Module, edit: Edit, tmp_path: Path
) -> None:
    (tmp_path / "filled").mkdir()
    (tmp_path / "filled" / "x").touch()
    with pytest.raises(RaygardError, match="is not empty"):
        save_edited_model(tiny_model, edit, tmp_path / "filled")
    with pytest.raises(RaygardError, match="is not empty"):
        save_guarded(tiny_model, edit, EDITED, tmp_path / "filled")
    with pytest.raises(RaygardError, match="cannot save the mask"):
        save_guarded(tiny_model, edit, EDITED[:1], tmp_path / "torn", metrics={"loss": float("nan")})
    assert not (tmp_path / "torn").exists()
    edit.apply(unet)
    for frozen in (EDITED, EDITED[:1]):
        with pytest.raises(RaygardError, match="or is edited already"):
            freeze_after(unet, edit, frozen)
    wrong = Edit.create(unet, edit.values)
    with pytest.raises(RaygardError, match="does not have the values"):
        save_edited_model(tiny_model, wrong, tmp_path / "new")
    assert not (tmp_path / "new").exists()
