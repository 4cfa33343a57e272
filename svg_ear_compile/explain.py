"""`explain`: every attention call of a model, its plan, and the reason for it."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from svg_ear_compile.eager_calls import CallingFromPython, CountingAttention
from svg_ear_compile.explained import entry, grouped, wrapped
from svg_ear_compile.given_models import check_callable
from svg_ear_compile.kernels.checked import printable
from svg_ear_compile.layers import inner_of, inputs_by_name
from svg_ear_compile.named_tokens import named_tokens
from svg_ear_compile.passes.drawing import (
    Surroundings,
    draw,
    surroundings_after,
    surroundings_before,
)
from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.site import Role
from svg_ear_compile.planning import GraphReport, SiteReport, rewrite_graph
from svg_ear_compile.settings import Settings
from svg_ear_compile.tracing import run_once

VERSION = 1
"""Of the JSON that `Explanation.to_json` writes."""


@dataclass(frozen=True)
class GraphBreak:
    """A graph break of Dynamo. Code between two graphs runs eagerly, where no backend sees it.

    Attributes:
        reason: what Dynamo says of it.
        hints: Dynamo's proposals.
        count: number of breaks with this message.
    """

    reason: str
    hints: tuple[str, ...]
    count: int


@dataclass(frozen=True)
class Explanation:
    """Reports of the graphs that a model was traced into.

    Attributes:
        graphs: a report for each graph, in the order of compilation.
        breaks: the graph breaks between them.
        unseen: number of attention calls outside of all graphs, which stay as they are.
        model: class of the model, "" for a function.
    """

    graphs: list[GraphReport] = field(default_factory=list)
    breaks: list[GraphBreak] = field(default_factory=list)
    unseen: int = 0
    model: str = ""

    @property
    def sites(self) -> list[SiteReport]:
        """All attention calls of all graphs."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def sparse(self) -> int:
        """Number of attention calls that are sparse, see `SiteReport.is_sparse`."""
        return sum(graph.sparse for graph in self.graphs)

    def to_json(self) -> str:
        """The whole report as JSON; ``version`` grows when the meaning of a field changes."""
        return json.dumps(
            {
                "version": VERSION,
                "model": self.model,
                "sparse": self.sparse,
                "graphs": [graph.to_dict() for graph in self.graphs],
                "breaks": [asdict(found) for found in self.breaks],
                "unseen": self.unseen,
            },
            indent=1,
        )

    def text(self, width: int = 80) -> str:
        """The report in lines of `width` characters; only a name may be longer.

        Calls that differ in nothing but the numbers in their names have one entry. Notes on times,
        errors and graph breaks follow.
        """
        calls, graphs = len(self.sites), len(self.graphs)
        head = (
            f"{self.model or 'The function'}: {calls} attention call{'' if calls == 1 else 's'} in "
            f"{graphs} graph{'' if graphs == 1 else 's'}, {self.sparse} sparse."
        )
        heads = [wrapped(head, width), wrapped("Shapes are B × H × N_q × N_k × D.", width)]
        entries = grouped(self.sites)
        digits = len(str(max((each.count for each in entries), default=1)))
        parts = ["\n".join(heads), *(entry(each, digits, width) for each in entries)]
        notes = [wrapped(note, width) for note in self._notes()]
        return "\n\n".join([*parts, *(["\n".join(notes)] if notes else [])])

    def _notes(self) -> list[str]:
        lines = []
        profiles = dict.fromkeys(g.profile for g in self.graphs if g.profile is not None)
        for profile in profiles:
            better = f"; better: {profile.improved_by}" if profile.improved_by else ""
            lines.append(f"Milliseconds: {profile.basis}{better}.")
        errors = dict.fromkeys(site.expected.errors for site in self.sites if site.expected)
        if errors:
            lines.append(f"Errors of the model's output: {'; '.join(errors)}.")
        if self.unseen:
            lines.append(
                f"{self.unseen} attention calls ran outside of all graphs, where no backend sees "
                "them: remove the graph breaks."
            )
        later = [site for graph in self.graphs[1:] for site in graph.sites if self.breaks]
        alone = [site for site in self.sites if site.role == Role.UNKNOWN.value]
        if any(site.is_sparse and site.in_one_piece for site in [*later, *alone]):
            lines.append(
                "Tokens reach some sparse calls in one piece. Text that was joined to the video "
                "before, ahead of a graph break or outside of what is compiled, is clustered with "
                "it, unless the option exact_tokens names it."
            )
        for found in self.breaks:
            lines.append(f"Graph break, {found.count} times: {found.reason}")
            lines += [f"  {hint}" for hint in found.hints[:1]]
        return lines

    def __str__(self) -> str:
        return self.text()


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    draw_to: Path | str | None = None,
    **kwargs: Any,
) -> Explanation:
    """Report what `torch.compile(model, backend="svg_ear", options=options)` would rewrite.

    Runs the model once on the given inputs, eagerly and without gradients. If there are graph
    breaks, runs it once more to count the attention calls outside of all graphs.

    Args:
        model: an `nn.Module`, compiled or not, or a function.
        args, kwargs: its inputs.
        options: see `Settings.parse`; ``exact_tokens`` may also be a function, see `bind`.
        draw_to: folder for drawings of the graph around sparse sites before and after the rewrite,
            one for each kind of site.

    Raises:
        ValueError: see `Settings.parse`; or the budget is for another model.
        TypeError: see `Settings.parse`; or the model is a pipeline, or cannot be called.
        OSError: the folder cannot be written.
    """
    check_callable("explain", model)
    settings, exact_length = _settings(model, args, kwargs, options)
    graphs: list[GraphReport] = []
    drawn: set[object] = set()
    in_graphs = 0

    def record(gm: GraphModule, example_inputs: object) -> Callable[..., Any]:
        tensors = (*gm.parameters(), *gm.buffers(), *vars(gm).values())
        traced = copy.deepcopy(gm, {id(t): t for t in tensors if isinstance(t, torch.Tensor)})
        before = {} if draw_to is None else surroundings_before(gm, find_sites(gm))
        graphs.append(rewrite_graph(gm, settings, exact_length))
        if draw_to is not None:
            _draw(Path(draw_to), before, surroundings_after(gm), drawn)

        def run(*inputs: Any) -> Any:
            nonlocal in_graphs
            with CountingAttention() as counted:
                outputs = traced.forward(*inputs)
            in_graphs += counted.calls
            return outputs

        return run

    target = getattr(model, "_orig_mod", model)

    def eager(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    before = _Counted.now()
    try:
        run_once(model, args, kwargs, record)
    except BackendCompilerFailed as error:  # Dynamo's wrapper of an error of the backend
        raise error.inner_exception from None
    breaks = [_break(*item) for item in _Counted.now().since(before).items()]
    unseen = 0
    if breaks:
        scripted = CallingFromPython() if _has_scripts(target) else nullcontext()
        with torch.no_grad(), CountingAttention() as counted, scripted:
            torch.compiler.disable(eager)(*args, **kwargs)
        unseen = counted.calls - in_graphs
    name = type(target).__name__ if isinstance(target, nn.Module) else ""
    return Explanation(graphs, breaks, unseen, name)


def _has_scripts(model: Callable[..., Any]) -> bool:
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(isinstance(module, torch.jit.ScriptModule) for module in modules)


def _settings(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    options: Mapping[str, Any] | None,
) -> tuple[Settings, int | None]:
    """The settings, with the exact tokens that a function names for these inputs, and whose."""
    function = options.get("exact_tokens") if isinstance(options, Mapping) else None
    if options is None or not callable(function):
        return Settings.parse(options), None
    rest = {key: value for key, value in options.items() if key != "exact_tokens"}
    settings = Settings.parse(rest)
    target = inner_of(model) if isinstance(model, nn.Module) else model
    signature = inspect.signature(target.forward if isinstance(target, nn.Module) else target)
    named = named_tokens(function, inputs_by_name(signature, args, kwargs))
    if named is None:
        return settings, None
    return replace(settings, exact_tokens=named.spans), named.tokens


def _draw(
    folder: Path,
    before: Mapping[str, Surroundings],
    after: Mapping[str, Surroundings],
    drawn: set[object],
) -> None:
    """Draw each rewritten site whose surroundings differ from those drawn before."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rewritten in after.items():
        if rewritten.outline not in drawn:
            drawn.add(rewritten.outline)
            title = name or "(function)"
            # A key of a ModuleDict may hold any character; matplotlib reads dollars as formulas.
            file = re.sub(r"[^\w.()#-]+", "_", title)[:100]
            picture = folder / f"{len(drawn):02d}-{file}.svg"
            draw(picture, printable(title).replace("$", r"\$"), before[name], rewritten)


@dataclass(frozen=True)
class _Counted:
    """What Dynamo has counted so far.

    Attributes:
        breaks: messages of graph breaks.
        other: messages of what it could not trace; it may have found another way.
        left: frames that it left as a whole, for such a reason.
    """

    breaks: Counter[str]
    other: Counter[str]
    left: int

    @classmethod
    def now(cls) -> _Counted:
        frames = counters["frames"]
        left = frames["total"] - frames["ok"]
        return cls(Counter(counters["graph_break"]), Counter(counters["unimplemented"]), left)

    def since(self, before: _Counted) -> Counter[str]:
        """Messages of the breaks since then, and of the frames that were left."""
        other = self.other - before.other if self.left > before.left else Counter[str]()
        return self.breaks - before.breaks + other


def _break(message: str, count: int) -> GraphBreak:
    """The break of a message without addresses of objects."""
    lines = [re.sub(r" at 0x[0-9a-f]+", "", line).strip() for line in message.splitlines()]
    lines = [line for line in lines if line]
    why = [x for x in lines[1:] if x.startswith("Explanation:")]
    reason = " ".join([lines[0], *(x.removeprefix("Explanation:").strip() for x in why)])
    return GraphBreak(reason, tuple(x for x in lines if x.startswith("Hint:")), count)
