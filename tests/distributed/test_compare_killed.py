"""The matrix on real actors: impossible cells are rows, and a comparison that was killed ends as one that was not."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raygard.cli import main
from raygard.compare.matrix import COSTS
from raygard.diffusion.model import load_denoiser
from raygard.mask import FreezeMask
from raygard.store import Store, read_pictures
from tests.evaluation_bench import OVERRIDES, Bench, make_bench

pytestmark = pytest.mark.distributed

# Measured of pictures, and what follows from that.
DISTANCES = ("distance", "d_base", "d_none")
FROM_DISTANCES = ("blocked", "relative", "sgr")
SETTINGS = (
    "domain.illegal=[a]",
    "domain.legal=[c]",
    "domain.general=[d]",
    "evaluation.half=user",
    "evaluation.bootstrap_samples=100",
    "tracking.enabled=false",
    # What imma-bad does wrong, it does again.
    "engine.max_failures=0",
    "compare.defences=[none, freeze, uce, uce+freeze, imma-bad]",
    "compare.edits=[{name: imma-bad, method: imma, rounds: 2, outer_lr: 1.0e30}]",
    "compare.adaptations=[full, {name: lora, method: lora, max_train_steps: 3}, {name: ignoring, method: full, "
    "ignore_mask: true}]",
)
# Every kind of user that is not in the comparison above, and what attackers may set.
USERS = {
    "renamed": "method: full, learn_as: thing",
    "longer": "method: full, times: 5",
    "faster": "method: full, learning_rate: 1.0e-2, optimizer: sgd",
    "attention": "method: attention, max_train_steps: 2",
    "dreambooth": "method: dreambooth, max_train_steps: 2",
    "prior": "method: dreambooth, max_train_steps: 2, class_prompt: a letter, num_class_images: 2",
    "textual-inversion": "method: textual-inversion, max_train_steps: 2, instance_prompt: <learned>",
    "custom-diffusion": "method: custom-diffusion, max_train_steps: 2, instance_prompt: <new1>",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_maker, imagefolder_maker) -> Bench:
    made = make_bench(tmp_path_factory.mktemp("compare"), tiny_maker, imagefolder_maker)
    unet = load_denoiser(made.config().model)
    # All that LoRA would adapt, so that under this mask it has nothing to train.
    frozen = [name for name, _ in unet.named_parameters() if ".to_" in name]
    FreezeMask.create(unet, frozen).save(made.root / "mask")
    return made


def command(bench: Bench, out: Path, *others: str) -> list[str]:
    paths = [f"domain.data={bench.root / 'data'}", f"model.pretrained_model_name_or_path={bench.root / 'sd'}"]
    mask = f"compare.mask={bench.root / 'mask'}"
    return ["compare", "--out", str(out), "--quiet", *paths, *OVERRIDES, *SETTINGS, mask, *others]


def table(out: Path) -> list[dict[str, str]]:
    with (out / "matrix.csv").open() as stream:
        return list(csv.DictReader(stream))


def without_costs(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """What is equal to the last digit: all but costs, and what is measured of pictures."""
    left_out = {*COSTS, *DISTANCES, *FROM_DISTANCES}
    return [{name: value for name, value in row.items() if name not in left_out} for row in rows]


def test_a_comparison_that_was_killed_ends_as_an_undisturbed_one(
    bench: Bench, ray_cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    out = tmp_path / "killed"
    started = subprocess.Popen(
        [sys.executable, "-m", "raygard.cli", *command(bench, out)],
        env={**os.environ, "RAY_ADDRESS": address}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while len(list((out / "store").glob("*/score-*.json"))) < 3:
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()[0][-3000:]
        time.sleep(0.05)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    half = table(out)
    assert "unfinished" in {row["status"] for row in half} and len(half) == 3 * 5 * 2
    kept = {file: file.stat().st_mtime_ns for file in (out / "store").glob("*/score-*.json")}

    for folder in (out, tmp_path / "whole"):
        monkeypatch.setattr(sys, "argv", ["raygard", *command(bench, folder)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    rows = table(out)
    whole = table(tmp_path / "whole")
    assert without_costs(rows) == without_costs(whole)
    for row, other in zip(rows, whole, strict=True):
        for name in DISTANCES:
            assert (row[name] == "") == (other[name] == "")
            assert not row[name] or float(row[name]) == pytest.approx(float(other[name]), abs=1e-4), (row, other)
    for key in {row["store"] for row in rows if row["store"]}:
        drawn = [read_pictures(Store(folder / "store").pictures_file(key)) for folder in (out, tmp_path / "whole")]
        changed = np.abs(drawn[0].astype(int) - drawn[1])
        # With AVX-512 sums round otherwise from process to process, and a pixel between two grey levels shows it.
        assert changed.max() <= 1 and np.count_nonzero(changed) <= len(changed)
    assert all(file.stat().st_mtime_ns == written for file, written in kept.items()) and len(kept) >= 3

    reasons = {(row["adaptation"], row["defence"]): row["reason"] for row in rows if row["status"] == "failed"}
    assert {defence for _, defence in reasons} == {"freeze", "uce+freeze", "imma-bad"}
    assert "the mask freezes all" in reasons["lora", "freeze"] and "IMMA" in reasons["full", "imma-bad"]
    assert ("full", "freeze") not in reasons
    done = {(row["adaptation"], row["defence"], row["class"]): row for row in rows if row["status"] == "done"}
    assert done["full", "none", "a"]["store"] == done["ignoring", "none", "a"]["store"]
    assert done["full", "freeze", "a"]["store"] != done["ignoring", "freeze", "a"]["store"]
    assert done["ignoring", "freeze", "a"]["outside_mask"] and not done["full", "freeze", "a"]["outside_mask"]
    # A mask that freezes every edited tensor carries the edit, and its user trains as much as under the mask alone.
    assert done["full", "uce+freeze", "a"]["trainable_params"] == done["full", "freeze", "a"]["trainable_params"]
    assert all(0 < float(row["trainable_share"]) <= 1 and float(row["seconds_adapt"]) > 0 for row in done.values())
    printed = capsys.readouterr().out
    assert "outside every mask: the mask is ignored" in printed and "failed" in printed
    text = (out / "tables.md").read_text()
    defences = json.loads((out / "summary.json").read_text())["tables"][0]["defences"]
    losses = {entry["defence"]: entry["base_loss"] for entry in defences}
    assert losses["uce"] == losses["uce+freeze"] != losses["freeze"] == losses["none"] > 0
    assert text.count("## ") == 3 and "base loss" in text and (out / "compare.html").stat().st_size > 10_000


def test_every_kind_of_user_meets_the_mask(
    bench: Bench, ray_cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = ", ".join(f"{{name: {name}, {settings}}}" for name, settings in USERS.items())
    others = ("compare.defences=[none, freeze]", f"compare.adaptations=[{users}]")
    monkeypatch.setattr(sys, "argv", ["raygard", *command(bench, tmp_path / "out", *others)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    rows = {(row["adaptation"], row["defence"], row["class"]): row for row in table(tmp_path / "out")}
    reasons = {key: row["reason"] for key, row in rows.items() if row["status"] != "done"}
    assert len(rows) == 4 * len(USERS) and set(reasons) == {("attention", "freeze", cls) for cls in "ac"}
    assert len({row["store"] for row in rows.values() if row["store"]}) == len(rows) - len(reasons)

    def stored(name: str, file: str, defence: str = "freeze") -> dict[str, Any]:
        return json.loads((tmp_path / "out" / "store" / rows[name, defence, "a"]["store"] / file).read_text())

    assert stored("renamed", "inputs.json")["adapt"]["learn_as"] == "thing"
    assert stored("faster", "inputs.json")["adapt"]["optimizer"] == "sgd"
    assert len(stored("longer", "adapted.json")["losses"]) == 5 * len(stored("renamed", "adapted.json")["losses"])
    for name in set(USERS) - {"attention"}:
        trained = [int(rows[name, defence, "a"]["trainable_params"]) for defence in ("none", "freeze")]
        around = bool(rows[name, "freeze", "a"]["outside_mask"])
        assert around == (name in ("textual-inversion", "custom-diffusion"))
        assert trained[0] == trained[1] if name == "textual-inversion" else trained[0] > trained[1]
