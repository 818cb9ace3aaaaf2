"""AdamW that loses no small update and needs little memory, torch's own or in 8 bits (bitsandbytes)."""

import hashlib
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Interval
from torch import Tensor, nn

from rl.distributed import PIECE

MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class OptimizerSettings:
    """The update, in GRPO and in SFT alike."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"  # AdamW of torch, or of bitsandbytes with 8-bit moments
    rounding: Literal["masters", "stochastic"] = "masters"  # Float32 masters, or stochastic rounding
    micro_batch_tokens: Annotated[int, Interval(ge=1, le=10**9)] | Literal["auto"] = "auto"
    """Tokens in one forward and backward; changes memory and speed, not the gradient. auto: what fits."""
    activation_checkpointing: bool = False  # Compute activations again in backward: less memory, slower


class Optimizer:
    """AdamW, one piece of a parameter at a time, so that only one piece at a time has temporaries.

    Near 0.02 a bfloat16 weight moves in steps of 1.2e-4, so an update of 1e-6 would round to nothing. With
    "masters", AdamW updates float32 copies, which are then rounded into the weights: 4 bytes a weight. With
    "stochastic" (bfloat16 only), each update is rounded up or down by chance, with the exact expectation: no
    memory, but noise. Float32 weights are updated in place.
    """

    def __init__(self, model: nn.Module, settings=OptimizerSettings(), micro_batch_tokens: int = 8192):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        # Smallest first: when the largest tensor needs room for its update, the other gradients are gone.
        self.parameters = dict(sorted(trained, key=lambda item: item[1].numel()))
        self.stochastic = settings.rounding == "stochastic"
        self.micro_batch_tokens = micro_batch_tokens  # of a forward and backward; halved if memory runs out
        self.skipped_in_a_row = 0  # updates skipped since the last one taken
        self.steps = 0
        self.masters: dict[str, list[nn.Parameter]] = {}
        self.optimizers: dict[str, list[torch.optim.Optimizer]] = {}
        for name, parameter in self.parameters.items():
            if self.stochastic and parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"stochastic rounding is for bfloat16 weights; {name} is {parameter.dtype}")
            self.masters[name] = [nn.Parameter(self.master_of(piece)) for piece in pieces(parameter)]
            self.optimizers[name] = [make_adamw(settings.kind, master) for master in self.masters[name]]

    def master_of(self, piece: Tensor) -> Tensor:
        """What AdamW updates: float32 weights themselves, a copy, or nothing if each step makes a copy."""
        if self.stochastic and piece.dtype != torch.float32:
            return piece.new_empty(0, dtype=torch.float32)
        return piece.float()

    @torch.no_grad()
    def step(self, learning_rate: float, skip: bool = False) -> float:
        """Clip the gradient to MAX_GRAD_NORM, update the parameters, clear the gradient; return its norm.

        With `skip`, or if the norm is not finite, nothing is updated, and NaN is returned.
        """
        gradients = (p.grad for p in self.parameters.values() if p.grad is not None)
        norm = math.nan if skip else joint_norm(gradients)
        if not math.isfinite(norm):
            self.clear_gradients()
            self.skipped_in_a_row += 1
            return math.nan
        scale = min(1.0, MAX_GRAD_NORM / (norm + 1e-6))
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            columns = (pieces(parameter), pieces(parameter.grad), self.masters[name], self.optimizers[name])
            for number, (weights, gradient, master, adamw) in enumerate(zip(*columns, strict=True)):
                if weights.dtype != torch.float32 and self.stochastic:
                    master.data = weights.float()
                master.grad = gradient.float().mul_(scale)
                adamw.param_groups[0]["lr"] = learning_rate
                adamw.step()
                master.grad = None
                if weights.dtype != torch.float32 and self.stochastic:
                    weights.copy_(round_stochastically(master.data, f"{self.steps} {name} {number}"))
                    master.data = self.master_of(weights)
                elif weights.dtype != torch.float32:
                    weights.copy_(master)
            parameter.grad = None
        self.steps += 1
        self.skipped_in_a_row = 0
        return norm

    def clear_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """`tensor` as flat views of at most PIECE elements."""
    return tensor.detach().view(-1).split(PIECE)


def joint_norm(gradients: Iterable[Tensor]) -> float:
    """The Euclidean norm of all gradients as one vector."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return float(torch.stack(norms).norm()) if norms else 0.0


def round_stochastically(x: Tensor, key: str) -> Tensor:
    """float32 to bfloat16, up or down with chances that make `x` the expectation; equal keys, equal choices.

    A bfloat16 is the upper half of a float32: a random number is added to the lower half, and may carry.
    """
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    generator = torch.Generator(x.device).manual_seed(seed)
    bits = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits += x.view(torch.int32)
    bits &= -(2**16)
    return bits.view(torch.float32).bfloat16()


def make_adamw(kind: str, parameter: nn.Parameter) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) for one tensor, or bitsandbytes' with 8-bit moments (arXiv:2110.02861)."""
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    if kind == "adamw":
        return torch.optim.AdamW([parameter], fused=True, **options)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of 4-bit kernels, not used here
    from bitsandbytes import optim  # takes seconds, and most runs do not need it

    return optim.AdamW8bit([parameter], **options)
