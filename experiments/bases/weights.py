"""Random weights, to train a model from nothing."""

import torch
from torch import nn

from model import Qwen3


def init_weights(model: Qwen3, seed: int, std: float = 0.02) -> Qwen3:
    """Draw all matrices from N(0, std²) and set the norms to one, to train from nothing; returns `model`."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std, generator=generator)
        else:
            nn.init.ones_(parameter)
    return model
