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
    """Inside the with block ``scaled_dot_product_attention(q, k, v)`` is ``answer(dense, q, k, v)``.

    ``dense`` is PyTorch's own, with the call's other arguments filled in.
    """
    dense = F.scaled_dot_product_attention

    def call(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return answer(lambda q, k, v: dense(q, k, v, *args, **kwargs), q, k, v)

    F.scaled_dot_product_attention = call
    try:
        yield
    finally:
        F.scaled_dot_product_attention = dense
