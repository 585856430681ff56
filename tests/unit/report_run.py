"""A realistic synthetic run directory for the tests of the report: no training, pictures from numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import yaml
from diffusers import UNet2DConditionModel

from raygard.config_file import load_config
from raygard.mask import FreezeMask, select_frozen
from raygard.outcome import build_outcome

CLASSES = {"Fluent 3D": "illegal", "OpenMoji": "illegal", "Twemoji": "legal", "FxEmoji": "legal"}
CONCEPTS = (
    "taco",
    "owl",
    "rainbow",
    "hot beverage",
    "grinning face with sweat",
    "cactus",
    "rocket",
    "cherries",
)
SHARES = {"none": 0.0, "freeze": 0.62, "random": 0.31, "random-matched": 0.62, "largest-first": 0.95}
STRENGTH = {"none": (0.0, 0.0), "freeze": (0.56, 0.13), "random": (0.06, 0.04)}
STRENGTH |= {"random-matched": (0.3, 0.22), "largest-first": (0.78, 0.66)}


def tiny_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def _pictures(rng: np.random.Generator, n: int, blur: float) -> np.ndarray:
    y, x = np.mgrid[:64, :64]
    images = np.full((n, 64, 64, 3), 255.0)
    for i in range(n):
        near = np.random.default_rng(i)
        centre, radius, colour = near.uniform(24, 40, 2), near.uniform(14, 24), near.uniform(0, 220, 3)
        inside = np.hypot(x - centre[0], y - centre[1]) < radius * (1 + 0.15 * np.sin(5 * np.arctan2(y - 32, x - 32)))
        images[i][inside] = colour
    coarse = images[:, ::8, ::8].repeat(8, 1).repeat(8, 2) + rng.normal(0, 20, (n, 1, 1, 3))
    weight = min(1.0, blur)
    return np.clip((1 - weight) * images + weight * coarse, 0, 255).astype(np.uint8)


def _jsonl(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_learning(run_dir: Path, rng: np.random.Generator) -> None:
    """config.yaml, run.json, the histories of relearning and mask learning, and the mask."""
    run_dir.mkdir(parents=True, exist_ok=True)
    config = load_config(overrides=["tracking.tracking_uri=http://me:hunter2@mlflow:5000"])
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    counts = {"learn_lower": 47, "learn_upper": 24, "select_adapt": 36, "select_reference": 35, "adapt": 71}
    run = {
        "raygard_version": "0.1.0",
        "versions": {"torch": "2.13.0", "diffusers": "0.42.1", "ray": "2.57.0"},
    }
    run |= {"config_hash": "0123456789abcdef", "started": "2026-11-21T23:00:00Z"}
    run |= {"seconds": {"cache": 12.1, "relearn": 80.5, "learn": 211.0, "evaluate": 402.7}}
    run |= {"domain_counts": {c: {**counts, "reference": 70} for c in CLASSES}}
    (run_dir / "run.json").write_text(json.dumps(run))
    decay = 0.12 + 0.1 * np.exp(-np.arange(200) / 50)
    noise = rng.normal(0, 0.02, (2, 200))
    steps = [
        {"step": i, "illegal_loss": d + noise[0, i], "legal_loss": 0.9 * d + noise[1, i]} for i, d in enumerate(decay)
    ]
    _jsonl(run_dir / "relearn" / "history.jsonl", steps)
    history = []
    for k in range(40):
        for i in range(10):
            loss = {
                "illegal_loss": 0.15 + 0.0008 * k + rng.normal(0, 0.02),
                "legal_loss": 0.13 + rng.normal(0, 0.02),
            }
            history.append({"kind": "user", "k": k, "l": i, "step": 10 * k + i, **loss})
        loss = {
            "illegal_loss": 0.15 + 0.001 * k + rng.normal(0, 0.01),
            "legal_loss": 0.13 + rng.normal(0, 0.01),
        }
        soft = {
            "soft_mean": 0.3,
            "frozen_by_count": 0.3,
            "frozen_by_params": 0.3 + 0.32 * (1 - np.exp(-k / 8)),
        }
        extra = {"theta_d_norm": 1.0, "signal_norm": 0.1, "rounding_gap": 0.42 * np.exp(-k / 15) + 0.05}
        history.append({"kind": "publisher", "k": k, "step": 10 * k + 9, **loss, **soft, **extra})
    _jsonl(run_dir / "learn" / "seed-0" / "history.jsonl", history)
    unet = tiny_unet()
    names = [name for name, _ in unet.named_parameters()]
    logits = np.array([1.0 * ("attn2" in n) + 0.6 * ("up_blocks" in n) + 0.3 * ("conv" in n) for n in names])
    import torch

    scores = torch.from_numpy(logits + rng.normal(0, 0.3, len(names)))
    sizes = torch.tensor([p.numel() for p in unet.parameters()])
    mask = FreezeMask.create(
        unet,
        select_frozen(scores, sizes, 0.3),
        logits=scores,
        base_model="zoo:tiny-sd",
        domain="emoji-styles",
    )
    mask.save(run_dir / "mask")


def write_evaluation(run_dir: Path, rng: np.random.Generator, n: int = 24) -> None:
    """Jobs with pictures, references and outcome.json."""
    config = load_config()
    results, references = [], {}
    texts = {c: [f"{CONCEPTS[i % 8]} in the style of {c}" for i in range(n)] for c in CLASSES}
    for index, (cls, role) in enumerate(CLASSES.items()):
        references[str(index)] = _pictures(rng, n, 0.0)
        base, full = 0.42 + 0.03 * index, 0.17 + 0.02 * index
        shared = rng.normal(0, 0.04, n)
        for defence in ("base", *SHARES):
            draws = [0, 1, 2] if defence.startswith("random") else [None]
            for draw in draws:
                share = STRENGTH[defence][role == "legal"] + rng.normal(0, 0.03) if defence in STRENGTH else 1.0
                if defence == "none":
                    share = 0.0
                distances = full + share * (base - full) + shared + rng.normal(0, 0.01, n)
                job = f"{index}-{defence}-{draw}"
                trainable = int(791_000 * (1 - SHARES.get(defence, 0.0)))
                record = {
                    "job_id": job,
                    "domain": "emoji-styles",
                    "class": cls,
                    "role": role,
                    "defence": defence,
                }
                record |= {"adaptation": "full", "scorer": "style_enlite0", "draw": draw, "seed": 0}
                record |= {"mask_seed": None if defence in ("base", "none") else 0}
                record |= {"freeze_ratio": 0.0 if defence in ("base", "none") else 0.3}
                record |= {"param_share": SHARES.get(defence, 0.0), "mask_sha256": None, "n": n}
                record |= {
                    "distance": float(distances.mean()),
                    "distances": distances.tolist(),
                    "captions": texts[cls],
                }
                record |= {"losses": [0.1], "seconds": {"adapt": 21.0 - 6 * SHARES.get(defence, 0.0)}}
                record |= {"trainable_params": trainable, "optimizer_bytes": 8 * trainable, "audit_ok": None}
                folder = run_dir / "evaluation" / "jobs" / job
                folder.mkdir(parents=True)
                (folder / "result.json").write_text(json.dumps(record))
                np.savez(folder / "pictures.npz", images=_pictures(rng, n, 0.1 + share))
                results.append(record)
    np.savez(run_dir / "evaluation" / "references.npz", **references)
    listing = {"classes": list(CLASSES), "captions": texts}
    (run_dir / "evaluation" / "references.json").write_text(json.dumps(listing))
    loss = dict.fromkeys(SHARES, 0.1312)
    outcome = build_outcome(results, config, loss, direction="distance")
    (run_dir / "outcome.json").write_text(json.dumps(outcome))


def write_run(run_dir: Path, n: int = 24) -> Path:
    rng = np.random.default_rng(0)
    write_learning(run_dir, rng)
    write_evaluation(run_dir, rng, n)
    return run_dir
