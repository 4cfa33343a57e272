"""MODULE:CALLABLE of the command line: a callable that returns a model and its inputs."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from svg_ear_compile.capture import ModelCall
from svg_ear_compile.given_models import check_callable, check_module
from svg_ear_compile.kernels.checked import InvalidTypeError, InvalidValueError, shown

_SHOWN = 4  # of a tuple that a callable returned, in a message
_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def model_and_inputs(path: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model or function, arguments and keyword arguments that the callable returns.

    Raises:
        ValueError: `path` names no callable, or the callable returns something else.
        ImportError: the module is not found.
    """
    found = callable_of(path, "--model")()
    wanted = f"{path} must return (model, args) or (model, args, kwargs)"
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        raise InvalidValueError(f"{wanted}, not {_described(found)}")
    model, args, *rest = found
    with _said_of(wanted):
        check_callable("the command", model)
    args, kwargs = _inputs(args, rest[0] if rest else {}, wanted)
    return model, args, kwargs


def model_and_calls(path: str) -> tuple[nn.Module, list[ModelCall]]:
    """The module and the inputs of several calls that the callable returns.

    Raises:
        ValueError: `path` names no callable, or the callable returns something else.
        ImportError: the module is not found.
    """
    found = callable_of(path, "--model")()
    wanted = f"{path} must return (model, calls), calls being a list of inputs"
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Sequence):
        raise InvalidValueError(f"{wanted}, not {_described(found)}")
    model, calls = found
    with _said_of(wanted):
        check_module("the command", model)
    return model, [_call(call, wanted) for call in calls]


def _call(given: object, wanted: str) -> ModelCall:
    if isinstance(given, ModelCall):
        return given
    pair = isinstance(given, Sequence) and len(given) == 2 and isinstance(given[1], Mapping)
    if pair and isinstance(given[0], (tuple, list)):  # type: ignore[index]
        return ModelCall(*_inputs(given[0], given[1], wanted))  # type: ignore[index]
    return ModelCall(*_inputs(given, {}, wanted))


def _inputs(args: object, kwargs: object, wanted: str) -> _Inputs:
    if not isinstance(args, (tuple, list)):
        raise InvalidValueError(f"{wanted}; args must be a tuple, not {shown(args)}")
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise InvalidValueError(f"{wanted}; kwargs must be a dict of names, not {shown(kwargs)}")
    return tuple(args), dict(kwargs)


def callable_of(path: str, option: str) -> Callable[[], Any]:
    """The callable that MODULE:CALLABLE names.

    Args:
        path: MODULE:CALLABLE.
        option: option of the command line that `path` was given to, for the message.

    Raises:
        ValueError: `path` names no callable.
        ImportError: the module is not found.
    """
    module, _, name = path.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module) or not name.isidentifier():
        raise InvalidValueError(f"{option} must be MODULE:CALLABLE, got {shown(path)}")
    if module.endswith(".py"):
        raise InvalidValueError(f"{option} names a module, not a file: leave .py out of {module}")
    sys.path.insert(0, "")
    make = getattr(importlib.import_module(module), name, None)
    if not callable(make):
        raise InvalidValueError(f"the module {module} has no callable {name!r}")
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise InvalidValueError(
            f"{option} must name a callable without arguments, but {name}: {error}"
        ) from error
    except ValueError:  # a builtin does not say
        pass
    return make


@contextmanager
def _said_of(wanted: str) -> Iterator[None]:
    """Answer a wrong model by what is wanted."""
    try:
        yield
    except InvalidTypeError as error:
        raise InvalidValueError(f"{wanted}; {error}") from error


def _described(found: object) -> str:
    if isinstance(found, tuple) and len(found) <= _SHOWN:
        return f"({', '.join(map(shown, found))})"
    return f"a tuple of {len(found)}" if isinstance(found, tuple) else shown(found)
