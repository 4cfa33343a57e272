"""Layers of a bound model: which layer makes an attention call.

A graph compiled for one block serves all blocks of its class. A parameter or buffer of the layer is
passed to each attention call; its identity survives compilation and tells the layer.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.weak import WeakTensorKeyDictionary

from svg_ear_compile.guidance import Latents, find_latents, latents_arguments
from svg_ear_compile.kernels.checked import checked
from svg_ear_compile.named_tokens import (
    NamedTokens,
    TokenFunction,
    check_function,
    named_tokens,
)

log = logging.getLogger(__name__)

Identity = Literal["parameter", "order"]

TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma")
"""Argument names that are tried for the timestep of a model, in this order."""


@dataclass(frozen=True)
class LayerReport:
    """One layer in the current generation.

    Attributes:
        model: position of the model among the arguments of `bind`.
        path: module path of the layer in its model.
        identity: ``"parameter"`` if a parameter or buffer tells the layer, ``"order"`` if only the
            order of execution does.
        index: position in the order of first execution within the model's last forward.
        branches: number of guidance branches and other videos, along a batch or in forwards of
            their own.
        density: fraction of the area that the last sparse call computed exactly, None if every call
            was dense.
        cold: number of sparse calls that clustered without earlier centroids.
        recomputed: number of sparse calls that clustered from the centroids of the step before.
        reused: number of sparse calls that reused clusters and block mask, of the step before or of
            the reference branch.
        kept: number of sparse calls that kept the clusters of cached keys, see
            `kernels.kept_clusters`.
    """

    model: int
    path: str
    identity: Identity
    index: int
    branches: int
    density: float | None
    cold: int
    recomputed: int
    reused: int
    kept: int = 0

    @property
    def sparse_calls(self) -> int:
        """Number of sparse calls, wherever their clusters came from."""
        return self.cold + self.recomputed + self.reused + self.kept

    @property
    def reused_fraction(self) -> float | None:
        """Fraction of the sparse calls that reused clusters; None if every call was dense."""
        return self.reused / self.sparse_calls if self.sparse_calls else None


class BoundModel:
    """One bound model: its layers, its timestep argument, its latents.

    Args:
        module: the module that is called, compiled or not.
        timestep: name of its timestep argument, None for the first of `TIMESTEP_NAMES`.
        latents: name of the argument with its latents, None to find it at each call.
        exact_tokens: names the exact tokens of a forward, None to go by the graph.

    Raises:
        ValueError: the forward has no such argument.
        TypeError: a name is no string.
    """

    def __init__(
        self,
        module: nn.Module,
        timestep: str | None,
        latents: str | None,
        exact_tokens: TokenFunction | None = None,
    ) -> None:
        check_function(exact_tokens)
        self.exact_tokens = exact_tokens
        checked("timestep", timestep, str | None)
        checked("latents", latents, str | None)
        inner = inner_of(module)
        self.module = module
        self.read_layers()
        self.ordered: dict[tuple[str, int], str] = {}
        self.signature = inspect.signature(inner.forward)
        self.latents = latents
        self.has_said_latents = False
        parameters = self.signature.parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.timestep = next(
            (
                name
                for name in (TIMESTEP_NAMES if timestep is None else (timestep,))
                if name in parameters or (name == timestep and takes_any)
            ),
            "",
        )
        if not self.timestep:
            sought = f"none of {TIMESTEP_NAMES}" if timestep is None else f"no {timestep!r}"
            raise ValueError(
                f"the forward of {type(inner).__name__} has {sought} among its arguments "
                f"{tuple(parameters)}; name its timestep argument with bind(..., timestep=...)"
            )
        if latents is not None and latents not in parameters and not takes_any:
            raise ValueError(
                f"the forward of {type(inner).__name__} has no {latents!r} among its arguments "
                f"{tuple(parameters)}: latents names the one that holds the noisy video"
            )

    def read_layers(self) -> None:
        """Read module paths and parameters, which adapters and quantisation change."""
        inner = inner_of(self.module)
        self.paths = {_clean(path) for path, _ in inner.named_modules()}
        self.owners = _owners(inner)

    def read(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], ascending: bool
    ) -> tuple[float | None, Latents]:
        """Timestep and latents of a forward; waits for the device of the timestep.

        The timestep is that of its noisiest token or video, None of an empty batch.

        Raises:
            ValueError: the timestep or the declared latents are missing.
        """
        given = _by_name(self.signature.bind_partial(*args, **kwargs))
        value = given.pop(self.timestep, None)
        if value is None:
            raise ValueError(
                f"a bound {type(self.module).__name__} was called without {self.timestep!r}"
            )
        latents = self._find_latents(given)
        if not isinstance(value, Tensor):
            return float(value), latents
        if not value.numel():
            return None, latents
        return float(value.min() if ascending else value.max()), latents

    def _find_latents(self, given: Mapping[str, Any]) -> Latents:
        if self.latents is None and not self.has_said_latents:
            names = latents_arguments(given)
            if len(names) > 1:
                self.has_said_latents = True
                log.warning(
                    "the latents of this %s, by which guidance branches are told, are taken to be "
                    "%r, the first of its arguments %s. If another one holds the noisy video, name "
                    "it with latents=...",
                    type(inner_of(self.module)).__name__,
                    names[0],
                    tuple(names),
                )
        return find_latents(given, self.latents)

    def named_tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> NamedTokens | None:
        """The exact tokens that the function names for a forward; None without a function.

        Raises:
            ValueError, TypeError: see `named_tokens.named_tokens`.
        """
        if self.exact_tokens is None:
            return None
        return named_tokens(self.exact_tokens, inputs_by_name(self.signature, args, kwargs))

    def later(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], fraction: float
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with a timestep lower by a fraction of itself.

        Integers move by a unit for each hundredth, zeros by the fraction of a unit.
        """
        bound = self.signature.bind_partial(*args, **kwargs)
        given = bound.arguments
        if self.timestep not in given:  # part of **kwargs
            (given,) = (v for v in given.values() if isinstance(v, dict) and self.timestep in v)
        value = given[self.timestep]
        integral = isinstance(value, int) or (
            isinstance(value, Tensor) and not value.is_floating_point()
        )
        if integral:
            moved = value - round(100 * fraction)
        elif isinstance(value, Tensor):
            moved = torch.where(value == 0, -fraction, value * (1 - fraction))
        else:
            moved = value * (1 - fraction) or -fraction
        given[self.timestep] = moved
        return bound.args, bound.kwargs

    def locate(
        self, layer: Tensor | None, owner: str, site: str, call: int
    ) -> tuple[str, Identity]:
        """Path of the layer that makes the `call`-th call of `site` in a forward.

        Args:
            layer: parameter or buffer inside the layer, or None.
            owner: path of the module that holds `layer`, relative to the compiled module.
            site: name of the call, relative to the compiled module.
        """
        bare = site.partition("#")[0]
        found = None if layer is None else self.owners.get(layer)
        if found is not None:
            root = _without_suffix(found, owner)
            if root is not None and (path := _joined(root, bare)) in self.paths:
                self.ordered[site, call] = path
                return path, "parameter"
        if (site, call) in self.ordered:
            return self.ordered[site, call], "order"
        return (bare if call == 0 and bare in self.paths else f"{site}@{call}"), "order"


def inputs_by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a forward by name, those that were not given with their defaults."""
    bound = signature.bind_partial(*args, **kwargs)
    bound.apply_defaults()
    return _by_name(bound)


def _by_name(bound: inspect.BoundArguments) -> dict[str, Any]:
    given = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


def inner_of(module: nn.Module) -> nn.Module:
    """The model itself, if `module` is the result of `torch.compile`."""
    while isinstance(module, OptimizedModule):
        module = module._orig_mod
    return module


def _owners(model: nn.Module) -> WeakTensorKeyDictionary:
    """Parameter or buffer to the path of its module; tensors shared by modules are left out."""
    paths: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
    for path, module in model.named_modules(remove_duplicate=False):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                paths.setdefault(tensor, set()).add(_clean(path))
    owners = WeakTensorKeyDictionary()
    for tensor, found in paths.items():
        if len(found) == 1:
            (owners[tensor],) = found
    return owners


def _clean(path: str) -> str:
    """A module path without the wrappers of compiled modules."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def _without_suffix(path: str, suffix: str) -> str | None:
    """The path above `suffix`; None if `path` does not end with it."""
    if not suffix:
        return path
    if path == suffix:
        return ""
    return path.removesuffix(f".{suffix}") if path.endswith(f".{suffix}") else None


def _joined(root: str, path: str) -> str:
    return f"{root}.{path}" if root and path else root or path
