"""The arguments of a node under their parameters' names, however they were passed.

A reader that takes arguments by name sees `permute(0, 2, 1)`, `permute(dims=(0, 2, 1))` and
`torch.permute(input=x, dims=(0, 2, 1))` as one call. What a reader did not take has to have its
default, so no argument can be overlooked.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from svg_ear_compile.passes.operation import aten_overloads, operation
from svg_ear_compile.passes.symbolic import known

# PyTorch's functions, NumPy's names of the same parameters and Python's operators, as ATen says.
_NAMES = {
    "input": "self", "a": "self", "x": "self", "x1": "self", "b": "other", "x2": "other",
    "axis": "dim", "axis0": "dim0", "axis1": "dim1", "tensor": "self",
}  # fmt: skip
_MISSING = object()


class Arguments:
    """The arguments of one call, by ATen's names of the parameters; the first tensor is "self"."""

    def __init__(self, given: Mapping[str, object], defaults: Mapping[str, object]) -> None:
        self._given = {name: known(value) for name, value in given.items()}
        self._defaults = dict(defaults)
        self._left = set(self._given)

    def __contains__(self, name: str) -> bool:
        return name in self._given

    def take(self, *names: str) -> Any:
        """The argument of the first of these parameters that the call has, or its default.

        Returns None for a parameter that the callee does not have.
        """
        for name in names:
            if name in self._given:
                self._left.discard(name)
                return self._given[name]
        return next((self._defaults[name] for name in names if name in self._defaults), None)

    def take_all(self, except_for: str) -> None:
        """Take every argument but one."""
        self._left &= {except_for}

    @property
    def rest_has_defaults(self) -> bool:
        """True if every argument that nobody took is None or what its parameter is by default."""
        return all(
            self._given[name] is None or _equal(self._given[name], self._defaults.get(name))
            for name in self._left
        )


def arguments(node: Node) -> Arguments | None:
    """The arguments of a call of a tensor operation, or None where no signature takes them.

    `out` is a parameter of every operation, None by default.
    """
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target is getattr:  # x.mT
        return Arguments({"self": node.args[0]}, {})
    if node.op == "call_method" and not aten_overloads(operation(node)):  # x.float()
        return Arguments({**_numbered(node.args), **node.kwargs}, {})
    kwargs = dict(node.kwargs)
    out = {"out": kwargs.pop("out")} if "out" in kwargs else {}
    certain = isinstance(node.target, torch._ops.OpOverload)
    for parameters in _signatures(node):
        bound = _bind(parameters, node.args, kwargs, method=node.op == "call_method")
        kinds = {p.name: p.kind for p in parameters}
        if bound is not None and (certain or all(_fits(kinds[n], v) for n, v in bound.items())):
            defaults = {p.name: p.default for p in parameters if p.default is not _MISSING}
            return Arguments({**bound, **out}, {"out": None, **defaults})
    return None


def _numbered(args: tuple[Any, ...]) -> dict[str, object]:
    """Names for the arguments of a method that no schema describes, its tensor first."""
    return {"self" if place == 0 else str(place): value for place, value in enumerate(args)}


class _Parameter:
    """A parameter of ATen's or Python's: `kind` says what it takes, "" anything."""

    def __init__(self, name: str, kind: str = "", default: object = _MISSING) -> None:
        self.name = _NAMES.get(name, name)
        self.kind = kind
        self.default = default


def _signatures(node: Node) -> Sequence[Sequence[_Parameter]]:
    """The signatures that the callee may have, in the order in which they are tried."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return [_of_schema(target)]
    if isinstance(target, torch._ops.OpOverloadPacket):
        return [_of_schema(getattr(target, name)) for name in target.overloads()]
    if node.op == "call_function":
        if target is torch.einsum:
            return [[_Parameter("equation"), _Parameter("tensors", "List")]]
        python = _of_python(target)
        if python is not None:
            return [python]
        if target is torch.tensor:
            names = ("data", "dtype", "device", "requires_grad", "pin_memory")
            defaults = (_MISSING, None, None, False, False)
            return [[_Parameter(n, "", d) for n, d in zip(names, defaults, strict=True)]]
    return [_of_schema(overload) for overload in aten_overloads(operation(node))]


@functools.lru_cache(maxsize=4096)
def _of_schema(overload: torch._ops.OpOverload) -> tuple[_Parameter, ...]:
    return tuple(
        _Parameter(
            a.name, str(a.type), a.default_value if a.has_default_value() else _MISSING
        )
        for a in overload._schema.arguments
        if not a.is_out
    )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _of_python(target: Callable[..., Any]) -> tuple[_Parameter, ...] | None:
    """The signature of a function that is written in Python, or of one of Python's operators."""
    is_operator = getattr(operator, getattr(target, "__name__", ""), None) is target
    if not (is_operator or inspect.isfunction(target)):
        return None
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # has none that Python knows
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return tuple(
        _Parameter(p.name, "", _MISSING if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is not p.VAR_KEYWORD  # a call that gives more than the others is not bound
    )  # fmt: skip


def _bind(
    parameters: Sequence[_Parameter],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    method: bool,
) -> dict[str, object] | None:
    """Arguments by name, or None where these parameters do not take them."""
    bound: dict[str, object] = {}
    rest = list(parameters)
    positional = list(args)
    if method and positional:  # a method's tensor need not be the first parameter: x.where(a, b)
        place = next((i for i, p in enumerate(rest) if p.name == "self"), 0)
        if not rest:
            return None
        bound[rest.pop(place).name] = positional.pop(0)
    while positional:
        if not rest:
            return None
        parameter = rest.pop(0)
        if parameter.kind.startswith("List") and not isinstance(positional[0], (list, tuple)):
            if parameter.kind == "List[Tensor]" and isinstance(positional[0], Node):
                bound[parameter.name] = positional.pop(0)  # a node that holds a list
                continue
            bound[parameter.name], positional = tuple(positional), []  # x.permute(0, 2, 1)
            continue
        bound[parameter.name] = positional.pop(0)
    names = {p.name for p in parameters}
    for name, value in kwargs.items():
        parameter_name = name if name in names else _NAMES.get(name, name)
        if parameter_name not in names or parameter_name in bound:
            return None
        bound[parameter_name] = value
    if any(p.default is _MISSING and p.name not in bound for p in parameters):
        return None
    return bound


def _fits(kind: str, value: object) -> bool:
    """False if an overload is certainly not meant: it tells tensors from numbers."""
    if isinstance(value, Node):
        is_tensor = isinstance(value.meta.get("example_value"), (Tensor, type(None)))
        if kind in ("Tensor", "Optional[Tensor]"):
            return is_tensor
        return not (is_tensor and kind in ("number", "int", "float", "bool", "Optional[number]"))
    if kind == "Tensor":
        return False
    return not (kind in ("number", "int", "float") and not isinstance(value, (int, float)))


def _equal(value: object, default: object) -> bool:
    if value is default:
        return True
    plain = (bool, int, float, str, type(None))
    return isinstance(value, plain) and isinstance(default, plain) and value == default
