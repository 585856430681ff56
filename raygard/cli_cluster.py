"""The commands that reach a cluster from outside: submit a job, examine the cluster. Thin, as `raygard.cli`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from raygard.cli_options import (
    ConfigOption,
    DataOption,
    JsonOption,
    ModelOption,
    OutOption,
    OverridesArgument,
    StageOption,
    WorkersOption,
    resolve_config,
)
from raygard.errors import ExitCode
from raygard.redaction import redact, redact_all

cluster_app = typer.Typer(add_completion=False)

GpuOption = Annotated[str, typer.Option("--gpu", help="Kind of GPU: H200, H100, A100 (80 GB) or A100-40GB.")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", help="Dashboard (http://HOST:8265) or head (HOST:6379) of the cluster; else RAY_ADDRESS names it."
    ),
]


@cluster_app.command()
def submit(
    command: Annotated[list[str], typer.Argument(help="What to run there, after `--`.", metavar="-- python jobs/...")],
    address: AddressOption = None,
    working_dir: Annotated[
        Path, typer.Option("--working-dir", help="Folder to upload and run in; .rayignore says what stays here.")
    ] = Path("."),
    num_cpus: Annotated[
        float | None, typer.Option("--entrypoint-num-cpus", help="CPUs to reserve for the command itself.", min=0)
    ] = None,
    num_gpus: Annotated[
        float | None, typer.Option("--entrypoint-num-gpus", help="GPUs to reserve for the command itself.", min=0)
    ] = None,
) -> None:
    """Run a job on a cluster, follow its log and end with its exit code: `raygard submit -- python jobs/search.py ...`.

    Ctrl-C stops the following only: the job goes on, and what is printed then says how to follow or stop it. The token
    is read as Ray reads it (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH).
    """
    from raygard.cluster.submit import follow, jobs_client
    from raygard.cluster.submit import submit as submit_job

    with jobs_client(address) as client:
        job_id = submit_job(client, command, working_dir, num_cpus=num_cpus, num_gpus=num_gpus)
        print(f"job {job_id}", file=sys.stderr, flush=True)
        ended = follow(client, job_id, lambda text: print(text, end="", flush=True))
    if ended.detached:
        ways = f"follow it: ray job logs --follow {job_id}    stop it: ray job stop {job_id}"
        print(f"\njob {job_id} goes on; {ways}", file=sys.stderr)
    for run in ended.mlflow_runs:
        print(f"MLflow run  {run}", file=sys.stderr)
    if ended.reason:
        print(f"raygard: job {job_id} ended early: {redact(ended.reason)}", file=sys.stderr)
    raise typer.Exit(ended.exit_code)


@cluster_app.command()
def doctor(
    address: AddressOption = None,
    out: OutOption = Path("runs"),
    config: ConfigOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    workers: WorkersOption = None,
    zero_stage: StageOption = None,
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Can this cluster run the job that these settings describe? One line for each check; exit code 4 if one is red.

    Looks at every node: versions, resources, storage, /dev/shm, memory, MLflow, model and data. Long jobs do the same
    before they start. `--model SDXL-shape` (or SD1.5-, SD2.1-, SD3-medium-, Flux.1-dev-shape) estimates the memory of a
    model that is not there.
    """
    from raygard.cluster.address import cluster_address, is_dashboard
    from raygard.cluster.doctor.checks import all_green, to_text
    from raygard.cluster.doctor.examine import examine, examine_from_outside, report_json

    run_config = resolve_config(config, overrides, model, data, workers, zero_stage)
    named = cluster_address(address)
    if named is not None and is_dashboard(named):
        checks = examine_from_outside(run_config, out, named)
    else:
        checks = examine(run_config, out, named)
    print(json.dumps(redact_all(report_json(checks))) if as_json else redact(to_text(checks)))
    raise typer.Exit(ExitCode.DONE if all_green(checks) else ExitCode.UNFIT_CLUSTER)


@cluster_app.command()
def estimate(
    config: ConfigOption = None,
    model: ModelOption = None,
    workers: WorkersOption = None,
    zero_stage: StageOption = None,
    gpu: GpuOption = "H200",
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
) -> None:
    """What training would hold on each GPU and how long it would take; exit code 4 if it does not fit.

    Arithmetic on a model, or on the shape of a release (`--model SD2.1-shape`, `SDXL-shape`, ...): nothing is started,
    no GPU and no cluster is asked. `raygard doctor` looks at a cluster that is there.
    """
    from raygard.cluster.estimate import estimate_run, fits, named_gpu, to_json, to_text

    kind = named_gpu(gpu)
    found = estimate_run(resolve_config(config, overrides, model, None, workers, zero_stage), kind)
    print(json.dumps(to_json(found, kind)) if as_json else to_text(found, gpu))
    raise typer.Exit(ExitCode.DONE if fits(found, kind) else ExitCode.UNFIT_CLUSTER)
