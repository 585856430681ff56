"""LoRA under a mask: what it may adapt, that its file is the merged model, and the audit of such files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raygard import cli
from raygard.adaptation import lora
from raygard.config import AdaptConfig, ModelConfig
from raygard.config_file import load_config
from raygard.diffusion.loss import DiffusionLoss
from raygard.diffusion.model import load_denoiser, load_noise_scheduler, load_pipeline, load_text_encoder
from raygard.errors import RaygardError
from raygard.mask import FreezeMask, audit_lora, lora_targets
from raygard.mask.adapters import LORA_FILE, PEFT_CONFIG, PEFT_FILE
from raygard.mask.weights import load_denoiser_state
from raygard.user import EMBEDDINGS_FILE, adapt_model, generate_pictures
from tests.latents import latent_set

Maker = Callable[..., Path]
TARGETS = ("to_k", "to_q", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def base(tiny_model: ModelConfig) -> Any:
    return load_denoiser(tiny_model)


def mask_of(base: Any, *frozen: str) -> FreezeMask:
    return FreezeMask.create(
        base, [name for name, _ in base.named_parameters() if any(part in name for part in frozen)]
    )


def adapt(model: Path, data: Path, out: Path, *overrides: str, mask: Path | None = None) -> dict[str, Any]:
    config = load_config(
        None,
        [
            f"model.pretrained_model_name_or_path={model}", "domain.resolution=16", "adapt.max_train_steps=3",
            "adapt.learning_rate=0.05", "adapt.train_batch_size=2", *overrides,
        ],
    )  # fmt: skip
    facts = adapt_model(config, data, (), mask, out, 0, quiet=True)
    assert facts is not None
    return facts


def raygard(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["raygard", *map(str, arguments)])
        cli.main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


# What may be adapted


def test_only_modules_whose_weight_is_free_are_adapted(base: Any) -> None:
    every = lora_targets(base, TARGETS)
    assert {name.rpartition("attn")[2].partition(".")[2] for name in every} == set(TARGETS)
    mask = mask_of(base, "to_q.weight", "attn2.to_v.weight", "to_out.0.bias")
    left = lora_targets(base, TARGETS, mask.frozen_names)
    assert set(every) - set(left) == {name for name in every if name.endswith(("to_q", "attn2.to_v"))}
    assert lora_targets(base, ["conv_in"]) == ["conv_in"]
    assert any(".resnets." in name for name in lora_targets(base, ["conv1", "time_emb_proj"]))


@pytest.mark.parametrize(
    ("wanted", "frozen", "message"),
    [
        (["to_z"], "conv_in", "no linear or convolution module 'to_z'; did you mean 'to_"),
        (["norm1"], "conv_in", "no linear or convolution module 'norm1'"),
        (["to_q", "to_k"], "attn", r"freezes all \d+ modules LoRA was to adapt \(to_q, to_k\); name others"),
    ],
)
def test_targets_that_cannot_be_adapted_are_named(base: Any, wanted: list[str], frozen: str, message: str) -> None:
    with pytest.raises(RaygardError, match=message):
        lora_targets(base, wanted, mask_of(base, frozen).frozen_names)


# From fine-tuning to the audit


@pytest.mark.parametrize("targets", [TARGETS, ("conv1", "to_v", "conv_out")])
def test_the_saved_adapter_is_the_merged_model_and_passes_the_audit(
    tiny_model: ModelConfig, base: Any, tmp_path: Path, targets: tuple[str, ...]
) -> None:
    config = AdaptConfig(method="lora", max_train_steps=3, learning_rate=0.05, rank=3, target_modules=targets)
    mask = mask_of(base, "attn2", "down_blocks.0")
    merged = load_denoiser(tiny_model)
    loss = DiffusionLoss(load_noise_scheduler(tiny_model))
    result = lora(merged, latent_set(), config, loss, mask=mask, seed=0)
    save_file(result.adapter, str(tmp_path / LORA_FILE))
    pipeline: Any = load_pipeline(tiny_model)
    pipeline.load_lora_weights(str(tmp_path))
    inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), 7, torch.ones(2, 8, 16)
    with torch.no_grad():
        outputs = [unet(*inputs).sample for unet in (base.eval(), merged.eval(), pipeline.unet.eval())]
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-4, atol=1e-5)
    assert (outputs[1] - outputs[0]).abs().max() > 0.01
    # Frozen values after merging are the released ones bit for bit, and the file says so.
    assert mask.audit(base.state_dict(), merged.state_dict()).ok
    report = audit_lora(mask, tmp_path)
    assert report.ok and report.num_targets == len(result.adapter) / 2
    other = audit_lora(mask_of(base, "to_v.weight"), tmp_path)
    changed = {name: (merged.get_parameter(name) - base.get_parameter(name)).detach() for name in mask.names}
    expected = {name for name, gap in changed.items() if "to_v.weight" in name and gap.any()}
    assert {moved.name for moved in other.moved} == expected
    for moved in other.moved:
        assert moved.max_abs_difference == pytest.approx(float(changed[moved.name].abs().max()), rel=1e-3)


def test_the_command_line_adapts_draws_and_audits(
    tiny_sd: Path, base: Any, imagefolder: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, mask = imagefolder({"a": 4}), mask_of(base, "attn1")
    mask.save(tmp_path / "mask")
    facts = adapt(tiny_sd, data, tmp_path / "kept", "adapt.method=lora", mask=tmp_path / "mask")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {LORA_FILE, "raygard_adapt.json"}
    assert facts["method"] == "lora" and facts["outside_mask"] == [] and not facts["ignore_mask"]
    ignoring = adapt(tiny_sd, data, tmp_path / "broken", "adapt.method=lora", "adapt.ignore_mask=true",
                     mask=tmp_path / "mask")  # fmt: skip
    assert ignoring["ignore_mask"] and ignoring["trainable_params"] > facts["trainable_params"]

    code, out, _ = raygard(capsys, "audit", "--lora", tmp_path / "kept", "--mask", tmp_path / "mask")
    assert code == 0 and "merging it keeps the mask" in out
    code, out, _ = raygard(capsys, "audit", "--lora", tmp_path / "broken" / LORA_FILE, "--mask", tmp_path / "mask")
    weights = [name for name in mask.frozen_names if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight"))]
    assert code == 3 and all(f"moved  {name} " in out for name in weights) and "attn2" not in out
    code, out, _ = raygard(capsys, "audit", "--lora", tmp_path / "broken", "--mask", tmp_path / "mask", "--json")
    assert code == 3 and not json.loads(out)["ok"] and len(json.loads(out)["moved"]) >= len(weights)
    code, _, error = raygard(
        capsys, "audit", "--lora", tmp_path / "kept", "--mask", tmp_path / "mask", "--base", tiny_sd
    )
    assert code == 2 and "give --base and --model, or --lora alone" in error

    drawn = []
    for number, adapter in enumerate((None, tmp_path / "kept", tmp_path / "kept" / LORA_FILE)):
        path = generate_pictures(str(tiny_sd), ["x"], tmp_path / f"drawn{number}", 0, 3, 2.0, lora=adapter)[0]
        drawn.append(path.read_bytes())
    assert drawn[0] != drawn[1] == drawn[2]
    with pytest.raises(RaygardError, match=r"adapt\.ignore_mask has no effect without --mask"):
        adapt(tiny_sd, data, tmp_path / "none", "adapt.ignore_mask=true")


def test_a_new_token_is_saved_and_drawn_with(tiny_sd: Path, imagefolder: Maker, tmp_path: Path) -> None:
    data = imagefolder({"a": 4})
    prompt = "adapt.instance_prompt='<t> b'"
    options = ("adapt.learn_as='<t>'", prompt)
    facts = adapt(tiny_sd, data, tmp_path / "token", "adapt.method=textual-inversion", *options)
    assert {path.name for path in (tmp_path / "token").iterdir()} == {EMBEDDINGS_FILE, "raygard_adapt.json"}
    assert "new token '<t>'" in facts["outside_mask"][0] and facts["trainable_params"] == 16
    drawn = []
    for number, token in enumerate((None, tmp_path / "token")):
        paths = generate_pictures(
            str(tiny_sd), ["<t> b", "b"], tmp_path / f"drawn{number}", 0, 3, 2.0, embeddings=token
        )
        drawn.append([path.read_bytes() for path in paths])
    assert drawn[0][0] != drawn[1][0] and drawn[0][1] == drawn[1][1]

    adapt(tiny_sd, data, tmp_path / "custom", "adapt.method=custom-diffusion", *options)
    tokenizer, encoder = load_text_encoder(ModelConfig(pretrained_model_name_or_path=str(tmp_path / "custom")))
    row = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<t>")]
    assert torch.equal(row, load_file(tmp_path / "custom" / EMBEDDINGS_FILE)["<t>"])
    before, after = load_denoiser_state(tiny_sd), load_denoiser_state(tmp_path / "custom")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if "attn2.to_k" in name or "attn2.to_v" in name
    }


# Files


def factors(base: Any, module: str, rank: int = 2) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(len(module))
    shape = base.get_parameter(f"{module}.weight").shape
    down = torch.randn(rank, *shape[1:], generator=rng)
    return down, torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=rng)


MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
LAYOUTS = {
    "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    "newer diffusers": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
    "peft": ("base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight"),
    "peft, named": ("base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"),
    "attention processors": ("unet.{}_lora.down.weight", "unet.{}_lora.up.weight"),
    "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
}  # fmt: skip


def write(folder: Path, layout: str, module: str, down: Tensor, up: Tensor, **more: Tensor) -> Path:
    name = {
        "kohya": module.replace(".", "_"),
        "attention processors": module.replace(".attn1.to_", ".attn1.processor.to_"),
    }.get(layout, module)
    keys = [key.format(name) for key in LAYOUTS[layout]]
    folder.mkdir(exist_ok=True)
    file = folder / (PEFT_FILE if layout.startswith("peft") else LORA_FILE)
    save_file({keys[0]: down, keys[1]: up, **more}, str(file))
    return file


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_is_read_and_the_size_is_that_of_the_merged_change(base: Any, tmp_path: Path, layout: str) -> None:
    down, up = factors(base, MODULE)
    file = write(tmp_path, layout, MODULE, down, up)
    report = audit_lora(mask_of(base, "attn1"), file.parent)
    (moved,) = report.moved
    change = up @ down
    assert (moved.name, moved.num_elements) == (f"{MODULE}.weight", change.numel()) and report.num_targets == 1
    assert moved.max_abs_difference == pytest.approx(float(change.abs().max()), rel=1e-6)
    assert audit_lora(mask_of(base, "attn2"), file).ok
    # An adapter as peft begins it changes nothing yet.
    assert audit_lora(mask_of(base, "attn1"), write(tmp_path, layout, MODULE, down, torch.zeros_like(up))).ok


def test_scale_and_convolutions(base: Any, tmp_path: Path) -> None:
    down, up = factors(base, "conv_in")
    file = write(tmp_path, "diffusers", "conv_in", down, up, **{"unet.conv_in.alpha": torch.tensor(6.0)})
    change = (up.flatten(1) @ down.flatten(1)).abs().max()
    mask = mask_of(base, "conv_in")
    assert audit_lora(mask, file).moved[0].max_abs_difference == pytest.approx(3 * float(change), rel=1e-6)
    peft = write(tmp_path / "peft", "peft", "conv_in", down, up)
    (peft.parent / PEFT_CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    assert audit_lora(mask, peft).moved[0].max_abs_difference == pytest.approx(2 * float(change), rel=1e-6)
    # A file that declares a scale of zero may be loaded with another.
    hidden = write(tmp_path, "diffusers", "conv_in", down, up, **{"unet.conv_in.alpha": torch.tensor(0.0)})
    assert not audit_lora(mask, hidden).ok
    nan = write(tmp_path, "diffusers", "conv_in", down * torch.nan, up)
    assert (
        json.loads(json.dumps(audit_lora(mask, nan).to_json(), allow_nan=False))["moved"][0]["name"] == "conv_in.weight"
    )


def test_what_no_mask_governs_is_said(base: Any, tmp_path: Path) -> None:
    text = {f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora.{part}.weight": torch.ones(2, 2)
            for part in ("down", "up")}  # fmt: skip
    report = audit_lora(mask_of(base, "attn2"), write(tmp_path, "diffusers", MODULE, *factors(base, MODULE), **text))
    assert report.ok and report.outside_mask == ("text encoder: 2 LoRA tensors",)


def test_what_cannot_be_judged_is_refused(base: Any, tmp_path: Path) -> None:
    mask = mask_of(base, "attn1")
    down, up = factors(base, MODULE)

    def refused(tensors: dict[str, Tensor]) -> str:
        save_file(tensors, str(tmp_path / LORA_FILE))
        with pytest.raises(RaygardError) as caught:
            audit_lora(mask, tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    keys = [key.format(MODULE) for key in LAYOUTS["diffusers"]]
    assert "of another base model, which has no 'blocks.9.to_q'" in refused(
        {"unet.blocks.9.to_q.lora.down.weight": down}
    )
    assert "of another base model: its factors" in refused({keys[0]: torch.ones(2, 5), keys[1]: up})
    assert "only one of its two LoRA factors" in refused({keys[0]: down})
    assert "has shape (2,), which no LoRA has" in refused({keys[0]: torch.ones(2), keys[1]: up})
    alpha = f"unet.{MODULE}.alpha"
    assert "has shape (2,), which no LoRA has" in refused({keys[0]: down, keys[1]: up, alpha: torch.ones(2)})
    assert "'unet.conv_in.weight' is no LoRA factor" in refused({"unet.conv_in.weight": torch.ones(1)})
    assert "is no LoRA factor" in refused({keys[0]: down, keys[1]: up, f"unet.{MODULE}.dora_scale": torch.ones(1)})
    twice = {**dict(zip(keys, (down, up), strict=True)), f"{MODULE}.lora_A.weight": down.clone()}
    assert "two LoRA factors 'down'" in refused(twice)
    assert "holds no LoRA factors" in refused({})
    (tmp_path / LORA_FILE).write_bytes(b"torn")
    with pytest.raises(RaygardError, match="damaged or incomplete"):
        audit_lora(mask, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RaygardError, match="holds no LoRA: neither"):
        audit_lora(mask, tmp_path / "empty")
    # An audit of the one file would pass for the other.
    save_file(dict(zip(keys, (down, up), strict=True)), str(tmp_path / "empty" / LORA_FILE))
    save_file(dict(zip(keys, (down, up), strict=True)), str(tmp_path / "empty" / PEFT_FILE))
    with pytest.raises(RaygardError, match=r"holds both .*; name the file"):
        audit_lora(mask, tmp_path / "empty")
    (tmp_path / "x.bin").touch()
    with pytest.raises(RaygardError, match="pickled weights are never read"):
        audit_lora(mask, tmp_path / "x.bin")
    with pytest.raises(RaygardError, match="no file at"):
        audit_lora(mask, tmp_path / "nowhere")


def test_an_adapter_that_cannot_be_drawn_with_is_refused(tiny_sd: Path, base: Any, tmp_path: Path) -> None:
    save_file({"unet.conv_in.lora.down.weight": torch.ones(2, 9), "unet.conv_in.lora.up.weight": torch.ones(9, 2)},
              str(tmp_path / LORA_FILE))  # fmt: skip
    save_file({"<t>": torch.ones(5)}, str(tmp_path / EMBEDDINGS_FILE))
    save_file({"text_encoder.x": torch.ones(5)}, str(tmp_path / "other.safetensors"))
    for options in ({"lora": tmp_path}, {"lora": tmp_path / "other.safetensors"}, {"embeddings": tmp_path}):
        with pytest.raises(RaygardError, match=r"cannot load|holds no LoRA factors for this model") as caught:
            generate_pictures(str(tiny_sd), ["x"], tmp_path / "out", 0, 2, 2.0, **options)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
