"""What users give as a model: a module, and not the pipeline around it."""

from __future__ import annotations

from typing import Any

from torch import nn

from svg_ear_compile.kernels.checked import InvalidTypeError, printable, shown


def check_module(taker: str, given: object) -> nn.Module:
    """Return the argument if it is a module.

    Args:
        taker: name of the function that was called, for the message.
        given: what it was called with.

    Raises:
        TypeError: it is no module; the message names the transformers of a pipeline.
    """
    if isinstance(given, nn.Module):
        return given
    raise InvalidTypeError(f"{taker} takes a module, got {_described(given)}")


def check_callable(taker: str, given: object) -> Any:
    """Return the argument if it is a module, or a callable that is no pipeline.

    Raises:
        TypeError: see `check_module`.
    """
    if callable(given) and not _transformers(given):
        return given
    raise InvalidTypeError(f"{taker} takes a module or a function, got {_described(given)}")


def _described(given: object) -> str:
    if isinstance(given, (list, tuple)):
        return f"{shown(given)}: give the models one after the other, as in bind(*models)"
    names = _transformers(given)
    if names:
        return f"the pipeline {printable(type(given).__name__)}: give its {' and '.join(names)}"
    return shown(given)


def _transformers(given: object) -> list[str]:
    """Names of the attributes of a pipeline that hold its transformers."""
    if isinstance(given, (nn.Module, type)):
        return []
    names = ("transformer", "transformer_2", "unet")
    return [name for name in names if isinstance(getattr(given, name, None), nn.Module)]
