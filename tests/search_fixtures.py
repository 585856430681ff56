"""One small search that nobody disturbs, on the bundled model and two plain patterns, for the tests of the search."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.patterns import make_patterns

SETTINGS = (
    "domain.name=patterns",
    "domain.illegal=[stripes]",
    "domain.legal=[checks]",
    "domain.resolution=64",
    "domain.legal_budget=1.0",
    "engine.cpus_per_worker=1",
    "engine.checkpointing_steps=1",
    "bilevel.train_batch_size=4",
    "bilevel.inner_steps=2",
    "bilevel.publisher_steps=4",
    "bilevel.user_lr=3e-4",
    "relearn.max_train_steps=6",
    "relearn.learning_rate=3e-4",
    "adapt.max_train_steps=16",
    "adapt.learning_rate=1e-3",
    "adapt.train_batch_size=8",
    "generation.num_images=8",
    "generation.num_inference_steps=4",
    "generation.guidance_scale=2",
    "generation.batch_size=4",
    "evaluation.defences=[none,freeze,random-matched]",
    "evaluation.random_draws=1",
    "evaluation.bootstrap_samples=200",
    "search.freeze_ratios=[0.3,0.7]",
    "search.inner_steps=[2,4]",
    "search.controls=[random-matched]",
    "search.fidelities=[0.5,1.0]",
)


def start_search(data: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    """`raygard search` in a process group of its own, so that exactly what was started can be ended."""
    command = [
        sys.executable,
        "-m",
        "raygard.cli",
        "search",
        "--data",
        str(data),
        "--out",
        str(out),
        *SETTINGS,
        *overrides,
    ]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.fixture(scope="session")
def patterns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_patterns(tmp_path_factory.mktemp("patterns") / "data")


@pytest.fixture(scope="session")
def searched(patterns: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Directory and output of a finished search: two p, two L, one domain."""
    out = tmp_path_factory.mktemp("searched") / "search"
    process = start_search(patterns, out)
    output = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, output[-4000:]
    return out, output
