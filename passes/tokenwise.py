"""Which operations leave every token in its place, whatever they do to its features."""

from __future__ import annotations

import functools

import torch
from torch.fx import Node

from svg_ear_compile.passes.dataflow import projected_input
from svg_ear_compile.passes.operation import CASTS, COPIES, aten_overloads, is_foreign, operation

# Statistics along any dimension, features in other numbers, the same elements in other memory.
_KEEP_PLACES = frozenset({
    "layer_norm", "rms_norm", "native_layer_norm", "group_norm", "native_group_norm",
    "batch_norm", "instance_norm", "normalize", "softmax", "log_softmax", "softmin", "cumsum",
    "mean", "sum", "vector_norm", "amax", "amin", "max", "min", "var", "std", "var_mean",
    "std_mean", "norm", "logsumexp", "view_as_complex", "view_as_real", "real", "imag", "conj",
    "complex", "polar", "glu", "prelu", "hardswish", "tanhshrink", "logsigmoid", "expand",
    "expand_as", "broadcast_to", "alias", "detach", "lift_fresh", "data", "requires_grad", "cpu",
    "cuda", "fill", "zero", "native_dropout", "feature_dropout", "alpha_dropout",
    "quantize_per_tensor", "dequantize", "fake_quantize_per_tensor_affine",
    "fake_quantize_per_channel_affine",
})  # fmt: skip


def is_tokenwise(node: Node) -> bool:
    """True if the result has a token where each input of its size has it.

    PyTorch tags what it computes element by element.
    """
    name, target = operation(node).rstrip("_"), node.target
    if name == "" and node.op == "call_function":
        if isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
            return True
        return is_foreign(target) or isinstance(target, torch._ops.HigherOrderOperator)
    if projected_input(node) is not None or name in _KEEP_PLACES | CASTS | COPIES:
        return True
    # The products of quantised layers are called "_scaled_mm", "_int_mm" and so on.
    return node.op == "call_module" or "attention" in name or "_mm" in name or _is_pointwise(name)


@functools.lru_cache(maxsize=1024)
def _is_pointwise(name: str) -> bool:
    return any(torch.Tag.pointwise in overload.tags for overload in aten_overloads(name))
