"""What reading a graph costs: in proportion to its nodes, whatever the number of tokens."""

from __future__ import annotations

import cProfile
import tracemalloc

import pytest
import torch
import torch.nn.functional as F
from joined_stack import WIDTH, attend
from torch import Tensor, nn
from torch.fx import GraphModule
from traced_graphs import graphs_of

from svg_ear_compile.passes.find import find_sites


@torch.library.custom_op("growth::project", mutates_args=())
def project(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


@project.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1])


class Foreign(nn.Module):
    """A projection that the passes do not know, as those of quantised models."""

    def __init__(self, *size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight)


class Block(nn.Module):
    def __init__(self, projection: type[nn.Module]) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (projection(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x, (WIDTH,))
        return attend(self.to_q(y), self.to_k(y), self.to_v(y))


class Model(nn.Module):
    """Text before the video; each gets its own out of the sequence again."""

    def __init__(self, layers: int, projection: type[nn.Module]) -> None:
        super().__init__()
        self.patches, self.words = nn.Linear(8, WIDTH), nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList(Block(projection) for _ in range(layers))

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        text, video, words = self.words(text), self.patches(video), text.shape[1]
        for block in self.blocks:
            y = block(torch.cat([text, video], 1))
            text, video = text + y[:, :words], video + y[:, words:]
        return video


class InPlace(Model):
    """Every block writes into one sequence: into all of it, then into its text and its video."""

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x, words = torch.cat([self.words(text), self.patches(video)], 1), text.shape[1]
        for block in self.blocks:
            x += block(x)
            x[:, :words] += F.silu(x[:, :words])
            x[:, words:] += F.silu(x[:, words:])
        return x


def _graph(make: type[Model], projection: type[nn.Module], layers: int, tokens: int) -> GraphModule:
    with torch.device("meta"):
        model = make(layers, projection)
        inputs = torch.empty(1, tokens, 8), torch.empty(1, 9, 16)
    (graph,) = graphs_of(model, *inputs)
    return graph


@pytest.mark.parametrize("make", [Model, InPlace])
@pytest.mark.parametrize("projection", [nn.Linear, Foreign])
def test_work_grows_with_the_layers(make: type[Model], projection: type[nn.Module]) -> None:
    def function_calls(layers: int) -> int:
        graph, profile = _graph(make, projection, layers, 500), cProfile.Profile()
        sites = profile.runcall(find_sites, graph)
        attended = [site for site in sites if site.reason is None]
        assert len(attended) == len({site.layer_parameter for site in attended}) == layers
        assert all(site.exact.counts == (9, 9) for site in attended)
        return sum(entry.callcount for entry in profile.getstats())

    function_calls(2)  # what is cached by name
    assert function_calls(32) < 6 * function_calls(8)


def test_tokens_are_not_counted_one_by_one() -> None:
    tokens = 1_000_000
    graph = _graph(Model, nn.Linear, 2, tokens)
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
