"""AdamW that loses no small update and needs little memory beside its state, in torch's or in bitsandbytes' 8-bit version."""

import hashlib
import logging
import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rl.sharding import divided, gathered, is_divided, local, sharding_of
from rl.workers import PIECE  # weights updated at a time, a multiple of the 256 that share a scale in 8-bit moments

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
ROUNDINGS = ("masters", "stochastic")


class Optimizer:
    """AdamW, a piece of a parameter at a time.

    Near 0.02 a bfloat16 weight moves in steps of 1.2e-4, so an update of 1e-6 would round to nothing. For weights that
    are not float32 there are two ways out. "masters": float32 copies are what is updated, and the weights are these,
    rounded; 4 bytes a weight. "stochastic": each update starts from the weights and rounds up or down by chance,
    so that the expectation is exact; it costs no memory, and noise of the size of the rounding (bfloat16 only).
    Float32 weights are updated in place.

    AdamW treats each weight by itself, so a parameter can be divided at will: each piece has an optimizer of its own, and
    the float32 copies and temporaries of one piece are all that exists at a time.

    Attributes:
        moved_share: of weights below float32, how many changed in the last step; None for float32. Near zero with
            masters, the learning rate is too small for the weights' precision to show anything for many steps.
    """

    def __init__(self, model: nn.Module, kind: str = "adamw", weight_decay: float = 0.0, rounding: str = "masters"):
        if kind not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {kind!r}")
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, not {rounding!r}")
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        # Smallest first: by the time the largest tensor needs room for its update, the other gradients are gone.
        self.parameters = dict(sorted(trained, key=lambda item: item[1].numel()))
        self.stochastic, self.sharding = rounding == "stochastic", sharding_of(model)
        self.updates = 0
        self.moved_share = None if all(p.dtype == torch.float32 for p in self.parameters.values()) else 0.0
        self.masters: dict[str, list[nn.Parameter]] = {}
        self.optimizers: dict[str, list[torch.optim.Optimizer]] = {}
        for name, parameter in self.parameters.items():
            if self.stochastic and parameter.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(f"stochastic rounding is for bfloat16 weights; {name} is {parameter.dtype}")
            self.masters[name] = [nn.Parameter(self.master_of(piece)) for piece in pieces(parameter)]
            self.optimizers[name] = [make_adamw(kind, m, weight_decay) for m in self.masters[name]]

    def master_of(self, piece: Tensor) -> Tensor:
        """What AdamW works on: the float32 weights themselves, a copy, or nothing yet if the copy is made for each step."""
        if self.stochastic and piece.dtype != torch.float32:
            return piece.new_empty(0, dtype=torch.float32)
        return piece.float()

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float | None = 1.0) -> float:
        """Clip the gradients' joint norm, update every parameter, clear the gradients; return the norm before clipping.

        If the norm is not finite nothing is updated.
        """
        norm = joint_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        if not math.isfinite(norm):
            self.clear_gradients()
            return norm
        scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
        moved: list[Tensor] = []
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            columns = (pieces(parameter), pieces(parameter.grad), self.masters[name], self.optimizers[name])
            for number, (weights, gradient, master, optimizer) in enumerate(zip(*columns, strict=True)):
                if weights.dtype != torch.float32 and self.stochastic:
                    master.data = weights.float()
                master.grad = gradient.float().mul_(scale)
                optimizer.param_groups[0]["lr"] = learning_rate
                optimizer.step()
                master.grad = None
                if weights.dtype != torch.float32:
                    moved.append(self.write_back(weights, master, f"{self.updates} {name} {number}"))
            parameter.grad = None
        self.updates += 1
        if self.moved_share is not None:
            self.moved_share = int(sum(moved)) / sum(p.numel() for p in self.parameters.values() if p.dtype != torch.float32)
        return norm

    def clear_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def write_back(self, weights: Tensor, master: nn.Parameter, key: str) -> Tensor:
        """Round `master` into `weights`; how many changed."""
        if self.stochastic:
            rounded = round_stochastically(master.data, key)
            master.data = self.master_of(weights)
        else:
            rounded = master.to(weights.dtype)
        moved = (rounded != weights).sum()
        weights.copy_(rounded)
        return moved

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that resuming needs, as (name, tensor): the masters of rounded weights and Adam's moments."""
        yield "updates", torch.tensor(self.updates)
        for name, parameter in self.parameters.items():
            saved_dtype = self.sharding.dtype if is_divided(parameter) else parameter.dtype  # a divided one is float32 here
            columns: dict[str, dict[int, Tensor]] = {}
            if saved_dtype != torch.float32 and not self.stochastic:
                columns["master"] = dict(enumerate(map(Tensor.detach, self.masters[name])))
            for number, (master, optimizer) in enumerate(zip(self.masters[name], self.optimizers[name], strict=True)):
                for key, value in optimizer.state[master].items():
                    columns.setdefault(key, {})[number] = torch.as_tensor(value)
            for key, values in columns.items():
                if is_divided(parameter):
                    values = dict(enumerate(gathered(list(values.values()), parameter)))
                for number, value in values.items():
                    yield f"{name}|{number}|{key}", value

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave, for a model with the same parameters, among however many processes."""
        self.updates = int(tensors["updates"])
        columns: dict[tuple[str, str], dict[int, Tensor]] = {}
        for name, number, key in (full_name.split("|") for full_name in tensors if full_name != "updates"):
            columns.setdefault((name, key), {})[int(number)] = tensors[f"{name}|{number}|{key}"]
        for (name, key), numbered in columns.items():
            if is_divided(self.parameters[name]):
                numbered = dict(enumerate(divided([numbered[n] for n in sorted(numbered)], self.parameters[name])))
            for number, value in numbered.items():
                master = self.masters[name][number]
                if key == "master":
                    master.copy_(value)
                    continue
                count = key == "step" and not value.is_floating_point()  # bitsandbytes counts in a plain integer
                self.optimizers[name][number].state[master][key] = int(value) if count else value.to(master.device)


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """This process's part of `tensor` as flat views of at most PIECE elements."""
    return local(tensor.detach()).view(-1).split(PIECE)


def joint_norm(gradients: list[Tensor]) -> float:
    """The Euclidean norm of all gradients as one vector, those parts included that other processes hold."""
    whole = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients if not is_divided(g)]
    parts = [torch.linalg.vector_norm(local(g), dtype=torch.float32) for g in gradients if is_divided(g)]
    if parts:
        square = torch.stack(parts).square().sum()
        dist.all_reduce(square)
        whole.append(square.sqrt())
    return float(torch.stack(whole).norm()) if whole else 0.0


def round_stochastically(x: Tensor, key: str) -> Tensor:
    """float32 to bfloat16, up or down with the chances that make `x` the expectation; the same `key`, the same choices.

    A bfloat16 is the upper half of a float32: a random number added to the lower half carries over with just that chance.
    """
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
    generator = torch.Generator(x.device).manual_seed(seed)
    bits = torch.randint(2**16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits += x.view(torch.int32)
    bits &= -(2**16)
    return bits.view(torch.float32).bfloat16()


def make_adamw(kind: str, parameter: nn.Parameter, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) for one tensor; 8-bit moments in blocks (arXiv:2110.02861) for the bitsandbytes kinds.

    Each step sets its learning rate.
    """
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    if kind == "adamw":
        return torch.optim.AdamW([parameter], fused=True, **options)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of 4-bit kernels, which are not used here
    import bitsandbytes  # imported only where it is used: it takes seconds, and most runs do not need it

    made = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return made[kind]([parameter], **options)
