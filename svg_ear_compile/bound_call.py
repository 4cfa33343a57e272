"""The call of a bound module: each forward runs as a part of a generation of its session."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from svg_ear_compile.in_place import is_compiled
from svg_ear_compile.layers import inner_of
from svg_ear_compile.tracing import runs_once

if TYPE_CHECKING:
    from svg_ear_compile.session import Session

log = logging.getLogger(__name__)

_NOT_COMPILED = (
    "it was not compiled before it was bound. Compile it first, with the backend svg_ear, and bind "
    "the result"
)
_IS_DENSE = (
    "the line of svg_ear at its compilation says why. Without such a line it was compiled with "
    "another backend, or its attention runs outside of all graphs: svg_ear_compile.explain shows it"
)

# Calls by number: while Dynamo traces, `_warn_of_compilation` can take numbers only.
_CALLS: WeakValueDictionary[int, BoundCall] = WeakValueDictionary()
_NUMBERS = itertools.count()


class BoundCall:
    """Wrapper of the call of a module, compiled or not.

    `nn.Module.__call__` goes through `_compiled_call_impl` before hooks and forward, both in eager
    modules and in results of `torch.compile`. Unlike a forward hook, the wrapper ends a forward
    that a KeyboardInterrupt interrupts, and it is never traced with the module's own graph.
    """

    def __init__(self, session: Session, model: int, module: nn.Module) -> None:
        self.session = session
        self.model = model
        self.module = module
        self.compiled = module._compiled_call_impl
        self.call: Callable[..., Any] = self.compiled or module._call_impl
        self.traced = False
        self.warned = False
        self.ran = False
        self.number = next(_NUMBERS)
        _CALLS[self.number] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # True if the module was compiled after it was bound: the session must not get into the
        # graph. `is_compiling` would not do, it is also true while another thread compiles.
        if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
            _warn_of_compilation(self.number)
            return self.call(*args, **kwargs)
        with self.session._current().running(self.model, args, kwargs) as layers:
            output = self.call(*args, **kwargs)
        if layers is not None and not self.ran:
            self.ran = True
            self._check_first(layers)
        return output

    def _check_first(self, layers: Collection[str]) -> None:
        """Warn if the first forward shows that the model, or the budget, is not what it seems."""
        if not layers:
            log.warning(
                "no sparse attention ran in the first forward of this %s: %s",
                type(inner_of(self.module)).__name__,
                _IS_DENSE if self._is_compiled() else _NOT_COMPILED,
            )
        self.session._plans.heard(self.model, layers)

    def _is_compiled(self) -> bool:
        """Whether the module was compiled before it was bound, by whichever backend."""
        return (
            inner_of(self.module) is not self.module
            or self.compiled is not None
            or any(map(is_compiled, self.module.children()))
        )

    @property
    def is_bypassed(self) -> bool:
        """Whether the module bypasses this call, because it was compiled after it was bound."""
        return self.traced or self.module.__dict__.get("_compiled_call_impl") is not self

    def restore(self) -> None:
        """Restore the module's own call, unless the module was compiled in place meanwhile."""
        if self.module.__dict__.get("_compiled_call_impl") is not self:
            return
        if self.compiled is None:
            del self.module._compiled_call_impl
        else:
            self.module._compiled_call_impl = self.compiled


@torch.compiler.assume_constant_result  # run while Dynamo traces; leaves no call in the graph
def _warn_of_compilation(number: int) -> bool:
    call = _CALLS.get(number)
    if call is not None and not call.traced and not runs_once():
        call.traced = True
        warn_of_bypass(call.module)
    return True


def warn_of_bypass(module: nn.Module) -> None:
    """Say that a model was compiled after it was bound."""
    log.warning(
        "this %s was compiled after it was bound: it bypasses its session, and every attention "
        "runs as compiled. Compile first, and bind the result of torch.compile",
        type(inner_of(module)).__name__,
    )
