"""Training in little memory: frozen base weights, in int8 if wanted, with low-rank adapters beside them.

LoRA (Hu et al., arXiv:2106.09685, section 4.1) learns the change of a weight W [out, in] as (alpha / rank)
B A. Only A [rank, in] and B [out, rank], two thin matrices, have gradients and optimizer states. The
int8 weights are those of LLM.int8() (Dettmers et al., arXiv:2208.07339, section 2.1): each row divided by
its largest magnitude, which is kept in float32, and rounded to -127 .. 127.
"""

import logging
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelError
from model.qwen3 import Qwen3

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class LoRALinear(nn.Module):
    """base(x) + (alpha / rank) (x A^T) B^T, for x [batch, time, in], in x's dtype.

    A is drawn from N(0, 1 / in) and B is zero, so training starts at the base itself.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None = None):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        out_size, in_size = base.weight.shape
        drawn = torch.randn(rank, in_size, generator=generator, dtype=torch.float32) / in_size**0.5
        self.lora_a = nn.Parameter(drawn.to(base.weight.device))  # drawn on the CPU: the same on every device
        self.lora_b = nn.Parameter(self.lora_a.new_zeros(out_size, rank))

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_a.to(x.dtype))  # [batch, time, rank]
        return self.base(x) + F.linear(self.scale * low, self.lora_b.to(x.dtype))

    def train(self, mode: bool = True) -> "LoRALinear":
        """Stay in training mode: in evaluation mode, bitsandbytes on a CPU would round x to int8."""
        return super().train(True)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The equivalent single weight, W + (alpha / rank) B A: [out, in] in float32."""
        weight = self.base.weight.float()
        if self.base.weight.dtype == torch.int8:
            weight *= self.base.state.SCB[:, None] * (1 / 127)
        return weight + self.scale * (self.lora_b @ self.lora_a)


def quantized(linear: nn.Linear) -> nn.Linear:
    """`linear` with its weight in int8 and a float32 scale for each row, on the same device.

    On a GPU bitsandbytes rounds each row of x to int8 too; a model with the `merged` weight does not.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else each call warns that x is not float16
    import bitsandbytes  # here, because the import takes seconds and most runs do not need it

    out_size, in_size = linear.weight.shape
    made = bitsandbytes.nn.Linear8bitLt(
        in_size, out_size, bias=False, has_fp16_weights=False, threshold=0.0, device="meta"
    )
    made.bias = linear.bias
    weight = linear.weight.detach().to(torch.float16)
    int8, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
    made.weight = bitsandbytes.nn.Int8Params(int8, requires_grad=False, CB=int8, SCB=scales)
    made.init_8bit_state()  # else the first forward does it
    return made


def add_adapters(model: Qwen3, rank: int, alpha: float, int8: bool, seed: int = 0) -> Qwen3:
    """Put adapters on all seven projections of each layer, in place, and freeze everything else.

    The model must have its device and dtype already. With `int8`, the projections are quantized, and nothing
    else. The same base and seed give the same bits.
    """
    if rank < 1 or not 0 < alpha < float("inf"):
        raise ValueError(f"rank and alpha must be positive, not {rank} and {alpha}")
    if any(adapters(model)):
        raise ValueError("the model has adapters already")
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    model.graphed = not int8  # bitsandbytes' kernels are not known to work inside a CUDA graph
    for layer in model.model.layers:
        for name in PROJECTIONS:
            base = layer.get_submodule(name)
            if int8:
                base = quantized(base)
            layer.set_submodule(name, LoRALinear(base, rank, alpha, generator))
    return model


def adapters(model: Qwen3) -> Iterator[tuple[str, LoRALinear]]:
    """Every adapted projection with its name, such as `model.layers.0.self_attn.q_proj`."""
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            yield name, module


def adapter_state(model: Qwen3) -> dict[str, Tensor]:
    """The adapters' own float32 matrices (no copies), by names like `model.layers.0.mlp.up_proj.lora_a`."""
    return {name: x for name, x in model.state_dict().items() if name.endswith((".lora_a", ".lora_b"))}


def load_adapter_state(model: Qwen3, tensors: dict[str, Tensor]) -> None:
    """Copy what `adapter_state` returned into the adapters. ModelError, nothing changed: it does not fit."""
    own = adapter_state(model)
    for name in own | tensors:
        if name not in own or name not in tensors or tensors[name].shape != own[name].shape:
            raise ModelError(f"adapter {name} is missing, unknown or of another shape")
    for name, matrix in own.items():
        matrix.copy_(tensors[name])


def plain_state(model: Qwen3) -> dict[str, Tensor]:
    """State dict, on the CPU, of an equal Qwen3 without adapters, merged in float32 and then rounded."""
    state = model.state_dict()
    for name, adapter in adapters(model):
        for key in adapter.state_dict(prefix=f"{name}."):
            del state[key]
        state[f"{name}.weight"] = adapter.merged().to("cpu", model.dtype)  # a GPU may have no room for all
        if adapter.base.bias is not None:
            state[f"{name}.bias"] = adapter.base.bias.detach()
    return {name: tensor.cpu() for name, tensor in state.items()}
