"""The state of an optimizer as named tensors, the same for any number of processes, sharded or not."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lab.sharding import full_pieces, local_pieces
from rl.distributed import is_sharded
from rl.optimizer import Optimizer


def state_tensors(optimizer: Optimizer, saved_dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Everything that resuming needs, as (name, tensor): masters of rounded weights, and Adam's moments.

    `saved_dtype` is that of sharded parameters in the checkpoint: here they are float32. All ranks of a
    sharded model have to call this.
    """
    yield "updates", torch.tensor(optimizer.steps)
    for name, parameter in optimizer.parameters.items():
        dtype = saved_dtype if is_sharded(parameter) else parameter.dtype
        columns: dict[str, dict[int, Tensor]] = {}
        if dtype != torch.float32 and not optimizer.stochastic:
            columns["master"] = dict(enumerate(master.detach() for master in optimizer.masters[name]))
        for number, (master, adamw) in enumerate(
            zip(optimizer.masters[name], optimizer.optimizers[name], strict=True)
        ):
            for key, value in adamw.state[master].items():
                columns.setdefault(key, {})[number] = torch.as_tensor(value)
        for key, numbered in columns.items():
            if is_sharded(parameter):
                numbered = dict(enumerate(full_pieces(list(numbered.values()), parameter)))
            for number, value in numbered.items():
                yield f"{name}|{number}|{key}", value


@torch.no_grad()
def load_state_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take back what `state_tensors` gave, for a model with the same parameters."""
    optimizer.steps = int(tensors["updates"])
    columns: dict[tuple[str, str], dict[int, Tensor]] = {}
    for full_name in tensors.keys() - {"updates"}:
        name, number, key = full_name.split("|")
        columns.setdefault((name, key), {})[int(number)] = tensors[full_name]
    for (name, key), numbered in columns.items():
        parameter = optimizer.parameters[name]
        if is_sharded(parameter):
            numbered = dict(enumerate(local_pieces([numbered[n] for n in sorted(numbered)], parameter)))
        for number, value in numbered.items():
            master = optimizer.masters[name][number]
            if key == "master":
                master.copy_(value)
                continue
            count = key == "step" and not value.is_floating_point()  # bitsandbytes counts in a plain integer
            state = optimizer.optimizers[name][number].state[master]
            state[key] = int(value) if count else value.to(master.device)
