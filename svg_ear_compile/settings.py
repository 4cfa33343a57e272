"""The options of `torch.compile(model, backend="svg_ear", options={...})`, checked and typed."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch._inductor.config as inductor_config
from torch._inductor import list_mode_options, list_options

from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model.budget import Budget
from svg_ear_compile.kernels.plan import REMOVED, AttentionPlan

log = logging.getLogger(__name__)

# A plan's own min_tokens is for graphs of several lengths; the option is the same number for all.
_PLAN_FIELDS = {f.name: f for f in fields(AttentionPlan) if f.name != "min_tokens"}
_NUMBER_OF = {"top_p": "top_p", "min_block_ratio": "top_p", "threshold": "threshold"}

_WISHES = ("target_speedup", "budget")
# What a wish decides by itself, and so cannot be given beside it.
_DECIDED_BY_WISH = ("routing", "top_p", "min_block_ratio", "threshold")
_DECIDED_BY_BUDGET = (*_DECIDED_BY_WISH, "q_clusters", "k_clusters", "compensation")


@dataclass(frozen=True)
class Settings:
    """Everything that a user asked for.

    Attributes:
        plan: the plan of every sparse site.
        target_speedup: wished speed-up of one forward of the whole model, above 1, or None.
        budget: a tuned budget, or None.
        budget_problem: why the budget that was given cannot be used: attention stays dense.
        min_tokens: fewest video tokens of a sparse site; None leaves it to the cost model.
        text_prefix, text_suffix: text tokens at the start and the end of joint sequences, for
            models whose graph does not show them; None reads them off the graph.
        inductor: Inductor's own configuration, mode included.
    """

    plan: AttentionPlan = field(default_factory=AttentionPlan)
    target_speedup: float | None = None
    budget: Budget | None = None
    budget_problem: str | None = None
    min_tokens: int | None = None
    text_prefix: int | None = None
    text_suffix: int | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Settings:
        """Settings of the two arguments that `torch.compile` hands to a backend.

        Keys are the fields of `AttentionPlan`, those of `Settings`, ``"mode"``, or Inductor's.

        Raises:
            ValueError: an unknown key (the message names the nearest valid ones), a value out of
                range, or options that contradict each other.
            TypeError: a value of the wrong type; the message names the option.
        """
        given = dict(options or {})
        if "mode" in given:
            if mode is not None:
                raise ValueError("mode is given twice: as an argument and in options")
            mode = given.pop("mode")
        modes = list_mode_options()
        if mode is not None and mode not in modes:
            near = difflib.get_close_matches(str(mode), modes, 1, 0.0)
            raise ValueError(f"unknown mode {mode!r}; did you mean {near[0]!r}?")
        inductor = dict(modes[mode]) if mode else {}
        known_inductor = set(list_options())
        plan: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, value in given.items():
            if key in _PLAN_FIELDS:
                plan[key] = _checked(key, value, get_type_hints(AttentionPlan)[key])
            elif key in ("min_tokens", "text_prefix", "text_suffix"):
                own[key] = _checked(key, value, int | None)
                if value is not None and own[key] < 0:
                    raise ValueError(f"{key} must not be negative, got {value!r}")
            elif key in _WISHES:
                own |= _wish(key, value)
            elif key in REMOVED:
                raise ValueError(REMOVED[key])
            elif key.replace("-", "_") in known_inductor:
                inductor[key.replace("-", "_")] = _checked_inductor(key.replace("-", "_"), value)
            else:
                raise ValueError(f"unknown option {key!r}{_nearest(key, known_inductor)}")
        routing = plan.get("routing", AttentionPlan.routing)
        for key, wanted in _NUMBER_OF.items():
            if key in plan and routing != wanted:
                raise ValueError(f'{key} belongs to routing="{wanted}", but routing is "{routing}"')
        if "density" in plan and routing != "density" and plan["density"] < 1:
            raise ValueError(f'density belongs to routing="density", but routing is "{routing}"')
        _check_wishes(given)
        return cls(AttentionPlan(**plan), **own, inductor=inductor)


def _wish(key: str, value: object) -> dict[str, object]:
    """The fields of `Settings` that a wish sets."""
    if key == "budget":
        if isinstance(value, Budget):
            return {"budget": value}
        if not isinstance(value, (str, Path)):
            raise TypeError(f"budget must be a path or a Budget, got {value!r}")
        # Not raised: the model is being compiled by now, and dense attention is always right.
        try:
            return {"budget": budgets.load(Path(value))}
        except (OSError, ValueError) as error:
            log.warning("the budget cannot be used, attention stays dense: %s", error)
            return {"budget_problem": f"Dense, because the budget cannot be used: {error}."}
    number = _checked(key, value, float)
    assert isinstance(number, float)
    if not (math.isfinite(number) and number > 1.0):
        raise ValueError(f"{key} must be finite and above 1, got {value!r}")
    return {key: number}


def _check_wishes(given: Mapping[str, Any]) -> None:
    wishes = [key for key in ("density", *_WISHES) if key in given]
    if len(wishes) > 1:
        raise ValueError(f"{' and '.join(wishes)} are ways to say the same thing: give one of them")
    for wish in wishes:
        taken = {"density": (), "budget": _DECIDED_BY_BUDGET}.get(wish, _DECIDED_BY_WISH)
        for key in taken:
            if key in given:
                raise ValueError(f"{wish} decides {key} by itself: leave one of them out")


def _nearest(key: str, known_inductor: set[str]) -> str:
    ours = [*_PLAN_FIELDS, *_WISHES, "min_tokens", "text_prefix", "text_suffix", "mode"]
    near = difflib.get_close_matches(key, ours, 3, 0.5)
    near += difflib.get_close_matches(key, sorted(known_inductor), 2, 0.7)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    return f"; valid are {', '.join(ours)} and Inductor's configuration keys"


def _checked_inductor(key: str, value: object) -> object:
    """Inductor takes any value and fails later: the type of its own default is asked for here."""
    default = getattr(inductor_config, key)
    if default is not None and type(value) is not type(default):
        wanted = type(default).__name__
        raise TypeError(f"{key} must be {wanted}, got {value!r} ({type(value).__name__})")
    return value


def _checked(key: str, value: object, kind: object) -> object:
    """The value if it is of the annotated type, a float from an int where a float is wanted."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kinds: dict[object, tuple[type, ...]] = {
        float: (float,), int: (int,), int | None: (int, type(None)), bool: (bool,),
    }  # fmt: skip
    allowed = kinds.get(kind, (str,))
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, allowed):
        names = " or ".join(t.__name__ for t in allowed)
        raise TypeError(f"{key} must be {names}, got {value!r} ({type(value).__name__})")
    return value
