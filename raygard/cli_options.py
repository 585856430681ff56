"""Options that several commands share, and the configuration they make."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file, e.g. one of jobs/configs/.")]
OutOption = Annotated[Path, typer.Option("--out", help="Run directory; finished stages in it are not run again.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="Settings as key=value.", metavar="[KEY=VALUE]...")]
ModelOption = Annotated[str | None, typer.Option("--model", help="diffusers directory or hub id.")]
DataOption = Annotated[str | None, typer.Option("--data", help="imagefolder with metadata.jsonl or metadata.csv.")]
WorkersOption = Annotated[
    str | None,
    typer.Option(
        "--workers",
        metavar="N|MIN:MAX",
        help="Ray Train workers (engine.num_workers); 1:4 goes on with as few as 1 when nodes are lost.",
    ),
]
StageOption = Annotated[
    int | None, typer.Option("--zero-stage", help="DeepSpeed ZeRO stage 0 to 3 (engine.zero_stage).")
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
SignedOption = Annotated[
    Path | None,
    typer.Option(
        "--require-signature", help="Public key whose owner must have signed the mask; else nothing is done (exit 5)."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


def resolve_config(
    config: Path | None,
    overrides: list[str] | None,
    model: str | None = None,
    data: str | None = None,
    workers: str | None = None,
    zero_stage: int | None = None,
) -> Any:
    """The run's configuration from a file, its overrides and the options that stand for single keys."""
    from raygard.config_file import load_config

    fewest, most = parse_workers(workers)
    options = {
        "model.pretrained_model_name_or_path": model,
        "domain.data": data,
        "engine.num_workers": most,
        "engine.min_workers": fewest,
        "engine.zero_stage": zero_stage,
    }
    extra = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value is not None]
    return load_config(config, [*extra, *(overrides or [])])


def parse_workers(workers: str | None) -> tuple[int | None, int | None]:
    """The fewest and the most workers of `--workers`: "4" is (None, 4), "1:4" is (1, 4).

    Raises a usage error for anything else.
    """
    if workers is None:
        return None, None
    found = re.fullmatch(r"(?:(\d+):)?(\d+)", workers)
    if found is None:
        raise typer.BadParameter(f"needs a number or MIN:MAX, got '{workers}'", param_hint="'--workers'")
    return (int(found[1]) if found[1] else None), int(found[2])
