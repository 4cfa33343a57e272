"""What the pass says of one attention call: where it stands, what it computes, why it is left."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch.fx import Node


class Role(str, Enum):
    """Which tokens attend to which, judged by the projections that q and k come from."""

    SELF = "self"
    JOINT = "joint"
    CROSS = "cross"
    PREFIX = "prefix"
    UNKNOWN = "unknown"


class Reason(str, Enum):
    """Why a site is left dense. The value is the code; `sentence` says it in words."""

    CAUSAL = "causal"
    DROPOUT = "dropout"
    GRADIENTS = "gradients"
    CROSS_ATTENTION = "cross_attention"
    ROLE = "role"
    MASK = "mask"
    HEAD_DIM = "head_dim"
    DTYPE = "dtype"
    LAYOUT = "layout"
    SHORT = "short"

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        return _SENTENCES[self]


_SENTENCES = {
    Reason.CAUSAL: "Causal attention is a language model's, not a video's.",
    Reason.DROPOUT: "Attention dropout is on: this is training.",
    Reason.GRADIENTS: "The graph needs gradients; the sparse operator is for inference.",
    Reason.CROSS_ATTENTION: "Queries and keys come from different tokens; text keys are few.",
    Reason.ROLE: "Queries are a part of the keys' tokens (cached or prefix keys).",
    Reason.MASK: "The mask is not key padding by its shape and type (bool, one query row).",
    Reason.HEAD_DIM: "The kernels are not built for this head dim, or values are of another one.",
    Reason.DTYPE: "The kernels take float16, bfloat16 and float32, the same for q, k and v.",
    Reason.LAYOUT: "q, k, v are not (batch, heads, tokens, head dim) with matching heads.",
    Reason.SHORT: "Too few tokens: clustering would cost more than it saves.",
}


@dataclass(frozen=True)
class TokenCount:
    """A number of tokens that is known at run time only: the size of `node` in `dim`."""

    node: Node
    dim: int

    @property
    def traced(self) -> int:
        """The number while tracing."""
        size = self.node.meta["example_value"].shape[self.dim]
        return size if isinstance(size, int) else int(size.node.hint)


@dataclass(frozen=True)
class TextSpan:
    """Text tokens of a joint sequence: the parts before the video tokens and those after."""

    prefix: tuple[int | TokenCount, ...] = ()
    suffix: tuple[int | TokenCount, ...] = ()

    @property
    def traced(self) -> tuple[int, int]:
        """Text tokens before and after the video tokens while tracing."""
        before, after = (
            sum(part if isinstance(part, int) else part.traced for part in parts)
            for parts in (self.prefix, self.suffix)
        )
        return before, after


@dataclass(frozen=True)
class AttentionSite:
    """One attention call of a graph.

    Attributes:
        name: unique in the graph and the same in every process: the layer path, numbered where a
            layer attends more than once.
        node: the call.
        q, k, v, mask: its tensor arguments; mask is None where there is none.
        scale: the scale argument, a number, a node or None.
        layer: path of the module that attends, e.g. "blocks.3.attn1"; "" for a bare function.
        layer_parameter: node of the nearest parameter from which q descends, or None.
        role: see `Role`.
        text: see `TextSpan`.
        q_shape, k_shape: (B, H, N, D), entries may be SymInt.
        dtype: of the output; under autocast not that of q.
        device: of q.
        reason: why the site cannot be sparse whatever it would gain, or None.
    """

    name: str
    node: Node
    q: Node
    k: Node
    v: Node
    mask: Node | None
    scale: float | Node | None
    layer: str
    layer_parameter: Node | None
    role: Role
    text: TextSpan
    q_shape: tuple[int | torch.SymInt, ...]
    k_shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype | None
    device: torch.device | None
    reason: Reason | None
