"""One line for each compiled model: how many of its attentions went sparse, and why others did not.

The line is shown without any configuration of logging. Graphs that are alike, as those of all
blocks of a model, get one line together. Where long attention was found and none of it went sparse,
the line is a warning with a cure, or a `NotSparseError` under the option ``strict``.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections import Counter

from torch._dynamo.exc import ShortenTraceback

from svg_ear_compile.kernels.checked import printable
from svg_ear_compile.passes.site import Reason
from svg_ear_compile.planning import GraphReport, SiteReport
from svg_ear_compile.ranks import rank
from svg_ear_compile.settings import Settings

log = logging.getLogger(__name__)

LONG_TOKENS = 10_240
"""Fewest tokens of long attention: on the fastest GPU that was measured, fewer are faster dense."""

NEVER_SPARSE = frozenset(
    {
        Reason.CAUSAL,
        Reason.CAUSAL_CHUNK,
        Reason.TEXT,
        Reason.CROSS_ATTENTION,
        Reason.LENGTHS,
        Reason.VALUES,
        Reason.PART_OF_CLIP,
        Reason.SHORT,
        Reason.BUDGET,
    }
)
"""Reasons that lie in the attention or in what the options ask for: nobody has to be warned."""

CURES = {
    Reason.DROPOUT: "call model.eval()",
    Reason.GRADIENTS: "call the model under torch.no_grad() or torch.inference_mode()",
    Reason.MASK: "pass a bool mask of padding, or none",
    Reason.FLEX: "drop the score function; let the mask function compare with captured tensors",
    Reason.LEAF: "let the module call torch.nn.functional.scaled_dot_product_attention itself",
    Reason.KERNEL: 'call PyTorch\'s attention, in diffusers by set_attention_backend("native")',
    Reason.PACKED: "pass a batch of one length, or boundaries that the model computes of numbers",
    Reason.PATTERN: "write it as torch.nn.functional.scaled_dot_product_attention",
    Reason.WEIGHTS: "do not ask for the attention weights",
    Reason.WRITTEN: "write into a copy of the tensor",
    Reason.SCALE: "give the scale as a Python number",
    Reason.HEAD_DIM: "there is none: svg_ear does not serve this model",
    Reason.DTYPE: "cast q, k and v to bfloat16",
    Reason.TENSOR_TYPE: "pass plain tensors, outside of torch.func",
    Reason.LAYOUT: "bring q, k and v to (batch, heads, tokens, head dim)",
    Reason.UNLISTED: "tune this model, or give the budget that was tuned on it",
    Reason.DEVICE: "run on CUDA or on a CPU",
    Reason.FAULT: "report it",
}
"""What a user can do about each other reason."""


class NotSparseError(ShortenTraceback):  # Dynamo passes this kind of error on as it is
    """Long attention was found, none went sparse, and the option ``strict`` is set."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


def announce(report: GraphReport, settings: Settings) -> None:
    """Log the line of a compiled graph, once for graphs that are alike.

    Raises:
        NotSparseError: long attention was found, none went sparse, and the settings are strict.
    """
    if not report.sites:
        return
    name = printable(report.model or "graph")
    counted = f"svg_ear: {name}: {_counts(report)}"
    missed = [site for site in report.sites if _is_missed(site, report, settings)]
    if not missed or report.sparse:
        say_once(logging.INFO, f"{counted}{_why_short(report)}{_profile(report)}")
        return
    longest = max(missed, key=lambda site: site.video_tokens or LONG_TOKENS)
    text = f"{counted}. {_answer(longest, report)}"
    if settings.strict:
        raise NotSparseError(text)
    say_once(logging.WARNING, text)


def _counts(report: GraphReport) -> str:
    sparse = [site for site in report.sites if site.is_sparse]
    text = f"{len(sparse)} of {len(report.sites)} attentions sparse"
    if sparse:
        text += f" at {_budget_of(sparse)}{_tokens_of(sparse)}"
    dense = Counter(_cause(site) for site in report.sites if not site.is_sparse)
    if dense:
        text += f"; dense: {', '.join(f'{count} {cause}' for cause, count in dense.items())}"
    return text


def _budget_of(sparse: list[SiteReport]) -> str:
    plans = [site.plan for site in sparse if site.plan is not None]
    routing = plans[0].routing
    numbers = sorted(
        plan.density if routing == "density" else getattr(plan, routing) for plan in plans
    )
    least, most = f"{numbers[0]:.3g}", f"{numbers[-1]:.3g}"
    name = routing.replace("_", "-")
    return f"{name} {least}" if least == most else f"{name} {least} to {most}"


def _tokens_of(sites: list[SiteReport]) -> str:
    known = [site.video_tokens for site in sites if site.video_tokens is not None]
    return f" ({max(known):,} video tokens)" if known else ""


def _cause(site: SiteReport) -> str:
    if site.reason is not None:
        return site.reason
    return "as asked for" if site.plan is not None and site.plan.is_dense else Reason.SHORT.value


def _is_missed(site: SiteReport, report: GraphReport, settings: Settings) -> bool:
    """Whether the call is long, dense, and could be sparse after a change that a user can make."""
    least = LONG_TOKENS if settings.min_tokens is None else settings.min_tokens
    long = site.video_tokens is None or site.video_tokens >= least
    if site.is_sparse or not long:
        return False
    reason = _cause(site)
    if reason == Reason.SHORT.value:  # too short by a guess, or by a measurement?
        return report.profile is not None and report.profile.origin == "prior"
    if reason == Reason.BUDGET.value:
        return settings.target_speedup is not None
    return reason != "as asked for" and Reason(reason) not in NEVER_SPARSE


def _answer(site: SiteReport, report: GraphReport) -> str:
    """Reason and cure of a call that was missed."""
    reason = Reason(_cause(site))
    cure = CURES.get(reason)
    if cure is None:
        better = report.profile.improved_by if report.profile else None
        cure = f"run {better}" if better else "there is none: dense attention is faster here"
    tokens = _tokens_of([site]).strip(" ()")
    where = f"{tokens}: " if tokens else ""
    return f"Long attention stays dense ({where}{reason.value}): {site.sentence} Cure: {cure}."


def _why_short(report: GraphReport) -> str:
    """The sentence of the longest call that is too short, where none is sparse."""
    short = [site for site in report.sites if site.reason == Reason.SHORT.value]
    if report.sparse or not short:
        return ""
    return f". {max(short, key=lambda site: site.video_tokens or 0).sentence.rstrip('.')}"


def _profile(report: GraphReport) -> str:
    if report.profile is None:
        return ""
    better = report.profile.improved_by
    command = f" (better: {better})" if better else ""
    return f"; predicted times: {report.profile.basis}{command}"


@functools.lru_cache(maxsize=256)
def say_once(level: int, text: str) -> None:
    """Log a line that was not logged before, on the first rank of torch.distributed only."""
    if rank() == 0:
        _show_by_default()
        log.log(level, "%s", text)


class _Unheard(logging.Handler):
    """Writes to standard error what no other handler gets."""

    def emit(self, record: logging.LogRecord) -> None:
        if len(log.handlers) == 1 and not (log.parent is not None and log.parent.hasHandlers()):
            bars = sys.modules.get("tqdm")  # a pipeline's first step compiles under its bar
            write = print if bars is None else bars.tqdm.write
            write(self.format(record), file=sys.stderr)


def _show_by_default() -> None:
    """Let the line through unless the user has set a level; write it if nobody else does."""
    package = logging.getLogger(__name__.partition(".")[0])
    if not (log.level or package.level):
        log.setLevel(logging.INFO)
    if not any(isinstance(handler, _Unheard) for handler in log.handlers):
        log.addHandler(_Unheard())
