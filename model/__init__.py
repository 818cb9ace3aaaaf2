"""A Qwen3 decoder from scratch, with its weights, tokenizer and KV-cache sampler; nothing about training."""

from model.cache import KVCache
from model.config import ModelError, Qwen3Config
from model.logprobs import TokenLogprobs, target_logprobs
from model.packed import PackedGroup, PackedGroups
from model.quantize import adapter_state, add_adapters, load_adapter_state, plain_state
from model.qwen3 import Qwen3
from model.sampler import Completion, generate, token_logprobs
from model.tokenizer import Tokenizer, prompt_ids
from model.weights import load_model, save_model
