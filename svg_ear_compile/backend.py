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
import torch.compiler.config
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from svg_ear_compile.overlapping_calls import warn_of_skipped_frames
from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.planning import GraphReport, rewrite_graph
from svg_ear_compile.session import warn_of_bypassed
from svg_ear_compile.settings import Settings
from svg_ear_compile.summary import NotSparseError, announce

log = logging.getLogger(__name__)

_FOR_INFERENCE = (
    "svg_ear is for inference: a graph that needs gradients is compiled by Inductor alone. "
    "Call the model under torch.no_grad() or torch.inference_mode()."
)


def svg_ear(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph: rewrite attention that is faster sparse, then call Inductor.

    Args:
        gm: the graph; Inductor takes ownership of it.
        example_inputs: its inputs, fake or real, SymInts among them.
        mode: one of Inductor's modes, e.g. "max-autotune".
        options: see `Settings.parse`.

    Returns:
        The compiled callable.

    Raises:
        ValueError, TypeError: see `Settings.parse`.
        NotSparseError: see `summary.announce`.
    """
    warn_of_bypassed()
    warn_of_skipped_frames(gm)
    return compile_graph(gm, example_inputs, Settings.parse(options, mode), announce)


def compile_graph(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    on_report: Callable[[GraphReport, Settings], None] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph, see `svg_ear`; `on_report` gets the report of a graph for inference.

    Raises:
        ValueError: the settings have the budget of another model.
    """
    if needs_gradients(gm):
        if settings.strict and find_sites(gm):
            raise NotSparseError(_FOR_INFERENCE)
        _warn_of_gradients()
        return _inductor(gm, example_inputs, settings)
    report = rewrite_graph(gm, settings)
    for site in report.sites:
        log.info("%s (%s, %s): %s", site.site, site.role, site.shape, site.sentence)
    if on_report is not None:
        on_report(report, settings)
    if not report.rewritten:
        return _inductor(gm, example_inputs, settings)
    # The keys of the compile caches hold no schemas and fake implementations of operators. Without
    # the tag, a cache could serve an artefact that another version of this package made. (mypy:
    # `patch` is installed at run time.)
    tag = f"{torch.compiler.config.cache_key_tag}svg_ear:{sources_digest()}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return _inductor(gm, example_inputs, settings)


def _inductor(
    gm: GraphModule, example_inputs: Sequence[Any], settings: Settings
) -> Callable[..., Any]:
    compiled: Any  # the type of compile_fx covers ahead-of-time compilation, too
    compiled = compile_fx(gm, list(example_inputs), config_patches=dict(settings.inductor))
    return compiled


def needs_gradients(gm: GraphModule) -> bool:
    """True if an output of the graph requires gradients.

    `torch.is_grad_enabled()` does not tell: the model may switch gradients off inside the graph.
    """
    (output,) = gm.graph.find_nodes(op="output")
    computed = (node for node in output.all_input_nodes if node.op != "placeholder")
    values = (node.meta.get("example_value") for node in computed)
    return any(x.requires_grad for x in tree_leaves(tuple(values)) if isinstance(x, torch.Tensor))


@functools.cache
def _warn_of_gradients() -> None:
    warnings.warn(_FOR_INFERENCE, stacklevel=2)


@functools.cache
def sources_digest() -> str:
    """SHA-256 of every Python file of the package."""
    from svg_ear_compile import cost_model, kernels, passes

    digest = hashlib.sha256()
    for room in (__file__, passes.__file__, kernels.__file__, cost_model.__file__):
        for path in sorted(Path(str(room)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
