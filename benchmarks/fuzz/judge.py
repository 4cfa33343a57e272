"""Compiles one case with the project's own pass and compares it with the module run eagerly."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch import eager_transforms
from torch.fx import GraphModule

from benchmarks.fuzz.case import Case
from svg_ear_compile.kernels import padding, query_chunks
from svg_ear_compile.planning import rewrite_graph
from svg_ear_compile.settings import Settings

Outcome = Literal["right", "left", "missed", "wrong", "crashed", "invalid"]

_ROWS_AT_A_TIME = 16
"""Rows of a mask that are read at a time: few, so that short ones are read as long ones are."""

SETTINGS = {
    density: Settings.parse({"density": density, "min_tokens": 1}) for density in (1.0, 0.999999)
}
"""At 1 a rewritten call takes PyTorch's attention; below, the kernels' CPU form, nearly all exact.
"""

_FEW_ULPS = {
    torch.float16: 4 * 2.0**-10,
    torch.bfloat16: 4 * 2.0**-7,
    torch.float32: 16 * 2.0**-23,  # sums of a hundred products in another order
    torch.float64: 16 * 2.0**-23,  # the kernels compute in float32
}


_IN_FLOAT64 = {
    **dict.fromkeys(("torch.float32", "torch.float16", "torch.bfloat16"), "torch.float64"),
    **dict.fromkeys((".float()", ".half()", ".bfloat16()"), ".double()"),
}
_NARROWER = re.compile("|".join(map(re.escape, _IN_FLOAT64)))


@dataclass(frozen=True)
class Verdict:
    """What became of one case.

    Attributes:
        outcome: "right" (rewritten, or untouched where it is no attention, and equal), "left"
            (attention that stays as it is, with a reason), "missed" (attention of which nothing is
            said), "wrong" (another result, or touched where it must not be), "crashed" (it fails
            through us), "invalid" (it fails without us).
        rewritten: sites that were rewritten.
        reasons: codes of the sites that were left.
        detail: what is wrong, in one line.
    """

    outcome: Outcome
    rewritten: int = 0
    reasons: tuple[str, ...] = ()
    detail: str = ""


@dataclass
class _Run:
    """Outputs of a module and its inputs afterwards, or the error that it raised."""

    tensors: list[Tensor] | None
    others: list[object]
    error: str = ""


class _Faults(logging.Handler):
    """What the pass logs where a fault of its own made it leave a graph alone."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            self.found.append("".join(traceback.format_exception(*record.exc_info, limit=-3)))


class _Backend:
    """Rewrites every graph for each density; `density` picks which one runs, None the original."""

    def __init__(self, through_aot: bool) -> None:
        self.through_aot = through_aot
        self.density: float | None = None
        self.rewritten: list[int] = []
        self.reasons: list[str] = []
        self.error = ""

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        made: dict[float | None, Callable[..., Any]] = {None: gm.forward}
        for density, settings in SETTINGS.items():
            graph = copy.deepcopy(gm)
            log, faults = logging.getLogger("svg_ear_compile"), _Faults()
            log.addHandler(faults)
            try:
                report = rewrite_graph(graph, settings)
            except Exception:  # whatever it is, it is what the fuzzer looks for
                faults.found.append(traceback.format_exc(limit=-3))
            finally:
                log.removeHandler(faults)
            if faults.found:
                self.error = faults.found[0]
                return gm.forward
            self.rewritten.append(report.rewritten)
            made[density] = graph.forward
            if self.through_aot and report.rewritten:
                made[density] = aot_eager(graph, list(example_inputs))
        self.reasons += [site.reason for site in report.sites if site.reason is not None]
        return lambda *args: made[self.density](*args)


def judge(case: Case) -> Verdict:
    """Compile a case, run it at every density and length, and compare."""
    torch._dynamo.reset()
    scope: dict[str, Any] = {"__name__": "fuzz_case"}
    quiet = logging.getLogger("torch._dynamo")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        # Of ever new shapes the cache of fake tensors remembers more than it saves.
        uncached = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
        with (
            uncached,
            mock.patch.object(padding, "_ROWS_AT_A_TIME", _ROWS_AT_A_TIME),
            mock.patch.object(query_chunks, "_ROWS_AT_A_TIME", _ROWS_AT_A_TIME),
            warnings.catch_warnings(),
            torch.no_grad(),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            exec(compile(case.source, f"<case {case.name}>", "exec"), scope)
            torch.manual_seed(0)
            model = scope["Model"]().to(scope["DTYPE"]).eval()
            return _judge(case, model, scope)
    finally:
        quiet.setLevel(level)


def _judge(case: Case, model: nn.Module, scope: dict[str, Any]) -> Verdict:
    wanted = [_run(model, scope["inputs"](n)) for n in case.lengths]
    if any(run.tensors is None for run in wanted):
        return Verdict("invalid", detail=wanted[0].error or wanted[-1].error)
    # AOTAutograd alone fails on a graph that enters inference mode (torch 2.13).
    backend = _Backend(case.through_aot and "inference_mode" not in case.source)
    # Guards are a tenth of the time, and one length needs none.
    options = {"guard_filter_fn": _no_guards} if len(case.lengths) == 1 else None
    dynamic = case.choices["dynamic"] == "yes"
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, options=options)
    narrowed = _narrowed(case)
    for density in SETTINGS:
        for n, eager in zip(case.lengths, wanted, strict=True):
            backend.density = density
            found = _run(compiled, scope["inputs"](n))
            if backend.error:
                return Verdict("crashed", detail=backend.error)
            exact = not any(backend.rewritten)
            precise = None if exact else _precise(case, model, n)
            problem = _difference(found, eager, precise, narrowed)
            if problem is None:
                continue
            backend.density = None  # does it differ without us?
            stock = _run(compiled, scope["inputs"](n))
            if stock.tensors is None:
                return Verdict("invalid", detail=stock.error)
            if _difference(found, stock, precise, narrowed) is None:
                continue
            outcome: Outcome = "crashed" if found.tensors is None else "wrong"
            return Verdict(
                outcome, max(backend.rewritten), tuple(backend.reasons),
                f"density {density:g}, {n} tokens: {problem}",
            )  # fmt: skip
    return _of_equal(case, backend)


def _narrowed(case: Case) -> torch.dtype:
    """The coarsest dtype in which the text may compute."""
    named = [dtype for dtype in (torch.bfloat16, torch.float16) if str(dtype)[6:] in case.source]
    return named[0] if named else torch.float16 if "half()" in case.source else torch.float32


def _no_guards(guards: Sequence[object]) -> list[bool]:
    return [False] * len(guards)


def _of_equal(case: Case, backend: _Backend) -> Verdict:
    """The verdict on a case whose values are right."""
    densities = len(SETTINGS)
    rewritten = sum(backend.rewritten) // densities
    reasons = tuple(dict.fromkeys(backend.reasons))
    if case.expect == "untouched":
        if rewritten:
            return Verdict("wrong", rewritten, reasons, "rewritten, though it is no attention")
        return Verdict("right", 0, reasons)
    if case.expect == "equal":
        return Verdict("right" if rewritten or not reasons else "left", rewritten, reasons)
    if len(backend.rewritten) > densities and not rewritten:
        return Verdict("left", 0, (*reasons, "graph_break"))  # the products lie in several graphs
    if rewritten + len(backend.reasons) < case.calls:
        return Verdict("missed", rewritten, reasons, "attention without a word")
    return Verdict("left" if reasons else "right", rewritten, reasons)


def _run(model: Callable[..., Any], inputs: tuple[Tensor, ...]) -> _Run:
    torch.manual_seed(2)
    try:
        returned = model(*inputs)
    except Exception as error:
        _leave_transforms()
        return _Run(None, [], f"{type(error).__name__}: {str(error)[:300]}")
    flat = torch.utils._pytree.tree_leaves(returned)
    tensors = [t for t in flat if isinstance(t, Tensor)]
    return _Run([*tensors, *inputs], [t for t in flat if not isinstance(t, Tensor)])


def _leave_transforms() -> None:
    """A compiled jvp that fails never ends: without this, all later cases would be inside of it."""
    torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(0)
    torch._C._set_fwd_grad_enabled(True)
    eager_transforms.JVP_NESTING = 0
    with contextlib.suppress(RuntimeError):  # inside of the one level that there can be
        torch._C._enter_dual_level()
    torch._C._exit_dual_level(level=0)


def _precise(case: Case, model: nn.Module, n: int) -> list[Tensor] | None:
    """Outputs of the same text in float64 throughout, or None where it only runs in its dtypes."""
    scope: dict[str, Any] = {"__name__": "fuzz_case"}
    text = "\n".join(
        line if "full" in line  # a number has the value that its dtype gave it
        else _NARROWER.sub(lambda found: _IN_FLOAT64[found[0]], line)
        for line in case.source.split("\n")
    )  # fmt: skip
    exec(compile(text, f"<case {case.name} in float64>", "exec"), scope)
    wide = scope["Model"]().to(torch.float64).eval()
    wide.load_state_dict(model.state_dict())
    inputs = scope["inputs"](n)
    low = getattr(torch, case.choices["dtype"])
    inputs = tuple(t.to(low).double() if t.is_floating_point() else t for t in inputs)
    return _run(wide, inputs).tensors


def _difference(
    found: _Run,
    wanted: _Run,
    precise: list[Tensor] | None,
    narrowed: torch.dtype = torch.float32,
) -> str | None:
    """What is different, in one line; with a float64 result by more than rounding."""
    if found.tensors is None or wanted.tensors is None:
        return None if found.tensors is wanted.tensors else found.error or wanted.error
    if len(found.tensors) != len(wanted.tensors):
        return f"{len(found.tensors)} tensors instead of {len(wanted.tensors)}"
    if found.others != wanted.others:
        return f"returned {found.others} instead of {wanted.others}"
    for place, (a, b) in enumerate(zip(found.tensors, wanted.tensors, strict=True)):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return f"tensor {place}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}"
        if _strides(a) != _strides(b):
            return f"tensor {place}: strides {a.stride()} instead of {b.stride()}"
        if torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all()):
            continue
        if a.dtype == torch.int16:  # the only one that a text returns: the bits of half precision
            a, b = a.view(torch.float16), b.view(torch.float16)
        if not a.is_floating_point():
            return f"tensor {place}: other {a.dtype} values"
        reference = precise[place] if precise is not None else None
        if reference is not None and reference.shape != b.shape:
            reference = None  # the text reads the bits of its tensors
        if reference is not None:
            # A low-precision product on the CPU may spread NaN into a neighbouring row: where eager
            # does that, no row that has NaN in one of them only is compared.
            spread = b.isnan() & ~reference.isnan()
            if spread.any() and bool((a.isnan() & b.isnan() >= reference.isnan()).all()):
                either = a.isnan() | b.isnan()
                a, b = (torch.where(either, reference.to(t.dtype), t) for t in (a, b))
        if not torch.equal(a.isnan(), b.isnan()):
            return f"tensor {place}: {int(a.isnan().sum())} NaN instead of {int(b.isnan().sum())}"
        problem = _beyond_rounding(a, b, reference, narrowed)
        if problem is not None:
            return f"tensor {place}: {problem}"
    return None


def _strides(t: Tensor) -> tuple[int, ...]:
    return tuple(s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1)


def _beyond_rounding(
    a: Tensor, b: Tensor, precise: Tensor | None, narrowed: torch.dtype
) -> str | None:
    """Twice the error of eager in the same dtype plus a few units in the last place are allowed.

    Args:
        a, b: result of the pass and of eager.
        precise: the result in float64.
        narrowed: the coarsest dtype that the text names, in which eager may have computed.
    """
    wide_a, wide_b = a.double(), b.double()
    kept = wide_b.isfinite()
    if not torch.equal(wide_a[~kept].nan_to_num(), wide_b[~kept].nan_to_num()):
        return "other infinities"
    if not kept.any():
        return None
    few = max(_FEW_ULPS[a.dtype], _FEW_ULPS[narrowed]) * float(wide_b[kept].abs().max())
    error, allowed = float((wide_a - wide_b)[kept].abs().max()), few
    if error <= allowed:
        return None
    if precise is not None:
        reference = precise.double()
        kept &= reference.isfinite()
        error = float((wide_a - reference)[kept].abs().max())
        allowed = 2 * float((wide_b - reference)[kept].abs().max()) + few
    return f"error {error:.2g}, allowed {allowed:.2g}" if not error <= allowed else None
