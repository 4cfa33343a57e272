"""Paths of modules, e.g. "blocks.3.attn1", read off how Python reaches them in the traced frame."""

from __future__ import annotations

import inspect
import re

from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import Node

_VARIABLE = re.compile(r"[LG]\['([^']*)'\]")
_STRING = r"(?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")"
# Names of modules that are no names of Python's.
_GETATTR = re.compile(rf"getattr\(((?:[^()'\"]|{_STRING})*), ({_STRING})\)")
_NAME = re.compile(rf"\[({_STRING})\]|\[(\d+)\]|\.?([^.\[\]]+)")
_ARGUMENT = re.compile(r"\[(?:'[^']*'|\d+)\]")
_CELLS = re.compile(r"(\.__closure__\[\d+\]\.cell_contents)*")
# How Python reaches a module from its method, maybe one that a hook or a decorator has wrapped.
_METHOD = re.compile(
    r"(?<![^.])(forward\.)?((func\.)?__closure__\.\d+\.cell_contents\.(forward\.)?)*__self__"
)
_WRAPPING = ("", "_modules", "__dict__", "_orig_mod", "_parameters", "_buffers")


def layer_path(node: Node) -> str:
    """Path of the innermost module that made the node, e.g. "blocks.3.attn1"; "" for a function."""
    return module_path(innermost(node))


def owner_path(parameter: Node) -> str:
    """Path of the module that owns a parameter or buffer of the graph, written as `layer_path`."""
    return module_path(source_of(parameter)).rpartition(".")[0]


def innermost(node: Node) -> str:
    """How Python reaches the innermost module that made the node; "" for a function."""
    stack = node.meta.get("nn_module_stack")
    return by_subscripts(str(list(stack.values())[-1][0])) if stack else ""


def source_of(node: Node) -> str:
    """How Python reaches a tensor of the graph."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return str(node.target)  # an attribute of the graph module, of exported models
    return by_subscripts(str(source.name() if callable(source.name) else source.name))


def by_subscripts(source: str) -> str:
    """A source with ``x['name']`` for ``getattr(x, 'name')``."""
    while (found := _GETATTR.sub(r"\1[\2]", source)) != source:
        source = found
    return source


def root_of(source: str) -> str:
    """The variable that Python starts from, "" where none is said.

    An argument in `*args` or `**kwargs` of the traced frame is a variable of its own, and so is
    what a function has in its closure: a decorator's wrapper takes the model as `args[0]` or holds
    a method of it, and the model's layers have the paths that they have without the decorator.
    """
    variable = _VARIABLE.match(source)
    if variable is None:
        return ""
    end = variable.end()
    if source.startswith("L") and variable[1] in _gathered_arguments():
        argument = _ARGUMENT.match(source, end)
        end = argument.end() if argument else end
    cells = _CELLS.match(source, end)
    return source[: cells.end() if cells else end]


def module_path(source: str) -> str:
    """The path that is left when what only says how Python reaches the model is taken away."""
    source = source.removeprefix(root_of(source))
    parts = ".".join(_read(text or name) or place for text, place, name in _NAME.findall(source))
    return ".".join(part for part in _METHOD.sub("", parts).split(".") if part not in _WRAPPING)


def _read(text: str) -> str:
    """A name as Dynamo writes it, with quotes or taken out of single ones."""
    plain = text[1:-1] if text[:1] in ("'", '"') else text
    return plain.encode("latin-1", "backslashreplace").decode("unicode_escape")


def _gathered_arguments() -> tuple[str, ...]:
    """Names of `*args` and `**kwargs` of the frame that Dynamo is tracing; none if it traces none.

    A source does not tell a tuple of arguments from a tuple that the caller has made, whose places
    tell models apart.
    """
    try:
        code = InstructionTranslator.current_tx().f_code
    except AttributeError:
        return ()
    named = code.co_argcount + code.co_kwonlyargcount
    flags = (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS)
    gathered = sum(bool(code.co_flags & flag) for flag in flags)
    return code.co_varnames[named : named + gathered]
