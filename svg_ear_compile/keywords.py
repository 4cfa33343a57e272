"""What an unknown keyword argument was meant to be, in place of Python's own TypeError."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from svg_ear_compile.kernels.checked import InvalidTypeError, shown
from svg_ear_compile.settings import COMPARED, OPTIONS

_P = ParamSpec("_P")
_R = TypeVar("_R")


def answers_unknown_keywords(options_go: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorates a function: an unknown keyword is an error that says what to write instead.

    Args:
        options_go: where an option of the backend is given, with ``{}`` for its name.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        name, known = function.__name__, tuple(inspect.signature(function).parameters)

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            for key in kwargs:
                if key not in known:
                    raise InvalidTypeError(f"{name} has no argument {shown(key)}{instead(key)}")
            return function(*args, **kwargs)

        def instead(key: str) -> str:
            if key in OPTIONS:
                return f", it is an option: {options_go.format(key)}"
            names = list(dict.fromkeys((*known, *OPTIONS)))
            near = difflib.get_close_matches(key[:COMPARED], names, 3, 0.5)
            if near:
                return f"; did you mean {' or '.join(near)}?"
            return f"; it has {', '.join(known)}"

        return call

    return decorate
