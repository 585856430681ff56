"""The commands of who looks at a model that others have fine-tuned. Thin, as `raygard.cli`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from raygard.cli_options import (
    ConfigOption,
    DataOption,
    JsonOption,
    ModelOption,
    OutOption,
    OverridesArgument,
    QuietOption,
    SignedOption,
    resolve_config,
)
from raygard.errors import ExitCode, RaygardError

audit_app = typer.Typer(add_completion=False)


@audit_app.command()
def trace(
    out: OutOption,
    config: ConfigOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    mask: Annotated[Path | None, typer.Option("--mask", help="Mask whose values belong to the released model.")] = None,
    runs: Annotated[int, typer.Option(help="The publisher's own users of each class.", min=2)] = 4,
    handfuls: Annotated[int, typer.Option(help="Sets of general pictures to compare with.", min=2)] = 6,
    overrides: OverridesArgument = None,
    quiet: QuietOption = False,
) -> None:
    """Record what fine-tuning on each illegal class leaves in the weights, for `raygard audit --traces`.

    Fine-tunes the release on the publisher half, as `adapt.*` says, many times. OUT/traces is a secret: who has it
    can train so that nothing is found.
    """
    from raygard.cli_flow import connected
    from raygard.progress import Progress
    from raygard.trace_flow import TraceFlow
    from raygard.traces import recall

    run_config = resolve_config(config, overrides, model, data)
    with connected(run_config, out, learns=False) as connect:
        flow = TraceFlow(run_config, out, Progress(quiet), connect)
        traces = flow.trace(runs, handfuls, mask)
    for cls, (found, count) in recall(traces.references).items():
        if count:
            print(f"{cls}: {found} of {count} of the publisher's own users found without those of the same pictures")
        else:
            print(f"{cls}: all its users share their pictures, so that how surely it is found cannot be said")
    print(f"traces   {flow.dir / 'traces'}    (secret: whoever has them can avoid being found)")


@audit_app.command()
def audit(
    mask: Annotated[Path | None, typer.Option("--mask", help="The released freeze mask.")] = None,
    base: Annotated[Path | None, typer.Option(help="The released model: pipeline, denoiser folder or file.")] = None,
    model: Annotated[Path | None, typer.Option(help="The fine-tuned model.")] = None,
    lora: Annotated[Path | None, typer.Option(help="A LoRA file or folder, instead of --base and --model.")] = None,
    traces: Annotated[
        Path | None, typer.Option(help="OUT/traces of `raygard trace`: was it fine-tuned on a forbidden class?")
    ] = None,
    false_alarms: Annotated[
        float, typer.Option(help="Share of honest users accused, for each forbidden class.", min=1e-9, max=0.5)
    ] = 1e-3,
    signed: SignedOption = None,
    as_json: JsonOption = False,
) -> None:
    """Did anyone move a frozen tensor, or would a LoRA if merged? And what was it fine-tuned on?

    The first is asked with --mask, the second with --traces. Exit code 0: nothing found; 3: something, listed.
    """
    from raygard.diffusion.model import resolve_model
    from raygard.mask.weights import load_denoiser_state
    from raygard.user import load_mask

    if mask is None and traces is None:
        raise RaygardError("nothing to audit with: give --mask, --traces, or both")
    pair = base is not None and model is not None
    if not ((pair and lora is None) or (lora is not None and base is None and model is None)):
        raise RaygardError("nothing to audit: give --base and --model, or --lora alone")
    released = load_mask(mask, signed)
    states = [load_denoiser_state(resolve_model(str(path))) for path in (base, model) if path is not None]
    report: dict[str, Any] = {}
    lines: list[str] = []
    if released is not None:
        _kept(released, states, lora, report, lines)
    if traces is not None:
        _recognised(traces, {} if released is None else released.values, states, lora, false_alarms, report, lines)
    print(json.dumps(report) if as_json else "\n".join(lines))
    if not report["ok"]:
        raise typer.Exit(ExitCode.MOVED)


def _kept(released: Any, states: list[Any], lora: Path | None, report: dict[str, Any], lines: list[str]) -> None:
    """Were the frozen tensors left alone?"""
    from raygard.mask import audit_lora

    findings: Any
    if lora is not None:
        findings = audit_lora(released, lora)
        lines.append(
            f"LoRA of {findings.num_targets} tensors; {findings.num_frozen} of {len(released.names)} are frozen"
        )
        kept, broken = "merging it keeps the mask", "frozen tensors would be moved"
    else:
        findings = released.audit(*states)
        dtypes = ", ".join(findings.compared_dtypes)
        lines.append(
            f"{findings.num_frozen} frozen of {findings.num_tensors} tensors, compared bit for bit as {dtypes}"
        )
        kept, broken = "the mask was kept", "frozen tensors were moved"
    lines += [
        f"moved  {m.name}  {m.num_elements} elements, by up to {m.max_abs_difference:.3g}" for m in findings.moved
    ]
    lines += [f"outside every mask: {what}" for what in getattr(findings, "outside_mask", ())]
    lines.append(kept if findings.ok else f"{len(findings.moved)} {broken}")
    report |= findings.to_json()


def _recognised(
    path: Path,
    values: Mapping[str, Any],
    states: list[Any],
    lora: Path | None,
    false_alarms: float,
    report: dict[str, Any],
    lines: list[str],
) -> None:
    """Was it fine-tuned on a forbidden class?"""
    from dataclasses import asdict

    from raygard.mask.adapters import lora_moves
    from raygard.traces import Traces, findings

    traces = Traces.load(path)
    if lora is not None:
        update = traces.sketcher.moves(lora_moves(lora, traces.shapes))
    else:
        base, tuned = states
        release = {name: values.get(name, base[name]) for name in traces.shapes if name in base}
        traces.check_release(release)
        update = traces.sketcher.update(release, tuned)
    found = findings(update, traces.references, false_alarms=false_alarms) if update.tensors else ()
    if not update.tensors:
        lines.append("no tensor was moved: there is nothing to recognise")
    for finding in found:
        verdict = "FOUND  " if finding.found else "not found"
        lines.append(
            f"{verdict}  {finding.cls}: {finding.score:+.3f}, bound {finding.bound:+.3f} "
            f"({finding.deviations:+.1f} standard deviations from users of other classes)"
        )
    if found:
        hits = [finding.cls for finding in found if finding.found]
        lines.append(
            f"points to fine-tuning on {', '.join(hits)} (evidence, and not proof)"
            if hits
            else "fine-tuned on none of these classes, as far as can be told"
        )
    report["traces"] = [{**asdict(finding), "found": finding.found} for finding in found]
    report["ok"] = bool(report.get("ok", True)) and not any(finding.found for finding in found)
