"""A model too large for one device: each layer's weights divided among the processes by FSDP2's `fully_shard`.

A layer is gathered for its forward and its backward, and given back in between (ZeRO-3, arXiv:1910.02054). What each
process keeps of it is float32, computed with in the model's dtype: the masters of `rl.optimizer`, for free. Embedding,
last norm and output head stay whole on each process.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import Qwen3
from rl.workers import PIECE, Workers


@dataclass(frozen=True)
class Sharding:
    """How a model is divided.

    Attributes:
        dtype: that it computes in.
        whole_to_sample: gather all layers once a rollout phase; else each layer for every token.
    """

    dtype: torch.dtype
    whole_to_sample: bool = True


def shard(model: Qwen3, workers: Workers, device: torch.device) -> Qwen3:
    """Divide `model`'s layers among `workers`, in place, and move what each keeps to `device`."""
    from torch.distributed.device_mesh import init_device_mesh  # half a second that one process can do without
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(device).type, (workers.size,))
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
    whole = {parameter for name, parameter in model.named_parameters() if ".layers." not in name}
    for layer in model.model.layers:
        fully_shard(layer.float().to(device), mesh=mesh, mp_policy=policy)
    fully_shard(model.model, mesh=mesh, mp_policy=policy, ignored_params=whole)
    for module in (*model.model.layers, model.model):
        module.set_gradient_divide_factor(1.0)  # losses have the whole batch's denominator: their gradients add up
        module.set_force_sum_reduction_for_comms(True)
    for layer in model.model.layers:
        layer.unshard()  # the buffers made here can be written in inference mode; made there, autograd could not use them
        layer.reshard()
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        module.to(device)
    model.sharding = Sharding(model.dtype)
    return model


def sharding_of(model: nn.Module) -> Sharding | None:
    return getattr(model, "sharding", None)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a divided tensor; any other as it is."""
    return tensor.to_local() if is_divided(tensor) else tensor


def is_divided(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # where it was never imported, nothing is divided
    return module is not None and isinstance(tensor, module.DTensor)


@torch.no_grad()
def round_to_saved(model: Qwen3) -> None:
    """Round the weights of a divided model to what a checkpoint has of them: a stage begins there, resumed or not."""
    if sharding := sharding_of(model):
        for parameter in filter(is_divided, model.parameters()):
            local(parameter).copy_(local(parameter).to(sharding.dtype))


@torch.no_grad()
def whole_model(model: Qwen3, keep: bool = True) -> Qwen3 | None:
    """A copy of a divided model that is not; any other model is its own. All processes have to take part.

    None for processes that do not `keep` it.
    """
    if sharding_of(model) is None:
        return model
    state = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.to(model.dtype).full_tensor() if is_divided(tensor) else tensor  # half the way in bfloat16
        if keep:
            state[name] = tensor
    if not keep:
        return None
    with torch.device("meta"):
        whole = Qwen3(model.config)
    whole.load_state_dict(state, assign=True)
    if model.config.tie_word_embeddings:
        whole.lm_head.weight = whole.model.embed_tokens.weight
    whole.num_tokens = model.num_tokens
    return whole


@contextlib.contextmanager
def sampling_model(model: Qwen3) -> Iterator[Qwen3]:
    """What to sample from within the block, where processes take different numbers of steps: `model`, unless it is divided.

    Then it is a whole copy, dropped again afterwards; or, where that has no room, the model itself, whose layers
    all processes have to gather together: each tells the others of every forward, and whoever is done first keeps the
    others company with forwards of its own.
    """
    sharding = sharding_of(model)
    if sharding is None:
        yield model
    elif sharding.whole_to_sample:
        yield whole_model(model)
    else:
        hook = model.model.register_forward_pre_hook(say_so)
        try:
            yield model
        finally:
            hook.remove()
        nothing = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.inference_mode():
            while still_at_work(False):
                model.model(nothing)


def say_so(*_) -> None:
    still_at_work(True)


def still_at_work(busy: bool) -> bool:
    """Whether any process still samples, which all are asked at the same time."""
    count = torch.tensor(float(busy))
    dist.all_reduce(count)
    return bool(count)


def gathered(pieces: list[Tensor], like: Tensor) -> list[Tensor]:
    """What belongs to a divided parameter, whole, from each process's flat pieces of it; in flat pieces again.

    Scalars are the same everywhere.
    """
    from torch.distributed.tensor import DTensor

    if pieces[0].dim() == 0:
        return [pieces[0]] * -(-like.numel() // PIECE)
    part = torch.cat(pieces).view(local(like).shape)
    layout = {"shape": like.shape, "stride": like.stride()}
    return list(DTensor.from_local(part, like.device_mesh, like.placements, **layout).full_tensor().view(-1).split(PIECE))


def divided(pieces: list[Tensor], like: Tensor) -> list[Tensor]:
    """This process's part of what `gathered` gave, in flat pieces."""
    count = -(-local(like).numel() // PIECE) or 1
    if pieces[0].dim() == 0:
        return [pieces[0]] * count
    parts = torch.cat(pieces).view(like.shape).chunk(like.device_mesh.size(), dim=0)
    rank = like.device_mesh.get_local_rank()
    part = parts[rank].reshape(-1) if rank < len(parts) else pieces[0][:0]
    return list(part.split(PIECE))
