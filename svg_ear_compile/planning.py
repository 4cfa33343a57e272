"""From settings and sites to plans, and what was decided for each site."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import torch
from torch.fx import GraphModule

from svg_ear_compile.cost_model.size_rule import min_tokens
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.find import find_sites
from svg_ear_compile.passes.rewrite import rewrite
from svg_ear_compile.passes.site import AttentionSite, Reason, TextSpan
from svg_ear_compile.passes.symbolic import hint
from svg_ear_compile.passes.workload import RestOfModel, rest_of_model
from svg_ear_compile.settings import Settings


@dataclass(frozen=True)
class SiteReport:
    """What was decided for one attention call, as plain data.

    Attributes:
        layer: path of the module that attends.
        site: name of the call in its graph.
        role: see `passes.site.Role`.
        shape: (B, H, N_q, N_k, D) as traced.
        text: text tokens before and after the video tokens.
        dtype, device: of the output.
        plan: the plan of a sparse site, else None.
        clusters: (Qc, Kc) of a sparse site, else None.
        reason: code of why the site stays dense, else None.
        sentence: the same in words.
        bound_by: parameter that tells the layer apart at run time, or None.
    """

    layer: str
    site: str
    role: str
    shape: tuple[int | None, ...]
    text: tuple[int | None, int | None]
    dtype: str
    device: str
    plan: AttentionPlan | None
    clusters: tuple[int, int] | None
    reason: str | None
    sentence: str
    bound_by: str | None


@dataclass(frozen=True)
class GraphReport:
    """All attention calls of one compiled graph, and what the rest of it costs."""

    sites: list[SiteReport] = field(default_factory=list)
    rest: RestOfModel = field(default_factory=lambda: RestOfModel(0, 0))

    @property
    def sparse(self) -> int:
        """Number of sites that were rewritten."""
        return sum(site.plan is not None for site in self.sites)

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def plan_site(site: AttentionSite, settings: Settings) -> AttentionPlan | Reason:
    """The plan of a site, or why it stays dense."""
    if site.reason is not None:
        return site.reason
    assert site.device is not None
    least = settings.min_tokens
    if least is None:
        least = min_tokens(site.device.type)
    tokens = site.q_shape[2]
    if isinstance(tokens, torch.SymInt):
        # The graph serves other lengths too. A guard on this one would compile once more for the
        # others, so each call decides.
        return replace(settings.plan, min_tokens=least)
    text = sum(count or 0 for count in site.text.traced)
    return settings.plan if tokens - text >= least else Reason.SHORT


def rewrite_graph(gm: GraphModule, settings: Settings) -> GraphReport:
    """Find, plan and rewrite every site of a graph in place; report each."""
    rest = rest_of_model(gm)
    sites = [_with_given_text(found, settings) for found in find_sites(gm)]
    plans = [plan_site(site, settings) for site in sites]
    report = GraphReport([_report(*pair) for pair in zip(sites, plans, strict=True)], rest)
    planned = [
        (site, plan)
        for site, plan in zip(sites, plans, strict=True)
        if isinstance(plan, AttentionPlan)
    ]
    if planned:
        rewrite(gm, planned)
    return report


def _with_given_text(site: AttentionSite, settings: Settings) -> AttentionSite:
    prefix, suffix = settings.text_prefix, settings.text_suffix
    if (prefix is None and suffix is None) or site.reason is not None:
        return site
    return replace(
        site,
        text=TextSpan(
            site.text.prefix if prefix is None else (prefix,),
            site.text.suffix if suffix is None else (suffix,),
        ),
    )


def _report(site: AttentionSite, decided: AttentionPlan | Reason) -> SiteReport:
    q, k = ([hint(size) for size in shape] for shape in (site.q_shape, site.k_shape))
    text = site.text.traced
    plan = decided if isinstance(decided, AttentionPlan) else None
    clusters = None
    if plan is not None and not {q[2], k[2], *text} & {None}:
        clusters = plan.clusters(*(n[2] - sum(text) for n in (q, k)))  # type: ignore[arg-type, operator]
    return SiteReport(
        layer=site.layer,
        site=site.name,
        role=site.role.value,
        shape=(*q[:3], *k[2:]),
        text=text,
        dtype=str(site.dtype).removeprefix("torch."),
        device=site.device.type if site.device else "",
        plan=plan,
        clusters=clusters,
        reason=decided.value if isinstance(decided, Reason) else None,
        sentence=_sentence(site, decided),
        bound_by=site.layer_parameter.name if site.layer_parameter else None,
    )


def _sentence(site: AttentionSite, decided: AttentionPlan | Reason) -> str:
    if isinstance(decided, Reason):
        return decided.sentence
    conditions = []
    if decided.min_tokens:
        conditions.append(f"from {decided.min_tokens} video tokens on")
    if site.prove_mask:
        conditions.append("if the mask turns out to be padding")
    return " ".join(["sparse", *([", ".join(conditions)] if conditions else [])])
