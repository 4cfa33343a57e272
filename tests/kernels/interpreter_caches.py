"""What Triton's interpreter computes again in every operation, or for nothing, left out.

An operation on a tile takes a hundred microseconds there, most of which go to making the same few
types, shapes and promotions anew. Everything here gives what Triton gives, in a fraction of the
time.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest


def remember_types(patch: pytest.MonkeyPatch) -> None:
    """Types of tiles and what follows from them are made once for each name."""
    from triton.language import core
    from triton.runtime import interpreter

    numpy_dtypes: dict[str, Any] = {}
    numpy_dtype = interpreter._get_np_dtype

    def numpy_dtype_once(of: Any) -> Any:
        found = numpy_dtypes.get(of.name)
        if found is None:
            found = numpy_dtypes[of.name] = numpy_dtype(of)
        return found

    blocks: dict[Any, dict[str, Any]] = {}
    make_block = core.block_type.__init__

    def make_block_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        found = blocks.get(key)
        if found is None:
            make_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        else:
            self.__dict__.update(found)

    tensors: dict[str, dict[str, Any]] = {}
    make_tensor = core.tensor.__init__

    def make_tensor_once(self: Any, handle: Any, type: Any) -> None:
        found = tensors.get(type.name)
        if found is None:
            make_tensor(self, handle, type)
            tensors[type.name] = {k: v for k, v in self.__dict__.items() if k != "handle"}
        else:
            self.__dict__.update(found, handle=handle)

    equal, integers = core.dtype.__eq__, {*core.dtype.SINT_TYPES, *core.dtype.UINT_TYPES}
    patch.setattr(interpreter, "_get_np_dtype", numpy_dtype_once)
    patch.setattr(core.block_type, "__init__", make_block_once)
    patch.setattr(core.tensor, "__init__", make_tensor_once)
    patch.setattr(core.dtype, "__eq__", lambda self, other: self is other or equal(self, other))
    patch.setattr(core.dtype, "is_int", lambda self: self.name in integers)


def remember_promotions(patch: pytest.MonkeyPatch) -> None:
    """Operands that have their common type and shape already are not looked at again."""
    from triton.language.semantic import TritonSemantic

    promote, cast = TritonSemantic.computation_type_impl, TritonSemantic.cast
    broadcast = TritonSemantic.broadcast_impl_value

    def cast_what_differs(self: Any, input: Any, dst_ty: Any, *rounding: Any) -> Any:
        return input if input.dtype is dst_ty else cast(self, input, dst_ty, *rounding)

    def broadcast_what_differs(self: Any, lhs: Any, rhs: Any) -> Any:
        shapes = [[*getattr(x.type, "shape", ())] for x in (lhs, rhs)]
        return (lhs, rhs) if shapes[0] == shapes[1] else broadcast(self, lhs, rhs)

    patch.setattr(TritonSemantic, "computation_type_impl", functools.cache(promote))
    patch.setattr(TritonSemantic, "cast", cast_what_differs)
    patch.setattr(TritonSemantic, "broadcast_impl_value", broadcast_what_differs)


def look_for_no_overflow(patch: pytest.MonkeyPatch) -> None:
    """Sums and products of integers are computed once.

    The interpreter computes each a second time in 64 bits and compares it with the limits of its
    type. It reports what it finds in its debug mode alone.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
