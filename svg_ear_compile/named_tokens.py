"""Exact tokens that a function of the model's inputs names, once in every forward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svg_ear_compile.kernels.call import CallRequest, ExactTokens
from svg_ear_compile.kernels.checked import (
    InvalidTypeError,
    InvalidValueError,
    printable,
    shown,
)
from svg_ear_compile.passes.exact import fits
from svg_ear_compile.settings import exact_spans

TokenFunction = Callable[[Mapping[str, Any]], object]
"""From the arguments of a forward, by name, to the tokens that are exact in it: slices, as the
option `exact_tokens` takes them, a bool mask (N,) or (B, N), indices of tokens, or None for what
the graph shows. A token that one sample of the batch names is exact in all. A mask or indices on a
GPU make each forward wait for it; slices do not."""


@dataclass
class NamedTokens:
    """The tokens that the function named in one forward.

    Attributes:
        spans: start and stop of slices of the sequence.
        tokens: length of the only sequence that they are slices of, None for any that they fit.
        seen: lengths of the sequences that the forward attended to.
    """

    spans: tuple[tuple[int | None, int | None], ...]
    tokens: int | None = None
    seen: set[int] = field(default_factory=set)
    _known: dict[tuple[int, int, torch.device], ExactTokens | None] = field(default_factory=dict)

    def of(self, request: CallRequest) -> ExactTokens | None:
        """The exact tokens of a call, None if they do not fit it.

        They are tokens of the keys; queries have the same if they are as many.
        """
        part = request.part
        queries, keys = (request.q_shape[2], request.k_shape[2]) if part is None else part.whole
        key = (queries, keys, request.device)
        if key not in self._known:
            self._known[key] = self._of(*key)
        exact = self._known[key]
        return exact if exact is None or part is None else exact.of_part(part)

    def _of(self, queries: int, keys: int, device: torch.device) -> ExactTokens | None:
        self.seen.add(keys)
        places = self._places(keys)
        if places is None:
            return None
        exact, clustered = torch.from_numpy(places).to(device).unsqueeze(0), int((~places).sum())
        if queries == keys:
            return ExactTokens(exact, exact, (clustered, clustered))
        return ExactTokens(None, exact, (queries, clustered))

    def _places(self, tokens: int) -> np.ndarray | None:
        """(N,) bool, True for exact tokens of a sequence; None where they do not fit it."""
        if self.tokens not in (None, tokens) or not all(fits(*span, tokens) for span in self.spans):
            return None
        places = np.zeros(tokens, bool)
        for span in self.spans:
            places[slice(*span)] = True
        return places

    def check_taken(self) -> None:
        """Raise an InvalidValueError if these tokens fitted no attention of the forward."""
        if not self.seen or any(self._known.values()):
            return
        lengths = ", ".join(f"{n:,}" for n in sorted(self.seen))
        what = (
            f"a mask of {self.tokens:,} tokens"
            if self.tokens is not None
            else "tokens outside of the sequence"
        )
        raise InvalidValueError(
            f"exact_tokens returned {what}, but attention goes over {lengths} tokens: a mask says "
            "it of every token, text and video"
        )


def named_tokens(function: TokenFunction, inputs: Mapping[str, Any]) -> NamedTokens | None:
    """The tokens that the function names for the inputs of a forward, None if it leaves them.

    Args:
        function: see `TokenFunction`.
        inputs: arguments of the forward by name, those that were not given with their defaults.

    Raises:
        InvalidTypeError, InvalidValueError: the function raises, or returns something else.
    """
    try:
        named = function(inputs)
    except Exception as error:
        said = printable(f"{type(error).__name__}: {error}")
        raise InvalidValueError(
            f"exact_tokens raised {said}; the arguments of this forward are {', '.join(inputs)}"
        ) from error
    if named is None:
        return None
    if not isinstance(named, Tensor):
        return NamedTokens(exact_spans(named))
    if named.dtype == torch.bool:
        if named.dim() not in (1, 2):
            raise InvalidValueError(
                f"exact_tokens must return a mask (tokens,) or (batch, tokens), got one of shape "
                f"{tuple(named.shape)}"
            )
        mask = (named if named.dim() == 1 else named.any(0)).cpu().numpy()
        return NamedTokens(_of_indices(np.flatnonzero(mask)), len(mask))
    if named.is_floating_point() or named.is_complex():
        raise InvalidTypeError(
            f"exact_tokens must return a bool mask or integer indices, got a tensor of "
            f"{named.dtype}: compare it, as in mask > 0"
        )
    return NamedTokens(_of_indices(np.unique(named.cpu().numpy())))


def check_function(function: object) -> None:
    """Raise an InvalidTypeError unless this can name tokens."""
    if function is not None and not callable(function):
        raise InvalidTypeError(
            f"exact_tokens of bind is a function of the model's inputs, got {shown(function)}: "
            "slices are an option of torch.compile"
        )


def _of_indices(indices: np.ndarray) -> tuple[tuple[int, int | None], ...]:
    """Slices of sorted indices, those that count from the end among them."""
    breaks = np.flatnonzero((np.diff(indices) > 1) | (indices[1:] == 0)) + 1
    runs = (run for run in np.split(indices, breaks) if len(run))
    return tuple((int(run[0]), None if run[-1] == -1 else int(run[-1]) + 1) for run in runs)
