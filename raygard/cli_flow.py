"""What the commands that run a flow share: the flow on a fit cluster, and what is printed of its outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def open_flow(
    config: Any, out: Path, quiet: bool, *, learns: bool = True, evaluates: bool = True, compares: bool = False
) -> Iterator[Any]:
    """A flow on a cluster that can run it; the cluster is left again at the end.

    learns: not only for a control that looks at what relearning changed, which needs learning's workers as well.
    """
    from raygard.compare_flow import CompareFlow
    from raygard.flow import Flow
    from raygard.progress import Progress

    with connected(config, out, learns=learns, evaluates=evaluates) as connect:
        yield (CompareFlow if compares else Flow)(config, out, Progress(quiet=quiet), connect)


@contextmanager
def connected(config: Any, out: Path, *, learns: bool = True, evaluates: bool = True) -> Iterator[Callable[[], None]]:
    """What reaches a cluster that can run the stages, and refuses another; the cluster is left again at the end."""
    from raygard.baselines import NEED_RELEARNED
    from raygard.cluster.doctor.examine import require_fit
    from raygard.cluster.evaluation_pool import require_evaluation
    from raygard.cluster.session import ray_session, require_resources

    with ExitStack() as stack:

        def connect() -> None:
            stack.enter_context(ray_session())
            relearns = learns or any(name in NEED_RELEARNED for name in config.evaluation.defences)
            if relearns:
                require_resources(config.engine)
            if evaluates:
                require_evaluation(config.evaluation)
            require_fit(config, out, *["learn"] * relearns, *["evaluate"] * evaluates)

        yield connect


def print_outcome(flow: Any, outcome: dict[str, Any]) -> None:
    """The outcome's table, and where its files lie."""
    from raygard.outcome_text import format_table
    from raygard.redaction import redact

    print(format_table(outcome))
    print()
    if (flow.dir / "mask").is_dir():
        print(f"mask     {flow.dir / 'mask'}")
    print(f"outcome  {flow.dir / 'outcome.json'}")
    print(f"report   {flow.dir / 'report.html'}")
    if flow.config.tracking.enabled:
        uri = redact(flow.config.tracking.tracking_uri or f"sqlite:///{flow.dir / 'mlflow.db'}")
        print(f"MLflow   {uri}    (look: mlflow ui --backend-store-uri {uri})")
