"""Plans of the sites of a graph, by settings and cost model, and a report of each decision."""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, dataclass, field, replace

import torch
from torch.fx import Graph, GraphModule

from svg_ear_compile.cost_model.stages import AttentionShape
from svg_ear_compile.foreign_budget import refuse_foreign
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.exact import given_tokens
from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.site import AttentionSite, Reason, Role
from svg_ear_compile.passes.symbolic import hint
from svg_ear_compile.passes.workload import NonAttentionCost, non_attention_cost
from svg_ear_compile.policy import (
    Decision,
    DeviceProfile,
    Expectation,
    SiteFacts,
    decide,
    profile_of,
)
from svg_ear_compile.settings import Settings
from svg_ear_compile.tracing import traced_module

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SiteReport:
    """The decision for one attention call, as plain data.

    Attributes:
        layer: path of the module that attends.
        site: name of the call in its graph.
        role: see `passes.site.Role`.
        shape: (B, H, N_q, N_k, D) as traced.
        exact: numbers of queries and of keys that are always exact, None where not known.
        places: where exact keys are (queries, where all keys are clustered), as "0:9, 201:205".
        origin: where exact tokens come from, in words.
        in_one_piece: all tokens come from one input of the graph, or queries and keys from one
            each, so that text does not show.
        dtype: dtype of the output. device: type of its device.
        plan: the plan of a sparse site, else None.
        clusters: (Qc, Kc) of a sparse site, else None.
        reason: code of the reason why the site stays dense, else None.
        sentence: the decision and its reason in words.
        bound_by: name of the parameter that tells the layer at run time, or None.
        conditions: conditions in words that a call of a sparse site has to meet at run time.
        expected: predicted milliseconds and error, None if nothing was predicted.
        kv_heads: heads of k and v.
    """

    layer: str
    site: str
    role: str
    shape: tuple[int | None, ...]
    exact: tuple[int | None, int | None]
    places: str
    origin: str
    in_one_piece: bool
    dtype: str
    device: str
    plan: AttentionPlan | None
    clusters: tuple[int, int] | None
    reason: str | None
    sentence: str
    bound_by: str | None
    conditions: tuple[str, ...] = ()
    expected: Expectation | None = None
    kv_heads: int | None = None

    @property
    def video_tokens(self) -> int | None:
        """Queries that are not exact, as far as these are known; None where tokens are not."""
        tokens = self.shape[2] if len(self.shape) == 5 else None
        return tokens if tokens is None else tokens - (self.exact[0] or 0)

    @property
    def is_sparse(self) -> bool:
        """Whether the call is sparse at the traced length, under a plan that is not dense."""
        if self.plan is None or self.plan.is_dense:
            return False
        return self.video_tokens is None or self.video_tokens >= self.plan.min_tokens


@dataclass(frozen=True)
class GraphReport:
    """All attention calls of one compiled graph.

    Attributes:
        sites: a report for each call, in the order of execution.
        non_attention: cost of the rest of the graph.
        model: class of the module that was traced, "" where that does not show.
        profile: profile of the device that attends; None without attention or kernels.
    """

    sites: list[SiteReport] = field(default_factory=list)
    non_attention: NonAttentionCost = field(default_factory=lambda: NonAttentionCost(0, 0))
    model: str = ""
    profile: DeviceProfile | None = None

    @property
    def rewritten(self) -> int:
        """Number of sites that were rewritten, dense plans among them."""
        return sum(site.plan is not None for site in self.sites)

    @property
    def sparse(self) -> int:
        """Number of sites that are sparse, see `SiteReport.is_sparse`."""
        return sum(site.is_sparse for site in self.sites)

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        sites = [{**asdict(site), "sparse": site.is_sparse} for site in self.sites]
        return {**asdict(self), "sites": sites, "sparse": self.sparse}


def decide_sites(
    sites: list[AttentionSite], non_attention: NonAttentionCost, settings: Settings
) -> list[Decision | Reason]:
    """The decision for each site, or the reason why it cannot be sparse at all."""
    able = [site for site in sites if site.reason is None]
    decided = iter(
        decide([_facts(site) for site in able], non_attention.flops, non_attention.bytes, settings)
    )
    return [site.reason or next(decided) for site in sites]


def plan_site(
    site: AttentionSite, decided: Decision | Reason, settings: Settings
) -> AttentionPlan | None:
    """The plan that the site is rewritten with; None if the site stays as it is."""
    if isinstance(decided, Reason):
        return None
    chunks = decided.min_chunk_tokens
    lengths = (site.q_shape[2], site.k_shape[2])
    varies = any(isinstance(n, torch.SymInt) for n in lengths) or decided.min_cached_keys > 0
    if varies and decided.least_tokens is not None:
        # The graph serves other lengths, too. A guard on this length would compile again for the
        # others, so each call decides by its own length. Only the call knows of kept clusters.
        return replace(
            decided.plan or settings.plan,
            min_tokens=decided.least_tokens,
            max_key_ratio=decided.max_key_ratio,
            min_cached_keys=decided.min_cached_keys,
            min_chunk_tokens=chunks,
        )
    return decided.plan and replace(decided.plan, min_chunk_tokens=chunks)


def _facts(site: AttentionSite) -> SiteFacts:
    q, k = ([hint(size) or 0 for size in shape] for shape in (site.q_shape, site.k_shape))
    assert site.device is not None
    exact_queries, exact_keys = (count or 0 for count in site.exact.counts)
    dtype = str(site.dtype).removeprefix("torch.")
    shape = AttentionShape(q[0], q[1], k[1], q[2], k[2], q[3], dtype, exact_keys, exact_queries)
    return SiteFacts(site.layer, shape, site.device, site.role is Role.PREFIX, site.may_have_chunks)


def rewrite_graph(
    gm: GraphModule, settings: Settings, exact_length: int | None = None
) -> GraphReport:
    """Find, plan and rewrite the sites of a graph in place; report every attention call.

    A graph on which the pass fails stays as it was, with a warning: a fault of this package must
    not keep a model from running.

    Args:
        exact_length: number of keys of the only calls that `settings.exact_tokens` fits, None for
            any.

    Raises:
        ValueError: the settings have the budget of another model.
    """
    try:
        non_attention, found = non_attention_cost(gm), find_sites(gm)
    except Exception as fault:  # Inductor can compile the graph all the same
        _warn_of(fault)
        return GraphReport()
    if settings.budget is not None:
        refuse_foreign(settings.budget, found)
    try:
        sites = [_with_given_tokens(site, settings, exact_length) for site in found]
        decided = decide_sites(sites, non_attention, settings)
        plans = [plan_site(*pair, settings) for pair in zip(sites, decided, strict=True)]
        notes = [_note(site, settings, exact_length) for site in found]
    except ValueError:  # the options do not fit the model
        raise
    except Exception as fault:  # as above
        _warn_of(fault)
        return GraphReport()
    planned = [(s, plan) for s, plan in zip(sites, plans, strict=True) if plan is not None]
    if planned:
        untouched = {module: _copied(module.graph) for module in _graph_modules(gm)}
        try:
            rewrite(gm, planned)
        except Exception as fault:  # as above
            _warn_of(fault)
            for module, graph in untouched.items():
                module.graph = graph
            decided = [
                Reason.FAULT if plan is not None else decision
                for decision, plan in zip(decided, plans, strict=True)
            ]
            plans = [None] * len(sites)
    rows = zip(sites, decided, plans, notes, strict=True)
    return GraphReport(
        [_report(*row) for row in rows], non_attention, _model_of(sites), _profile_of(sites)
    )


def _model_of(sites: list[AttentionSite]) -> str:
    traced = traced_module(sites[0].call.node) if sites else None
    return "" if traced is None else type(traced).__name__


def _profile_of(sites: list[AttentionSite]) -> DeviceProfile | None:
    devices = (site.device for site in sites if site.device is not None)
    return next((found for device in devices if (found := profile_of(device))), None)


def _graph_modules(gm: GraphModule) -> list[GraphModule]:
    return [module for module in gm.modules() if isinstance(module, GraphModule)]


def _copied(graph: Graph) -> Graph:
    """A copy that keeps what Dynamo has set on the nodes: later stages refuse inputs without it."""
    copied = copy.deepcopy(graph)
    for node, old in zip(copied.nodes, graph.nodes, strict=True):
        for name, value in vars(old).items():
            vars(node).setdefault(name, value)  # what is the copy's own stays
    return copied


def _warn_of(fault: Exception) -> None:
    log.warning(
        "svg_ear failed on a graph, which stays dense and is compiled by Inductor alone. Please "
        "report this: %s: %s",
        type(fault).__name__,
        fault,
        exc_info=fault,
    )


def _with_given_tokens(
    site: AttentionSite, settings: Settings, length: int | None
) -> AttentionSite:
    """The site with the exact tokens of the options, if these fit it."""
    spans = settings.exact_tokens
    if site.reason is not None or spans is None:
        return site
    given = given_tokens(site.call, spans, length)
    return site if given is None else replace(site, exact=given)


def _note(site: AttentionSite, settings: Settings, length: int | None) -> str:
    """What is to be said of the exact tokens of a site that could be sparse."""
    spans = settings.exact_tokens
    if site.reason is not None:
        return ""
    if spans is not None and given_tokens(site.call, spans, length) is None:
        return " The given exact_tokens do not fit its tokens: ignored here."
    if site.exact.guessed and spans is None:
        return " Exact tokens are a guess: tokens without positions. exact_tokens says it."
    if site.exact.untold and spans is None:
        return (
            f" It holds tokens of {site.exact.untold} in places that the graph does not show: all "
            "are clustered. exact_tokens names those that are to stay exact."
        )
    return ""


def _report(
    site: AttentionSite, decided: Decision | Reason, plan: AttentionPlan | None, note: str
) -> SiteReport:
    q, k = ([hint(size) for size in shape] for shape in (site.q_shape, site.k_shape))
    exact, spans, clusters = site.exact.counts, site.exact.spans, None
    if plan is not None and not {q[2], k[2], *exact} & {None}:
        clusters = plan.clusters(q[2] - exact[0], k[2] - exact[1])  # type: ignore[operator]
    reason = decided.value if isinstance(decided, Reason) else decided.reason
    length, proof = _conditions(site, plan)
    # A decision for too few tokens says itself from how many on the call is sparse.
    said = [proof] if reason == "short" else [length, proof]
    sentence = "; ".join([*(f"sparse {when}" for when in said if when), decided.sentence])
    return SiteReport(
        layer=site.layer,
        site=site.name,
        role=site.role.value,
        shape=(*q[:3], *k[2:]),
        exact=exact,
        places=spans[1] or spans[0],
        origin=site.exact.origin,
        in_one_piece=site.exact.in_one_piece,
        dtype=str(site.dtype).removeprefix("torch."),
        device=site.device.type if site.device else "",
        plan=plan,
        clusters=clusters,
        reason=reason if plan is None else None,
        sentence=f"{sentence.rstrip('.')}.{note}" if note else sentence,
        bound_by=site.layer_parameter.name if site.layer_parameter else None,
        conditions=tuple(when for when in (length, proof) if when),
        expected=None if isinstance(decided, Reason) else decided.expected,
        kv_heads=k[1] if len(k) > 1 else None,
    )


def _conditions(site: AttentionSite, plan: AttentionPlan | None) -> tuple[str, str]:
    """When a call of a sparse site is sparse: by its length, by its mask; "" for always."""
    if plan is None:
        return "", ""
    length = f"from {plan.min_tokens:,} video tokens on" if plan.min_tokens else ""
    proof = "if the mask turns out to be padding" if site.prove_mask else ""
    if site.may_have_chunks:
        least = plan.min_chunk_tokens
        proof += " or by chunk" + (f", in chunks of at least {least:,} tokens" if least else "")
    return length, proof
