"""Mask learning arranged as the published code does it, to compare raygard's with (methods.md, sections 4 to 6).

theta(m) in float32 with a float32 gradient, theta_d in bfloat16, autoencoder and text encoder on the device in bfloat16
and run in every step, SGD in the lower loop, and loops over the tensors with copies and a synchronisation for each.
Written from that description. Where it says nothing, or where the published choice only changes results (initial
logits, the update rule), it does what raygard does, so that both can be compared number by number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raygard.bilevel.batches import BatchSource
from raygard.bilevel.rules import Rule
from raygard.diffusion.cache import encode_pixels
from raygard.diffusion.conditioning import Conditioning
from raygard.diffusion.loss import TrainingLoss, draw


class PublishedArrangement:
    """Both kinds of step. theta_pre is what `unet` holds on entry; theta_ft by name.

    pixels: uint8 (n, H, W, 3); tokens: int64 (n, L); the rows that batches name.
    """

    def __init__(
        self,
        unet: nn.Module,
        vae: Any,
        text_encoder: Any,
        loss: TrainingLoss,
        rule: Rule,
        temperature: float,
        lr: float,
        theta_ft: dict[str, Tensor],
        pixels: Tensor,
        tokens: Tensor,
        device: str,
        precision: torch.dtype,
    ) -> None:
        self.device, self.precision, self.lr, self.temperature = device, precision, lr, temperature
        self.unet = unet.to(device)
        self.vae, self.text_encoder = vae.to(device, precision), text_encoder.to(device, precision)
        self.loss, self.rule, self.state = loss, rule, rule.initial()
        self.pixels, self.tokens = pixels, tokens
        self.theta_d: dict[str, Tensor] = {}
        m = rule.soft(self.state)
        with torch.no_grad():
            for i, (name, parameter) in enumerate(self.unet.named_parameters()):
                difference = parameter - theta_ft[name].to(device)
                self.theta_d[name] = difference.to(torch.bfloat16)
                parameter.sub_(difference * (1 - m[i].item()))

    def losses(self, source: BatchSource, step: int) -> tuple[Tensor, Tensor]:
        """Mean loss of the illegal and of the legal half of a batch; pictures and captions are encoded here."""
        batch = source.batches(step)[0].to(self.device)
        rows, slots = source.rows(step), range(source.batch_size)
        eps = draw(source.seed, source.stream, step, list(slots), source.data.shape, source.num_timesteps)[0]
        with torch.no_grad(), torch.autocast(self.device, self.precision, self.precision != torch.float32):
            mean, std = encode_pixels(self.vae, self.pixels[rows], self.device)
            text = self.text_encoder(self.tokens[rows].to(self.device))[0].float()
        latents = (mean + std * eps).to(self.device)
        with torch.autocast(self.device, self.precision, self.precision != torch.float32):
            each = self.loss.per_sample(self.unet, latents, Conditioning(text=text), batch.noise, batch.timesteps)
        return each[batch.illegal].mean(), each[~batch.illegal].mean()

    def user_step(self, source: BatchSource, step: int) -> None:
        illegal, legal = self.losses(source, step)
        (illegal + legal).backward()
        with torch.no_grad():
            for i, (name, parameter) in enumerate(self.unet.named_parameters()):
                m = torch.sigmoid(self.state["logits"][i].to(self.device).float() / self.temperature)
                assert parameter.grad is not None
                delta = self.lr * parameter.grad * (1 - m)
                self.theta_d[name] = (self.theta_d[name] + delta).to(torch.bfloat16)
                parameter.data = parameter.data - delta * (1 - m)
        self.unet.zero_grad()

    def publisher_step(self, source: BatchSource, step: int) -> None:
        illegal, legal = self.losses(source, step)
        (legal - illegal).backward()
        signal = torch.empty(len(self.theta_d), dtype=torch.float64)
        with torch.no_grad():
            for i, (name, parameter) in enumerate(self.unet.named_parameters()):
                assert parameter.grad is not None
                signal[i] = (parameter.grad * self.theta_d[name]).sum().item()
            before = self.rule.soft(self.state)
            self.rule.update(self.state, signal)
            after = self.rule.soft(self.state)
            for i, (name, parameter) in enumerate(self.unet.named_parameters()):
                parameter.data = parameter.data + self.theta_d[name] * (after[i] - before[i]).item()
        self.unet.zero_grad()
