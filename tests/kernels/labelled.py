"""A small float64 attention problem with random labels, on which the definition is tested."""

from __future__ import annotations

import torch
from torch import Tensor

from svg_ear_compile.kernels import reference
from svg_ear_compile.kernels.reference import Clusters, Corrections, ProxyTokens


class Labelled:
    """Random float64 q, k, v of one batch element and two heads with random labels."""

    def __init__(self, seed: int, q_clusters: int = 3, k_clusters: int = 5, dim: int = 6) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.q_clusters, self.k_clusters, self.dim = q_clusters, k_clusters, dim
        self.scale = dim**-0.5
        self.q, self.k, self.v = self.randn(1, 2, 19, dim), *self.randn(2, 1, 2, 23, dim)
        self.q_labels = self.labels(19, q_clusters)
        self.k_labels = self.labels(23, k_clusters)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def labels(self, tokens: int, clusters: int) -> Tensor:
        """Labels with two or more tokens in each cluster: compensating one token has no error."""
        drawn = torch.randint(clusters, (1, 2, tokens), generator=self.generator)
        drawn[..., : 2 * clusters] = torch.arange(clusters).repeat(2)
        return drawn

    def random_blocks(self) -> Tensor:
        shape = (1, 2, self.q_clusters, self.k_clusters)
        return torch.rand(shape, generator=self.generator) < 0.4

    def clusters(self) -> tuple[Clusters, Clusters]:
        return (
            Clusters(self.q_labels, *reference.cluster_means(self.q, self.q_labels, 3)),
            Clusters(
                self.k_labels, *reference.cluster_means(self.k, self.k_labels, self.k_clusters)
            ),
        )

    def scores(self) -> reference.BlockScores:
        return reference.score_blocks(*self.clusters(), self.k, self.v, self.scale)

    def proxies(self) -> ProxyTokens:
        value_means, _ = reference.cluster_means(self.v, self.k_labels, self.k_clusters)
        return reference.proxy_tokens(self.clusters()[1], value_means)

    def corrections(self) -> Corrections:
        value_means, _ = reference.cluster_means(self.v, self.k_labels, self.k_clusters)
        return reference.corrections(
            self.q, self.k, self.v, *self.clusters(), value_means, self.scale
        )

    def attend(self, exact: Tensor, form: str) -> tuple[Tensor, Tensor]:
        return reference.softmax_over(
            self.q, self.k, self.v, self.q_labels, self.k_labels, exact, self.proxies(),
            self.scale, self.corrections() if form == "gaussian" else None,
        )  # fmt: skip

    def dense(self) -> tuple[Tensor, Tensor]:
        logits = self.scale * self.q @ self.k.transpose(2, 3)
        return logits.softmax(-1) @ self.v, logits.logsumexp(-1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
