"""Launching a decoding step as one CUDA graph."""

from collections.abc import Callable, Hashable

import torch


class GraphedStep:
    """Runs `function` as one CUDA graph: launching its thousand small kernels takes longer than running them.

    A graph records addresses and shapes, so `function` must work in place on the same tensors in every call;
    a new `shape` says that they have changed.
    """

    def __init__(self, function: Callable[[], None]):
        self.function = function
        self.shape: Hashable = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, shape: Hashable) -> None:
        if shape != self.shape:  # once without a graph: libraries set themselves up on their first call
            self.graph = None
            self.shape = shape
            self.function()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):  # records, and runs nothing
                self.function()
        self.graph.replay()
