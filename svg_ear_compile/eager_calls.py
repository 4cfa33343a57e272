"""Counts the attention calls of code that runs eagerly, whichever way they are written."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from svg_ear_compile.passes.find import is_attention
from svg_ear_compile.passes.operation import name_of

_PRODUCTS = frozenset({"matmul", "mm", "bmm", "einsum", "baddbmm"})
_SOFTMAXES = frozenset({"softmax", "log_softmax", "softmin", "exp"})


class CountingAttention(TorchFunctionMode):
    """Counts attention: by PyTorch, by known operators, and written by hand.

    Written by hand is a product of two tensors that are no parameters, a softmax of as many
    elements later on, and a product with its weights.

    Attributes:
        calls: number of calls so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self._stages: Any = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_attention(func):
            self.calls += 1
        elif isinstance(out, Tensor):
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            stage = self._stage(name_of(func), given, out)
            if stage is not None:
                self._stages[out] = stage
        return out

    def _stage(
        self, name: str, given: list[Tensor], out: Tensor
    ) -> Literal["scores", "weights"] | None:
        if name in _PRODUCTS:
            if any(self._stages.get(x) == "weights" for x in given):
                self.calls += 1
                return None
            return None if any(isinstance(x, Parameter) for x in given) else "scores"
        alike = (self._stages.get(x) for x in given if x.numel() == out.numel())
        before = next((stage for stage in alike if stage is not None), None)
        return "weights" if before is not None and name in _SOFTMAXES else before


class CallingFromPython(TorchDispatchMode):
    """Calls the operators of TorchScript from Python, where `CountingAttention` sees them."""

    supports_higher_order_operators = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}))
