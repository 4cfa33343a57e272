"""Checks of values that users give, by the annotations of dataclass fields.

The annotation of a field, e.g. ``Annotated[float, Range(0.0, 1.0)]``, states its type and range
once; options, plans and files are all checked by it. An invalid value raises one of the two errors
below, with one printable sentence, whatever the value is.
"""

from __future__ import annotations

import functools
import math
import types
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from svg_ear_compile.kernels.removed import REMOVED

LARGEST = 2**31 - 1
_SHOWN = 60
_LONGEST = 400  # characters of a message


class InvalidValueError(ValueError):
    """An invalid option, file or argument; the message names it and the reason."""


class InvalidTypeError(TypeError):
    """An option or argument of the wrong type; the message names it."""


@dataclass(frozen=True)
class Range:
    """Range of a number, both ends included."""

    least: float
    most: float = LARGEST

    def refusal(self, value: float) -> str | None:
        """The fault of a finite number outside the range, in words; None inside it."""
        if self.least <= value <= self.most:
            return None
        if self.most <= 1:
            return f"must be in [{self.least:g}, {self.most:g}]"
        if value > self.most:
            return f"must be at most {self.most:,}"
        return "must not be negative" if self.least == 0 else f"must be at least {self.least:,}"


Fraction = Annotated[float, Range(0.0, 1.0)]
NotNegative = Annotated[float, Range(0.0, 1e15)]
Count = Annotated[int, Range(0)]
Size = Annotated[int, Range(1)]

_NAMES = {float: "float", int: "int", str: "str", bool: "bool", types.NoneType: "None"}


def printable(text: str) -> str:
    """The text with all characters escaped that are not printable, shortened to one screen.

    These are control characters, line ends, marks of writing direction and lone surrogates.
    """
    if len(text) > _LONGEST:  # a path of the user's, for example
        text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 4 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """A value for a message: short, printable, and without calling code of the value's class."""
    if value is None or type(value) in (bool, float):
        return repr(value)
    if type(value) is int:
        bits = value.bit_length()
        return repr(value) if bits <= 100 else f"a whole number of {bits:,} bits"
    if type(value) is str:
        return repr(value) if len(value) <= _SHOWN else f"{value[:_SHOWN]!r}…"
    name = printable(type(value).__name__)
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


@functools.cache
def field_kinds(kind: type[Any]) -> dict[str, Any]:
    """Field name to annotation of a dataclass, ranges included."""
    return get_type_hints(kind, include_extras=True)


def check_fields(record: Any) -> None:
    """Check every field of a dataclass against its annotation.

    Raises:
        InvalidTypeError, InvalidValueError: see `checked`; the message names the field.
    """
    kind: Any = type(record)
    hints = field_kinds(kind)
    for field in fields(record):
        checked(field.name, getattr(record, field.name), hints[field.name])


def checked(name: str, value: object, kind: Any) -> Any:
    """Return the value if it fits an annotation; a whole number becomes a float where one is due.

    Args:
        name: name of the field, for the message.
        value: any object.
        kind: ``str``, ``bool``, ``int``, ``float``, a ``Literal`` of strings, an ``Annotated``
            number with a `Range`, or one of these or None.

    Raises:
        InvalidTypeError: it is of another type.
        InvalidValueError: it is not finite, out of its range, or none of the literals.
    """
    rule = _rule(kind)
    if value is None and rule.optional:
        return None
    plain = rule.plain
    given = type(value)
    right = isinstance(value, plain) and (plain is bool or given is not bool)
    if not right and not (plain is float and given is int):
        wanted = _NAMES[plain] + (" or None" if rule.optional else "")
        raise InvalidTypeError(f"{name} must be {wanted}, got {_with_type(value)}")
    if rule.choices and value in REMOVED:
        raise InvalidValueError(f"{name}: {REMOVED[str(value)]}")
    if rule.choices and value not in rule.choices:
        raise InvalidValueError(f"{name} must be one of {rule.choices}, got {shown(value)}")
    if plain is float:
        value = _finite(name, value)
    for limit in rule.limits:
        refusal = limit.refusal(value)  # type: ignore[arg-type]
        if refusal is not None:
            raise InvalidValueError(f"{name} {refusal}, got {shown(value)}")
    return value


@dataclass(frozen=True)
class _Rule:
    """An annotation of plain type, taken apart."""

    plain: type[Any]
    choices: tuple[str, ...]
    limits: tuple[Range, ...]
    optional: bool


@functools.cache
def _rule(kind: Any) -> _Rule:
    limits: tuple[Range, ...] = ()
    optional = get_origin(kind) in (Union, types.UnionType)
    if optional:
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
    if get_origin(kind) is Annotated:
        kind, *found = get_args(kind)
        limits = tuple(found)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    return _Rule(str if choices else kind, choices, limits, optional)


def _finite(name: str, value: Any) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise InvalidValueError(f"{name} must be finite, got {shown(value)}")
    return number


def _with_type(value: object) -> str:
    text, name = shown(value), type(value).__name__
    return text if text.endswith(f" {name}") or value is None else f"{text} ({name})"
