"""Reads hand-written attention off a graph: product, steps, softmax, steps, product.

The walk starts at a softmax. Every tensor on the way has a letter for each of its dimensions, as in
einsum's notation, so that it does not matter in which order somebody keeps them: it is attention if
the letter under the softmax is the one that the second product contracts.

Longer than 400 lines: it is one walk, whose steps hand the same letters on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from string import ascii_letters

import torch
from torch.fx import Node

from svg_ear_compile.kernels.padding import NEGLIGIBLE
from svg_ear_compile.passes.arguments import Arguments
from svg_ear_compile.passes.dataflow import Dataflow, values_read
from svg_ear_compile.passes.memory import is_same_view
from svg_ear_compile.passes.patterns import read_product, read_step
from svg_ear_compile.passes.products import Product
from svg_ear_compile.passes.site import Call, EmptyRow, Mask, Operand, Reason
from svg_ear_compile.passes.steps import (
    Given,
    Step,
    added_by_product,
    filled_by_index,
    read_softmax,
)
from svg_ear_compile.passes.symbolic import hint
from svg_ear_compile.passes.unread import unread

# Longer than any pattern seen; bounds the walk on graphs that are no attention.
_MAX_STEPS = 12
_OF_FOLDS = "123"  # letters that no product has


@dataclass(frozen=True)
class _Taken:
    """A step on the way: its node, the node that carried the data into it, what it does."""

    node: Node
    source: Node
    step: Step


@dataclass
class _Reading:
    """What has been read of one attention so far; letters as in `Product`."""

    letters: str
    heads: int = 1  # of which each sample has as many in a folded dimension
    folded: dict[str, str] = field(default_factory=dict)  # its letter, and the two that it holds
    tangled: bool = False  # other dimensions were folded, too
    scale: float = 1.0
    masks: list[Mask] = field(default_factory=list)
    fill: float = -math.inf  # the logit of a key that a mask leaves out, scaled since
    reason: Reason | None = None  # why it has to stay as it is

    def take(self, step: Step, node: Node) -> None:
        if step.order is not None:
            self.letters = "".join(self.letters[d] for d in step.order)
        if step.merged is not None:
            self._fold(self.letters[step.merged : step.merged + 2], step.heads, apart=False)
        elif step.split is not None:
            self._fold(self.letters[step.split], step.heads, apart=True)
        self._leave(step.reason)
        self._scale(step.factor)
        tensor = step.added or step.mask
        if tensor is not None:
            value = tensor.meta.get("example_value")
            rank = value.dim() if isinstance(value, torch.Tensor) else 0
            if rank > len(self.letters) or self.masks:
                self._leave(Reason.MASK)
            aligned = self.letters[max(0, len(self.letters) - rank) :] if rank else ""
            added = step.added is not None
            self.masks.append(
                Mask(Operand(tensor, aligned), step.inverted, added=added, factor=step.sign)
            )
            self.fill = step.fill
        dtype = _dtype(node)
        if dtype is not None:  # the lowest float32 is -inf in float16
            self.fill = float(torch.tensor(self.fill, dtype=torch.float64).to(dtype))

    def round(self, node: Node) -> None:
        """The logits, with the mask that has been added to them, have the dtype of this node."""
        dtype = _dtype(node)
        self.masks = [
            replace(m, rounded=dtype)
            if m.added and (m.rounded is None or _is_narrower(dtype, m.rounded)) else m
            for m in self.masks
        ]  # fmt: skip

    def _fold(self, letters: str, heads: int, apart: bool) -> None:
        """Two letters become one, or one becomes two."""
        if not self.folded:
            self.folded = {letters: _OF_FOLDS[:2]} if apart else {_OF_FOLDS[2]: letters}
            self.heads = heads
        ((one, pair),) = self.folded.items()
        taken, made = (one, pair) if apart else (pair, one)
        self.tangled |= heads != self.heads or letters != taken
        self.letters = self.letters.replace(letters, made)

    def unfolded(self, letters: str) -> str:
        """With two letters for a folded dimension."""
        return "".join(self.folded.get(letter, letter) for letter in letters)

    def _scale(self, factor: float) -> None:
        # A mask is scaled with the scores it was added to or filled into.
        self.masks = [replace(m, factor=m.factor * factor) for m in self.masks]
        self.scale *= factor
        self.fill *= factor

    def _leave(self, reason: Reason | None) -> None:
        self.reason = self.reason or reason

    def done(self) -> Mask | None:
        """The mask, once all steps have been taken."""
        if not self.masks:
            return None
        if self.masks[0].added:  # a row of nothing but -inf
            return replace(self.masks[0], empty_row=EmptyRow.NAN)
        if not self.fill <= NEGLIGIBLE:  # a key that is left out would still take part
            self._leave(Reason.PATTERN)
        empty_row = EmptyRow.MEAN if math.isfinite(self.fill) else EmptyRow.NAN
        return replace(self.masks[0], empty_row=empty_row, factor=1.0)


def read_handwritten(softmax: Node, flow: Dataflow) -> Call | None:
    """The attention around a softmax, or None if it is none.

    The call has a reason where it is attention that must stay as it is.
    """
    read = read_softmax(softmax)
    after = _descend(softmax, flow) if read is not None else None
    before = _climb(read[0], softmax, flow) if read is not None else None
    if read is None or after is None or before is None:
        return unread(softmax, flow)
    _, dim, reason = read
    (weight_steps, out), (product_node, score_steps) = after, before
    product, value_product = read_product(product_node), read_product(out)
    assert product is not None
    assert value_product is not None
    # Whatever a product with the values does besides is a step on the output.
    alone = value_product.factor == 1.0 and value_product.added is None
    reasons = (
        product.reason, reason, value_product.reason, None if alone else Reason.PATTERN
    )  # fmt: skip
    reading = _Reading(product.out_dims, scale=product.factor)
    if product.added is not None:
        reading.take(added_by_product(product.added, flow), product_node)
        reading.round(product_node)
    for taken in score_steps:
        reading.take(taken.step, taken.node)
        reading.round(taken.node)
    normalised = reading.letters[dim]
    for taken in weight_steps:
        reading.take(taken.step, taken.node)
    reading.reason = next((r for r in reasons if r is not None), reading.reason)
    weights = weight_steps[-1].node if weight_steps else softmax
    operands = None
    if not reading.tangled:
        operands = _operands(product, value_product, weights, reading, normalised)
    if operands is None:
        return unread(softmax, flow) if reading.folded else None
    nodes = [product_node, *(t.node for t in score_steps), softmax, *(t.node for t in weight_steps)]
    return _call(flow, operands, [*nodes, out], reading)


def _climb(
    node: Node, reader: Node, flow: Dataflow, depth: int = 0
) -> tuple[Node, list[_Taken]] | None:
    """The product whose scores reach `reader` through `node`, and the steps between, in order."""
    # A step may be a statement whose result nobody names: `scores.masked_fill_(...)`.
    writers = [w for w in flow.writes_before(node, reader) if flow.is_before(node, w)]
    if writers:
        writer = writers[-1]
        step = filled_by_index(Given(writer, node, Arguments({}, {}), flow))
        if step is not None:
            found = _climb(node, writer, flow, depth + 1) if depth < _MAX_STEPS else None
            return (found[0], [*found[1], _Taken(writer, node, step)]) if found else None
        # Written through a view of another shape, the scores are not what the step returns.
        if not all(is_same_view(node, target) for target in (writer, *flow.written(writer))):
            return None
        node = writer
    if read_product(node) is not None:
        return node, []
    if depth == _MAX_STEPS:
        return None
    for source in node.all_input_nodes:
        step = _step(node, source, flow)
        found = _climb(source, node, flow, depth + 1) if step is not None else None
        if step is not None and found is not None:
            return found[0], [*found[1], _Taken(node, source, step)]
    return None


def _step(node: Node, source: Node, flow: Dataflow) -> Step | None:
    """The step that a node is; one that writes into anything but the scores is none."""
    if any(target is not source for target in flow.written(node)):
        return None
    return read_step(node, source, flow)


def _descend(node: Node, flow: Dataflow, depth: int = 0) -> tuple[list[_Taken], Node] | None:
    """The steps from the softmax to a product that takes its weights, and that product."""
    for user in node.users:
        product = read_product(user)
        if product is not None and (node is product.left) != (node is product.right):
            return [], user
        step = _step(user, node, flow)
        if step is None or not step.keeps_weights or depth == _MAX_STEPS:
            continue
        found = _descend(user, flow, depth + 1)
        if found is not None:
            return [_Taken(user, node, step), *found[0]], found[1]
    return None


@dataclass(frozen=True)
class _Operands:
    """q, k, v with raw letters, those of the batch, and the letters of queries, keys, channels."""

    q: Operand
    k: Operand
    v: Operand
    out_dims: str
    batch: str
    query: str
    key: str
    channel: str
    value_channel: str


def _operands(
    product: Product, value_product: Product, weights: Node, reading: _Reading, normalised: str
) -> _Operands | None:
    """Which operand is which, by letters; None if the letters are not attention's.

    A folded dimension of an operand has two letters.
    """
    apart, letters = reading.unfolded, reading.letters
    left = Operand(product.left, apart(product.left_dims))
    right = Operand(product.right, apart(product.right_dims))
    scores = apart(product.out_dims)
    if (normalised in left.dims) == (normalised in right.dims):
        return None
    q, k = (right, left) if normalised in left.dims else (left, right)
    contracted = (set(q.dims) & set(k.dims)) - set(scores)
    first = (value_product.left, value_product.left_dims)
    second = (value_product.right, value_product.right_dims)
    (_, weight_dims), (value, value_dims) = (
        (first, second) if weights is value_product.left else (second, first)
    )
    if len(weight_dims) != len(letters) or len(contracted) != 1:
        return None
    # The second product has letters of its own: name them as the weights are named.
    names = dict(zip(weight_dims, letters, strict=True))
    used = {*letters, *product.left_dims, *product.right_dims}
    free = iter(sorted(set(ascii_letters) - used))
    for letter in value_dims:
        if letter not in names:
            names[letter] = next(free)
    v = Operand(value, apart("".join(names[letter] for letter in value_dims)))
    out = apart("".join(names.get(letter, "?") for letter in value_product.out_dims))
    value_channels = set(v.dims) - set(apart(letters))
    if normalised not in v.dims or normalised in out or len(value_channels) != 1:
        return None
    (channel,), (value_channel,) = contracted, value_channels
    # Where all heads share the keys, theirs is another letter that only q has; queries come last.
    own = [x for x in scores if x in q.dims and x not in k.dims and x not in v.dims]
    if not own:
        return None
    query = own[-1]
    batch = [x for x in scores if x in q.dims and x != query]
    if set(out) != {*batch, query, value_channel} or set(q.dims) != {*batch, query, channel}:
        return None
    if not set(k.dims) - {normalised, channel} <= set(batch):
        return None
    if set(k.dims) - {channel} != set(v.dims) - {value_channel}:
        return None
    return _Operands(q, k, v, out, "".join(batch), query, normalised, channel, value_channel)


def _call(
    flow: Dataflow,
    found: _Operands,
    nodes: list[Node],
    reading: _Reading,
) -> Call:
    if len(found.batch) > 2:
        q, k, v = (Operand(operand.node, "") for operand in (found.q, found.k, found.v))
        return Call(nodes[-1], tuple(nodes), q, k, v, reason=Reason.LAYOUT)
    batch = dict(zip(found.batch, "bh"[2 - len(found.batch) :], strict=True))
    tokens = {**batch, found.query: "n", found.channel: "d", found.value_channel: "d"}
    keys = {**batch, found.key: "n", found.channel: "d", found.value_channel: "d"}
    pairs = {**batch, found.query: "q", found.key: "k"}

    def named(operand: Operand, names: dict[str, str]) -> Operand:
        dims = "".join(names[letter] for letter in reading.unfolded(operand.dims))
        return Operand(operand.node, *_folded(operand.node, dims, reading.heads))

    mask = reading.done()
    if mask is not None:
        mask = replace(mask, tensor=named(mask.tensor, pairs))
    tensors = [m.tensor for m in reading.masks]
    q, k, v = (named(found.q, tokens), named(found.k, keys), named(found.v, keys))
    out_dims = "".join(tokens[letter] for letter in found.out_dims)
    out_dims, _ = _folded(nodes[-1], out_dims, reading.heads)
    steps = tuple(sorted(nodes, key=flow.position.__getitem__))
    reason = reading.reason
    reason = reason or _reason_to_leave(flow, steps, [q, k, v, *tensors])
    reason = reason or _reason_of_dtypes(steps)
    scale = reading.scale
    if _dtype(q.node) != _dtype(v.node):
        q, of_q = _before_upcast(q, v.node, flow, steps)
        k, of_k = _before_upcast(k, v.node, flow, steps)
        scale *= of_q * of_k
    return Call(
        node=nodes[-1], steps=steps, q=q, k=k, v=v, out_dims=out_dims,
        mask=mask, scale=scale, reason=reason,
    )  # fmt: skip


def _folded(node: Node, dims: str, heads: int) -> tuple[str, int]:
    """The letters as `Operand` has them, and the heads in a folded dimension.

    Letters that do not fit the tensor leave it without extents, so that the call is left.
    """
    value = node.meta.get("example_value")
    place = dims.find("bh")
    if not isinstance(value, torch.Tensor) or value.dim() == len(dims) or place < 0:
        return dims, 1
    # A mask of one for all may be of extent 1 there.
    one = "b" if hint(value.shape[place]) == 1 and heads != 1 else "f"
    return dims.replace("bh", one), heads if one == "f" else 1


def _reason_to_leave(
    flow: Dataflow, steps: tuple[Node, ...], operands: list[Operand]
) -> Reason | None:
    inside, out = set(steps), steps[-1]
    kept = {operand.node for operand in operands}

    def goes_too(node: Node, user: Node) -> bool:
        """True for a step, for what only steps read, and for what asks for no values.

        What only asks for shape or dtype, as `zeros_like(scores)` does, keeps the product in the
        graph; compilation removes it there, since nothing reads its values.
        """
        if node not in values_read(user):
            return True
        made_for_steps = set(user.users) <= inside and user not in kept
        return user in inside or (
            made_for_steps and not flow.written(user) and not user.is_impure()
        )

    for node in steps[:-1]:
        if not all(goes_too(node, user) for user in node.users):
            return Reason.WEIGHTS
        if not set(flow.writes_before(node, out)) <= inside:
            return Reason.PATTERN
        if any(not set(flow.sharing(n)) <= inside for n in flow.written(node)):
            return Reason.WRITTEN
    for operand in operands:
        readers = [n for n in steps if operand.node in n.all_input_nodes]
        first = min(readers, key=flow.position.__getitem__, default=out)
        if flow.is_written_between(operand.node, first, out):
            return Reason.WRITTEN
    return None


def _reason_of_dtypes(steps: tuple[Node, ...]) -> Reason | None:
    """Why the dtypes on the way matter: scores that are rounded more than attention rounds."""
    out = _dtype(steps[-1])
    held = [_dtype(n) for n in steps if n.meta.get("example_value") is not None]
    return Reason.DTYPE if any(_is_narrower(dtype, out) for dtype in held) else None


def _is_narrower(dtype: torch.dtype | None, other: torch.dtype | None) -> bool:
    if dtype is None or other is None or not (dtype.is_floating_point and other.is_floating_point):
        return True
    one, two = torch.finfo(dtype), torch.finfo(other)
    return one.eps > two.eps or one.max < two.max


def _before_upcast(
    operand: Operand, value: Node, flow: Dataflow, steps: tuple[Node, ...]
) -> tuple[Operand, float]:
    """The operand as it was before it was cast up, and the factor it has been scaled by since.

    Casts make products and softmax precise; the kernels accumulate in float32 whatever they are
    given.
    """
    node, dims, factor = operand.node, operand.dims, 1.0
    for _ in range(_MAX_STEPS):
        if _dtype(node) == _dtype(value):
            written = flow.is_written_between(node, node, steps[-1])
            return (operand, 1.0) if written else (replace(operand, node=node, dims=dims), factor)
        taken = ((s, read_step(node, s, flow)) for s in node.all_input_nodes)
        source, step = next(((s, t) for s, t in taken if t is not None), (None, None))
        if source is None or step is None or flow.is_ever_written(node):
            break
        if replace(step, order=None, factor=1.0) != Step():
            break
        if step.order is not None:
            letters = dict(zip(step.order, dims, strict=True))
            dims = "".join(letters[d] for d in range(len(dims)))
        node, factor = source, factor * step.factor
    return operand, 1.0


def _dtype(node: Node) -> torch.dtype | None:
    value = node.meta.get("example_value")
    return value.dtype if isinstance(value, torch.Tensor) else None
