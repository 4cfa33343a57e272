"""Fingerprint of a module: its class, configuration and parameter shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from torch import nn

from svg_ear_compile.cost_model.budget import Fingerprint, fingerprint


def fingerprint_of(module: nn.Module) -> Fingerprint:
    """Fingerprint of a module, compiled or not; the values of its parameters do not count."""
    inner = getattr(module, "_orig_mod", module)
    shapes = {
        ".".join(part for part in name.split(".") if part != "_orig_mod"): tuple(parameter.shape)
        for name, parameter in inner.named_parameters()
    }
    return fingerprint(type(inner).__name__, config_of(inner), shapes)


def config_of(holder: object) -> dict[str, Any] | None:
    """The configuration of a module, a scheduler or a pipeline; None if it has none."""
    config: Any = getattr(holder, "config", None)
    if is_dataclass(config) and not isinstance(config, type):
        return asdict(config)
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if not isinstance(config, Mapping):
        return None
    # Private keys hold file names and library versions, which are no part of the model.
    return {str(key): value for key, value in config.items() if not str(key).startswith("_")}
