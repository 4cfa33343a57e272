"""What the pass says of one attention call: where it stands, what it computes, why it is left."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch.fx import Node

from svg_ear_compile.passes.block_mask import BlockMask
from svg_ear_compile.passes.exact_places import ExactTokens
from svg_ear_compile.passes.memory import is_plain
from svg_ear_compile.passes.symbolic import Size, hint


class Role(str, Enum):
    """Which tokens attend to which, judged by the projections that q and k come from."""

    SELF = "self"
    JOINT = "joint"
    CROSS = "cross"
    PREFIX = "prefix"
    SPATIAL = "spatial"
    TEMPORAL = "temporal"
    UNKNOWN = "unknown"


class Reason(str, Enum):
    """Why a site is left as it is. The value is the code; `sentence` says it in words."""

    CAUSAL = "causal"
    CAUSAL_CHUNK = "causal_chunk"
    TEXT = "text"
    DROPOUT = "dropout"
    GRADIENTS = "gradients"
    CROSS_ATTENTION = "cross_attention"
    LENGTHS = "lengths"
    VALUES = "values"
    PART_OF_CLIP = "part_of_clip"
    MASK = "mask"
    FLEX = "flex"
    LEAF = "leaf"
    KERNEL = "kernel"
    PACKED = "packed"
    PATTERN = "pattern"
    WEIGHTS = "weights"
    WRITTEN = "written"
    SCALE = "scale"
    HEAD_DIM = "head_dim"
    DTYPE = "dtype"
    TENSOR_TYPE = "tensor_type"
    LAYOUT = "layout"
    SHORT = "short"
    BUDGET = "budget"
    UNLISTED = "unlisted"
    DEVICE = "device"
    FAULT = "fault"

    @property
    def sentence(self) -> str:
        """One sentence for people."""
        return _SENTENCES[self]


_SENTENCES = {
    Reason.CAUSAL: "Causal or windowed by position: a language model's attention, not a video's.",
    Reason.CAUSAL_CHUNK: "Causal by token among the new tokens: could be sparse by whole chunks.",
    Reason.TEXT: "The tokens come from token ids alone: a text model.",
    Reason.DROPOUT: "Attention dropout is on: this is training.",
    Reason.GRADIENTS: "The graph needs gradients; the sparse operator is for inference.",
    Reason.CROSS_ATTENTION: "Queries and keys come from different tokens; text keys are few.",
    Reason.LENGTHS: "Keys are other tokens than queries, and nothing shows that both are video.",
    Reason.VALUES: "Values come from other tokens than the keys.",
    Reason.PART_OF_CLIP: "Tokens of one frame, place or window attend to each other: short rows.",
    Reason.MASK: "The mask is a learned bias, one of several, or of no shape that padding has.",
    Reason.FLEX: "flex_attention with a score function, or a mask function that is not understood.",
    Reason.LEAF: "Attention inside one PyTorch call, with its projections: it cannot be opened.",
    Reason.KERNEL: "Another library's kernel, in a use that is not known to be plain attention.",
    Reason.PACKED: "Packed sequences of several lengths, or whose lengths the graph does not show.",
    Reason.PATTERN: "Attention written by hand with a step that the pass does not know.",
    Reason.WEIGHTS: "The attention weights are used elsewhere, so they have to be computed.",
    Reason.WRITTEN: "q, k, v or the mask is overwritten before the attention is complete.",
    Reason.SCALE: "The logits are scaled by a tensor, not by one number.",
    Reason.HEAD_DIM: "The kernels are not built for this head dim, or values are of another one.",
    Reason.DTYPE: "The kernels take float16, bfloat16 and float32, the same for q, k and v.",
    Reason.TENSOR_TYPE: "A nested, sparse, quantised or wrapped tensor, or one in a transform.",
    Reason.LAYOUT: "q, k, v are not (batch, heads, tokens, head dim) with matching heads.",
    Reason.SHORT: "Too few tokens: clustering would cost more than it saves.",
    Reason.BUDGET: "The objective or the budget is served best with this call dense.",
    Reason.UNLISTED: "The budget has no entry for this layer.",
    Reason.DEVICE: "There are no kernels for this kind of device.",
    Reason.FAULT: "The pass failed on this graph, which is a fault of ours; the log names it.",
}


class EmptyRow(str, Enum):
    """The output of a query that is left no key: PyTorch's attention gives 0.

    A softmax of nothing but a large negative number is even, so the row is the mean of all values;
    one of nothing but -inf is NaN.
    """

    ZERO = "zero"
    MEAN = "mean"
    NAN = "nan"


@dataclass(frozen=True)
class Operand:
    """A tensor of an attention call and what its dimensions are.

    Attributes:
        node: the tensor.
        dims: one letter for each dimension: batch, heads, n tokens, d channels ("bhnd"); in a mask
            q queries and k keys ("bhqk"). A letter that is missing has extent 1, and so has "1".
            "f" is batch and heads folded into one dimension, the heads of one sample side by side;
            "p" is batch and tokens, the tokens of one sample side by side.
        heads: how many heads there are in "f".
        batch: how many samples there are in "p".
    """

    node: Node
    dims: str = "bhnd"
    heads: int = 1
    batch: int = 1

    def sizes(self, order: str = "bhnd") -> tuple[Size, ...] | None:
        """Extents in that order of letters, as traced; None if the node is no such tensor."""
        value = self.node.meta.get("example_value")
        if not is_plain(value) or value.dim() != len(self.dims):
            return None
        extents: dict[str, Size] = dict(zip(self.dims, value.shape, strict=True))
        if "f" in extents:
            extents.update(b=extents["f"] // self.heads, h=self.heads)
        if "p" in extents:
            extents.update(b=self.batch, n=extents["p"] // self.batch)
        return tuple(extents.get(letter, 1) for letter in order)


_COARSEST_UNIT = 8.0
"""The unit in the last place of a bias from which on logits count as rounded away: that of the
-10000 that models write, in float16. The lowest number of float16 has one of 32."""


@dataclass(frozen=True)
class Mask:
    """A mask of an attention call.

    Attributes:
        tensor: its tensor, dims over "bhqk".
        inverted: True in a bool mask leaves a key out instead of keeping it.
        empty_row: what a row without any key gives.
        added: it is added to the logits, also where it is no float.
        factor: it is multiplied by this number before it is added.
        rounded: the coarsest dtype that the logits have once it is added, None where PyTorch's
            attention adds it. A bias whose unit in the last place is larger than the logits leaves
            nothing of them.
    """

    tensor: Operand
    inverted: bool = False
    empty_row: EmptyRow = EmptyRow.ZERO
    added: bool = False
    factor: float = 1.0
    rounded: torch.dtype | None = None

    @property
    def absorbing(self) -> float | None:
        """The least bias that leaves nothing of the logits; None for a mask that rounds nothing."""
        if self.rounded is None:
            return None
        return _COARSEST_UNIT / torch.finfo(self.rounded).eps * abs(self.factor)


@dataclass(frozen=True)
class Padding:
    """A bool mask as the product of masks over keys and masks over queries.

    Attributes:
        keys: masks (B|1, H|1, 1, N_k) whose conjunction says which keys take part.
        rows: masks (B|1, H|1, N_q, 1) whose conjunction says which queries do.
    """

    keys: tuple[Operand, ...] = ()
    rows: tuple[Operand, ...] = ()


@dataclass(frozen=True)
class Call:
    """An attention call as it is written, whatever its pattern.

    Attributes:
        node: the node that holds the output.
        steps: all nodes that the rewrite replaces, in order of execution, `node` the last.
        q, k, v: operands.
        out_dims: letters of the output's dimensions, as in `Operand`.
        mask: None where there is none.
        scale: of the logits; None is 1/sqrt(D).
        symbols: numbers known at run time that multiply the scale, or divide it where True.
        dropout_p, is_causal: as given to the call; hand-written attention has neither.
        block_mask: the mask of flex_attention, None where there is none.
        lse: the node that holds the log-sum-exp of the logits, letters among "bhn"; None where
            nobody asks for it.
        reason: why the call cannot be read any further, or None.
    """

    node: Node
    steps: tuple[Node, ...]
    q: Operand
    k: Operand
    v: Operand
    out_dims: str = "bhnd"
    mask: Mask | None = None
    scale: float | Node | None = None
    symbols: tuple[tuple[Node, bool], ...] = ()
    dropout_p: object = 0.0
    is_causal: object = False
    block_mask: BlockMask | None = None
    lse: Operand | None = None
    reason: Reason | None = None


@dataclass(frozen=True)
class AttentionSite:
    """One attention call of a graph and what is known of it.

    Attributes:
        name: unique in the graph and the same in every process: the layer path, numbered where a
            layer attends more than once.
        call: the call as it is written.
        layer: path of the module that attends, e.g. "blocks.3.attn1"; "" for a bare function.
        layer_parameter: node of the nearest parameter from which q descends, or None.
        role: see `Role`.
        exact: the tokens that are always exact.
        q_shape, k_shape: (B, H, N, D), entries may be SymInt; () where the call cannot be read.
        dtype: in which attention is computed; under autocast not that of q.
        device: of q.
        padding: how the graph makes the mask out of padding, or None if that does not show: then
            its values have to prove it.
        reason: why the site cannot be sparse whatever it would gain, or None.
    """

    name: str
    call: Call
    layer: str
    layer_parameter: Node | None
    role: Role
    exact: ExactTokens
    q_shape: tuple[Size, ...]
    k_shape: tuple[Size, ...]
    dtype: torch.dtype | None
    device: torch.device | None
    padding: Padding | None
    reason: Reason | None

    @property
    def prove_mask(self) -> bool:
        """True if the mask has to prove at run time that it is padding."""
        by_mask = self.call.mask is not None and self.padding is None
        return by_mask or self.call.block_mask is not None

    @property
    def may_have_chunks(self) -> bool:
        """True if the mask may turn out to give each of several chunks of queries its own keys."""
        sizes = self.call.mask.tensor.sizes("bhqk") if self.prove_mask and self.call.mask else None
        return sizes is not None and hint(sizes[2]) != 1
