"""Letters for the dimensions of scores and weights, followed through transposes and reshapes.

A product gives every dimension a letter, as einsum does. A reshape keeps the order of the elements,
so it only folds neighbouring dimensions into one, which then has the letters of all, or takes a
dimension apart, whose parts get letters of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import sympy

from svg_ear_compile.passes.symbolic import Size, expression

Group = tuple[str, ...]
"""The letters of each dimension of a tensor: one, several where it is folded, none of extent 1."""

Piece = TypeVar("Piece")
_OF_PARTS = "0123456789"  # letters that no product has


class Letters:
    """Letters of the scores of one attention as they are after the steps taken so far.

    Attributes:
        groups: letters of each dimension.
        reshaped: whether any step changed more than the order of dimensions.
    """

    def __init__(self, letters: str, shape: Sequence[Size]) -> None:
        """Every dimension of a product of this shape has one letter."""
        self.groups: Group = tuple(letters)
        self.reshaped = False
        self._extents: dict[str, Any] = dict(zip(letters, map(expression, shape), strict=True))
        self._parts: dict[str, str] = {}

    def reorder(self, order: Sequence[int]) -> None:
        """Permute the dimensions."""
        self.groups = tuple(self.groups[d] for d in order)

    def reshape(self, shape: Sequence[Size]) -> bool:
        """Take the shape of a view; False if its dimensions do not line up with the letters."""
        self.reshaped = True
        found = regroup(
            "".join(self.groups), [expression(n) for n in shape], self.extent, self._take_apart
        )
        if found is not None:
            self.groups = tuple("".join(group) for group in found)
        return found is not None

    def _take_apart(self, letter: str, outer: Any, inner: Any) -> tuple[str, str] | None:
        """Letters for the two parts of a dimension; None if there are none left."""
        free = [x for x in _OF_PARTS if x not in self._extents]
        if len(free) < 2:
            return None
        self._extents |= {free[0]: outer, free[1]: inner}
        self._parts[letter] = free[0] + free[1]
        return free[0], free[1]

    def apart(self, letters: str) -> str:
        """The same with the letters of the parts of what was taken apart."""
        while any(letter in self._parts for letter in letters):
            letters = "".join(self._parts.get(letter, letter) for letter in letters)
        return letters

    def extent(self, letter: str) -> Any:
        """The extent of a letter's dimension, a number or an expression."""
        return self._extents[letter]

    def named(
        self, groups: Group, shape: Sequence[Size], names: Mapping[str, str]
    ) -> tuple[str, int]:
        """Dimensions as `Operand` has them, and the heads of a folded one.

        Args:
            groups: letters of a tensor's dimensions.
            shape: the tensor's.
            names: what `Operand` calls each letter.

        Returns:
            "" and 1 where `Operand` has no letter for a dimension.
        """
        dims, heads = "", 1
        for group, size in zip(groups, shape, strict=True):
            atoms = self.apart(group)
            meaning = "".join(names.get(letter, "?") for letter in atoms)
            if len(meaning) != 1 and expression(size) == 1:
                meaning = "1"  # one for all
            elif meaning == "bh":
                extent = self.extent(atoms[1])
                if not isinstance(extent, int):
                    return "", 1
                meaning, heads = "f", extent
            if len(meaning) != 1:
                return "", 1
            dims += meaning
        return dims, heads


def regroup(
    pieces: Iterable[Piece],
    shape: Sequence[Any],
    extent: Callable[[Piece], Any],
    take_apart: Callable[[Piece, Any, Any], tuple[Piece, Piece] | None],
) -> list[list[Piece]] | None:
    """Which pieces of dimensions each dimension of a view holds.

    Args:
        pieces: those of the viewed tensor, in order.
        shape: extents of the view, numbers or expressions.
        extent: of a piece.
        take_apart: makes two pieces of one, of the given extents, or None.

    Returns:
        None where they do not line up.
    """
    rest, groups = list(pieces), []
    for place, size in enumerate(shape):
        group: list[Piece] = []
        missing = size
        if missing == 1 and rest and extent(rest[0]) == 1:
            group.append(rest.pop(0))
        while missing != 1:
            if not rest:
                return None
            left = _quotient(missing, extent(rest[0]))
            if left is None:
                inner = _quotient(extent(rest[0]), missing)
                parts = None if inner is None else take_apart(rest[0], missing, inner)
                if parts is None:
                    return None
                rest[:1] = parts
                left = 1
            group.append(rest.pop(0))
            missing = left
        # A dimension of extent 1 that vanishes belongs to whichever neighbour.
        following = shape[place + 1] if place + 1 < len(shape) else None
        while rest and extent(rest[0]) == 1 and following != 1:
            group.append(rest.pop(0))
        groups.append(group)
    return None if rest else groups


def _quotient(number: Any, divisor: Any) -> Any:
    """The quotient of two extents, or None if it is not certainly whole."""
    if isinstance(number, int) and isinstance(divisor, int):
        return number // divisor if divisor and number % divisor == 0 else None
    if not all(isinstance(n, (int, sympy.Expr)) for n in (number, divisor)):
        return None  # the ragged size of a nested tensor
    quotient = sympy.cancel(sympy.sympify(number) / divisor)
    if not quotient.is_integer or quotient.as_numer_denom()[1] != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient
