"""Letters for the dimensions of scores and weights, followed through transposes and reshapes.

A product gives every dimension a letter, as einsum does. A reshape keeps the order of the elements,
so it only folds neighbouring dimensions into one, which then has the letters of all, or takes a
dimension apart, whose parts get letters of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]

from svg_ear_compile.passes.symbolic import Size, expression

Group = tuple[str, ...]
"""The letters of each dimension of a tensor: one, several where it is folded, none of extent 1."""

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
        rest = list("".join(self.groups))
        sizes = [expression(size) for size in shape]
        groups = []
        for place, size in enumerate(sizes):
            group = self._fill(size, rest)
            if group is None:
                return False
            # A dimension of extent 1 that vanishes belongs to whichever neighbour.
            following = sizes[place + 1] if place + 1 < len(sizes) else None
            while rest and self._extents[rest[0]] == 1 and following != 1:
                group += rest.pop(0)
            groups.append(group)
        self.groups = tuple(groups)
        return not rest

    def _fill(self, size: Any, rest: list[str]) -> str | None:
        """Take from `rest` the letters whose extents make up `size`; None if none do."""
        group, missing = "", size
        if missing == 1 and rest and self._extents[rest[0]] == 1:
            return rest.pop(0)
        while missing != 1:
            if not rest:
                return None
            letter = rest[0]
            extent = self._extents[letter]
            left = _quotient(missing, extent)
            if left is None:
                inner = _quotient(extent, missing)
                if inner is None or len(self._extents) > len(_OF_PARTS):
                    return None
                rest[0] = self._take_apart(letter, missing, inner)
                letter, left = self._parts[letter][0], 1
            else:
                rest.pop(0)
            group += letter
            missing = left
        return group

    def _take_apart(self, letter: str, outer: Any, inner: Any) -> str:
        """Give the two parts of a dimension letters; returns the inner one."""
        used = set(self._extents)
        first, second = [x for x in _OF_PARTS if x not in used][:2]
        self._extents |= {first: outer, second: inner}
        self._parts[letter] = first + second
        return second

    def apart(self, letters: str) -> str:
        """The same with the letters of the parts of what was taken apart."""
        while any(letter in self._parts for letter in letters):
            letters = "".join(self._parts.get(letter, letter) for letter in letters)
        return letters

    def extent(self, letter: str) -> object:
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
