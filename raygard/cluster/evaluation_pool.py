"""Handle of the warm evaluation actors: started once in the driver, used from any process of the cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raygard.cluster.coordinator import Coordinator
from raygard.cluster.session import node_resources
from raygard.config import EvaluationConfig, RunConfig
from raygard.errors import RaygardError


@dataclass(frozen=True)
class EvaluationPool:
    """A coordinator and, behind it, the generation and scorer actors.

    config: what they were started for. group: placement group that holds what the actors reserve, None for nothing.
    """

    coordinator: Any
    config: dict[str, Any]
    group: Any

    @classmethod
    def start(cls, config: RunConfig) -> EvaluationPool:
        """Start a coordinator; its actors start with the first job that needs them and stay warm until `stop`.

        The pool lives as long as the process that started it: start it in the driver, and send the handle.
        Raises RaygardError, with the arithmetic, if the cluster cannot hold the actors and one adaptation, or if
        others keep what the actors need.
        """
        import ray

        require_evaluation(config.evaluation)
        content = config.model_dump(mode="json")
        group = _reserve(config.evaluation)
        remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=outside_groups())
        return cls(remote(Coordinator).remote(content, group), content, group)

    def stop(self) -> None:
        """End the coordinator and with it its actors."""
        import ray

        ray.kill(self.coordinator)
        if self.group is not None:
            ray.util.remove_placement_group(self.group)

    def __enter__(self) -> EvaluationPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def status(self) -> dict[str, Any]:
        """Processes and counts of items, as `Coordinator.status` says."""
        import ray

        return ray.get(self.coordinator.status.remote())

    def check(self, config: RunConfig) -> None:
        """Raise RaygardError if `config` asks for another model or scorer than the actors hold."""
        mine = RunConfig.model_validate(self.config)
        if (config.model, config.evaluation.scorer) != (mine.model, mine.evaluation.scorer):
            raise RaygardError(
                f"these evaluation actors hold model {mine.model.pretrained_model_name_or_path} and scorer "
                f"{mine.evaluation.scorer}; start others for {config.model.pretrained_model_name_or_path} and "
                f"{config.evaluation.scorer}"
            )


def _reserve(evaluation: EvaluationConfig) -> Any:
    """A placement group with a bundle for each actor that reserves something, generators first; None for none.

    Without it, adaptations that are submitted while an actor starts, or starts again, would take its device.
    """
    import ray

    e = evaluation
    actors = (e.generators, e.generator_cpus, e.generator_gpus), (e.scorers, e.scorer_cpus, e.scorer_gpus)
    bundles = [
        {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0}
        for count, cpus, gpus in actors
        for _ in range(count)
        if cpus > 0 or gpus > 0
    ]
    if not bundles:
        return None
    group = ray.util.placement_group(bundles)
    if not group.wait(e.item_timeout_s):
        ray.util.remove_placement_group(group)
        raise RaygardError(
            f"the evaluation actors wait for {bundles} since {e.item_timeout_s:g} s: others use the cluster; try again "
            "later, or lower what the actors hold (evaluation.generator_*, evaluation.scorer_*)"
        )
    return group


def outside_groups() -> Any:
    """Scheduling of what must not be charged to the placement group that its caller sits in."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(placement_group=None)


def require_evaluation(evaluation: EvaluationConfig) -> None:
    """`evaluation_fits` on the cluster that this process is connected to."""
    evaluation_fits(evaluation, node_resources())


def evaluation_fits(evaluation: EvaluationConfig, nodes: Sequence[Mapping[str, float]]) -> str:
    """The arithmetic of the actors and one adaptation on nodes with these total resources.

    Raises RaygardError, with the arithmetic, if the nodes can never hold them.
    """
    e = evaluation
    needs = {
        "CPU": ((e.generators, e.generator_cpus), (e.scorers, e.scorer_cpus), (1, e.cpus_per_job)),
        "GPU": ((e.generators, e.generator_gpus), (e.scorers, e.scorer_gpus), (1, e.gpus_per_job)),
    }
    said = []
    for resource, terms in needs.items():
        have = [node.get(resource, 0.0) for node in nodes]
        total, largest = sum(count * each for count, each in terms), max(each for _, each in terms)
        (g, each_g), (s, each_s), (_, job) = terms
        sums = f"{g} generators x {each_g:g} + {s} scorers x {each_s:g} + one adaptation x {job:g} = {total:g}"
        if largest > max(have, default=0.0) + 1e-9:
            raise RaygardError(
                f"one evaluation process needs {largest:g} {resource}, but the largest node has "
                f"{max(have, default=0.0):g}; lower evaluation.*_{resource.lower()}s, or add a larger node"
            )
        if total > sum(have) + 1e-9:
            raise RaygardError(
                f"{sums} {resource}, but the cluster has {sum(have):g}; lower evaluation.generators, "
                "evaluation.scorers or what each takes, or add nodes"
            )
        if total:
            said.append(f"{sums} of {sum(have):g} {resource}")
    return ", ".join(said)
