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
    """The optimizer of GRPO and SFT."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"  # AdamW of torch, or of bitsandbytes with 8-bit moments
    rounding: Literal["masters", "stochastic"] = "masters"  # From float32 copies, or by chance
    micro_batch_tokens: Annotated[int, Interval(ge=1, le=10**9)] | Literal["auto"] = "auto"
    """Tokens in one forward and backward; changes memory and speed, not the gradient. auto: what fits."""
    activation_checkpointing: bool = False  # Compute activations again in backward: less memory, slower


class Optimizer:
    """AdamW, one piece of a parameter at a time, so that only one piece at a time has temporaries."""

    def __init__(self, model: nn.Module, settings: OptimizerSettings = OptimizerSettings()):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Smallest first: when the largest tensor needs room for its update, the other gradients are gone.
        smallest_first = sorted(trained, key=lambda name: trained[name].numel())
        self.parameters = {name: trained[name] for name in smallest_first}
        self.updates = 0
        self.skipped_in_a_row = 0  # updates skipped since the last one taken
        self.pieces: dict[str, list[Piece]] = {}
        for name, parameter in self.parameters.items():
            way = way_to_keep(name, parameter.dtype, settings.rounding)
            self.pieces[name] = [way(part, settings.kind) for part in flat_parts(parameter)]

    @torch.no_grad()
    def step(self, learning_rate: float, skip: bool = False) -> float:
        """Clip the gradient to MAX_GRAD_NORM, update the parameters, clear the gradient; return its norm.

        With `skip`, or if the norm is not finite, nothing is updated, and NaN is returned.
        """
        # 1. The norm before clipping.
        gradients = (p.grad for p in self.parameters.values() if p.grad is not None)
        norm = math.nan if skip else joint_norm(gradients)
        if not math.isfinite(norm):
            self.clear_gradients()
            self.skipped_in_a_row += 1
            return math.nan

        # 2. The update.
        scale = min(1.0, MAX_GRAD_NORM / (norm + 1e-6))
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient_parts = flat_parts(parameter.grad)
            for number, piece in enumerate(self.pieces[name]):
                random_key = f"{self.updates} {name} {number}"
                piece.update(gradient_parts[number], scale, learning_rate, random_key)
            parameter.grad = None
        self.updates += 1
        self.skipped_in_a_row = 0
        return norm

    def clear_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None


class Piece:
    """At most PIECE float32 weights of a parameter, which AdamW updates in place."""

    def __init__(self, weights: Tensor, kind: str):
        self.weights = weights
        self.master = nn.Parameter(weights.float())  # what AdamW updates; float32 weights are not copied
        self.adamw = make_adamw(kind, self.master)

    def update(self, gradient: Tensor, scale: float, learning_rate: float, random_key: str) -> None:
        """Take a step of AdamW on `scale * gradient`."""
        self.before_step()
        self.master.grad = gradient.float().mul_(scale)
        self.adamw.param_groups[0]["lr"] = learning_rate
        self.adamw.step()
        self.master.grad = None
        self.after_step(random_key)

    def before_step(self) -> None:
        pass

    def after_step(self, random_key: str) -> None:
        pass


class PieceWithMaster(Piece):
    """AdamW updates a float32 copy, which is then rounded into the weights: 4 bytes per weight.

    Near 0.02 a bfloat16 weight moves in steps of 1.2e-4, so an update of 1e-6 would round to nothing.
    """

    def after_step(self, random_key: str) -> None:
        self.weights.copy_(self.master)


class StochasticPiece(Piece):
    """AdamW updates a float32 copy that exists only during the step: no memory, but noise.

    The copy is rounded up or down by chance, with the exact expectation.
    """

    def __init__(self, weights: Tensor, kind: str):
        super().__init__(weights, kind)
        self.drop_copy()

    def before_step(self) -> None:
        self.master.data = self.weights.float()

    def after_step(self, random_key: str) -> None:
        self.weights.copy_(round_stochastically(self.master.data, random_key))
        self.drop_copy()

    def drop_copy(self) -> None:
        self.master.data = self.weights.new_empty(0, dtype=torch.float32)


def way_to_keep(name: str, dtype: torch.dtype, rounding: str) -> type[Piece]:
    """The class of the pieces of a parameter. ValueError: this rounding does not suit its dtype."""
    if dtype == torch.float32:
        return Piece
    if rounding == "masters":
        return PieceWithMaster
    if dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding is for bfloat16 weights; {name} is {dtype}")
    return StochasticPiece


def flat_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """`tensor` as flat views of at most PIECE elements."""
    return tensor.detach().view(-1).split(PIECE)


def joint_norm(gradients: Iterable[Tensor]) -> float:
    """The Euclidean norm of all gradients as one vector."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    if not norms:
        return 0.0
    return float(torch.stack(norms).norm())


def round_stochastically(x: Tensor, key: str) -> Tensor:
    """float32 to bfloat16, up or down with chances that make `x` the expectation; equal keys, equal choices.

    A bfloat16 is the upper half of a float32: a random number is added to the lower half, and may carry.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little", signed=True)
    generator = torch.Generator(x.device).manual_seed(seed)
    bits = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits += x.view(torch.int32)
    bits &= -(2**16)
    return bits.view(torch.float32).bfloat16()


def make_adamw(kind: str, parameter: nn.Parameter) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) for one tensor, or bitsandbytes' with 8-bit moments (arXiv:2110.02861)."""
    betas = (0.9, 0.95)
    if kind == "adamw":
        return torch.optim.AdamW([parameter], betas=betas, weight_decay=0.0, fused=True)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of 4-bit kernels, not used here
    from bitsandbytes import optim  # takes seconds, and most runs do not need it

    return optim.AdamW8bit([parameter], betas=betas, weight_decay=0.0)
