"""The whole run as typed, validated configuration.

One frozen pydantic model for each concern; YAML files in `jobs/configs/`, dotted overrides on the command line
(`mask.freeze_ratio=0.5`). Unknown keys and values out of range raise RaygardError with one line that names the
key and the nearest valid one. Option names follow diffusers (`learning_rate`, `mixed_precision`), Ray
(`num_workers`, `max_failures`) and the paper (`freeze_ratio`, `temperature`, `inner_steps`).
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from raygard.config_adapt import AdaptConfig
from raygard.config_compare import CompareConfig
from raygard.config_domain import DomainConfig
from raygard.config_section import UNQUOTED_NO, Section, check_batch, once
from raygard.errors import nearest
from raygard.redaction import without_credentials
from raygard.shares import largest_share
from raygard.values_config import ValuesConfig

# Rules of `mask.rule` that choose tensors without learning anything.
UNLEARNED_RULES = ("largest-first",)
DEFAULT_RULE = "average"
# Of Eq 5, which a search may vary.
WEIGHTS = ("illegal_weight", "legal_weight")


class ModelConfig(Section):
    """Which diffusion model the mask is for."""

    pretrained_model_name_or_path: str = Field(
        "zoo:tiny-sd", description="diffusers directory, hub id, or 'zoo:tiny-sd' for the bundled model"
    )
    revision: str | None = None
    variant: str | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        None, description="overrides the scheduler's own setting"
    )


class MaskConfig(Section):
    """What is frozen and by which update rule the logits are learned."""

    freeze_ratio: float = Field(0.3, gt=0, lt=1, description="p")
    budget: Literal["count", "params"] = Field("count", description="p counts tensors or parameters")
    draw_ratios: tuple[float, ...] = Field(
        (),
        description="p is drawn anew from these for each publisher step: one ranking, good at all of them; average "
        "learns at no less than 0.3",
    )
    rule: str = Field(
        DEFAULT_RULE,
        description="update rule of the logits: average, budget, paper; largest-first learns and relearns nothing",
    )
    temperature: float = Field(0.2, gt=0, le=100, description="T in m = sigmoid(w / T)")
    mask_lr: float | None = Field(None, gt=0, description="step size of the logits; null: the rule's default")
    sparsity_weight: float | None = Field(None, ge=0, description="weight of Eq 6, rule 'paper' only; null: 5e3")

    @field_validator("rule")
    @classmethod
    def _known_rule(cls, rule: str) -> str:
        from raygard.bilevel.rules import RULES

        known = (*RULES, *UNLEARNED_RULES)
        if rule not in known:
            raise ValueError(f"unknown rule '{rule}'{nearest(rule, known)}")
        return rule

    @property
    def learned(self) -> bool:
        """Whether `rule` learns logits, rather than choosing tensors by what they are."""
        return self.rule not in UNLEARNED_RULES

    @model_validator(mode="after")
    def _no_inert_setting(self) -> MaskConfig:
        from raygard.bilevel.rules import RULES

        if not self.learned:
            for key in ("draw_ratios", "temperature", "mask_lr", "sparsity_weight"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"mask.{key} has no effect with mask.rule={self.rule}; remove it")
            return self
        if self.sparsity_weight is not None and not RULES[self.rule].uses_sparsity_weight:
            raise ValueError(f"mask.sparsity_weight has no effect with mask.rule={self.rule}; remove it")
        if self.draw_ratios and not RULES[self.rule].draws_ratios:
            raise ValueError(f"mask.draw_ratios has no effect with mask.rule={self.rule}; remove it")
        return self

    @field_validator("draw_ratios")
    @classmethod
    def _ratios_in_range(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        return _ratios(ratios)


def _ratios(values: tuple[float, ...]) -> tuple[float, ...]:
    for value in values:
        if not 0 < value < 1:
            raise ValueError(f"a freeze ratio p lies between 0 and 1, got {value:g}")
    return values


class RelearnConfig(Section):
    """Full fine-tuning of the base on illegal and legal pictures with AdamW: theta_pre -> theta_ft.

    Batch size, moments, weight decay and clipping are those of `bilevel`.
    """

    max_train_steps: int = Field(200, ge=1)
    learning_rate: float = Field(1e-5, gt=0)


class BilevelConfig(Section):
    """Algorithm 1: K publisher steps, each after L user steps."""

    publisher_steps: int = Field(40, ge=1, description="K")
    inner_steps: int = Field(10, ge=1, description="L, user steps before each publisher step")
    user_optimizer: Literal["sgd", "adamw"] = "adamw"
    user_lr: float = Field(1e-5, gt=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    adam_weight_decay: float = Field(1e-2, ge=0)
    max_grad_norm: float = Field(1.0, ge=0, description="clips user steps only; 0 switches it off")
    illegal_weight: float = Field(1.0, ge=0, description="lambda_1 of Eq 5; not of rule 'average'")
    legal_weight: float = Field(1.0, ge=0, description="lambda_2 of Eq 5; not of rule 'average'")
    train_batch_size: int = Field(16, ge=2, description="global batch, half illegal and half legal")
    gradient_accumulation_steps: int = Field(1, ge=1)
    snr_gamma: float | None = Field(None, gt=0, description="min-SNR weighting; off when null")

    def micro_batch(self, num_workers: int) -> int:
        """Pictures of the largest micro-batch."""
        return 2 * largest_share(self.train_batch_size // 2, num_workers * self.gradient_accumulation_steps)


class EngineConfig(Section):
    """How training runs inside Ray Train and DeepSpeed."""

    num_workers: int = Field(1, ge=1)
    min_workers: int | None = Field(
        None, ge=1, description="so few may go on when nodes are lost; null: exactly num_workers (docs/failures.md)"
    )
    zero_stage: Literal[0, 1, 2, 3] = 2
    mixed_precision: Annotated[Literal["no", "bf16"], UNQUOTED_NO] = "no"
    use_gpu: bool = False
    cpus_per_worker: float = Field(1.0, gt=0)
    torch_threads: int = Field(1, ge=1)
    max_failures: int = Field(3, ge=-1)
    checkpointing_steps: int = Field(5, ge=1, description="publisher steps between checkpoints")
    checkpoints_total_limit: int = Field(2, ge=1)
    gradient_checkpointing: bool = False
    channels_last: bool = Field(False, description="memory format of latents")
    compile: bool = Field(False, description="torch.compile of the denoiser's repeated blocks")
    offload_optimizer_device: Literal["none", "cpu"] = Field("none", description="ZeRO-Offload; ZeRO 1 to 3")
    offload_param_device: Literal["none", "cpu"] = Field("none", description="ZeRO-Offload; ZeRO 3")
    theta_d_dtype: Literal["float32", "bfloat16"] = Field("float32", description="bfloat16 is rounded at random")
    theta_d_device: Literal["worker", "cpu"] = Field("worker", description="cpu: main memory, pinned")
    stream_gradients: bool = Field(
        False, description="use each gradient as it arrives; one worker without DeepSpeed (docs/bilevel.md)"
    )
    timeout_s: float = Field(1800.0, gt=0, description="collective timeout")
    node_timeout_s: float = Field(
        900.0, gt=0, description="after lost nodes: how long to wait for room for the workers before giving up"
    )
    check_cluster: bool = Field(True, description="refuse a cluster that cannot run the job (docs/cluster-jobs.md)")

    @property
    def fewest_workers(self) -> int:
        """How many workers there must be room for."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @model_validator(mode="after")
    def _fewer_than_all(self) -> EngineConfig:
        if self.fewest_workers > self.num_workers:
            raise ValueError(f"engine.min_workers {self.min_workers} is above engine.num_workers {self.num_workers}")
        return self

    @model_validator(mode="after")
    def _options_fit_the_stage(self) -> EngineConfig:
        zero = self.zero_stage
        if self.offload_optimizer_device == "cpu" and zero == 0:
            raise ValueError("engine.offload_optimizer_device=cpu needs engine.zero_stage 1, 2 or 3, not 0")
        if self.offload_param_device == "cpu" and zero != 3:
            raise ValueError(f"engine.offload_param_device=cpu needs engine.zero_stage=3, not {zero}")
        if self.theta_d_device == self.offload_optimizer_device == "cpu":
            raise ValueError(
                "engine.offload_optimizer_device=cpu takes theta_d along; engine.theta_d_device=cpu has no effect"
            )
        if self.compile and zero == 3:
            raise ValueError("engine.compile needs engine.zero_stage below 3, which takes weights apart between layers")
        if self.stream_gradients and (self.num_workers, zero) != (1, 0):
            raise ValueError(
                "engine.stream_gradients is for one worker without sharding: set engine.num_workers=1 and "
                "engine.zero_stage=0"
            )
        return self


class GenerationConfig(Section):
    """Pictures drawn from an adapted model: the same noise for every defence."""

    num_images: int = Field(24, ge=2, description="pictures for each class, over its reference captions in turn")
    num_inference_steps: int = Field(25, ge=1)
    guidance_scale: float = Field(4.0, ge=1)
    batch_size: int = Field(8, ge=1)


class EvaluationConfig(Section):
    """Which defences are compared, how often, and by what scorer."""

    scorer: str = "style_enlite0"
    defences: tuple[str, ...] = Field(
        ("none", "freeze", "random", "random-matched", "largest-first"), description="masks, see docs/defences.md"
    )
    random_draws: int = Field(3, ge=1, description="draws of each random mask")
    mask_seeds: tuple[int, ...] = Field((0,), min_length=1, description="one mask is learned for each")
    adaptation_seeds: tuple[int, ...] = Field((0,), min_length=1)
    half: Literal["user", "publisher"] = Field("user", description="publisher: simulated users on the select part")
    bootstrap_samples: int = Field(2000, ge=100)
    cpus_per_job: float = Field(1.0, gt=0, description="of one adaptation task")
    gpus_per_job: float = Field(0.0, ge=0)
    generators: int = Field(1, ge=1, description="actors that hold a warm pipeline each")
    generator_cpus: float = Field(0.0, ge=0, description="0: shares the CPUs of the adaptations")
    generator_gpus: float = Field(0.0, ge=0)
    scorers: int = Field(1, ge=1, description="actors that hold one evaluation network each")
    scorer_cpus: float = Field(0.0, ge=0)
    scorer_gpus: float = Field(0.0, ge=0)
    actor_threads: int = Field(1, ge=1, description="CPU threads of each generator and scorer")
    max_attempts: int = Field(3, ge=1, description="after so many failures an item is reported and left out")
    item_timeout_s: float = Field(600.0, gt=0, description="an actor or adaptation silent for longer is replaced")

    @field_validator("defences", "mask_seeds", "adaptation_seeds")
    @classmethod
    def _no_repetition(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return once(values)

    @field_validator("gpus_per_job", "generator_gpus", "scorer_gpus")
    @classmethod
    def _whole_gpus(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError(f"above 1 GPUs are given out whole, got {gpus:g}")
        return gpus

    @field_validator("defences")
    @classmethod
    def _known_defences(cls, defences: tuple[str, ...]) -> tuple[str, ...]:
        from raygard.baselines import DEFENCES

        for name in defences:
            if name not in DEFENCES:
                raise ValueError(f"unknown defence '{name}'{nearest(name, DEFENCES)}")
        if "none" not in defences:
            raise ValueError("defences must contain 'none': every outcome is measured against it")
        return defences


class SearchConfig(Section):
    """Ray Tune over p, T, L and, where several are given, the upper loss's weights and the update rule."""

    freeze_ratios: tuple[float, ...] = Field((0.1, 0.3, 0.5, 0.7), description="p")
    temperatures: tuple[Annotated[float, Field(gt=0, le=100)], ...] = Field((), description="T; [] keeps the mask's")
    inner_steps: tuple[Annotated[int, Field(ge=1)], ...] = Field((), description="L, K times L held; [] keeps L")
    illegal_weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    legal_weights: tuple[Annotated[float, Field(ge=0)], ...] = ()
    rules: tuple[str, ...] = ()
    mode: Literal["per_ratio", "one_ranking"] = Field(
        "per_ratio", description="one_ranking: one learning run serves every p (mask.draw_ratios)"
    )
    algorithm: Literal["grid", "optuna"] = "grid"
    num_trials: int | None = Field(None, ge=1, description="optuna only; null: as many as the grid has points")
    scheduler: Literal["asha", "fifo"] = "asha"
    reduction_factor: int = Field(2, ge=2, description="ASHA keeps one in so many at each rung")
    fidelities: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0), description="shares of the full adaptation at which a trial reports its proxy"
    )
    calibration_trials: int = Field(6, ge=3, description="scored without pruning, to measure what the proxy is worth")
    min_proxy_correlation: float = Field(0.5, ge=-1, le=1, description="below this rank correlation nothing is pruned")
    legal_penalty: float = Field(2.0, ge=0, description="score = mitigation - this x legal impact above the budget")
    savings_tolerance: float = Field(
        0.0, ge=0, description="mitigation given up for a mask that freezes more parameters, which saves users more"
    )
    controls: tuple[str, ...] = Field(
        ("random", "random-matched", "largest-first"), description="scored beside the best mask of each p"
    )
    max_concurrent_trials: int | None = Field(None, ge=1, description="null: as many as the cluster can hold")

    @field_validator("freeze_ratios")
    @classmethod
    def _some_ratios(cls, ratios: tuple[float, ...]) -> tuple[float, ...]:
        if not ratios:
            raise ValueError("the search space is empty: name at least one freeze ratio, e.g. [0.1, 0.3, 0.5]")
        return _ratios(ratios)

    @field_validator(
        "freeze_ratios", "temperatures", "inner_steps", "illegal_weights", "legal_weights", "rules", "controls"
    )
    @classmethod
    def _no_repetition(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return once(values)

    @field_validator("rules")
    @classmethod
    def _known_rules(cls, rules: tuple[str, ...]) -> tuple[str, ...]:
        for rule in rules:
            if rule in UNLEARNED_RULES:
                raise ValueError(f"'{rule}' learns nothing to search for; it is scored as a control (search.controls)")
        return tuple(MaskConfig._known_rule(rule) for rule in rules)

    @field_validator("controls")
    @classmethod
    def _known_controls(cls, controls: tuple[str, ...]) -> tuple[str, ...]:
        from raygard.baselines import DEFENCES

        known = [name for name, choose in DEFENCES.items() if choose is not None]
        for name in controls:
            if name not in known:
                raise ValueError(f"unknown control '{name}'{nearest(name, known)}")
        return controls

    @field_validator("fidelities")
    @classmethod
    def _rising_to_one(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or values[-1] != 1 or values[0] <= 0 or list(values) != sorted(set(values)):
            raise ValueError("must rise from above 0 to 1, e.g. [0.25, 0.5, 1.0]")
        return values

    @model_validator(mode="after")
    def _no_inert_setting(self) -> SearchConfig:
        if self.num_trials is not None and self.algorithm == "grid":
            raise ValueError("search.num_trials has no effect with search.algorithm=grid; remove it or use optuna")
        return self


class TrackingConfig(Section):
    """MLflow. The default store is sqlite inside the run directory."""

    enabled: bool = True
    tracking_uri: str | None = Field(
        None,
        description="null: sqlite store in the run directory; its password belongs into MLFLOW_TRACKING_PASSWORD",
    )
    experiment: str = "raygard"
    log_images: bool = Field(True, description="false for domains whose pictures must not leave the cluster")


class RunConfig(Section):
    """Everything that decides the outcome of a run."""

    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    domain: DomainConfig = DomainConfig()
    mask: MaskConfig = MaskConfig()
    relearn: RelearnConfig = RelearnConfig()
    bilevel: BilevelConfig = BilevelConfig()
    values: ValuesConfig = ValuesConfig()
    engine: EngineConfig = EngineConfig()
    adapt: AdaptConfig = AdaptConfig()
    generation: GenerationConfig = GenerationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    search: SearchConfig = SearchConfig()
    compare: CompareConfig = CompareConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _rules_can_do_what_is_asked(self) -> RunConfig:
        from raygard.bilevel.rules import RULES

        weights = [
            *(f"bilevel.{name}" for name in WEIGHTS if getattr(self.bilevel, name) != 1),
            *(f"search.{name}s" for name in WEIGHTS if getattr(self.search, f"{name}s")),
        ]
        for name in self.search.rules or (self.mask.rule,):
            rule = RULES.get(name)
            if self.search.mode == "one_ranking" and not (rule and rule.draws_ratios):
                raise ValueError(f"search.mode=one_ranking needs a rule that can draw p; '{name}' cannot")
            if weights and rule and not rule.weighs_losses:
                raise ValueError(f"{weights[0]} has no effect with rule '{name}'; remove it, or set mask.rule=budget")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> RunConfig:
        b = self.bilevel
        check_batch("bilevel", b.train_batch_size, 2, "2 roles", b.gradient_accumulation_steps, self.engine.num_workers)
        return self

    @model_validator(mode="after")
    def _gradients_can_be_streamed(self) -> RunConfig:
        b = self.bilevel
        if self.engine.stream_gradients and (b.max_grad_norm > 0 or b.gradient_accumulation_steps > 1):
            raise ValueError(
                "engine.stream_gradients uses each gradient as it arrives: set bilevel.max_grad_norm=0 and "
                "bilevel.gradient_accumulation_steps=1"
            )
        return self

    @model_validator(mode="after")
    def _values_can_be_trained(self) -> RunConfig:
        self.values.check_run(self.domain.general, self.engine.num_workers)
        return self


# How work is spread: this may change between two attempts at the same run, as may where records are kept.
SCHEDULING: dict[str, set[str]] = {
    "engine": {
        *("max_failures", "checkpoints_total_limit", "timeout_s", "cpus_per_worker", "torch_threads", "check_cluster"),
        *("min_workers", "node_timeout_s"),
    },
    "evaluation": {
        *("cpus_per_job", "gpus_per_job", "actor_threads", "max_attempts", "item_timeout_s"),
        *("generators", "generator_cpus", "generator_gpus", "scorers", "scorer_cpus", "scorer_gpus"),
    },
    "search": {"max_concurrent_trials"},
}


def public(config: RunConfig) -> RunConfig:
    """The configuration as everyone may read it: the tracking store's address is without user and password."""
    uri = config.tracking.tracking_uri
    tracking = config.tracking.model_copy(update={"tracking_uri": uri and without_credentials(uri)})
    return config.model_copy(update={"tracking": tracking})


def decides(key: str) -> bool:
    """Whether a dotted key decides results, and is neither scheduling nor tracking."""
    section, _, name = key.partition(".")
    return section != "tracking" and name not in SCHEDULING.get(section, set())


def config_hash(config: RunConfig) -> str:
    """SHA-256 (hex, 16 characters) of the canonical JSON of all that decides results."""
    content = config.model_dump(mode="json", exclude={**SCHEDULING, "tracking": True})
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(config: BaseModel) -> dict[str, Any]:
    """Return `{'mask.freeze_ratio': 0.3, ...}`, lists as comma-separated strings, mappings in them as sorted JSON."""
    flat: dict[str, Any] = {}

    def text(item: Any) -> str:
        return json.dumps(item, sort_keys=True) if isinstance(item, dict) else str(item)

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            flat[prefix] = ",".join(map(text, value)) if isinstance(value, list) else value

    walk("", config.model_dump(mode="json"))
    return flat
