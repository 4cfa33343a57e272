"""`torch.compile(model, backend="svg_ear")`."""

from __future__ import annotations

import functools
import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.settings import Settings

log = logging.getLogger(__name__)


def svg_ear(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: attention that pays goes sparse, Inductor compiles the rest.

    Args:
        gm: the graph; Inductor takes ownership of it.
        example_inputs: its inputs, fake or real, SymInts among them.
        mode: a mode of Inductor's, e.g. "max-autotune".
        options: see `Settings.parse`.

    Returns:
        The compiled callable.

    Raises:
        ValueError, TypeError: see `Settings.parse`.
    """
    settings = Settings.parse(options, mode)
    patches = dict(settings.inductor)
    compiled: Any  # compile_fx is typed for all its uses, ahead-of-time ones included
    if needs_gradients(example_inputs):
        _warn_of_gradients()
        compiled = compile_fx(gm, list(example_inputs), config_patches=patches)
        return compiled
    report = rewrite_graph(gm, settings)
    for site in report.sites:
        log.info("%s (%s, %s): %s", site.site, site.role, site.shape, site.sentence)
    if report.sparse:
        stamp = _SourceStamp(patches.get("post_grad_custom_pre_pass"))
        patches["post_grad_custom_pre_pass"] = stamp
    compiled = compile_fx(gm, list(example_inputs), config_patches=patches)
    return compiled


def needs_gradients(example_inputs: Sequence[Any]) -> bool:
    """True if autograd would record this graph."""
    return torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs
    )


@functools.cache
def _warn_of_gradients() -> None:
    warnings.warn(
        "svg_ear is for inference: a graph that needs gradients is compiled by Inductor alone. "
        "Call the model under torch.no_grad() or torch.inference_mode().",
        stacklevel=2,
    )


class _SourceStamp(CustomGraphPass):
    """Ties compiled artefacts to these sources.

    Schemas and fake implementations of custom operators are not in the compile caches' keys, so an
    artefact made by other sources would be served. The pass changes nothing; its uuid is a part of
    the key.
    """

    def __init__(self, after: CustomGraphPass | None) -> None:
        self.after = after

    def __call__(self, graph: Graph) -> None:
        if self.after is not None:
            self.after(graph)

    def uuid(self) -> object:
        return (sources_digest(), self.after.uuid() if self.after is not None else None)


@functools.cache
def sources_digest() -> str:
    """SHA-256 of every Python file of the package."""
    from svg_ear_compile import cost_model, kernels, passes

    digest = hashlib.sha256()
    for room in (__file__, passes.__file__, kernels.__file__, cost_model.__file__):
        for path in sorted(Path(str(room)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
