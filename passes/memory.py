"""Which memory a tensor lies in: fake tensors share storages exactly as the real ones do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from svg_ear_compile.passes.symbolic import expression

# Tensors that show no storage (sparse ones, those inside of torch.func) may share any with others.
_HIDDEN = 0


def storages(value: object) -> frozenset[int]:
    """Identities of the storages of every tensor in a value, also inside of lists and dicts."""
    leaves = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return frozenset(storage for leaf in leaves for storage in _of_tensor(leaf))


def _of_tensor(tensor: Tensor) -> Iterator[int]:
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _of_tensor(getattr(tensor, name))
    elif is_plain(tensor):
        yield tensor.untyped_storage()._cdata
    else:
        yield _HIDDEN


def is_plain(value: object) -> TypeGuard[Tensor]:
    """True for a strided tensor without anything around it.

    Nested, sparse, quantised and wrapped tensors and those inside of torch.func are not plain.
    """
    return (
        isinstance(value, Tensor)
        and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        and value.layout == torch.strided
        and not value.is_nested
        and not value.is_quantized
        and not is_traceable_wrapper_subclass(value)
    )


def fake_mode_of(*values: object) -> FakeTensorMode | None:
    """The mode that made the first fake tensor among the values."""
    leaves = (leaf for leaf in tree_leaves(values) if isinstance(leaf, FakeTensor))
    return next((leaf.fake_mode for leaf in leaves), None)


def is_same_view(first: Node, second: Node) -> bool:
    """True if two nodes hold the same elements of the same storage in the same order."""
    one, other = (node.meta.get("example_value") for node in (first, second))
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    if not (is_plain(one) and is_plain(other)):
        return False
    return (
        one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and one.dtype == other.dtype
        and _key(one) == _key(other)
    )


def _key(tensor: Tensor) -> tuple[object, ...]:
    """Offset, shape and strides; symbols by their expressions, which guards nothing."""
    numbers = (tensor.storage_offset(), *tensor.shape, *tensor.stride())
    return tuple(expression(n) for n in numbers)
