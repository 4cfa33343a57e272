"""Policy: a decision for each attention call of a graph, from the settings and the cost model.

The settings give a density, a speed-up or a tuned budget. With a density, each call is sparse where
the cost model predicts it to be faster. With a speed-up of the whole graph, a knapsack chooses the
density of each call. A model can have several graphs (regional compilation, graph breaks). Each
graph is decided alone: where every graph reaches the speed-up, the model does too.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from svg_ear_compile.cost_model import default_error, device_profile, knapsack
from svg_ear_compile.cost_model.budget import Budget, Choice
from svg_ear_compile.cost_model.calibration import Calibration, Origin
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.cost_model.disturbance import disturbance_of
from svg_ear_compile.cost_model.error import together
from svg_ear_compile.cost_model.hardware import hardware_of
from svg_ear_compile.cost_model.latency import (
    LONGEST,
    attention_allowance,
    break_even_tokens,
    dense_ms,
    fewest_cached_keys,
    most_keys_per_query,
    non_attention_ms,
    sparse_ms,
)
from svg_ear_compile.cost_model.stages import AttentionShape, expected_density
from svg_ear_compile.digits import three_digits
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.passes.site import Reason
from svg_ear_compile.settings import Settings

log = logging.getLogger(__name__)

DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
"""Densities among which a speed-up without a tuned budget chooses."""


@dataclass(frozen=True)
class SiteFacts:
    """Layer, shape and device of one attention call that could be sparse.

    Attributes:
        layer: path of the layer.
        shape: shape of the call.
        device: device of its tensors.
        cached_keys: the keys are those of a cache, whose clusters a session keeps.
        has_chunks: its queries may be several chunks, each of which sees keys of its own.
    """

    layer: str
    shape: AttentionShape
    device: torch.device
    cached_keys: bool = False
    has_chunks: bool = False


@dataclass(frozen=True)
class Expectation:
    """Predictions of the cost model for one call.

    Attributes:
        dense_ms, sparse_ms: predicted milliseconds of dense attention, and of the plan that was
            chosen or considered. Clusters are cold, as in a model that is not bound.
        error: relative RMS error of the model's output with this call alone sparse.
        times, errors: origin of the times and of the error, in words.
        uncertainty: see `Calibration`.
    """

    dense_ms: float
    sparse_ms: float
    error: float
    times: str
    errors: str
    uncertainty: float | None = 0.0


@dataclass(frozen=True)
class Decision:
    """Decision for one call.

    Attributes:
        plan: plan of the call, None for dense.
        least_tokens: smallest number of video tokens at which the call is sparse. Where this call
            is too short, it would then have the plan of the settings. None if it is never sparse.
        reason: code of the reason for a dense call; None for a sparse call, and for a call that is
            dense because the options ask for density 1.
        sentence: reason or expectation in words.
        expected: see `Expectation`; None where there are no predictions.
        max_key_ratio, min_cached_keys, min_chunk_tokens: see `AttentionPlan`.
    """

    plan: AttentionPlan | None
    least_tokens: int | None
    reason: Literal["short", "budget", "unlisted", "device"] | None
    sentence: str
    expected: Expectation | None
    max_key_ratio: float = 0.0
    min_cached_keys: int = 0
    min_chunk_tokens: int = 0


@dataclass(frozen=True)
class DeviceProfile:
    """Where the predicted times of a device come from.

    Attributes:
        origin: see `Calibration`.
        basis: origin in words.
        uncertainty: see `Calibration`.
        improved_by: command that gives a better profile; None if there is none.
    """

    origin: Origin
    basis: str
    uncertainty: float | None
    improved_by: str | None


def profile_of(device: torch.device) -> DeviceProfile | None:
    """The profile from which times on a device are predicted; None where it has no kernels."""
    calibration = calibration_of(device)
    if calibration is None:
        return None
    origin, basis, doubt = calibration.origin, calibration.basis, calibration.uncertainty
    here = origin == "calibrated"
    if here and disturbance_of(calibration) is not None:
        basis += " while it was busy"
    elif here and doubt == 0.0:
        return DeviceProfile(origin, basis, doubt, None)
    return DeviceProfile(origin, basis, doubt, f"svg-ear calibrate --device {device.type}")


@functools.lru_cache(maxsize=16)
def calibration_of(device: torch.device) -> Calibration | None:
    """Calibration of a device, read once per process; None where the device has no kernels."""
    try:
        return device_profile.load(describe(device), hardware_of(device))
    except ValueError:
        return None


def decide(
    sites: Sequence[SiteFacts], flops: float, moved: float, settings: Settings
) -> list[Decision]:
    """One decision for each site of a graph.

    Args:
        sites: calls that could be sparse.
        flops, moved: FLOPs of the graph outside attention, and bytes of the outputs of its nodes.
        settings: settings of the compilation.
    """
    if settings.budget is not None:
        found = [_by_budget(site, settings.budget, settings) for site in sites]
    elif settings.target_speedup is not None:
        found = _by_speedup(sites, flops, moved, settings.target_speedup, settings)
    else:
        found = [_by_density(site, settings) for site in sites]
    return [_with_chunks(site, each, settings) for site, each in zip(sites, found, strict=True)]


def _with_chunks(site: SiteFacts, decision: Decision, settings: Settings) -> Decision:
    """The decision with the length from which on a chunk of queries is sparse.

    It is that of self-attention. A chunk that sees more keys saves more, and clusters no others.
    """
    calibration = calibration_of(site.device)
    if not site.has_chunks or decision.least_tokens is None or calibration is None:
        return decision
    least = settings.min_tokens
    if least is None:
        plan = decision.plan or settings.plan
        square = replace(site.shape, k_tokens=site.shape.clustered[0] + site.shape.text)
        least = break_even_tokens(square, plan, calibration)
    return replace(decision, min_chunk_tokens=LONGEST if least is None else least)


def expect(site: SiteFacts, plan: AttentionPlan, calibration: Calibration) -> Expectation:
    """Predictions for a call under a plan that is not dense."""
    shape = site.shape
    return Expectation(
        dense_ms(shape, calibration),
        sparse_ms(shape, plan, calibration, "cold").total,
        default_error.model_error(expected_density(plan), plan, *shape.clustered),
        calibration.basis,
        default_error.BASIS,
        calibration.uncertainty,
    )


def _by_density(site: SiteFacts, settings: Settings) -> Decision:
    calibration = calibration_of(site.device)
    plan, tokens = settings.plan, site.shape.q_tokens - site.shape.query_text
    if calibration is None:
        return _NO_KERNELS
    if plan.is_dense:
        return Decision(plan, 0, None, "dense, as asked for", None)
    if calibration.uncertainty is None and settings.min_tokens is None:
        return _unmeasured(calibration)
    expected = expect(site, plan, calibration)
    least = at_any_ratio = settings.min_tokens
    ratio = 0.0
    if settings.min_tokens is None:
        queries, keys = site.shape.clustered
        square = replace(site.shape, k_tokens=queries + site.shape.text)
        least = break_even_tokens(site.shape, plan, calibration)
        at_any_ratio = break_even_tokens(square, plan, calibration)
        ratio = most_keys_per_query(site.shape, plan, calibration)
    cached = 0
    if site.cached_keys and settings.min_tokens is None:
        cached = fewest_cached_keys(site.shape, plan, calibration) or 0
    if least is not None and tokens >= least:
        sentence = f"sparse {_times(expected)}"
        return Decision(plan, at_any_ratio, None, sentence, expected, ratio, cached)
    where = "at no length" if least is None else f"from {least:,} video tokens on"
    sentence = f"Too few tokens: sparse {where}; here {_times(expected)}."
    # A call whose length is known only at run time may still be long enough.
    if least is None and at_any_ratio is not None:
        sentence = f"Too many keys for so few queries: sparse up to {ratio:g} for each; here " + (
            f"{keys / queries:.3g}: {_times(expected)}."
        )
    if cached:  # a session that keeps clusters does not cluster all keys
        at_any_ratio = LONGEST if at_any_ratio is None else at_any_ratio
        sentence += f" In a session, sparse from {cached:,} cached keys on."
    return Decision(None, at_any_ratio, "short", sentence, expected, ratio, cached)


def _by_budget(site: SiteFacts, budget: Budget, settings: Settings) -> Decision:
    try:
        choice, how = _choice(site.layer, budget.scaled(site.shape.k_tokens))
    except ValueError as error:
        return Decision(None, None, "unlisted", f"Dense, because {error}.", None)
    tokens = site.shape.q_tokens - site.shape.query_text
    calibration = calibration_of(site.device)
    short = settings.min_tokens is not None and tokens < settings.min_tokens
    if calibration is None:
        return _NO_KERNELS
    if choice.density >= 1.0 or short:
        return _dense("The budget leaves it dense." if not short else "Below min_tokens.")
    plan = choice.plan(settings.plan)
    expected = expect(site, plan, calibration)
    total = budget.predicted.error
    if total is not None:
        expected = replace(expected, error=total, errors="of the whole budget, as it was tuned")
    return Decision(
        plan, settings.min_tokens or 0, None, f"sparse {_times(expected)}, {how}", expected
    )


def _choice(layer: str, budget: Budget) -> tuple[Choice, str]:
    found = budget.densest(layer)
    if found is not None:
        several = budget.schedule.phases > 1
        return found, "the densest of its phases until it is bound" if several else "by the budget"
    # The graph of one block serves all blocks: only a bound model knows which block is running.
    alike = [path for path in budget.layers if path.endswith(f".{layer}")] if layer else []
    if not alike:
        raise ValueError(f"the budget has no layer {layer or '(function)'!r}")
    choices = [found for path in alike if (found := budget.densest(path)) is not None]
    sparse = [choice for choice in choices if choice.density < 1.0]
    densest = max(sparse, key=lambda choice: choice.density, default=choices[0])
    return densest, f"the densest of {len(alike)} layers until it is bound"


def _by_speedup(
    sites: Sequence[SiteFacts], flops: float, moved: float, target: float, settings: Settings
) -> list[Decision]:
    """Decisions for a speed-up of the graph: a knapsack over dense and `DENSITIES` of each call.

    What is uncertain about the device counts against sparse calls, as it does with a density.
    """
    calibration = calibration_of(sites[0].device) if sites else None
    if calibration is None:
        return [_NO_KERNELS for _ in sites]
    if calibration.uncertainty is None and settings.min_tokens is None:
        return [_unmeasured(calibration) for _ in sites]
    menus = [_menu(site, calibration, settings) for site in sites]
    dense = [dense_ms(site.shape, calibration) for site in sites]
    other = non_attention_ms(flops, moved, sites[0].shape.dtype, calibration)
    groups = [[knapsack.Option(ms, error**2) for _, ms, error in menu] for menu in menus]
    unreachable = ""
    try:
        chosen = knapsack.solve(groups, attention_allowance(sum(dense), other, target))
    except knapsack.UnreachableError:
        chosen = tuple(min(range(len(g)), key=lambda i, g=g: g[i].cost) for g in groups)  # type: ignore[misc]
        fastest = sum(menu[i][1] for menu, i in zip(menus, chosen, strict=True))
        best = (sum(dense) + other) / (fastest + other)
        unreachable = f"target_speedup {target:g} cannot be reached here: the best is {best:.2f}x"
        log.warning("%s (%s)", unreachable, calibration.basis)
    picked = [menu[i] for menu, i in zip(menus, chosen, strict=True)]
    attention = sum(ms for _, ms, _ in picked)
    at_least = "at least " if calibration.uncertainty else ""
    summary = unreachable or (
        f"whole graph {at_least}{(sum(dense) + other) / (attention + other):.2f}x, "
        f"error {together(error for _, _, error in picked):.2g}"
    )
    return [
        _decision(site, plan, summary, calibration, settings)
        for site, (plan, _, _) in zip(sites, picked, strict=True)
    ]


_MenuEntry = tuple[AttentionPlan | None, float, float]


def _menu(site: SiteFacts, calibration: Calibration, settings: Settings) -> list[_MenuEntry]:
    """(plan, longest milliseconds, error) of all options of a call, dense first."""
    menu: list[_MenuEntry] = [(None, dense_ms(site.shape, calibration), 0.0)]
    least = settings.min_tokens or 0
    if site.shape.q_tokens - site.shape.query_text >= least:
        for density in DENSITIES:
            plan = replace(settings.plan, density=density)
            expected = expect(site, plan, calibration)
            longest = expected.sparse_ms * (1.0 + (calibration.uncertainty or 0.0))
            menu.append((plan, longest, expected.error))
    return menu


def _decision(
    site: SiteFacts,
    plan: AttentionPlan | None,
    summary: str,
    calibration: Calibration,
    settings: Settings,
) -> Decision:
    least = settings.min_tokens or 0
    if plan is not None:
        expected = expect(site, plan, calibration)
        return Decision(plan, least, None, f"sparse {_times(expected)}; {summary}", expected)
    considered = expect(site, replace(settings.plan, density=DENSITIES[-1]), calibration)
    return Decision(None, None, "budget", f"Dense is the best choice here; {summary}.", considered)


def _dense(sentence: str) -> Decision:
    return Decision(None, None, "budget", sentence, None)


def _unmeasured(calibration: Calibration) -> Decision:
    return Decision(None, None, "short", f"The device's times are {calibration.basis}.", None)


_NO_KERNELS = Decision(None, None, "device", Reason.DEVICE.sentence, None)


def _times(expected: Expectation) -> str:
    doubt = f" (uncertain by {expected.uncertainty:.0%})" if expected.uncertainty else ""
    return (
        f"{three_digits(expected.sparse_ms)} ms{doubt} instead of {three_digits(expected.dense_ms)}"
    )
