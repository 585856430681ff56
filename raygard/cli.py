"""The command line. Thin: parse, call, exit code (`raygard.errors.ExitCode`, docs/cluster-jobs.md)."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import raygard
from raygard.cli_audit import audit_app
from raygard.cli_cluster import cluster_app
from raygard.cli_flow import open_flow, print_outcome
from raygard.cli_options import (
    ConfigOption,
    DataOption,
    JsonOption,
    ModelOption,
    OutOption,
    OverridesArgument,
    QuietOption,
    SignedOption,
    StageOption,
    WorkersOption,
    resolve_config,
)
from raygard.cli_sign import require_signed, sign_app
from raygard.errors import ExitCode, RaygardError
from raygard.redaction import RedactingFormatter, redact

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help=(
        "Search for freeze masks that keep released diffusion models from being fine-tuned on what they must not "
        "imitate, while legal fine-tuning works as before.\n\n"
        "Start with `raygard demo --out runs/demo`. Settings are dotted overrides after the options, e.g. "
        "`raygard learn --out DIR mask.freeze_ratio=0.5`."
    ),
)
app.add_typer(cluster_app)
app.add_typer(sign_app)
app.add_typer(audit_app)


@app.command()
def demo(out: OutOption = Path("runs/demo"), overrides: OverridesArgument = None, quiet: QuietOption = False) -> None:
    """The whole flow on the bundled model and domain, on two CPU cores, in minutes.

    Relearns, learns a mask with two Ray Train workers under DeepSpeed ZeRO-2, lets simulated users adapt to every
    class under no, random and learned masks, scores, and writes a report.
    """
    from raygard.config_file import load_config

    _run(load_config(demo_config(), overrides or []), out, quiet)


@app.command()
def run(
    out: OutOption,
    config: ConfigOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    workers: WorkersOption = None,
    zero_stage: StageOption = None,
    overrides: OverridesArgument = None,
    quiet: QuietOption = False,
) -> None:
    """The whole flow with your own configuration: learn, adapt every class, score, report."""
    _run(resolve_config(config, overrides, model, data, workers, zero_stage), out, quiet)


def _run(config: Any, out: Path, quiet: bool) -> None:
    with open_flow(config, out, quiet) as flow:
        outcome = flow.run()
    print_outcome(flow, outcome)


@app.command()
def compare(
    out: OutOption,
    config: ConfigOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    workers: WorkersOption = None,
    zero_stage: StageOption = None,
    signed: SignedOption = None,
    overrides: OverridesArgument = None,
    quiet: QuietOption = False,
) -> None:
    """Let users of every kind meet every defence: the matrix `compare.defences` x `compare.adaptations`.

    Writes matrix.csv, one line for each user, which names unfinished and impossible cells as such, and tables with
    95 % intervals. A comparison that was cut off goes on when the same command is given again.
    """
    run_config = resolve_config(config, overrides, model, data, workers, zero_stage)
    require_signed(run_config.compare.mask, signed)
    with open_flow(run_config, out, quiet, compares=True) as flow:
        flow.run()
    print(flow.text())
    for what, name in (("matrix", "matrix.csv"), ("tables", "tables.md"), ("report", "compare.html")):
        print(f"{what}   {flow.dir / name}")


@app.command()
def tables(
    small: Annotated[bool, typer.Option("--small", help="Of the small twins, on the bundled model.")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", help="E.g. table3 or figure14; may be repeated.")] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option("--runs", help="Where runs lie; may be repeated, the first that has one counts."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for tables.md, tables.tex and tables.html.")] = None,
) -> None:
    """The tables of the FreezeAsGuard paper with ours beside the published numbers.

    Ours come from comparisons (docs/tables.md); what was not run is marked, with the command that would run it.
    """
    from raygard.compare.tables import plain_text
    from raygard.paper_tables import FOLDERS, NAMES, fill, write_tables

    blocks = [fill(name, small, runs or FOLDERS) for name in dict.fromkeys(only or NAMES)]
    print(plain_text(blocks))
    if out is not None:
        for path in write_tables(blocks, out):
            print(path)


@app.command()
def search(
    out: OutOption,
    config: Annotated[
        list[Path] | None, typer.Option("--config", help="YAML file; repeat it to search several domains.")
    ] = None,
    model: ModelOption = None,
    data: DataOption = None,
    workers: WorkersOption = None,
    zero_stage: StageOption = None,
    overrides: OverridesArgument = None,
    quiet: QuietOption = False,
) -> None:
    """Find the freeze ratio p (with T and L) to release with, within the domain's budget of legal harm.

    Ray Tune runs the trials on the publisher half; the chosen mask is then scored once on the user half. A search
    that was cut off goes on when the same command is given again.
    """
    import ray

    from raygard.cluster.doctor.examine import require_fit
    from raygard.cluster.evaluation_pool import require_evaluation
    from raygard.cluster.session import ray_session, require_resources, require_state_api
    from raygard.progress import Progress
    from raygard.search.space import concurrent_trials
    from raygard.search.tables import domains_table, format_trials
    from raygard.search_flow import SearchFlow, search_folders, write_domains

    files: list[Path | None] = [*config] if config else [None]
    configs = [resolve_config(path, overrides, model, data, workers, zero_stage) for path in files]
    folders = search_folders(configs, out)
    done: list[tuple[dict[str, Any], dict[str, Any]]] = []
    failed: list[str] = []
    with ExitStack() as stack:

        def connect(run_config: Any) -> None:
            stack.enter_context(ray_session(state_api=True))
            require_resources(run_config.engine)
            require_evaluation(run_config.evaluation)
            concurrent_trials(run_config, ray.cluster_resources())
            require_state_api()
            require_fit(run_config, out, "learn", "evaluate", "search")

        # All are checked before the first one starts: a mistake in the last would otherwise show up hours later.
        flows = [
            SearchFlow(each, folder, Progress(quiet=quiet), partial(connect, each))
            for each, folder in zip(configs, folders, strict=True)
        ]
        for flow in flows:
            try:
                choice = flow.run()
            except RaygardError as error:
                # One domain that cannot be searched is no reason to give up the others.
                if len(flows) == 1:
                    raise
                failed.append(f"{flow.config.domain.name}: {error}")
                continue
            print(format_trials(flow.summary, choice))
            print(f"\nreport   {flow.dir / 'report.html'}\nchoice   {flow.dir / 'choice.json'}\n")
            done.append((flow.summary, choice))
    if len(flows) > 1 and done:
        write_domains(out, done)
        print(domains_table(done))
    if failed:
        raise RaygardError("; ".join(failed))


@app.command()
def learn(
    out: OutOption,
    config: ConfigOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    workers: WorkersOption = None,
    zero_stage: StageOption = None,
    overrides: OverridesArgument = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Learn a freeze mask and save it as OUT/mask."""
    run_config = resolve_config(config, overrides, model, data, workers, zero_stage)
    with open_flow(run_config, out, quiet, evaluates=False) as flow, flow.parent:
        mask = flow.learn_all()[0]
    facts = {
        "mask": str(flow.dir / "mask"),
        "frozen_tensors": int(mask.frozen.sum()),
        "num_tensors": len(mask.names),
        "ratio_by_count": mask.ratio_by_count,
        "ratio_by_params": mask.ratio_by_params,
        "sha256": mask.sha256,
    }
    if mask.values:
        facts |= {key: mask.metrics[key] for key in ("base_loss_before", "base_loss_after")}
    if as_json:
        print(json.dumps(facts))
    else:
        print(
            f"froze {facts['frozen_tensors']} of {facts['num_tensors']} tensors "
            f"({mask.ratio_by_params:.1%} of the parameters)"
        )
        if mask.values:
            before, after = facts["base_loss_before"], facts["base_loss_after"]
            print(f"values   new ones in all of them; the base model's own loss {before:.4f} -> {after:.4f}")
        print(f"mask     {facts['mask']}")


@app.command()
def evaluate(
    out: OutOption,
    mask: Annotated[
        list[Path] | None,
        typer.Option(
            "--mask", help="Mask to measure; repeat it for masks of several seeds. Else those learned in OUT."
        ),
    ] = None,
    config: ConfigOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    signed: SignedOption = None,
    overrides: OverridesArgument = None,
    quiet: QuietOption = False,
) -> None:
    """Measure a mask without learning one: users adapt every class under it and under controls, and are scored.

    Masks that `raygard learn` left in OUT are taken if no `--mask` is given. OUT keeps to the masks it has measured.
    """
    from raygard.defences import masks_to_evaluate

    seeds = [f"evaluation.mask_seeds={list(range(len(mask)))}"] if mask else []
    run_config = resolve_config(config, [*(overrides or []), *seeds], model, data)
    masks = masks_to_evaluate(run_config, mask or (), out, signed)
    with open_flow(run_config, out, quiet, learns=False) as flow:
        outcome = flow.evaluate_masks(masks, given=bool(mask))
    print_outcome(flow, outcome)


@app.command()
def adapt(
    data: Annotated[Path, typer.Option("--data", help="imagefolder to fine-tune on.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the fine-tuned pipeline.")],
    model: Annotated[str, typer.Option("--model", help="diffusers directory or hub id.")] = "zoo:tiny-sd",
    mask: Annotated[Path | None, typer.Option("--mask", help="Freeze mask to respect.")] = None,
    cls: Annotated[list[str] | None, typer.Option("--class", help="Only these classes; may be repeated.")] = None,
    method: Annotated[
        str | None, typer.Option(help="full, attention, lora, dreambooth, textual-inversion, custom-diffusion.")
    ] = None,
    config: ConfigOption = None,
    seed: Annotated[int, typer.Option(help="Seed of data order and noise.")] = 0,
    signed: SignedOption = None,
    overrides: OverridesArgument = None,
    quiet: QuietOption = False,
) -> None:
    """Fine-tune a model on your pictures, respecting a freeze mask (the user's side).

    What is not set takes the published values of the method (docs/adaptations.md).

    Runs under `accelerate launch` on several GPUs as well: `accelerate launch -m raygard.cli adapt ...`.
    """
    from raygard.user import adapt_model

    chosen = [f"adapt.method={json.dumps(method)}"] if method is not None else []
    run_config = resolve_config(config, [*chosen, *(overrides or [])], model)
    facts = adapt_model(run_config, data, tuple(cls or ()), mask, out, seed, quiet, signed)
    if facts is not None:
        print(f"trained {facts['trainable_params']} parameters in {facts['seconds']:.0f} s; saved {out}")
        for what in facts["outside_mask"]:
            print(f"outside every mask: {what}")


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="Captions to draw.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for the pictures (PNG and metadata.jsonl).")],
    model: Annotated[str, typer.Option("--model", help="diffusers directory or hub id.")] = "zoo:tiny-sd",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    steps: Annotated[int, typer.Option(help="Inference steps.", min=1)] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance.", min=1.0)] = 4.0,
    lora: Annotated[Path | None, typer.Option(help="LoRA file, or folder of `raygard adapt`.")] = None,
    embeddings: Annotated[Path | None, typer.Option(help="Learned tokens, file or folder of `raygard adapt`.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Mask whose values belong to the released model.")] = None,
    signed: SignedOption = None,
) -> None:
    """Draw pictures from captions."""
    from raygard.user import generate_pictures

    for path in generate_pictures(model, prompts, out, seed, steps, guidance_scale, lora, embeddings, mask, signed):
        print(path)


@app.command()
def score(
    generated: Annotated[Path, typer.Option("--generated", help="Folder of generated pictures.")],
    reference: Annotated[Path, typer.Option("--reference", help="Folder of real pictures.")],
    scorer: Annotated[str, typer.Option(help="Evaluation model.")] = "style_enlite0",
    as_json: JsonOption = False,
) -> None:
    """Mean distance between generated and real pictures under a scorer."""
    from raygard.user import score_folders

    result = score_folders(generated, reference, scorer)
    if as_json:
        print(json.dumps(result))
    else:
        print(
            f"{result['scorer']} {result['direction']}: {result['mean']:.4f} +- {result['sd']:.4f} "
            f"({result['num_generated']} generated, {result['num_reference']} real pictures)"
        )


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="A run or search directory.")]) -> None:
    """Write RUN_DIR/report.html anew from what is there."""
    from raygard.report import build_report

    print(build_report(run_dir))


@app.command()
def track(
    run_dir: Annotated[Path, typer.Option("--sync", help="Run directory whose spooled records to send.")],
    tracking_uri: Annotated[str | None, typer.Option(help="Another MLflow store than the run's own.")] = None,
) -> None:
    """Send MLflow records that were spooled while the server was away."""
    from raygard.tracking import sync

    print(f"{sync(run_dir, tracking_uri)} records sent")


@app.command()
def config(
    config: ConfigOption = None,
    overrides: OverridesArgument = None,
    reference: Annotated[bool, typer.Option("--reference", help="Every key with default and meaning.")] = False,
) -> None:
    """Print the resolved configuration as YAML, or the reference of all keys."""
    import yaml

    from raygard.config import public
    from raygard.config_file import reference_markdown

    if reference:
        print(reference_markdown(), end="")
    else:
        found = public(resolve_config(config, overrides))
        print(yaml.safe_dump(found.model_dump(mode="json"), sort_keys=False), end="")


@app.command()
def version() -> None:
    """Print raygard's version."""
    print(raygard.__version__)


def demo_config() -> Path:
    """The demo's configuration, shipped inside the package."""
    return Path(raygard.__file__).parent / "zoo" / "demo.yaml"


def main() -> None:
    """Entry point: user mistakes become one line and exit code 2; whatever fails, its last line says why."""
    _quieten()
    try:
        code = app(standalone_mode=False)
    except RaygardError as error:
        _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        if type(error).__module__.startswith(("click", "typer")):
            describe = getattr(error, "format_message", None)
            message = " ".join((describe() if describe else str(error)).split())
            if message:
                _fail(message, ExitCode.BAD_INPUT)
            sys.exit(ExitCode.BAD_INPUT)
        print(redact(traceback.format_exc()), file=sys.stderr, end="")
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        _fail(f"failed: {type(error).__name__}: {lines[-1] if lines else 'no reason given'}", ExitCode.DEFECT)
    sys.exit(code if isinstance(code, int) else ExitCode.DONE)


def _fail(message: str, code: ExitCode) -> NoReturn:
    # A job's log takes both streams: what waits in the other one must not come after the reason.
    sys.stdout.flush()
    print(f"raygard: {redact(message)}", file=sys.stderr)
    sys.exit(code)


def _quieten() -> None:
    # The libraries' start-up notices (telemetry, missing accelerators) would bury raygard's own lines.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("raygard").setLevel(logging.INFO)
    # diffusers imports it where it is installed, and on some CPUs it misses a kernel that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


if __name__ == "__main__":
    main()
