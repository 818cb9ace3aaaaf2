"""Launching a decoding step as one CUDA graph."""

from collections.abc import Callable, Hashable

import torch


class GraphedStep:
    """Calls `function`, which takes and returns nothing, by replaying its recorded kernels.

    A decoding step is a thousand small kernels, and launching each from Python takes longer than running it; a graph is
    launched once. What is recorded are addresses and shapes, so `function` must work in place on the same tensors in
    every call; it says by another `shape` that they are others now.
    """

    def __init__(self, function: Callable[[], None]):
        self.function = function
        self.shape: Hashable = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, shape: Hashable) -> None:
        if shape != self.shape:  # once without a graph: libraries set themselves up on their first call
            self.graph, self.shape = None, shape
            self.function()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):  # records, and runs nothing
                self.function()
        self.graph.replay()
