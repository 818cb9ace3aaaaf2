"""What a GRPO step costs on several devices: seconds for each part, computed from shapes and rates.

`benchmarks/scaling.py` measures the rates of this machine, and compares. The formulas leave out packing and
other Python, finished rows that are still in the batch, and communication that overlaps computing (so the
seconds of `exchange` are an upper bound).
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from lab.memory_plan import MemoryPlan, plan_memory, work_of
from lab.recipe import EvaluationSettings, Recipe
from model import Qwen3, Qwen3Config
from model.memory import CACHE_SHARE, LOGITS_COPIES
from model.sampler import plan_batches
from rl.grpo import GRPOStage
from rl.optimizer import OptimizerSettings
from rl.rollout import SamplingSettings

PARAMETERS_A_LAYER = 11  # each of which is an exchange of its own


@dataclass(frozen=True)
class Hardware:
    """One device among several alike. All rates are those that are reached.

    Attributes:
        learn_flops, decode_flops: a second, in forward and backward over many tokens, and in decoding steps.
        bandwidth: bytes a second that a decoding step reads.
        optimizer_bandwidth: bytes a second that an optimizer step moves.
        launch: seconds of a decoding step for each layer, however little there is to do.
        row: seconds more for each row in it, whose attention is a matrix product of its own.
        memory: bytes, free before the weights come.
        link, network: bytes a second that each device sends while all do, within a node and between nodes.
        latency: seconds of an exchange, however small.
        node: devices in one.
    """

    kind: str
    learn_flops: float
    decode_flops: float
    bandwidth: float
    optimizer_bandwidth: float
    launch: float
    row: float
    memory: float
    link: float
    network: float
    latency: float
    node: int


@dataclass(frozen=True)
class Step:
    """A step of GRPO. Lengths of completions are random around `mean`, at most `limit`; without a mean, all
    reach it."""

    prompts: int
    samples: int
    prompt_length: int
    limit: int
    mean: float | None = None
    updates: int = 1

    def lengths(self, seed: int = 0) -> np.ndarray:
        """Tokens of each completion, [prompts, samples]: geometric, as if each token stopped with one
        chance."""
        shape = self.prompts, self.samples
        if self.mean is None:
            return np.full(shape, self.limit)
        return np.minimum(np.random.default_rng(seed).geometric(1 / self.mean, shape), self.limit)


@dataclass(frozen=True)
class Setting:
    """A model in training on `devices`, each of which has all of it."""

    config: Qwen3Config
    dtype: torch.dtype
    optimizer: OptimizerSettings
    step: Step
    devices: int = 1


@dataclass
class Seconds:
    """Per device, the mean over all; `waiting` is the time until the slowest has finished."""

    prefill: float = 0.0
    decode: float = 0.0
    learn: float = 0.0
    exchange: float = 0.0  # of gradients
    optimizer: float = 0.0
    waiting_rollout: float = 0.0
    waiting_update: float = 0.0

    @property
    def rollout(self) -> float:
        return self.prefill + self.decode + self.waiting_rollout

    @property
    def update(self) -> float:
        return self.learn + self.exchange + self.optimizer + self.waiting_update

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


def layer_weights(config: Qwen3Config) -> int:
    """Weights of all layers; the matrices are all that counts."""
    heads = config.num_attention_heads + config.num_key_value_heads
    return (
        config.num_hidden_layers
        * config.hidden_size
        * (2 * config.head_dim * heads + 3 * config.intermediate_size)
    )


def head_weights(config: Qwen3Config) -> int:
    return config.vocab_size * config.hidden_size


def attention_flops(config: Qwen3Config) -> int:
    """For each pair of a query and a key, in all layers: scores and weighted values."""
    return 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim


def prefill_seconds(setting: Setting, hardware: Hardware, groups: int) -> float:
    """A group's prompt goes through the layers once, its last position alone through the output head."""
    config, length = setting.config, setting.step.prompt_length
    layers = length * 2 * layer_weights(config) + attention_flops(config) * length**2 / 2
    return groups * (layers + 2 * head_weights(config)) / hardware.learn_flops


def decode_seconds(setting: Setting, hardware: Hardware, lengths: np.ndarray) -> float:
    """One batch, `lengths` [groups, samples]: each step costs its arithmetic or what it reads, whichever
    takes longer."""
    config, prompt, size = setting.config, setting.step.prompt_length, setting.dtype.itemsize
    times = np.arange(1, lengths.max())  # own tokens that rows have when the next one is made
    rows = (lengths[..., None] > times).sum((0, 1))
    groups = (lengths.max(1)[:, None] > times).sum(0)
    weights = layer_weights(config) + head_weights(config)
    flops = rows * (2 * weights + attention_flops(config) * (prompt + times))
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
    logits = rows * config.vocab_size * 4 * LOGITS_COPIES
    moved = size * weights + token * (groups * prompt + rows * times) + logits
    busy = np.maximum(flops / hardware.decode_flops, moved / hardware.bandwidth)
    layers = config.num_hidden_layers * (len(times) * hardware.launch + rows.sum() * hardware.row)
    return float(busy.sum() + layers)


def learn_seconds(setting: Setting, hardware: Hardware, lengths: np.ndarray) -> float:
    """Forward and backward over groups of `lengths` [groups, samples], a prompt once a group; backward is
    two forwards.

    The head's logits are always computed again in backward; the layers with activation checkpointing.
    """
    config, prompt = setting.config, setting.step.prompt_length
    tokens = lengths.sum() + len(lengths) * prompt
    pairs = (lengths * (prompt + lengths / 2)).sum() + len(lengths) * prompt**2 / 2
    layers = 2 * layer_weights(config) * tokens + attention_flops(config) * pairs
    head = 2 * head_weights(config) * lengths.sum()
    return (layers * (3 + setting.optimizer.activation_checkpointing) + 4 * head) / hardware.learn_flops


def exchange_seconds(hardware: Hardware, devices: int, sent: float, times: float) -> float:
    """`times` exchanges in a ring in which each device sends `sent` bytes in all, had it infinitely many
    neighbours."""
    if devices == 1:
        return 0.0
    rate = hardware.link if devices <= hardware.node else hardware.network
    return sent * (devices - 1) / devices / rate + times * hardware.latency


def seconds(setting: Setting, hardware: Hardware, plan: MemoryPlan) -> Seconds:
    """Of one step. Groups are dealt out in turn, as `rl.distributed.own_part` does."""
    config, step, devices = setting.config, setting.step, setting.devices
    lengths, result = step.lengths(), Seconds()
    shares = [lengths[rank::devices] for rank in range(devices)]
    rollouts = []
    for share in shares:
        prefill, decode = rollout_seconds(setting, hardware, plan, share)
        rollouts.append(prefill + decode)
        result.prefill += prefill / devices
        result.decode += decode / devices
    result.waiting_rollout = max(rollouts) - result.prefill - result.decode
    layers, head = layer_weights(config), head_weights(config) * (1 if config.tie_word_embeddings else 2)
    gradients, count = 2 * 4 * (layers + head), config.num_hidden_layers * PARAMETERS_A_LAYER
    for number in range(step.updates):
        own = [lengths[number :: step.updates][rank::devices] for rank in range(devices)]
        times = [learn_seconds(setting, hardware, share) for share in own]
        result.learn += sum(times) / devices
        result.waiting_update += max(times) - sum(times) / devices
        result.exchange += exchange_seconds(hardware, devices, gradients, count)
        result.optimizer += state_bytes(plan) / hardware.optimizer_bandwidth
    return result


def rollout_seconds(
    setting: Setting, hardware: Hardware, plan: MemoryPlan, share: np.ndarray
) -> tuple[float, float]:
    """(prefill, decode) of one device, with its groups in as many batches as its memory needs."""
    if not len(share):
        return 0.0, 0.0
    config, step = setting.config, setting.step
    token = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * setting.dtype.itemsize
    )
    row = step.limit * token
    free = CACHE_SHARE * (hardware.memory - plan.lasting)
    room = int(free * row / (row + LOGITS_COPIES * 4 * config.vocab_size) / token)
    prompts = [step.prompt_length] * len(share)
    batches = [share[part] for part in plan_batches(prompts, step.samples, step.limit, room)]
    prefill = sum(prefill_seconds(setting, hardware, len(batch)) for batch in batches)
    decode = sum(decode_seconds(setting, hardware, batch) for batch in batches)
    return prefill, decode


def state_bytes(plan: MemoryPlan) -> int:
    """What an optimizer's step reads and writes."""
    return 2 * (plan.masters + plan.moments + plan.weights) + plan.gradients


def recipe_of(setting: Setting) -> Recipe:
    step = setting.step
    stage = GRPOStage(
        prompts_per_step=step.prompts, samples_per_prompt=step.samples, updates_per_step=step.updates
    )
    evaluation = EvaluationSettings(problems=1)
    sampling = SamplingSettings(max_new_tokens=step.limit)
    return Recipe(sampling=sampling, evaluation=evaluation, optimizer=setting.optimizer, stages=(stage,))


def memory(setting: Setting, hardware: Hardware) -> MemoryPlan:
    """The plan that a run would make on the first of the devices, from a model without weights."""
    on = type("On", (Qwen3,), {"device": torch.device(hardware.kind)})
    with torch.device("meta"):
        model = on(setting.config).to(setting.dtype)
    work = work_of(recipe_of(setting), setting.step.prompt_length, setting.devices)
    return plan_memory(model, setting.optimizer, work, int(hardware.memory))
