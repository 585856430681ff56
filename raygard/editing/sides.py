"""One optimizer for two sides that take turns: AdamW with moments of its own for each side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

Side = Literal["inner", "outer"]
SIDES: tuple[Side, ...] = ("inner", "outer")


class TwoSidedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) of two sides, which may share tensors.

    Set `side` before the backward pass of every step: `step` moves that side's tensors alone, with that side's learning
    rate, moments and number of steps, as an optimizer of its own would. Gradients of tensors that only the other side
    trains are zero, so that a norm taken over all gradients, by whomever, is the side's own.

    tensors: of each side. One parameter group for each set of sides that trains a tensor, so that whoever flattens
    groups (DeepSpeed) never joins tensors that move at different times; `step` may find one group at a time.
    """

    def __init__(
        self,
        tensors: Mapping[Side, Iterable[nn.Parameter]],
        lr: Mapping[Side, float],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        self.side: Side = "inner"
        self.lr = dict(lr)
        of_side = {side: {id(tensor): tensor for tensor in tensors[side]} for side in SIDES}
        found: dict[tuple[Side, ...], list[nn.Parameter]] = {}
        for key, tensor in (of_side["inner"] | of_side["outer"]).items():
            sides = tuple(side for side in SIDES if key in of_side[side])
            found.setdefault(sides, []).append(tensor)
            if len(sides) < len(SIDES):
                tensor.register_hook(partial(self._of_this_side, sides))
        groups = [{"params": params, "sides": sides} for sides, params in found.items()]
        super().__init__(groups, {"betas": betas, "eps": eps, "weight_decay": weight_decay})

    def trained(self) -> list[Tensor]:
        """The tensors of the side at hand."""
        return [tensor for group in self.param_groups if self.side in group["sides"] for tensor in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move what the side at hand trains, of the groups that are there. Local."""
        if closure is not None:
            raise ValueError("TwoSidedAdamW takes no closure")
        for group in self.param_groups:
            if self.side in group["sides"]:
                self._move(group, [tensor for tensor in group["params"] if tensor.grad is not None])

    def _move(self, group: dict[str, Any], tensors: list[Tensor]) -> None:
        step, first, second = (f"{self.side}_{name}" for name in ("step", "exp_avg", "exp_avg_sq"))
        for tensor in tensors:
            state = self.state[tensor]
            if step not in state:
                state[step] = 0
                state[first], state[second] = torch.zeros_like(tensor), torch.zeros_like(tensor)
        states = [self.state[tensor] for tensor in tensors]
        adamw(
            tensors,
            [tensor.grad for tensor in tensors if tensor.grad is not None],
            [state[first] for state in states],
            [state[second] for state in states],
            [],
            [torch.tensor(float(state[step])) for state in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=self.lr[self.side],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for state in states:
            state[step] += 1

    def _of_this_side(self, sides: tuple[Side, ...], gradient: Tensor) -> Tensor:
        return gradient if self.side in sides else torch.zeros_like(gradient)
