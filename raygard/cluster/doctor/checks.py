"""From facts to verdicts: pure functions, one for each line of `raygard doctor`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from raygard.cluster.doctor.memory import CUDA_CONTEXT, GIB, LIBRARIES, NOT_COVERED, describe_memory
from raygard.cluster.doctor.node import MIB, Listing
from raygard.cluster.evaluation_pool import evaluation_fits
from raygard.cluster.session import workers_fit
from raygard.config import RunConfig
from raygard.diffusion.shape import is_shape
from raygard.errors import RaygardError
from raygard.search.space import concurrent_trials

# NVIDIA's advice for containers in which NCCL runs, beside what Ray's object store takes of /dev/shm.
NCCL_SHM_BYTES = 1024**3

# What a job may do; a search does all of it.
STAGES = ("learn", "evaluate", "search")
# Red lines that no job survives. The others may be untrue of it (an estimate, GPUs that are held for a moment), or be
# borne: MLflow's records wait on disk for their server.
FATAL = ("cluster", "versions", "resources", "storage", "model")


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, whether it will do, what was found and, if it will not, how to mend it."""

    name: str
    ok: bool
    text: str
    mend: str = ""

    @property
    def fatal(self) -> bool:
        """Whether a job must not be started."""
        return not self.ok and self.name in FATAL

    def line(self) -> str:
        return f"{'green' if self.ok else 'RED  '}  {self.name:<9}  {self.text}" + (f"; {self.mend}" * bool(self.mend))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NodeFacts:
    """What one node says of itself. failed: why it could not be asked; nothing else counts then.

    resources: Ray's totals. shm_bytes: size of /dev/shm, 0 for none. gpus: free and total bytes of each.
    memory_bytes: available main memory. wrote: why its marker could not be written, None if it was. unseen: ids of the
    nodes whose markers it did not find.
    """

    node_id: str
    name: str
    failed: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    shm_bytes: int = 0
    gpus: Sequence[tuple[int, int]] = ()
    memory_bytes: int = 0
    wrote: str | None = None
    unseen: Sequence[str] = ()
    model: Listing = field(default_factory=Listing)


@dataclass(frozen=True)
class Facts:
    """What all checks are made of.

    address: of the cluster, "" for a private one. storage: the folder that markers were written to. versions: of the
    process that asks. memory: terms of `estimate_memory` by stage, or why there are none. data: the domain's folder,
    which only the driver reads. mlflow_trouble: why the store does not answer.
    """

    address: str
    storage: str
    versions: Mapping[str, str]
    nodes: Sequence[NodeFacts]
    memory: Mapping[str, Mapping[str, int]] | str
    data: Listing
    mlflow_trouble: str | None


def judge(config: RunConfig, facts: Facts, stages: Sequence[str] = STAGES) -> list[Check]:
    """All checks on facts of a cluster that let us in, in the order they are printed.

    stages: what there must be room for, of STAGES.
    """
    nodes = [node for node in facts.nodes if node.failed is None]
    return [
        check_cluster(facts),
        check_versions(facts.versions, nodes),
        check_resources(config, nodes, stages),
        check_storage(facts.storage, nodes),
        check_shm(config, nodes),
        check_memory(config, facts.memory, nodes),
        check_mlflow(config, facts.mlflow_trouble),
        check_model(config.model.pretrained_model_name_or_path, nodes),
        check_data(config.domain.data, facts.data),
    ]


def all_green(checks: Sequence[Check]) -> bool:
    return all(check.ok for check in checks)


def to_text(checks: Sequence[Check]) -> str:
    """One line for each check."""
    return "\n".join(check.line() for check in checks)


def check_cluster(facts: Facts) -> Check:
    """Every node runs a task."""
    lost = [f"{node.name}: {node.failed}" for node in facts.nodes if node.failed is not None]
    where = f"at {facts.address}" if facts.address else "(a private one, on this machine)"
    if lost:
        mend = "install the same raygard on every node, or take the node out of the cluster"
        return Check("cluster", False, f"{len(lost)} of {len(facts.nodes)} nodes run no task ({'; '.join(lost)})", mend)
    return Check("cluster", True, f"{_plural(len(facts.nodes), 'node')} {where} let this process in and run tasks")


def check_versions(mine: Mapping[str, str], nodes: Sequence[NodeFacts]) -> Check:
    """Equal versions in this process and on every node."""
    other = [
        f"{name} {node.versions.get(name, 'missing')} on {node.name}, {version} here"
        for node in nodes
        for name, version in mine.items()
        if node.versions.get(name) != version
    ]
    if other:
        mend = "start every node from one image or one environment (constraints.txt)"
        return Check("versions", False, ", ".join(other), mend)
    return Check("versions", True, "equal everywhere: " + ", ".join(f"{name} {v}" for name, v in mine.items()))


def check_resources(config: RunConfig, nodes: Sequence[NodeFacts], stages: Sequence[str] = STAGES) -> Check:
    """Room for one run's workers, for the evaluation, and for one trial of a search beside it, as `stages` ask."""
    have = [node.resources for node in nodes]
    total = {name: sum(node.get(name, 0.0) for node in have) for name in ("CPU", "GPU")}
    try:
        said = []
        if "learn" in stages:
            said.append(workers_fit(config.engine, have))
        if "evaluate" in stages:
            said.append(evaluation_fits(config.evaluation, have))
        if "search" in stages:
            said.append(f"{_plural(concurrent_trials(config, total), 'trial')} at once")
    except RaygardError as error:
        text, _, mend = str(error).partition("; ")
        return Check("resources", False, text, mend)
    return Check("resources", True, "; ".join(said))


def check_storage(storage: str, nodes: Sequence[NodeFacts]) -> Check:
    """Every node wrote a marker and found those of all others."""
    cannot = [f"{node.name}: {node.wrote}" for node in nodes if node.wrote is not None]
    if cannot:
        mend = "mount it on every node, writable for the user that runs Ray, or give another --out"
        return Check("storage", False, f"{storage} cannot be written on {', '.join(cannot)}", mend)
    names = {node.node_id: node.name for node in nodes}
    pairs = ((node, other) for node in nodes for other in node.unseen if other in names)
    blind = [f"{node.name} does not see what {names[other]} writes" for node, other in pairs]
    if blind:
        more = f" (and {len(blind) - 1} more such pairs)" if len(blind) > 1 else ""
        mend = "mount the same file system there on every node, or give an --out that is on one"
        return Check("storage", False, f"{storage} is not shared: {blind[0]}{more}", mend)
    return Check("storage", True, f"{storage}: {_plural(len(nodes), 'node')} wrote a marker and read all of them")


def check_shm(config: RunConfig, nodes: Sequence[NodeFacts]) -> Check:
    """Ray's object store fits into /dev/shm, else it lies in /tmp; and NCCL, on nodes whose GPUs are used."""
    small = []
    for node in nodes:
        store = node.resources.get("object_store_memory", 0.0)
        nccl = NCCL_SHM_BYTES if config.engine.use_gpu and node.resources.get("GPU", 0.0) else 0
        if node.shm_bytes < store + nccl:
            # Ray takes nothing of a /dev/shm that is too small for its store.
            why = "Ray's store is on disk" if node.shm_bytes < store else "1 GiB of it for NCCL"
            small.append(f"{node.name} has {node.shm_bytes / MIB:.0f} of {(store + nccl) / MIB:.0f} MiB ({why})")
    if small:
        mend = "raise it (docker --shm-size, an emptyDir of medium Memory in Kubernetes) or start Ray with less"
        return Check("shm", False, f"/dev/shm is small: {', '.join(small)}", f"{mend} --object-store-memory")
    least = min((node.shm_bytes for node in nodes), default=0)
    return Check("shm", True, f"/dev/shm has at least {least / MIB:.0f} MiB on every node")


def check_memory(config: RunConfig, stages: Mapping[str, Mapping[str, int]] | str, nodes: Sequence[NodeFacts]) -> Check:
    """What one worker needs in its largest stage is free on the GPUs it may land on, or in main memory on CPUs."""
    if isinstance(stages, str):
        # The arithmetic failed, not the cluster: no reason to keep a job from starting.
        return Check("memory", True, f"not estimated: {stages}")
    engine = config.engine
    stage = max(stages, key=lambda name: sum(stages[name].values()))
    process = {"CUDA context": CUDA_CONTEXT} if engine.use_gpu else {"Python's libraries": LIBRARIES}
    terms = {**stages[stage], **process}
    need = sum(terms.values())
    said = f"a worker needs {describe_memory(terms)} (stage {stage})"
    if engine.use_gpu:
        free = [(f"GPU {i} of {n.name}", each[0]) for n in nodes for i, each in enumerate(n.gpus)]
        if not free:
            return Check("memory", False, f"{said}; no node shows a GPU", "install NVIDIA's driver and container tools")
        usable = [entry for entry in free if entry[1] >= need]
        if len(usable) < engine.fewest_workers:
            name, most = max(free, key=lambda entry: entry[1])
            found = f"{len(usable)} of {len(free)} GPUs have that free, {engine.fewest_workers} are needed"
            mend = "end what holds them, or raise engine.zero_stage or gradient_accumulation_steps, or set bf16"
            return Check("memory", False, f"{said}; {found} (most: {most / GIB:.1f} GiB on {name})", mend)
        return Check("memory", True, f"{said}; {len(usable)} of {len(free)} GPUs have that free ({NOT_COVERED})")
    tight = []
    for node in nodes:
        here = min(engine.num_workers, int(node.resources.get("CPU", 0.0) / engine.cpus_per_worker + 1e-9))
        if here * need > node.memory_bytes:
            tight.append(f"{node.name} may get {here} and has {node.memory_bytes / GIB:.1f} GiB")
    if tight:
        mend = "use larger nodes, or raise engine.cpus_per_worker so that fewer workers share one"
        return Check("memory", False, f"{said}; {', '.join(tight)}", mend)
    return Check("memory", True, f"{said}; every node has that in main memory for the workers it may get")


def check_mlflow(config: RunConfig, trouble: str | None) -> Check:
    """The tracking store answers the process that tracks, which is the job's driver."""
    uri = config.tracking.tracking_uri
    if not config.tracking.enabled:
        return Check("mlflow", True, "tracking is switched off")
    if uri is None:
        return Check("mlflow", True, "sqlite in the run directory; no server is asked for")
    if trouble is not None:
        mend = "start it, correct tracking.tracking_uri, or set MLFLOW_TRACKING_USERNAME and _PASSWORD for the job"
        return Check("mlflow", False, f"the store does not answer ({trouble})", mend)
    return Check("mlflow", True, "the store answers")


def check_model(name: str, nodes: Sequence[NodeFacts]) -> Check:
    """Every node can read the model, and sees the same; a known shape has nothing to be read."""
    if is_shape(name):
        return Check("model", True, f"{name} is a size to estimate with; there is nothing to read")
    broken = [f"{node.name}: {node.model.error}" for node in nodes if node.model.error is not None]
    if broken:
        mend = "put it on storage that every node mounts and give its absolute path"
        return Check("model", False, f"{name} cannot be read on {', '.join(broken)}", mend)
    kinds: dict[tuple[int, int], list[str]] = {}
    for node in nodes:
        kinds.setdefault((node.model.num_files, node.model.size_bytes), []).append(node.name)
    described = [
        f"{_plural(n, 'file')}, {size / MIB:.1f} MiB on {', '.join(names)}" for (n, size), names in kinds.items()
    ]
    if len(kinds) > 1:
        mend = "copy one of them everywhere, or use shared storage"
        return Check("model", False, f"{name} differs between nodes: {' but '.join(described)}", mend)
    return Check("model", True, f"{name} is readable on {_plural(len(nodes), 'node')}")


def check_data(name: str, listing: Listing) -> Check:
    """The driver can read the pictures; the nodes get what it makes of them."""
    if listing.error is not None:
        mend = "put it on storage that the driver's node mounts and give its absolute path"
        return Check("data", False, f"{name} cannot be read by the driver: {listing.error}", mend)
    return Check("data", True, f"{name} is readable where the job's driver runs")


def fit_or_reason(find: Callable[[], Mapping[Any, Mapping[str, int]]]) -> Mapping[Any, Mapping[str, int]] | str:
    """What `find` returns, or the message of its RaygardError."""
    try:
        return find()
    except RaygardError as error:
        return str(error)


def _plural(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
