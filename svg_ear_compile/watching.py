"""Looks at the tensors of every attention call while a model runs once, dense and eagerly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter

from svg_ear_compile.kernels.clusters import Result
from svg_ear_compile.kernels.device_guard import on_device
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.registry import sparse_attention
from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.settings import Settings
from svg_ear_compile.tracing import run_once


@dataclass(frozen=True)
class SeenCall:
    """One attention call of a forward.

    Attributes:
        layer: path of the module that attends.
        q, k, v: (B, H, N, D), the model's own.
        out: (B, H, N_q, D), dense.
        scale: logit scale.
        text: text tokens before and after the video tokens.
        attn_mask: key-padding mask or None.
    """

    layer: str
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    text: tuple[int, int]
    attn_mask: Tensor | None

    def sparse(self, plan: AttentionPlan) -> Result:
        """The call under a plan, cold."""
        with on_device(self.q.device):
            return sparse_attention(
                self.q,
                self.k,
                self.v,
                plan,
                attn_mask=self.attn_mask,
                scale=self.scale,
                text=self.text,
            )

    def error(self, result: Result) -> float:
        """Relative L2 distance of a result from dense attention."""
        dense = self.out.float()
        return float((result.out.float() - dense).norm() / dense.norm())


class _Watcher(Interpreter):
    def __init__(self, gm: GraphModule, see: Callable[[SeenCall], None]) -> None:
        super().__init__(gm)
        self.see = see

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = super().call_function(target, args, kwargs)
        if target is torch.ops.svg_ear.attention.default:
            q, k, v, mask = args[:4]
            keys, _rows, proven = (*args[5:], None, None, None)[:3]
            if proven is not None:
                mask = keys
            if proven is None or bool(proven):
                layer, scale = kwargs["site"].partition("#")[0], kwargs["scale"]
                scale = q.shape[3] ** -0.5 if scale is None else scale
                text = (kwargs["text_prefix"], kwargs["text_suffix"])
                self.see(SeenCall(layer, q, k, v, result[0], scale, text, mask))
        return result


def watch(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    see: Callable[[SeenCall], None],
) -> Any:
    """Run a model once, without gradients, and let `see` look at each call that could be sparse.

    The tensors live as long as `see` keeps them. Returns what the model returns.
    """
    settings = Settings.parse({"density": 1.0})

    def backend(gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
        rewrite_graph(gm, settings)
        return _Watcher(gm, see).run

    return run_once(model, args, kwargs, backend)
