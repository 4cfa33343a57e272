"""No kernel touches memory outside of its tensors: every access is checked in the interpreter.

A sanitizer on a GPU notices an access past a tensor only at the end of an allocation, and the
machine of the continuous tests has no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from attention_cases import (
    INTERPRETER,
    SEEDS,
    needs_interpreter,
    random_kinds,
    random_mask,
    random_qkv,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from svg_ear_compile.kernels.plan import AttentionPlan, Compensation

GUARD = 1 << 12
"""Bytes before and after every tensor, a multiple of all element sizes."""


class Guarded:
    """The tensors of one launch, each copied into memory of its own."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def copy_in(self, argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        storage = argument.untyped_storage()
        if storage.data_ptr() not in self.buffers:
            # All bits are 1: NaN in every float dtype.
            buffer = torch.full((storage.nbytes() + 2 * GUARD,), 255, dtype=torch.uint8)
            inside(buffer).copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
            self.buffers[storage.data_ptr()] = buffer
        buffer = self.buffers[storage.data_ptr()]
        offset = argument.storage_offset() + GUARD // argument.element_size()
        size, stride = argument.size(), argument.stride()
        return argument.new_empty(0).set_(buffer.untyped_storage(), offset, size, stride)

    def copy_out(self, argument: Any) -> None:
        if isinstance(argument, Tensor):
            storage = argument.untyped_storage()
            bytes_of = torch.empty(0, dtype=torch.uint8).set_(storage)
            bytes_of.copy_(inside(self.buffers[storage.data_ptr()]))

    def check(self, addresses: np.ndarray, element: int) -> None:
        """Raise an AssertionError for the first access that is in no tensor."""
        if not addresses.size:
            return
        least, most = int(addresses.min()), int(addresses.max()) + element
        for buffer in self.buffers.values():
            start = buffer.data_ptr() + GUARD
            if start <= least and most <= start + buffer.numel() - 2 * GUARD:
                return
        raise AssertionError(f"access to {most - least} bytes outside of every tensor")


def inside(buffer: Tensor) -> Tensor:
    return buffer[GUARD : buffer.numel() - GUARD]


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check every access of an interpreted kernel during the test."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    launch = Guarded()

    def init(self: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        launch.buffers.clear()
        return [launch.copy_in(a) for a in args], {k: launch.copy_in(a) for k, a in kwargs.items()}

    def restore(self: Any, args: Any, args_host: Any, kwargs: Any, kwargs_host: Any) -> None:
        for argument in (*args, *kwargs.values()):
            launch.copy_out(argument)

    def checked(access: Callable[..., Any], where_mask: int) -> Callable[..., Any]:
        def call(self: Any, ptrs: Any, *rest: Any) -> Any:
            element = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
            launch.check(ptrs.data[rest[where_mask].data.astype(bool)], element)
            return access(self, ptrs, *rest)

        return call

    monkeypatch.setattr(executor, "_init_args_hst", init)
    monkeypatch.setattr(executor, "_restore_args_dev", restore)
    for name, where_mask in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(builder, name, checked(getattr(builder, name), where_mask))


@needs_interpreter
@given(
    seed=SEEDS,
    tokens=st.tuples(st.sampled_from((17, 45, 70)), st.sampled_from((17, 45, 70))),
    exact=st.sampled_from(((0.0, 0.0), (0.1, 0.2))),
    masked=st.booleans(),
)
@settings(
    max_examples=2, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@pytest.mark.parametrize("compensation", get_args(Compensation))
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float16), (40, torch.float32)], ids=str)
@pytest.mark.usefixtures("guarded")
def test_every_access_is_inside_of_a_tensor(
    dim: int, dtype: torch.dtype, compensation: Compensation, seed: int, tokens: tuple[int, int],
    exact: tuple[float, float], masked: bool,
) -> None:  # fmt: skip
    q, k, v = random_qkv(seed, 1, (2, 1), tokens, dim, dtype, "cpu")
    plan = AttentionPlan(
        density=0.3, compensation=compensation, q_clusters=3, k_clusters=7, first_iterations=1
    )
    mask = random_mask(seed, (True, True), (1, 1), tokens[1], "cpu") if masked else None
    kinds = random_kinds(seed, mask, 1, tokens, exact, "cpu")
    more: dict[str, Any] = {"kinds": kinds, "return_lse": True}
    made = INTERPRETER(q, k, v, plan, **more)
    centroids = (made.queries.centroids, made.keys.centroids)
    later = INTERPRETER(q, k, v, plan, centroids=centroids, blocks=made.blocks, **more)
    assert made.out.isfinite().all()
    assert later.out.isfinite().all()


@needs_interpreter
@pytest.mark.parametrize("place", [-1, 9])
@pytest.mark.usefixtures("guarded")
def test_an_access_outside_is_caught(place: int) -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def read(x_ptr, out_ptr, place):
        tl.store(out_ptr, tl.load(x_ptr + place))

    x, out = torch.arange(9.0), torch.zeros(1)
    read[(1,)](x, out, 8)
    assert out.item() == 8.0
    with pytest.raises(triton.runtime.errors.InterpreterError, match="outside of every tensor"):
        read[(1,)](x, out, place)
