"""Every model family through the whole flow in one process: learn, adapt, draw, audit, edit, evaluate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from raygard.adaptation import ADAPTATIONS, full, get_adaptation
from raygard.bilevel.alternation import DenoiserLoss, PlainEngine, alternate
from raygard.bilevel.rules import make_rule
from raygard.bilevel.segments import ShardLayout
from raygard.cluster.evaluators import Adaptation, GeneratorActor, PictureRequest, adapt_task, base_loss_task
from raygard.cluster.jobs import EvaluationJob, job_content
from raygard.cluster.worker import batch_sources, make_optimizer, make_schedule, prepare, rule_settings
from raygard.config import EngineConfig, RunConfig
from raygard.config_file import load_config
from raygard.defences import make_mask
from raygard.diffusion.cache import LatentSet, build_cache, load_cache
from raygard.diffusion.layers import attention_tensors
from raygard.diffusion.model import load_denoiser, load_loss, load_pipeline, model_family, model_parts
from raygard.domain import load_domain
from raygard.editing import Edit, EditMaterial, check_family, edit_model, save_guarded
from raygard.errors import RaygardError
from raygard.flow import Flow
from raygard.mask import FreezeMask, audit_lora
from raygard.mask.adapters import LORA_FILE
from raygard.mask.weights import load_denoiser_state
from raygard.report.layers import block_of, block_shares
from raygard.store import Store
from raygard.user import adapt_model, generate_pictures
from raygard.values import Objective, Plan, TaughtLoss, ValuesSource, release_errors, train_values
from raygard.values.batches import Pictures
from tests.evaluation_bench import PARTS, Bench, make_bench
from tests.families import TINY

pytestmark = pytest.mark.families
ONE_TEXT_ENCODER = "StableDiffusionPipeline"
SHORT = (
    "mask.freeze_ratio=0.4",
    "bilevel.publisher_steps=2",
    "bilevel.inner_steps=2",
    "bilevel.train_batch_size=4",
    "bilevel.user_lr=1e-3",
    "adapt.train_batch_size=2",
    "adapt.max_train_steps=2",
)


@pytest.fixture(scope="module", params=TINY)
def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, imagefolder_maker: Callable[..., Path]
) -> Bench:
    root = tmp_path_factory.mktemp("flow") / request.param
    root.mkdir()
    return make_bench(root, TINY[request.param], imagefolder_maker)


@pytest.fixture(scope="module")
def config(bench: Bench) -> RunConfig:
    return bench.config(*SHORT)


@pytest.fixture(scope="module")
def learn_rows(bench: Bench, config: RunConfig) -> LatentSet:
    parts = [(cls, part) for cls in "abcd" for part in ("learn_lower", "learn_upper")]
    view = load_domain(config.domain).view("learn")
    return load_cache(build_cache(config.model, config.domain, view, parts, bench.root / "learn"))


@pytest.fixture(scope="module")
def mask(bench: Bench, config: RunConfig, learn_rows: LatentSet) -> FreezeMask:
    """Relearned and learned as `raygard learn` does it, without a cluster."""
    denoiser, loss = load_denoiser(config.model), load_loss(config.model)
    pre = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    settings = config.adapt.model_copy(update={"max_train_steps": 3, "learning_rate": 1e-3})
    full(denoiser, learn_rows, settings, loss, mask=None, seed=0)
    relearned = {name: p.detach().clone() for name, p in denoiser.named_parameters()}
    denoiser = load_denoiser(config.model).train()
    sizes = torch.tensor([p.numel() for p in denoiser.parameters()])
    optimizer = make_optimizer(config, denoiser.parameters(), make_rule("budget", rule_settings(config, sizes, 0)))
    layout = ShardLayout.dense({name: p.numel() for name, p in pre.items()})
    optimizer.bind(list(denoiser.parameters()), layout, pre, relearned)
    engine = PlainEngine(DenoiserLoss(denoiser, loss), optimizer)
    sources = batch_sources(config, learn_rows, False, 0)
    records = list(alternate(engine, optimizer, *sources, make_schedule(config, False, 0, 1)))
    assert [record.kind for record in records] == ["user", "user", "publisher"] * 2
    assert optimizer.invariant_error(pre) < 1e-5
    learned = make_mask(config, optimizer.logits, optimizer.soft, 0)
    learned.save(bench.root / "learned")
    return learned


def adapt(bench: Bench, out: Path, *overrides: str, mask: Path | None = None) -> dict[str, Any]:
    config = bench.config(*SHORT, *overrides)
    facts = adapt_model(config, bench.root / "data", ("a",), mask, out, 0, quiet=True)
    assert facts is not None
    return facts


def moved(bench: Bench, out: Path) -> set[str]:
    before, after = load_denoiser_state(bench.root / "sd"), load_denoiser_state(out)
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_the_learned_mask_freezes_the_asked_share_of_the_families_tensors(mask: FreezeMask, config: RunConfig) -> None:
    names = [name for name, _ in load_denoiser(config.model).named_parameters()]
    assert list(mask.names) == names
    assert len(mask.frozen_names) == round(0.4 * len(names))
    places = [block_of(name) for name in names]
    assert {"input conv", "time embedding", "output"} < {block for block, _ in places}
    assert {"self q", "self k", "self v", "self out", "feed-forward", "norm"} <= {kind for _, kind in places}
    blocks = [block.split()[0] for block in block_shares(names, [1] * len(names), [False] * len(names))[0]]
    assert blocks[0] == "input" and blocks[-1] == "output"
    if "transformer_blocks" in blocks and "single_transformer_blocks" in blocks:
        assert blocks.index("transformer_blocks") < blocks.index("single_transformer_blocks")


@pytest.mark.parametrize("method", ["full", "attention", "dreambooth"])
def test_users_under_the_mask_pass_the_audit(bench: Bench, mask: FreezeMask, tmp_path: Path, method: str) -> None:
    prompts = {"dreambooth": ("adapt.instance_prompt=a q",)}.get(method, ())
    facts = adapt(bench, tmp_path / "guarded", f"adapt.method={method}", *prompts, mask=bench.root / "learned")
    changed = moved(bench, tmp_path / "guarded")
    assert changed and not changed & set(mask.frozen_names)
    if method == "attention":
        assert changed <= set(attention_tensors(load_denoiser(bench.config().model), "attention"))
    base, tuned = load_denoiser_state(bench.root / "sd"), load_denoiser_state(tmp_path / "guarded")
    assert mask.audit(base, tuned).ok and facts["trainable_params"] > 0
    name = mask.frozen_names[0]
    tuned[name] = tuned[name] + 1
    assert [entry.name for entry in mask.audit(base, tuned).moved] == [name]
    # What was saved is a whole pipeline of the same family, which draws.
    index = json.loads((tmp_path / "guarded" / "model_index.json").read_text())
    assert index["_class_name"] == bench.root.name
    if method == "full":
        drawn = generate_pictures(str(tmp_path / "guarded"), ["ab"], tmp_path / "drawn", 0, 1, 2.0)
        assert drawn[0].stat().st_size > 0


def test_lora_goes_round_no_frozen_tensor_and_is_read_by_the_pipeline(
    bench: Bench, mask: FreezeMask, tmp_path: Path
) -> None:
    adapt(bench, tmp_path / "lora", "adapt.method=lora", "adapt.learning_rate=0.1", mask=bench.root / "learned")
    report = audit_lora(mask, tmp_path / "lora")
    assert report.ok and report.num_targets > 0
    factors = load_file(tmp_path / "lora" / LORA_FILE)
    prefix = model_family(bench.config().model).denoiser
    assert {name.split(".")[0] for name in factors} == {prefix}
    adapt(bench, tmp_path / "free", "adapt.method=lora", "adapt.learning_rate=0.1")
    assert not audit_lora(mask, tmp_path / "free").ok
    with_it, without = (
        generate_pictures(str(bench.root / "sd"), ["ab"], tmp_path / f"drawn-{lora}", 0, 1, 2.0, lora=lora)
        for lora in (tmp_path / "lora", None)
    )
    assert with_it[0].read_bytes() != without[0].read_bytes()


def test_prior_preservation_draws_with_the_family_s_pipeline(bench: Bench, tmp_path: Path) -> None:
    settings = ("adapt.instance_prompt=a q", "adapt.class_prompt=a", "adapt.num_class_images=1")
    run = ("adapt.method=dreambooth", "adapt.max_train_steps=1", *settings)
    if bench.root.name == "FluxPipeline":
        # Its pipeline draws 256 pixels of this autoencoder, whatever the pictures are.
        with pytest.raises(RaygardError, match=r"leave domain\.resolution at the model's own"):
            adapt(bench, tmp_path / "out", *run)
        return
    adapt(bench, tmp_path / "out", *run)
    assert moved(bench, tmp_path / "out")


@pytest.mark.parametrize("method", ["textual-inversion", "custom-diffusion"])
def test_methods_for_one_text_encoder_refuse_other_families(
    bench: Bench, config: RunConfig, tmp_path: Path, method: str
) -> None:
    if bench.root.name == ONE_TEXT_ENCODER:
        ADAPTATIONS[method].check_family(config.model)
        return
    with pytest.raises(
        RaygardError, match=r"is for Stable Diffusion 1\.x/2\.x only, and .* is of the family"
    ) as caught:
        adapt(bench, tmp_path / "out", f"adapt.method={method}", "adapt.learn_as=<q>")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(RaygardError, match="is of the family"):
        Flow(bench.config(*SHORT, f"adapt.method={method}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(RaygardError, match="an embedding of a new token is for"):
        generate_pictures(str(bench.root / "sd"), ["a"], tmp_path / "drawn", 0, 1, 2.0, embeddings=tmp_path)


def test_edits_work_on_the_family_or_refuse_it(bench: Bench, config: RunConfig, learn_rows: LatentSet) -> None:
    denoiser, material = load_denoiser(config.model), EditMaterial.of(config, learn_rows)
    edit = edit_model("imma", denoiser, material, rounds=1)
    assert edit.values.keys() == set(attention_tensors(denoiser, "attention"))
    before = dict(denoiser.named_parameters())
    assert any(not torch.equal(value, before[name].detach()) for name, value in edit.values.items())
    if bench.root.name == ONE_TEXT_ENCODER:
        assert edit_model("uce", denoiser, material).values
        check_family("uce", config.model)
        return
    for name, settings in (("uce", {}), ("imma", {"inner": "textual-inversion"})):
        with pytest.raises(RaygardError, match=r"Stable Diffusion 1\.x/2\.x"):
            edit_model(name, denoiser, material, **settings)
        with pytest.raises(RaygardError, match=r"is for Stable Diffusion 1\.x/2\.x only"):
            check_family(name, config.model, **settings)
    check_family("imma", config.model)


def test_an_edited_release_is_a_pipeline_of_the_family(bench: Bench, config: RunConfig, tmp_path: Path) -> None:
    denoiser = load_denoiser(config.model)
    (first, value), (second, _) = list(denoiser.named_parameters())[:2]
    edit = Edit.create(denoiser, {first: 2 * value.detach()}, "double")
    save_guarded(config.model, edit, [second], tmp_path / "out")
    released = load_config(None, [f"model.pretrained_model_name_or_path={tmp_path / 'out' / 'model'}"]).model
    found = FreezeMask.load(tmp_path / "out" / "mask").apply(load_denoiser(released))
    assert torch.equal(found.get_parameter(first), 2 * value)
    assert model_family(released) is model_family(config.model)


def test_evaluation_measures_an_adaptation_and_its_actor_draws_it(
    bench: Bench, config: RunConfig, mask: FreezeMask, tmp_path: Path
) -> None:
    inputs = bench.inputs(bench.config(*SHORT), tmp_path / "store")
    adaptation = Adaptation(
        key="k", store=inputs.store, config=inputs.config, cache=inputs.cache, cls="a", adapt_part=PARTS[0],
        reference_part=PARTS[1], seed=0, mask=str(bench.root / "learned"), untouched=False, milestones=(0, 2),
        held_out="h",
    )  # fmt: skip
    record = list(adapt_task(adaptation))[-1]["record"]
    assert record["audit_ok"] is True and [step for step, _ in record["milestones"]] == [0, 2]
    assert all(np.isfinite(loss) for _, loss in record["milestones"])
    assert load_file(Store(tmp_path / "store").tensors_file("k")).keys().isdisjoint(mask.frozen_names)
    job = EvaluationJob("freeze", "a", "illegal", mask=str(bench.root / "learned"))
    content = job_content(job, inputs, config, mask, ["a"])
    assert {*content["model"]} == {"prediction_type", *model_parts(config.model)}
    actor = GeneratorActor(config.model.model_dump(mode="json"), 1, 0)
    actor.ready()
    sampler = config.generation.model_copy(update={"num_inference_steps": 1}).model_dump(mode="json")

    def drawn(adapted: str | None) -> Any:
        return actor.generate(PictureRequest(adapted, ("ab",), ("k",), sampler, 0))[1]

    base, tuned = drawn(None), drawn(str(Store(tmp_path / "store").tensors_file("k")))
    assert base.dtype == np.uint8 and not np.array_equal(base, tuned) and np.array_equal(base, drawn(None))


def test_the_release_s_own_loss_is_measured(bench: Bench, config: RunConfig) -> None:
    (cache,) = (bench.root / "cache").iterdir()
    loss = base_loss_task(config.model_dump(mode="json"), str(cache))
    assert np.isfinite(loss) and loss > 0


def test_gradient_checkpointing_changes_no_gradient(bench: Bench, config: RunConfig, learn_rows: LatentSet) -> None:
    loss, found = load_loss(config.model), []
    rows = torch.arange(2)
    latents, noise = torch.randn(2, 2, *learn_rows.shape, generator=torch.Generator().manual_seed(0))
    for checkpointing in (False, True):
        denoiser = load_denoiser(config.model).train()
        if checkpointing:
            denoiser.enable_gradient_checkpointing()
        loss.per_sample(denoiser, latents, learn_rows.conditioning[rows], noise, rows * 500).mean().backward()
        found.append({name: p.grad for name, p in denoiser.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(found[1][name], gradient)


def test_channels_last_is_refused_where_it_has_no_effect(bench: Bench, tmp_path: Path) -> None:
    config = bench.config(*SHORT, "engine.channels_last=true")
    if not model_family(config.model).flow_matching:
        Flow(config, tmp_path / "run")
        return
    with pytest.raises(RaygardError, match=r"engine\.channels_last has no effect on .*; remove it"):
        Flow(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_repeated_blocks_are_compiled(config: RunConfig) -> None:
    denoiser = load_denoiser(config.model)
    prepare(denoiser, EngineConfig(compile=True))
    blocks = {module.__class__.__name__ for module in denoiser.modules() if module._compiled_call_impl is not None}
    assert blocks and all(name.endswith("TransformerBlock") for name in blocks)


def test_users_who_checkpoint_gradients_get_the_same_weights(config: RunConfig, learn_rows: LatentSet) -> None:
    names = [name for name, _ in load_denoiser(config.model).named_parameters()]
    front = FreezeMask.create(load_denoiser(config.model), names[: len(names) // 3])
    for method in ("full", "lora"):
        found = []
        for checkpointing in (False, True):
            overrides = (f"adapt.method={method}", f"adapt.gradient_checkpointing={checkpointing}")
            settings = load_config(None, ["adapt.max_train_steps=2", *overrides]).adapt
            denoiser, loss = load_denoiser(config.model), load_loss(config.model)
            get_adaptation(method)(denoiser, learn_rows, settings, loss, mask=front, seed=0)
            found.append(denoiser.state_dict())
        assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_pipeline_loaded_whole_holds_the_given_denoiser(config: RunConfig) -> None:
    denoiser = load_denoiser(config.model)
    pipeline = load_pipeline(config.model, denoiser)
    assert getattr(pipeline, model_family(config.model).denoiser) is denoiser
    parameters: list[Tensor] = list(pipeline.vae.parameters())
    assert {p.dtype for p in parameters} == {torch.float32}


class PlainAdamW:
    """One process without DeepSpeed."""

    def __init__(self, module: DenoiserLoss) -> None:
        self.module, self.optimizer = module, torch.optim.AdamW(module.parameters(), lr=1e-3)

    def __call__(self, *batch: Any) -> Tensor:
        return self.module(*batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_values_are_trained_relative_to_the_release(config: RunConfig, learn_rows: LatentSet) -> None:
    names = [Pictures(rows, learn_rows.conditioning.index[rows][None]) for rows in map(learn_rows.rows, "abcd")]
    loss = load_loss(config.model)
    source = ValuesSource(learn_rows, ([names[0]], [names[1]], [names[2]]), 4, loss.num_timesteps, 0)
    engine = PlainAdamW(TaughtLoss(load_denoiser(config.model), loss, load_denoiser(config.model)))
    curves = release_errors(engine, source, Plan(1), num_bins=2)
    objective = Objective.of(curves, loss.num_timesteps, config.values)
    errors = torch.stack([record.errors for record in train_values(engine, source, objective, Plan(3))])
    assert curves.shape == (3, 2) and errors.shape == (3, 3) and torch.isfinite(errors).all()
    assert not torch.equal(errors[0], errors[2])
    assert errors[0, 1] < 1e-9 < errors[1, 1], "general pictures: what the release answers"
