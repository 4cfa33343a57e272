"""How a group of GPUs divides one attention, what fits, and what each GPU then does and sends.

Ulysses gives a GPU all tokens and a part of the heads; four tensors are exchanged for each
attention. A ring leaves a GPU its part of the queries; the keys and values of all parts come by, as
diffusers does it by one gather. Both at once: the ring goes over groups of Ulysses.
"""

from __future__ import annotations

from dataclasses import dataclass

_BYTES = 2  # of an element, bfloat16


@dataclass(frozen=True)
class Layout:
    """Degrees of the two forms; their product is the number of GPUs."""

    ring: int
    ulysses: int

    @property
    def gpus(self) -> int:
        return self.ring * self.ulysses

    @property
    def name(self) -> str:
        """What the tables call it."""
        if self.gpus == 1:
            return "one GPU"
        if self.ring == 1:
            return "Ulysses"
        return "ring" if self.ulysses == 1 else f"ring {self.ring} × Ulysses {self.ulysses}"


@dataclass(frozen=True)
class Shape:
    """Heads, tokens and head dim of one attention over all GPUs, batch 1."""

    heads: int
    tokens: int
    dim: int


@dataclass(frozen=True)
class Amounts:
    """What one GPU does and receives for one attention.

    Attributes:
        heads: heads of a call.
        tokens: queries, and keys, of a call.
        calls: calls of the operator.
        clustered: queries and keys that are clustered, counted for every head, as a multiple of an
            even part of those of one GPU. A ring clusters the queries anew for each part of the
            keys, and each part of the keys on every GPU.
        received: bytes from other GPUs.
    """

    heads: int
    tokens: int
    calls: int
    clustered: int
    received: int


def layouts(gpus: int, heads: int) -> list[Layout]:
    """All that are measured for so many GPUs.

    Both at once has the largest groups of Ulysses that divide the heads and leave a ring.
    """
    if gpus == 1:
        return [Layout(1, 1)]
    fitting = [n for n in range(2, gpus // 2 + 1) if gpus % n == heads % n == 0]
    both = [Layout(gpus // fitting[-1], fitting[-1])] if fitting else []
    return [Layout(1, gpus), Layout(gpus, 1), *both]


def sizes(most: int) -> list[int]:
    """Numbers of GPUs that are measured: powers of two up to the largest, and the largest."""
    powers = [1 << n for n in range(most.bit_length())]
    return [*powers, *([] if most in powers else [most])]


def misfit(layout: Layout, shape: Shape) -> str | None:
    """One sentence about why a shape cannot be divided so, or None."""
    if shape.heads % layout.ulysses:
        fitting = [n for n in range(1, shape.heads + 1) if shape.heads % n == 0]
        return (
            f"Ulysses over {layout.ulysses} GPUs does not divide {shape.heads} heads: take "
            f"{', '.join(map(str, fitting[:-1]))} or {fitting[-1]}, and give the rest to the ring."
        )
    if shape.tokens % layout.gpus:
        return (
            f"{layout.gpus} GPUs do not divide {shape.tokens:,} tokens: change the resolution, the "
            "number of frames or the number of GPUs."
        )
    return None


def amounts(layout: Layout, shape: Shape) -> Amounts:
    """Counted, not measured; see `Amounts`.

    Raises:
        ValueError: the layout does not divide the shape, see `misfit`.
    """
    if (sentence := misfit(layout, shape)) is not None:
        raise ValueError(sentence)
    heads, tokens = shape.heads // layout.ulysses, shape.tokens // layout.ring
    held = shape.tokens // layout.gpus * shape.heads * shape.dim * _BYTES  # of one tensor
    exchanged = 4 * held * (layout.ulysses - 1) // layout.ulysses
    gathered = 2 * held * (layout.ring - 1)
    return Amounts(heads, tokens, layout.ring, layout.ring, exchanged + gathered)
