"""One process that never holds all gradients: each is used and freed as soon as the backward pass has made it.

The mask needs of a publisher's gradient no more than <g_i, theta_d_i>, and a user step of one tensor no other tensor's
gradient, unless the norm of all is clipped. So the end of a backward pass needs a copy of the model in float32 less.
Its beginning, where activations are largest, needs less only if the denoiser is bfloat16 itself: autocast keeps a copy
of all weights until then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raygard.bilevel.alternation import DenoiserLoss
from raygard.bilevel.optimizer import BilevelOptimizer
from raygard.diffusion.conditioning import Conditioning


class StreamedEngine:
    """An `alternation.Engine` that steps inside the backward pass.

    optimizer: bound to whole tensors (`ShardLayout.dense`), float32 or bfloat16, without clipping. Weights move while
    the backward pass goes on, each when nothing before it needs it any more, so the result equals that of a step after
    it bit for bit.
    """

    def __init__(self, module: DenoiserLoss, optimizer: BilevelOptimizer) -> None:
        if optimizer.max_grad_norm > 0:
            raise ValueError("clipping needs all gradients at once; max_grad_norm must be 0")
        self.module, self.optimizer = module, optimizer
        for shard in optimizer.shards():
            shard.register_post_accumulate_grad_hook(optimizer.consume)

    @property
    def device(self) -> torch.device:
        return self.optimizer.shards()[0].device

    def __call__(self, latents: Tensor, conditioning: Conditioning, noise: Tensor, timesteps: Tensor) -> Tensor:
        return self.module(latents, conditioning, noise, timesteps)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.finish()
