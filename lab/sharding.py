"""A model too large for one device: FSDP2's `fully_shard` divides each layer's weights among the ranks.

A layer is gathered for its forward and its backward, and freed in between (ZeRO-3, arXiv:1910.02054). Shards
are float32, computation is in the model's dtype. Embedding, last norm and output head are full on each rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model import Qwen3
from rl.distributed import PIECE, is_sharded, local, rank, world_size


@dataclass(frozen=True)
class Sharding:
    dtype: torch.dtype  # of the computation

    @torch.no_grad()
    def full_model(self, model: Qwen3, keep: bool = True, device=None) -> Qwen3 | None:
        """A full copy of a sharded model, or None without `keep`. A collective call, tensor by tensor."""
        state = {}
        for name, tensor in model.state_dict().items():
            tensor = tensor.to(model.dtype).full_tensor() if is_sharded(tensor) else tensor
            if keep:
                state[name] = tensor.to(device)
        if not keep:
            return None
        with torch.device("meta"):
            full = Qwen3(model.config)
        full.load_state_dict(state, assign=True)
        if model.config.tie_word_embeddings:
            full.lm_head.weight = full.model.embed_tokens.weight
        full.num_tokens = model.num_tokens
        full.graphed = model.graphed
        return full


def shard(model: Qwen3, device: torch.device) -> Qwen3:
    """Shard `model`'s layers over all processes, in place, and move this rank's part to `device`."""
    # Here, because the imports take half a second, which one process can do without.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(device).type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=model.dtype, reduce_dtype=torch.float32)
    full = {parameter for name, parameter in model.named_parameters() if ".layers." not in name}
    for layer in model.model.layers:
        fully_shard(layer.float().to(device), mesh=mesh, mp_policy=policy)
    fully_shard(model.model, mesh=mesh, mp_policy=policy, ignored_params=full)
    for module in (*model.model.layers, model.model):
        # Losses have the whole update's denominator, so gradients are summed, not averaged.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for layer in model.model.layers:
        layer.unshard()  # makes buffers outside inference mode; buffers made in it cannot be used by autograd
        layer.reshard()
    for module in (model.model.embed_tokens, model.model.norm, model.lm_head):
        module.to(device)
    model.sharding = Sharding(model.dtype)
    return model


@torch.no_grad()
def round_to_saved(model: Qwen3) -> None:
    """Round a sharded model's weights as a checkpoint does, so that a resumed stage starts alike."""
    if sharding := model.sharding:
        for parameter in filter(is_sharded, model.parameters()):
            local(parameter).copy_(local(parameter).to(sharding.dtype))


def full_pieces(pieces: list[Tensor], like: Tensor) -> list[Tensor]:
    """Flat pieces of a full tensor, from each rank's pieces of its shard; `like` is the parameter.

    Scalars are the same on all ranks, and repeated for each piece.
    """
    from torch.distributed.tensor import DTensor

    if pieces[0].dim() == 0:
        return [pieces[0]] * -(-like.numel() // PIECE)
    part = torch.cat(pieces).view(local(like).shape)
    layout = {"shape": like.shape, "stride": like.stride()}
    full = DTensor.from_local(part, like.device_mesh, like.placements, **layout).full_tensor()
    return list(full.view(-1).split(PIECE))


def local_pieces(pieces: list[Tensor], like: Tensor) -> list[Tensor]:
    """This rank's flat pieces, from what `full_pieces` gave."""
    count = -(-local(like).numel() // PIECE) or 1
    if pieces[0].dim() == 0:
        return [pieces[0]] * count
    parts = torch.cat(pieces).view(like.shape).chunk(world_size(), dim=0)
    part = parts[rank()].reshape(-1) if rank() < len(parts) else pieces[0][:0]
    return list(part.split(PIECE))
