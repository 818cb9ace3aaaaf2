"""AdamW over float32 master weights, in torch's or in bitsandbytes' 8-bit version, one parameter at a time."""

import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")


class Optimizer:
    """AdamW that loses no small update.

    Near 0.02 a bfloat16 weight moves in steps of 1.2e-4, so an update of 1e-6 would round to nothing. Parameters that
    are not float32 therefore get a float32 master copy, which is what the optimizer updates; the rounded result is
    copied into the model. Float32 parameters are updated in place.

    Each parameter has an optimizer of its own, so that only one float32 gradient exists at a time.

    Attributes:
        moved_share: of weights below float32, how many changed in the last step; None for float32. Near zero, the
            learning rate is too small for the weights' precision to show anything for many steps.
    """

    def __init__(self, model: nn.Module, kind: str = "adamw", learning_rate: float = 1e-6, weight_decay: float = 0.0):
        if kind not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {kind!r}")
        # Smallest first: by the time the largest tensor needs room for its update, the other gradients are gone.
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = dict(sorted(trained, key=lambda item: item[1].numel()))
        self.masters: dict[str, Tensor] = {}
        self.moved_share = None if all(p.dtype == torch.float32 for p in self.parameters.values()) else 0.0
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, parameter in self.parameters.items():
            master = parameter.detach()
            if parameter.dtype != torch.float32:
                master = master.float()
            self.masters[name] = nn.Parameter(master)
            self.optimizers[name] = make_adamw(kind, self.masters[name], learning_rate, weight_decay)

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float | None = 1.0) -> float:
        """Clip the gradients' joint norm, update every parameter, clear the gradients; return the norm before clipping."""
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in self.parameters.values() if p.grad is not None]
        norm = float(torch.stack(norms).norm()) if norms else 0.0
        moved: list[Tensor] = []
        scale = 1.0 if max_grad_norm is None else min(1.0, max_grad_norm / (norm + 1e-6))
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            master, optimizer = self.masters[name], self.optimizers[name]
            master.grad = parameter.grad.float().mul_(scale)
            parameter.grad = None
            optimizer.param_groups[0]["lr"] = learning_rate
            optimizer.step()
            master.grad = None
            if master.data_ptr() != parameter.data_ptr():
                rounded = master.to(parameter.dtype)
                moved.append((rounded != parameter).sum())
                parameter.copy_(rounded)
        if self.moved_share is not None:
            self.moved_share = int(sum(moved)) / sum(p.numel() for p in self.parameters.values())
        return norm

    def state_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Everything that resuming needs, as (name, tensor): the masters of rounded weights and Adam's moments."""
        for name, master in self.masters.items():
            if master.data_ptr() != self.parameters[name].data_ptr():
                yield f"{name}|master", master.detach()
            for key, value in self.optimizers[name].state[master].items():
                yield f"{name}|{key}", torch.as_tensor(value)

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_tensors` gave, for a model with the same parameters."""
        for full_name, tensor in tensors.items():
            name, key = full_name.split("|")
            master = self.masters[name]
            if key == "master":
                master.copy_(tensor)
            else:
                count = key == "step" and not tensor.is_floating_point()  # bitsandbytes counts in a plain integer
                self.optimizers[name].state[master][key] = int(tensor) if count else tensor.to(master.device)


def make_adamw(kind: str, parameter: nn.Parameter, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (arXiv:1711.05101) for one tensor; 8-bit moments in blocks (arXiv:2110.02861) for the bitsandbytes kinds."""
    options = {"lr": learning_rate, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    if kind == "adamw":
        return torch.optim.AdamW([parameter], fused=True, **options)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of 4-bit kernels, which are not used here
    import bitsandbytes  # imported only where it is used: it takes seconds, and most runs do not need it

    made = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    return made[kind]([parameter], **options)
