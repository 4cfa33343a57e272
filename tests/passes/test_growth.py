"""What reading a graph costs: in proportion to its nodes, whatever the number of tokens."""

from __future__ import annotations

import cProfile
import tracemalloc

import torch
import torch.nn.functional as F
from joined_stack import WIDTH, attend
from torch import Tensor, nn
from torch.fx import GraphModule
from traced_graphs import graphs_of

from svg_ear_compile.passes.find import find_sites


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Text before the video; each gets its own out of the sequence again."""
        y = F.layer_norm(torch.cat([text, video], 1), (WIDTH,))
        y = attend(self.to_q(y), self.to_k(y), self.to_v(y))
        words = text.shape[1]
        return video + y[:, words:], text + y[:, :words]


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.patches, self.words = nn.Linear(8, WIDTH), nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        video, text = self.patches(video), self.words(text)
        for block in self.blocks:
            video, text = block(video, text)
        return video


def _graph(layers: int, tokens: int) -> GraphModule:
    with torch.device("meta"):
        model, inputs = Model(layers), (torch.empty(1, tokens, 8), torch.empty(1, 9, 16))
    (graph,) = graphs_of(model, *inputs)
    return graph


def _function_calls(layers: int) -> int:
    graph, profile = _graph(layers, 500), cProfile.Profile()
    sites = profile.runcall(find_sites, graph)
    assert [site.reason for site in sites] == [None] * layers
    assert all(site.exact.counts == (9, 9) for site in sites)
    assert len({site.layer_parameter for site in sites}) == layers
    return sum(entry.callcount for entry in profile.getstats())


def test_twice_the_layers_are_twice_the_work() -> None:
    _function_calls(2)  # what is cached by name
    few, many = _function_calls(8), _function_calls(32)
    assert many < 4.2 * few


def test_tokens_are_not_counted_one_by_one() -> None:
    tokens = 1_000_000
    graph = _graph(2, tokens)
    find_sites(graph)
    tracemalloc.start()
    try:
        sites = find_sites(graph)
        spans = [site.exact.spans for site in sites]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert spans == [("0:9", "0:9")] * 2
    assert peak < tokens
