"""Options that several commands share, and the configuration they make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file, e.g. one of jobs/configs/.")]
OutOption = Annotated[Path, typer.Option("--out", help="Run directory; finished stages in it are not run again.")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(help="Settings as key=value.", metavar="[KEY=VALUE]...")]
ModelOption = Annotated[str | None, typer.Option("--model", help="diffusers directory or hub id.")]
DataOption = Annotated[str | None, typer.Option("--data", help="imagefolder with metadata.jsonl or metadata.csv.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", help="Ray Train workers (engine.num_workers).")]
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
    workers: int | None = None,
    zero_stage: int | None = None,
) -> Any:
    """The run's configuration from a file, its overrides and the options that stand for single keys."""
    from raygard.config_file import load_config

    options = {
        "model.pretrained_model_name_or_path": model,
        "domain.data": data,
        "engine.num_workers": workers,
        "engine.zero_stage": zero_stage,
    }
    extra = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in options.items() if value is not None]
    return load_config(config, [*extra, *(overrides or [])])
