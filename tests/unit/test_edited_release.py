"""An evaluation of an edited release: the edit comes before the mask, and keys and losses follow it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raygard.cluster.evaluators import Adaptation, adapt_task, base_loss_task
from raygard.cluster.jobs import EvaluationJob, base_loss_content, job_content, reference_facts
from raygard.cluster.memory import CLEAR, PeakMemory
from raygard.diffusion.model import load_denoiser
from raygard.editing import Edit, freeze_after
from raygard.errors import RaygardError
from raygard.mask import FreezeMask
from raygard.scoring import face_detection, pooled_detection
from raygard.store import Store
from tests.evaluation_bench import PARTS, Bench, make_bench

TENSOR = "conv_in.weight"
TELLS_PEAK = torch.cuda.is_available() or os.access(CLEAR, os.W_OK)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_maker, imagefolder_maker) -> Bench:
    return make_bench(tmp_path_factory.mktemp("bench"), tiny_maker, imagefolder_maker)


@pytest.fixture(scope="module")
def edit(bench: Bench) -> Path:
    unet = load_denoiser(bench.config().model)
    return Edit.create(unet, {TENSOR: 2 * dict(unet.named_parameters())[TENSOR]}, "double").save(
        bench.root / "edit.safetensors"
    )


def adapt(bench: Bench, store: Path, *overrides: str, edit: Path | None = None, mask: Path | None = None) -> dict:
    """The record of an adaptation in this process; its tensors lie in `store` under "k"."""
    inputs = bench.inputs(bench.config(*overrides), store)
    adaptation = Adaptation(
        key="k", store=str(store), config=inputs.config, cache=inputs.cache, cls="a", adapt_part=PARTS[0],
        reference_part=PARTS[1], seed=0, mask=None if mask is None else str(mask), untouched=False, milestones=(),
        held_out=None, edit=None if edit is None else str(edit),
    )  # fmt: skip
    return list(adapt_task(adaptation))[-1]["record"]


def changed(store: Path) -> dict[str, torch.Tensor]:
    return load_file(Store(store).tensors_file("k"))


def test_an_edited_tensor_that_is_frozen_keeps_the_edits_value(bench: Bench, edit: Path, tmp_path: Path) -> None:
    values = Edit.load(edit).values
    unet = load_denoiser(bench.config().model)
    other = next(name for name, _ in unet.named_parameters() if name != TENSOR)
    # The mask carries the edit; then it alone is the release.
    carrying = freeze_after(unet, Edit.load(edit), [TENSOR])
    assert not carrying.needs_edited_base
    assert adapt(bench, tmp_path / "carried", mask=carrying.mask.save(tmp_path / "m1"))["audit_ok"] is True
    assert torch.equal(changed(tmp_path / "carried")[TENSOR], values[TENSOR])
    # The mask leaves the edit loose, and belongs to the edited base.
    loose = freeze_after(unet, Edit.load(edit), [other])
    record = adapt(bench, tmp_path / "loose", edit=edit, mask=loose.mask.save(tmp_path / "m2"))
    assert record["audit_ok"] is True and other not in changed(tmp_path / "loose")
    assert not torch.equal(changed(tmp_path / "loose")[TENSOR], values[TENSOR])


def test_an_edit_is_where_the_user_starts_from(bench: Bench, edit: Path, tmp_path: Path) -> None:
    values = Edit.load(edit).values
    still = "adapt.learning_rate=1e-12"
    adapt(bench, tmp_path / "edited", still, "adapt.adam_weight_decay=0", edit=edit)
    assert torch.allclose(changed(tmp_path / "edited")[TENSOR], values[TENSOR], atol=1e-6)
    # The pristine model that processes keep is not touched by it.
    adapt(bench, tmp_path / "plain", still, "adapt.adam_weight_decay=0")
    assert TENSOR not in changed(tmp_path / "plain")


def test_the_loss_on_general_classes_is_the_edited_releases(bench: Bench, edit: Path) -> None:
    config = bench.config("domain.general=[c]", "domain.legal=[d]")
    (cache,) = (bench.root / "cache").iterdir()
    dumped = config.model_dump(mode="json")
    assert base_loss_task(dumped, str(cache), edit=str(edit)) != base_loss_task(dumped, str(cache))
    assert base_loss_content(config, str(cache), edit=str(edit)) != base_loss_content(config, str(cache))
    # A run that trains no values may measure a mask which carries some: on pictures kept as training them would.
    with pytest.raises(RaygardError, match="one to keep"):
        base_loss_task(dumped, str(cache), kept=True)
    assert base_loss_content(config, str(cache), kept=True) != base_loss_content(config, str(cache))


def test_the_store_tells_edits_apart_by_what_they_hold(bench: Bench, edit: Path, tmp_path: Path) -> None:
    config = bench.config()
    inputs = bench.inputs(config, tmp_path)
    captions, _ = reference_facts(inputs.references, "a")

    def content(path: Path | None) -> dict:
        job = EvaluationJob("uce", "a", "illegal", edit=None if path is None else str(path))
        return job_content(job, inputs, config, None, captions)

    copy = Edit.load(edit).save(tmp_path / "copy.safetensors")
    unet = load_denoiser(config.model)
    other = Edit.create(unet, {TENSOR: 3 * dict(unet.named_parameters())[TENSOR]}).save(tmp_path / "other.safetensors")
    assert content(edit) == content(copy) and len({str(content(path)) for path in (None, edit, other)}) == 3
    assert "edit" not in content(None)
    with pytest.raises(RaygardError, match="cannot read"):
        content(tmp_path / "none.safetensors")


def test_a_mask_of_the_edited_base_is_refused_on_the_original_one(bench: Bench, edit: Path, tmp_path: Path) -> None:
    unet = Edit.load(edit).apply(load_denoiser(bench.config().model))
    mask = FreezeMask.create(unet, [TENSOR]).save(tmp_path / "mask")
    with pytest.raises(RaygardError, match="does not have the values this mask was made for"):
        adapt(bench, tmp_path / "refused", mask=mask)
    assert adapt(bench, tmp_path / "taken", edit=edit, mask=mask)["audit_ok"] is True


def test_an_adaptation_reports_its_peak_memory(bench: Bench, tmp_path: Path) -> None:
    peak = adapt(bench, tmp_path / "peak")["peak_memory_bytes"]
    assert peak > 2**20 if TELLS_PEAK else peak is None


@pytest.mark.skipif(not TELLS_PEAK, reason="this system does not tell the peak of a part of a process's life")
def test_the_peak_is_that_of_the_time_since_the_count_began() -> None:
    def use() -> None:
        torch.ones(200 * 2**20, dtype=torch.uint8, device="cuda" if torch.cuda.is_available() else "cpu")

    use()
    count = PeakMemory()
    before = count.bytes
    use()
    during = count.bytes
    after = PeakMemory().bytes
    assert before is not None and during is not None and after is not None
    assert min(during - before, during - after) > 150 * 2**20


@pytest.mark.parametrize(
    ("own", "earlier", "expected"),
    [
        (5, None, 5),
        (5, {"peak_memory_bytes": 3}, 5),
        (5, {"peak_memory_bytes": 9}, 9),
        (5, {"peak_memory_bytes": None}, None),
        (5, {"step": 1}, None),
        (None, {"peak_memory_bytes": 9}, None),
        (None, None, None),
    ],
)
def test_the_peak_of_parts_is_the_largest_and_unknown_if_one_is(
    own: int | None, earlier: dict | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeakMemory, "bytes", property(lambda _: own))
    assert PeakMemory().over(earlier) == expected


class Faces:
    def undetected(self, embeddings):
        return embeddings[:, 0] == 0


def test_faces_of_items_are_pooled_as_if_they_were_one() -> None:
    embeddings = torch.tensor([[1.0], [0], [1], [1], [0], [0], [0]]).numpy()
    distances = torch.tensor([0.1, 1, 0.2, 0.6, 1, 1, 1]).numpy()
    whole = face_detection(Faces(), embeddings, distances)
    spans = [(0, 3), (3, 5), (5, 7)]
    items = [(b - a, face_detection(Faces(), embeddings[a:b], distances[a:b])) for a, b in spans]
    pooled = pooled_detection(items)
    assert pooled == {name: pytest.approx(value) for name, value in whole.items()}
    assert pooled_detection(items[2:]) == {"undetected": 1.0, "mean_detected": None}
    assert pooled_detection([(3, face_detection(object(), embeddings, distances))]) == {}
