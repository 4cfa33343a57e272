"""Reads hand-written attention off a graph: product, steps, softmax, steps, product.

The walk starts at a softmax. Every tensor on the way has a letter for each of its dimensions, as in
einsum's notation, so that it does not matter in which order somebody keeps them: it is attention if
the letter under the softmax is the one that the second product contracts.

Longer than 400 lines: it is one walk, whose steps hand the same letters on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from string import ascii_letters

import torch
from torch.fx import Node

from svg_ear_compile.kernels.padding import NEGLIGIBLE
from svg_ear_compile.passes.arguments import Arguments
from svg_ear_compile.passes.dataflow import Dataflow, is_weight, values_read
from svg_ear_compile.passes.letters import Group, Letters
from svg_ear_compile.passes.memory import is_same_view
from svg_ear_compile.passes.operation import operation
from svg_ear_compile.passes.patterns import read_product, read_step
from svg_ear_compile.passes.products import Product
from svg_ear_compile.passes.site import Call, EmptyRow, Mask, Operand, Reason
from svg_ear_compile.passes.steps import (
    Given,
    Softmax,
    Step,
    added_by_product,
    filled_by_index,
    read_softmax,
)
from svg_ear_compile.passes.symbolic import shape_of
from svg_ear_compile.passes.unread import unread

# Longer than any pattern seen; bounds the walk on graphs that are no attention.
_MAX_STEPS = 12


@dataclass(frozen=True)
class _Taken:
    """A step on the way: its node, the node that carried the data into it, what it does."""

    node: Node
    source: Node
    step: Step


@dataclass
class _Reading:
    """What has been read of one attention so far; letters as in `Product`."""

    letters: Letters
    softmax: Softmax
    scale: float = 1.0
    symbols: list[tuple[Node, bool]] = field(default_factory=list)  # as in `Call`
    moved: bool = False  # weights have other dimensions than the scores that the softmax took
    tangled: bool = False  # a step's shape does not line up with the letters
    beside: list[Node] = field(default_factory=list)  # nodes that only look at the scores
    masks: list[Mask] = field(default_factory=list)
    aligned: list[Group] = field(default_factory=list)  # letters of each mask's dimensions
    fill: float = -math.inf  # the logit of a key that a mask leaves out, scaled since
    reason: Reason | None = None  # why it has to stay as it is

    def __post_init__(self) -> None:
        self.zeroes_empty_rows = self.softmax.zeroes_empty_rows  # instead of leaving them NaN

    def take(self, step: Step) -> None:
        self.moved |= step.order is not None or step.shape is not None
        if step.order is not None:
            self.letters.reorder(step.order)
        if step.shape is not None:
            self.tangled |= not self.letters.reshape(step.shape)
        if step.emptied is not None:
            self.zeroes_empty_rows = True
            self.beside += step.beside
            known = step.emptied == (self.softmax.scores, self.softmax.dim)
            self._leave(None if known and not self.moved else Reason.PATTERN)
        self._leave(step.reason)
        self._scale(step.factor)
        if step.symbol is not None:
            self.symbols.append((step.symbol, step.divides))
            self._leave(Reason.SCALE if self.masks else None)  # it scales the mask, too
        tensor = step.added or step.mask
        if tensor is not None:
            value = tensor.meta.get("example_value")
            rank = value.dim() if isinstance(value, torch.Tensor) else 0
            groups = self.letters.groups
            if rank > len(groups) or self.masks:
                self._leave(Reason.MASK)
            self.aligned.append(groups[max(0, len(groups) - rank) :] if rank else ())
            added = step.added is not None
            self.masks.append(
                Mask(Operand(tensor, ""), step.inverted, added=added, factor=step.sign)
            )
            self.fill = step.fill

    def round(self, node: Node) -> None:
        """The logits, with the mask that is in them, have the dtype of this node."""
        dtype = _dtype(node)
        if dtype is not None:  # the lowest float32 is -inf in float16
            self.fill = float(torch.tensor(self.fill, dtype=torch.float64).to(dtype))
        self.masks = [
            replace(m, rounded=dtype)
            if m.added and (m.rounded is None or _is_narrower(dtype, m.rounded)) else m
            for m in self.masks
        ]  # fmt: skip

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
        empty_row = EmptyRow.ZERO if self.zeroes_empty_rows else EmptyRow.NAN
        if self.masks[0].added:  # a row of nothing but -inf
            return replace(self.masks[0], empty_row=empty_row)
        if not self.fill <= NEGLIGIBLE:  # a key that is left out would still take part
            self._leave(Reason.PATTERN)
        empty_row = EmptyRow.MEAN if math.isfinite(self.fill) else empty_row
        return replace(self.masks[0], empty_row=empty_row, factor=1.0)


def read_handwritten(softmax: Node, flow: Dataflow) -> Call | None:
    """The attention around a softmax, or None if it is none.

    The call has a reason where it is attention that must stay as it is.
    """
    read = read_softmax(softmax)
    after = _descend(read.weights, flow) if read is not None else None
    before = _climb(read.scores, softmax, flow) if read is not None else None
    if read is None or after is None or before is None:
        return unread(softmax, flow)
    (weight_steps, out), (product_node, score_steps) = after, before
    product, value_product = read_product(product_node), read_product(out)
    assert product is not None
    assert value_product is not None
    # Whatever a product with the values does besides is a step on the output.
    alone = value_product.factor == 1.0 and value_product.added is None
    reasons = (
        product.reason, read.reason, value_product.reason, None if alone else Reason.PATTERN
    )  # fmt: skip
    shape = shape_of(product_node)
    if shape is None or len(shape) != len(product.out_dims):
        return unread(softmax, flow)
    reading = _Reading(Letters(product.out_dims, shape), read, product.factor)
    if product.added is not None:
        reading.take(added_by_product(product.added, flow))
        reading.round(product_node)
    for taken in score_steps:
        reading.take(taken.step)
        reading.round(taken.node)
    reading.round(softmax)
    normalised = "" if reading.tangled else reading.letters.groups[read.dim]
    reading.moved = False
    for taken in weight_steps:
        reading.take(taken.step)
    reading.reason = next((r for r in reasons if r is not None), reading.reason)
    weights = weight_steps[-1].node if weight_steps else read.weights
    operands = None
    if not reading.tangled and len(reading.letters.apart(normalised)) == 1:
        operands = _operands(product, value_product, weights, reading, normalised)
    if operands is None:
        sides = (product.left, product.right, value_product.left, value_product.right)
        mixes_heads = any(map(is_weight, sides))
        return unread(softmax, flow) if reading.letters.reshaped or mixes_heads else None
    softmaxes = dict.fromkeys((softmax, read.weights))
    taken_nodes = [t.node for t in (*score_steps, *weight_steps)]
    return _call(flow, operands, [product_node, *softmaxes, *taken_nodes, out], reading)


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
class _Tensor:
    """A tensor of the attention and the letters of its dimensions."""

    node: Node
    groups: Group

    @property
    def letters(self) -> str:
        return "".join(self.groups)


@dataclass(frozen=True)
class _Operands:
    """q, k, v, the output, letters of the batch, of queries, keys and channels."""

    q: _Tensor
    k: _Tensor
    v: _Tensor
    out: Group
    batch: str
    query: str
    key: str
    channel: str
    value_channel: str


def _operands(
    product: Product, value_product: Product, weights: Node, reading: _Reading, normalised: str
) -> _Operands | None:
    """Which operand is which, by letters; None if the letters are not attention's."""
    letters = reading.letters
    normalised = letters.apart(normalised)

    def apart(groups: Iterable[str]) -> Group:
        return tuple(letters.apart(group) for group in groups)

    left = _Tensor(product.left, apart(product.left_dims))
    right = _Tensor(product.right, apart(product.right_dims))
    scores = letters.apart(product.out_dims)
    if (normalised in left.letters) == (normalised in right.letters):
        return None
    q, k = (right, left) if normalised in left.letters else (left, right)
    contracted = (set(q.letters) & set(k.letters)) - set(scores)
    first = (value_product.left, value_product.left_dims)
    second = (value_product.right, value_product.right_dims)
    (_, weight_dims), (value, value_dims) = (
        (first, second) if weights is value_product.left else (second, first)
    )
    if len(weight_dims) != len(letters.groups) or len(contracted) != 1:
        return None
    # The second product has letters of its own: name them as the weights are named.
    names = dict(zip(weight_dims, apart(letters.groups), strict=True))
    used = {*scores, *product.left_dims, *product.right_dims}
    free = iter(sorted(set(ascii_letters) - used))
    for letter in value_dims:
        if letter not in names:
            names[letter] = next(free)
    v = _Tensor(value, tuple(names[letter] for letter in value_dims))
    out = tuple(names.get(letter, "?") for letter in value_product.out_dims)
    value_channels = set(v.letters) - set(scores)
    if normalised not in v.groups or normalised in "".join(out) or len(value_channels) != 1:
        return None
    (channel,), (value_channel,) = contracted, value_channels
    # Where all heads share the keys, theirs is another letter that only q has; queries come last.
    own = [x for x in scores if x in q.letters and x not in k.letters and x not in v.letters]
    if not own:
        return None
    query = own[-1]
    batch = [x for x in scores if x in q.letters and x != query]
    if set("".join(out)) != {*batch, query, value_channel}:
        return None
    if set(q.letters) != {*batch, query, channel}:
        return None
    if not set(k.letters) - {normalised, channel} <= set(batch):
        return None
    if set(k.letters) - {channel} != set(v.letters) - {value_channel}:
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

    def named(node: Node, groups: Group, names: dict[str, str]) -> Operand:
        shape = shape_of(node) or ()
        fits = len(shape) == len(groups)
        return Operand(node, *reading.letters.named(groups, shape, names)) if fits else (
            Operand(node, "")
        )  # fmt: skip

    mask = reading.done()
    if mask is not None:
        mask = replace(mask, tensor=named(mask.tensor.node, reading.aligned[0], pairs))
    tensors = [m.tensor for m in reading.masks]
    q = named(found.q.node, found.q.groups, tokens)
    k, v = (named(operand.node, operand.groups, keys) for operand in (found.k, found.v))
    out_dims = named(nodes[-1], found.out, tokens).dims
    reason = reading.reason or _reason_of_dtypes(nodes)
    checks = (u for n in nodes[:-1] for u in n.users if operation(u) == "_assert_tensor_metadata")
    steps = tuple(sorted((*nodes, *reading.beside, *checks), key=flow.position.__getitem__))
    reason = reason or _reason_to_leave(flow, steps, [q, k, v, *tensors])
    scale = reading.scale
    if _dtype(q.node) != _dtype(v.node):
        q, of_q = _before_upcast(q, v.node, flow, steps)
        k, of_k = _before_upcast(k, v.node, flow, steps)
        scale *= of_q * of_k
    return Call(
        node=nodes[-1], steps=steps, q=q, k=k, v=v, out_dims=out_dims,
        mask=mask, scale=scale, symbols=tuple(reading.symbols), reason=reason,
    )  # fmt: skip


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


def _reason_of_dtypes(steps: list[Node]) -> Reason | None:
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
