"""Let something else answer the attention calls of an eager model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Answer = Callable[[Callable[..., Tensor], Tensor, Tensor, Tensor], Tensor]


@contextmanager
def attention_answered_by(answer: Answer) -> Iterator[None]:
    """Let ``answer(dense, q, k, v)`` stand for ``scaled_dot_product_attention`` in the with block.

    ``dense(q, k, v)`` is PyTorch's own, with the call's other arguments filled in; so is every
    call that ``answer`` makes itself.
    """
    dense = F.scaled_dot_product_attention

    def call(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        F.scaled_dot_product_attention = dense
        try:
            return answer(lambda q, k, v: dense(q, k, v, *args, **kwargs), q, k, v)
        finally:
            F.scaled_dot_product_attention = call

    F.scaled_dot_product_attention = call
    try:
        yield
    finally:
        F.scaled_dot_product_attention = dense
