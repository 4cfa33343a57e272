"""Capture of calls: the inputs of a model's forwards, and the tensors of its attention calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.utils._pytree import tree_map

from svg_ear_compile.given_models import check_module
from svg_ear_compile.kernels.call import unquoted
from svg_ear_compile.kernels.checked import InvalidTypeError, InvalidValueError, shown
from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.device_guard import on_device
from svg_ear_compile.kernels.kinds import TokenKinds, token_kinds
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.registry import sparse_attention
from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.settings import Settings
from svg_ear_compile.tracing import run_once


@dataclass(frozen=True)
class ModelCall:
    """The inputs of one forward of a model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def check_calls(calls: object) -> None:
    """Raise unless the argument is a sequence of at least one `ModelCall`.

    Raises:
        TypeError: it is something else.
        ValueError: it is empty.
    """
    if not isinstance(calls, Sequence):
        raise InvalidTypeError(f"calls must be a list of ModelCall, got {shown(calls)}")
    for call in calls:
        if not isinstance(call, ModelCall):
            raise InvalidTypeError(
                f"calls must be a list of ModelCall(args, kwargs), got {shown(call)} in it"
            )
    if not calls:
        raise InvalidValueError("tune needs at least one call of the model")


def capture_calls(
    model: nn.Module, run: Callable[[], object], *, keep: Callable[[int], bool] = lambda index: True
) -> list[ModelCall]:
    """Capture the inputs of a model's forwards while other code, e.g. a pipeline, runs the model.

    For example::

        calls = capture_calls(pipe.transformer, lambda: pipe(prompt), keep=lambda i: i % 10 == 5)

    Args:
        model: the module whose forwards are captured.
        run: runs the model.
        keep: says by the number of a forward, from 0, whether its inputs are kept. Tensors of kept
            inputs are copied.

    Raises:
        TypeError: the model is no module, or `run` is no function.
    """
    check_module("capture_calls", model)
    if not callable(run):
        raise InvalidTypeError(
            f"capture_calls takes a function that runs the model, got {shown(run)}: as in "
            "capture_calls(model, lambda: pipe(prompt))"
        )
    calls: list[ModelCall] = []
    count = 0

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        if keep(count):
            copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))
            calls.append(ModelCall(*copied))
        count += 1

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return calls


@dataclass(frozen=True)
class CapturedCall:
    """One attention call of a forward, with its tensors.

    Attributes:
        layer: path of the module that attends.
        q: (B, H, N_q, D). k, v: (B, H_kv, N_k, D). Tensors of the model, not copied.
        out: (B, H, N_q, D), the output of dense attention.
        scale: logit scale.
        kinds: which tokens are clustered, always exact or padding.
    """

    layer: str
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    kinds: TokenKinds

    def sparse(self, plan: AttentionPlan) -> Result:
        """Sparse attention of the same tensors under a plan, with cold clusters."""
        with on_device(self.q.device):
            return sparse_attention(
                self.q, self.k, self.v, plan, kinds=self.kinds, scale=self.scale
            )

    def error(self, result: Result) -> float:
        """Relative L2 distance of a sparse result from the dense output."""
        dense = self.out.float()
        return float((result.out.float() - dense).norm() / dense.norm())


class _CapturingInterpreter(Interpreter):
    def __init__(self, gm: GraphModule, on_call: Callable[[CapturedCall], None]) -> None:
        super().__init__(gm)
        self.on_call = on_call

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is torch.ops.svg_ear.attention.default:
            q, k, v, mask = args[:4]
            keys, _rows, proven, queries_exact, keys_exact = (*args[5:], *(None,) * 5)[:5]
            if proven is not None:
                mask = keys
            if proven is None or bool(proven):
                layer, scale = unquoted(kwargs["site"]).partition("#")[0], kwargs["scale"]
                scale = q.shape[3] ** -0.5 if scale is None else scale
                counts = kwargs["clustered_queries"], kwargs["clustered_keys"]
                clustered = None if None in counts else counts
                kinds = token_kinds(mask, queries_exact, keys_exact, clustered)
                self.on_call(CapturedCall(layer, q, k, v, result[0], scale, kinds))
        return result


def capture_attention(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    on_call: Callable[[CapturedCall], None],
) -> Any:
    """Run a model once, dense, eagerly and without gradients, and capture its attention calls.

    Args:
        model: an `nn.Module`, compiled or not, or a function.
        args, kwargs: its inputs.
        on_call: called with each attention call that could be sparse. The tensors of a call live
            as long as `on_call` keeps them.

    Returns:
        The output of the model.
    """
    settings = Settings.parse({"density": 1.0})

    def backend(gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
        rewrite_graph(gm, settings)
        return _CapturingInterpreter(gm, on_call).run

    return run_once(model, args, kwargs, backend)
