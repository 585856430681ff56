"""One optimizer with two kinds of step: the simulated user's and the publisher's (Algorithm 1).

State on every shard: theta(m) (the parameter itself) and theta_d = theta_pre - theta_ft. Given to DeepSpeed as the
client optimizer it sees flat float32 shards at every ZeRO stage; alone it sees the model's tensors, float32 or
bfloat16. Of bfloat16 ones it keeps the missing bits itself (`halves`), so that theta(m) is float32 always. Invariant
after every step of either kind: theta(m) = theta_pre - (1 - m) theta_d.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from raygard.bilevel.halves import Halves
from raygard.bilevel.ops import SegmentOps
from raygard.bilevel.rules import Rule, RuleState
from raygard.bilevel.segments import ShardLayout
from raygard.seeding import derive_seed

StepKind = Literal["user", "publisher"]
Reduce = Callable[[Tensor], None]
MOMENTS = ("exp_avg", "exp_avg_sq")


class BilevelOptimizer(torch.optim.Optimizer):
    """User steps move theta_ft under the soft mask; publisher steps move the logits.

    user step (Eq 9, 10, 13), u = g for "sgd" and u = Adam(g) + weight_decay * theta_ft for "adamw":
        theta_d += lr (1 - m) u,   theta(m) -= lr (1 - m)^2 u
    publisher step (Eq 8, 11, 12): s_i = <dL_upper/dtheta(m)_i, theta_d_i>, one all-reduce of N numbers, logits by
    the rule, then theta(m) += theta_d (m_new - m_old).
    Adam stands inside the factor (1 - m): it rescales its input, so a factor on g would let nearly frozen tensors
    drift. rule=None keeps m = 0: plain fine-tuning that tracks theta_d (relearning).

    params: as for any torch optimizer, one parameter group. reduce: sums a tensor over ranks in place; None for one
    process. Set `kind` before each `step`. `bind` must be called once before the first step. theta_d_dtype: bfloat16
    halves what theta_d takes; it is then rounded at random, and the invariant holds up to that. theta_d_on_host: it
    lies in main memory (pinned beside a GPU) and visits the device piece by piece in every step.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        rule: Rule | None,
        user_optimizer: Literal["sgd", "adamw"] = "adamw",
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float = 0.0,
        reduce: Reduce | None = None,
        theta_d_dtype: torch.dtype = torch.float32,
        theta_d_on_host: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if len(self.param_groups) != 1:
            raise ValueError("BilevelOptimizer takes one parameter group: the mask needs one vector of logits")
        self.kind: StepKind = "user"
        self.rule = rule
        self.user_optimizer = user_optimizer
        self.max_grad_norm = max_grad_norm
        self.last: dict[str, float] = {}
        self.num_collectives = 0
        self.theta_d_dtype, self.theta_d_on_host = theta_d_dtype, theta_d_on_host
        self._signal: Tensor | None = None
        self._consumed = 0
        self._places: dict[Tensor, int] = {}
        self._reduce = reduce
        self._layout: ShardLayout | None = None
        self._ops: dict[Tensor, SegmentOps] = {}
        self._rule_state: RuleState = rule.initial() if rule is not None else {}
        self._soft = torch.empty(0, dtype=torch.float64)

    @property
    def logits(self) -> Tensor:
        """float64 (N,), equal on all ranks."""
        return self._rule_state["logits"]

    @property
    def soft(self) -> Tensor:
        """m, float64 (N,), on the CPU."""
        return self._soft

    @property
    def layout(self) -> ShardLayout:
        assert self._layout is not None, "call bind() first"
        return self._layout

    def initial_soft(self, num_tensors: int) -> Tensor:
        """m before the first publisher step, float64 (N,): the model must hold theta(m) for it when bound."""
        if self.rule is None:
            return torch.zeros(num_tensors, dtype=torch.float64)
        return self.rule.soft(self._rule_state)

    def bind(
        self,
        shards: Sequence[Tensor],
        layout: ShardLayout,
        theta_pre: Mapping[str, Tensor],
        theta_ft: Mapping[str, Tensor],
    ) -> None:
        """Give the shards their layout and values: theta_d = theta_pre - theta_ft and theta(m) for the initial m.

        shards: this rank's flat float32 tensors, or a bfloat16 model's own, in the layout's order; they are the tensors
        `step` will find in the parameter group. theta_pre, theta_ft: full tensors by name. Local, no collective.
        """
        self._layout = layout
        self._soft = self.initial_soft(layout.num_tensors)
        with torch.no_grad():
            for shard, segments in zip(shards, layout.shards, strict=True):
                ops = SegmentOps(segments, layout.num_tensors, shard.numel(), shard.device)
                self._places[shard] = len(self._ops)
                self._ops[shard] = ops
                theta_d = torch.zeros(shard.numel(), dtype=torch.float32, device=shard.device)
                relearned = torch.zeros_like(theta_d)
                one = ShardLayout(layout.names, layout.sizes, (segments,), layout.replicated)
                one.scatter(theta_pre, [theta_d])
                one.scatter(theta_ft, [relearned])
                for s in segments:
                    part = slice(s.shard_start, s.shard_start + s.length)
                    self._set_theta(shard, theta_d[part], part)
                kept = self._kept(theta_d.sub_(relearned))
                ops.set_mask(self._soft)
                ops.add_scaled(self._theta(shard), kept, "keep", -1.0)
                self.state[shard].update(theta_d=kept, step=0)

    def _theta(self, shard: Tensor) -> Tensor | Halves:
        """theta(m) of a shard, flat float32: the shard itself, or what it is with its missing bits."""
        flat = shard.detach().view(-1)
        if flat.dtype == torch.float32:
            return flat
        if "low" not in self.state[shard]:
            self.state[shard]["low"] = torch.zeros(flat.numel(), dtype=torch.int16, device=flat.device)
        return Halves(flat, self.state[shard]["low"])

    def _set_theta(self, shard: Tensor, values: Tensor, part: slice = slice(None)) -> None:
        """values: flat float32, of this part of the shard."""
        theta = self._theta(shard)[part]
        if isinstance(theta, Halves):
            theta.set(values)
        else:
            theta.copy_(values)

    def _kept(self, theta_d: Tensor) -> Tensor:
        """theta_d as this optimizer keeps it."""
        kept = theta_d.to(self.theta_d_dtype)
        if not self.theta_d_on_host:
            return kept
        return kept.cpu().pin_memory() if theta_d.is_cuda else kept

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step of the current `kind` with the gradients found in the parameter group.

        A publisher step is collective: every rank must take it.
        """
        if closure is not None:
            raise ValueError("BilevelOptimizer takes no closure")
        shards = [p for p in self.param_groups[0]["params"] if p.grad is not None]
        if len(shards) != len(self._ops):
            raise ValueError(f"{len(shards)} shards have gradients, {len(self._ops)} were bound")
        for shard in shards:
            self._zero_padding(shard)
        if self.kind == "user":
            self._clip(shards)
        for shard in shards:
            self._use(shard)
        if self.kind == "publisher":
            self._update_mask()

    @torch.no_grad()
    def consume(self, shard: Tensor) -> None:
        """Do one shard's part of the step of the current `kind` and free its gradient.

        For gradients that are used as they arrive: when all shards were consumed, `finish` ends the step. A gradient
        must be whole, and nothing may need theta(m) of this shard any more; there is no clipping.
        """
        self._zero_padding(shard)
        self._use(shard)
        shard.grad = None
        self._consumed += 1

    @torch.no_grad()
    def finish(self) -> None:
        """End a step whose gradients were consumed. Collective where `step` is."""
        consumed, self._consumed = self._consumed, 0
        if consumed != len(self._ops):
            raise ValueError(f"{consumed} shards have had gradients, {len(self._ops)} were bound")
        if self.kind == "publisher":
            self._update_mask()

    def _zero_padding(self, shard: Tensor) -> None:
        assert shard.grad is not None
        self._ops[shard].zero_padding(shard.grad.view(-1))

    def _clip(self, shards: Sequence[Tensor]) -> None:
        if self.max_grad_norm > 0:
            square = torch.stack([torch.linalg.vector_norm(_grad(p)).double() ** 2 for p in shards]).sum()
            self._sum_over_ranks(square)
            norm = float(square.sqrt())
            self.last["grad_norm"] = norm
            if norm > self.max_grad_norm:
                for shard in shards:
                    assert shard.grad is not None
                    shard.grad.mul_(self.max_grad_norm / norm)

    def _use(self, shard: Tensor) -> None:
        """A user step of one shard, or its part of the publisher's signal."""
        if self.kind == "user":
            self._user_step(self.param_groups[0], shard)
            return
        if self.rule is None:
            raise ValueError("publisher steps need an update rule")
        if self._signal is None:
            self._signal = torch.zeros(self.layout.num_tensors, dtype=torch.float64, device=shard.device)
        self._signal += self._ops[shard].inner(_grad(shard), self.state[shard]["theta_d"])

    def _user_step(self, group: dict[str, Any], shard: Tensor) -> None:
        ops, state = self._ops[shard], self.state[shard]
        theta, theta_d, update = self._theta(shard), state["theta_d"], _grad(shard)
        state["step"] += 1
        if self.user_optimizer == "adamw":
            self._adam_direction(group, state, update)
            if group["weight_decay"]:
                update.add_(_value(theta), alpha=group["weight_decay"])
                ops.add_scaled(update, theta_d, "soft", -group["weight_decay"])
        ops.add_scaled(theta_d, update, "keep", group["lr"], self._rounding(shard))
        ops.add_scaled(theta, update, "keep2", -group["lr"])

    def _rounding(self, shard: Tensor) -> torch.Generator | None:
        """Keyed by step and shard, so that a resumed run rounds as an undisturbed one would have."""
        if self.theta_d_dtype == torch.float32:
            return None
        seed = derive_seed("theta_d", self.state[shard]["step"], self._places[shard])
        return torch.Generator(shard.device).manual_seed(seed)

    @staticmethod
    def _adam_direction(group: dict[str, Any], state: dict[str, Any], grad: Tensor) -> None:
        """Replace `grad` by Adam's bias-corrected direction, without the learning rate."""
        if MOMENTS[0] not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(grad), torch.zeros_like(grad)
        beta1, beta2 = group["betas"]
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = state["exp_avg_sq"].sqrt().div_((1 - beta2 ** state["step"]) ** 0.5).add_(group["eps"])
        torch.div(state["exp_avg"], denominator, out=grad)
        grad.div_(1 - beta1 ** state["step"])

    def _update_mask(self) -> None:
        """The rest of a publisher step, when the signal of all shards is there."""
        assert self.rule is not None and self._signal is not None
        self._sum_over_ranks(self._signal)
        signal, self._signal = self._signal.cpu(), None
        self.rule.update(self._rule_state, signal)
        self._soft = self.rule.soft(self._rule_state)
        self.last["signal_norm"] = float(signal.norm())
        for shard, ops in self._ops.items():
            ops.set_mask(self._soft)
            ops.add_scaled(self._theta(shard), self.state[shard]["theta_d"], "change")

    def _sum_over_ranks(self, values: Tensor) -> None:
        if self._reduce is not None and not self.layout.replicated:
            self._reduce(values)
            self.num_collectives += 1

    def theta_d(self) -> list[Tensor]:
        """theta_d of every shard as it is kept, in the layout's order."""
        if self.theta_d_on_host and torch.cuda.is_available():
            torch.cuda.synchronize()
        return [self.state[shard]["theta_d"] for shard in self._ops]

    def shards(self) -> list[Tensor]:
        return list(self._ops)

    @torch.no_grad()
    def theta(self) -> list[Tensor]:
        """theta(m) of every shard, flat float32."""
        return [_value(self._theta(shard)) for shard in self._ops]

    def theta_d_norm(self) -> float:
        """Euclidean norm of theta_d over the whole model. Collective if sharded."""
        square = torch.stack(
            [torch.linalg.vector_norm(d, dtype=torch.float32).double() ** 2 for d in self.theta_d()]
        ).sum()
        if self._reduce is not None and not self.layout.replicated:
            self._reduce(square)
        return float(square.sqrt())

    @torch.no_grad()
    def invariant_error(self, theta_pre: Mapping[str, Tensor]) -> float:
        """Largest |theta(m) - theta_pre + (1 - m) theta_d| on this rank. Local."""
        worst = 0.0
        for shard, theta_d, segments in zip(self._ops, self.theta_d(), self.layout.shards, strict=True):
            theta = _value(self._theta(shard))
            for s in segments:
                part = slice(s.shard_start, s.shard_start + s.length)
                source = theta_pre[self.layout.names[s.tensor]].reshape(-1)[s.tensor_start :][: s.length]
                keep = 1 - float(self._soft[s.tensor])
                gap = theta[part] - source.to(theta) + keep * theta_d[part].to(theta)
                worst = max(worst, float(gap.abs().max()))
        return worst

    def sharded_state(self) -> dict[str, list[Tensor]]:
        """What a checkpoint must hold beside `shared_state`: for each kind one flat tensor for each shard.

        "theta" and "theta_d" always; "exp_avg" and "exp_avg_sq" once Adam has taken a step.
        """
        found = {"theta": self.theta(), "theta_d": self.theta_d()}
        for kind in MOMENTS:
            if all(kind in self.state[shard] for shard in self._ops):
                found[kind] = [self.state[shard][kind] for shard in self._ops]
        return found

    def shared_state(self) -> dict[str, Tensor]:
        """What is equal on all ranks: the rule's state (logits) and the number of user steps."""
        steps = next(iter(self.state[shard]["step"] for shard in self._ops))
        return {**{f"mask.{key}": value for key, value in self._rule_state.items()}, "step": torch.tensor(steps)}

    @torch.no_grad()
    def restore(self, sharded: Mapping[str, Sequence[Tensor]], shared: Mapping[str, Tensor]) -> None:
        """Take on the state that `sharded_state` and `shared_state` described, whatever the shards were then.

        sharded: for each kind one flat tensor for each of the present shards. `bind` must have been called.
        """
        for index, shard in enumerate(self._ops):
            low = {key: value for key, value in self.state[shard].items() if key == "low"}
            state: dict[str, Any] = {kind: values[index] for kind, values in sharded.items() if kind != "theta"}
            kept = {"theta_d": self._kept(state["theta_d"]), "step": int(shared["step"])}
            self.state[shard] = {**state, **low, **kept}
            self._set_theta(shard, sharded["theta"][index])
        self._take_rule({key.removeprefix("mask."): value for key, value in shared.items() if key.startswith("mask.")})

    def _take_rule(self, state: RuleState) -> None:
        self._rule_state = {key: value.clone() for key, value in state.items()}
        if self.rule is not None:
            self._soft = self.rule.soft(self._rule_state)
        for ops in self._ops.values():
            ops.set_mask(self._soft)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with the mask's logits and rule state under "mask"."""
        return {
            **super().state_dict(),
            "mask": {key: value.clone() for key, value in self._rule_state.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore shards' states and the mask. `bind` must have been called; theta(m), float32, is the caller's."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "mask"})
        for shard in self._ops:
            self.state[shard]["theta_d"] = self._kept(self.state[shard]["theta_d"])
        self._take_rule(state_dict["mask"])


def _value(theta: Tensor | Halves) -> Tensor:
    return theta.value() if isinstance(theta, Halves) else theta


def _grad(shard: Tensor) -> Tensor:
    assert shard.grad is not None
    return shard.grad.view(-1).float()
