"""The options of `torch.compile(model, backend="svg_ear", options={...})`, checked and typed."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch._inductor.config as inductor_config
from torch._inductor import list_mode_options, list_options

from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model.budget import Budget
from svg_ear_compile.kernels.checked import (
    Count,
    InvalidTypeError,
    InvalidValueError,
    NotNegative,
    checked,
    field_kinds,
    printable,
    shown,
)
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.kernels.removed import REMOVED

COMPARED = 64
"""Characters of an unknown name that are compared with known ones, in quadratic time."""

# What the policy sets. AttentionPlan.min_tokens is for graphs of several lengths; the option of
# that name is one number for all sites.
_DERIVED = ("min_tokens", "max_key_ratio", "min_cached_keys", "min_chunk_tokens", "is_tuned")
_PLAN_FIELDS = {
    f.name: field_kinds(AttentionPlan)[f.name]
    for f in fields(AttentionPlan)
    if f.name not in _DERIVED
}
_NUMBER_OF = {"top_p": "top_p", "min_block_ratio": "top_p", "threshold": "threshold"}

_COUNTS = ("min_tokens", "text_prefix", "text_suffix")
_SPELLINGS = ("text_prefix", "text_suffix")
_MOST_SPANS = 1000
_SPAN = re.compile(r"((?:-?\d{1,9})?):((?:-?\d{1,9})?)")
_OBJECTIVES = ("target_speedup", "budget")
OPTIONS = (*_PLAN_FIELDS, *_OBJECTIVES, *_COUNTS, "exact_tokens", "strict", "mode")
"""Names of all options but Inductor's."""
# What only a running model knows: arguments of `accelerate` and `bind`, no options of a graph.
_OF_THE_SESSION = (
    "dense_steps", "dense_above_timestep", "dense_layers", "early_factor", "steps", "timestep",
    "ascending", "guidance", "branches", "latents", "chunked",
)  # fmt: skip
# Options that follow from the objective and cannot be given beside it.
_DECIDED_BY_OBJECTIVE = ("routing", "top_p", "min_block_ratio", "threshold")
_DECIDED_BY_BUDGET = (*_DECIDED_BY_OBJECTIVE, "q_clusters", "k_clusters", "compensation")


@dataclass(frozen=True)
class Settings:
    """The options of a compilation.

    Attributes:
        plan: the plan of every sparse site.
        target_speedup: objective: speed-up of one forward of the whole model, above 1, or None.
        budget: a tuned budget, or None.
        min_tokens: fewest video tokens of a sparse site; None leaves it to the cost model.
        exact_tokens: start and stop of the slices of tokens that are always exact, for models whose
            graph does not show them; None reads them off the graph. They are ignored in a call
            that they do not fit. Given as slices, or as numbers of tokens at the start and
            the end by `text_prefix` and `text_suffix`.
        strict: whether a graph of which no long attention went sparse raises, see `summary`.
        inductor: Inductor's own configuration, mode included.
    """

    plan: AttentionPlan = field(default_factory=AttentionPlan)
    target_speedup: float | None = None
    budget: Budget | None = None
    min_tokens: int | None = None
    exact_tokens: tuple[tuple[int | None, int | None], ...] | None = None
    strict: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None = None, mode: str | None = None) -> Settings:
        """Settings from the arguments `options` and `mode` of `torch.compile`.

        Keys are the fields of `AttentionPlan`, those of `Settings`, ``"mode"``, or Inductor's.

        Raises:
            ValueError: an unknown key (the message names the nearest valid ones), a value out of
                range, a budget file that cannot be read, or options that contradict each other.
            TypeError: a key or a value of the wrong type; the message names the option.
        """
        given = by_name(options)
        if "mode" in given:
            if mode is not None:
                raise InvalidValueError("mode is given twice: as an argument and in options")
            mode = given.pop("mode")
        # None stands for the default, as wrappers pass it on.
        for key in ("density", *_OBJECTIVES, "exact_tokens"):
            if given.get(key, key) is None:
                del given[key]
        _check_objectives(given)
        inductor = _mode(mode)
        plan: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key, value in given.items():
            if key in _PLAN_FIELDS:
                plan[key] = checked(key, value, _PLAN_FIELDS[key])
            elif key in _COUNTS:
                own[key] = checked(key, value, Count | None)
            elif key == "exact_tokens":
                own["exact_tokens"] = exact_spans(value)
            elif key == "strict":
                own[key] = checked(key, value, bool)
            elif key in _OBJECTIVES:
                own |= _objective(key, value)
            elif key in REMOVED:
                raise InvalidValueError(REMOVED[key])
            elif key in _OF_THE_SESSION:
                raise InvalidValueError(
                    f"{key} is no option of the backend: give it to svg_ear_compile.accelerate or "
                    f"bind, as in accelerate(pipe, {key}=...)"
                )
            else:
                name = key.replace("-", "_")
                inductor[name] = _checked_inductor(key, name, value)
        ends = {key: count for key in _SPELLINGS if (count := own.pop(key, None)) is not None}
        if ends and "exact_tokens" in own:
            raise InvalidValueError(f"exact_tokens says what {' and '.join(ends)} says: give one")
        if ends:
            own["exact_tokens"] = _ends(**ends)
        routing = plan.get("routing", AttentionPlan.routing)
        for key, wanted in _NUMBER_OF.items():
            if key in plan and routing != wanted:
                raise InvalidValueError(
                    f'{key} belongs to routing="{wanted}", but routing is "{routing}"'
                )
        if "density" in plan and routing != "density" and plan["density"] < 1:
            raise InvalidValueError(
                f'density belongs to routing="density", but routing is "{routing}"'
            )
        return cls(AttentionPlan(**plan), **own, inductor=inductor)


def _ends(text_prefix: int = 0, text_suffix: int = 0) -> tuple[tuple[int | None, int | None], ...]:
    """Slices of so many tokens at the start and the end."""
    spans: list[tuple[int | None, int | None]] = [(0, text_prefix)] if text_prefix else []
    return (*spans, (-text_suffix, None)) if text_suffix else tuple(spans)


def exact_spans(value: object) -> tuple[tuple[int | None, int | None], ...]:
    """Start and stop of the slices of the option `exact_tokens`.

    Args:
        value: a slice, a list of slices, or slices as text, as in ``"0:226, -10:"``.

    Raises:
        InvalidTypeError, InvalidValueError: it is none of these, or a slice has a step.
    """
    count = value.count(",") if isinstance(value, str) else 0
    count = len(value) - 1 if isinstance(value, (list, tuple)) else count
    if count >= _MOST_SPANS:
        raise InvalidValueError(
            f"exact_tokens must be at most {_MOST_SPANS} slices, got {count + 1}"
        )
    if isinstance(value, str):
        found = [_SPAN.fullmatch(part.strip()) for part in value.split(",")]
        spans = [(int(m[1] or 0), int(m[2]) if m[2] else None) for m in found if m is not None]
        if len(spans) < len(found):
            raise InvalidValueError(
                f'exact_tokens must be slices such as "0:226, -10:", got {shown(value)}'
            )
        return tuple(spans)
    if callable(value):
        raise InvalidTypeError(
            "exact_tokens as a function is called with the model's inputs, which a compiled graph "
            "does not know: give it to svg_ear_compile.bind(model, exact_tokens=...) or accelerate"
        )
    slices: list[Any] = list(value) if isinstance(value, (list, tuple)) else [value]
    for part in slices:
        if not isinstance(part, slice) or any(
            bound is not None and type(bound) is not int for bound in (part.start, part.stop)
        ):
            raise InvalidTypeError(
                f"exact_tokens must be a slice, a list of slices or text, got {shown(part)}"
            )
        if part.step not in (None, 1):
            raise InvalidValueError("exact_tokens must be slices without a step")
        for bound in (part.start, part.stop):
            if bound is not None:
                checked("a bound of exact_tokens", abs(bound), Count)
    return tuple((part.start, part.stop) for part in slices)


def by_name(options: object) -> dict[str, Any]:
    """The options as a dict; raises an InvalidTypeError unless their names are strings."""
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise InvalidTypeError(f"options must be a dict, got {shown(options)}")
    for key in options:
        if not isinstance(key, str):
            raise InvalidTypeError(f"options are named by strings, got {shown(key)} as a name")
    return dict(options)


def _mode(mode: object) -> dict[str, Any]:
    """Inductor's configuration for one of its modes; empty for None."""
    modes = list_mode_options()
    if mode is None:
        return {}
    if not isinstance(mode, str):
        raise InvalidTypeError(f"mode must be str or None, got {shown(mode)}")
    if mode not in modes:
        (near,) = difflib.get_close_matches(mode[:COMPARED], modes, 1, 0.0)
        raise InvalidValueError(f"unknown mode {shown(mode)}; did you mean {near!r}?")
    return dict(modes[mode])


def _objective(key: str, value: object) -> dict[str, object]:
    """The fields of `Settings` that an objective sets."""
    if key != "budget":
        number = checked(key, value, NotNegative)
        if not number > 1.0:
            raise InvalidValueError(f"{key} must be finite and above 1, got {shown(value)}")
        return {key: number}
    return {"budget": usable_budget(value)}


def usable_budget(value: object) -> Budget:
    """The budget itself, or the one in the file that a path names.

    Raises:
        TypeError: it is neither a path nor a `Budget`.
        ValueError: the file cannot be read, or its budget is broken.
    """
    if not isinstance(value, (str, Path, Budget)):
        raise InvalidTypeError(f"budget must be a path or a Budget, got {shown(value)}")
    try:
        return budgets.check(value) if isinstance(value, Budget) else Budget.load(Path(value))
    except (OSError, ValueError) as error:
        problem = printable(str(error))
        raise InvalidValueError(f"the budget cannot be used: {problem}") from error


def _check_objectives(given: Mapping[str, Any]) -> None:
    objectives = [key for key in ("density", *_OBJECTIVES) if key in given]
    if len(objectives) > 1:
        raise InvalidValueError(f"{' and '.join(objectives)} are objectives: give one of them")
    for objective in objectives:
        taken = {"density": (), "budget": _DECIDED_BY_BUDGET}.get(objective, _DECIDED_BY_OBJECTIVE)
        for key in taken:
            if key in given:
                raise InvalidValueError(f"{objective} decides {key}: leave one of them out")


def _checked_inductor(key: str, name: str, value: object) -> object:
    """The value, if it has the type of Inductor's default; Inductor itself would fail later."""
    known = list_options()
    if name not in known:
        raise InvalidValueError(f"unknown option {shown(key)}{_nearest(key, known)}")
    default = getattr(inductor_config, name)
    if default is not None and type(value) is not type(default):
        wanted = type(default).__name__
        raise InvalidTypeError(
            f"{key} must be {wanted}, got {shown(value)} ({type(value).__name__})"
        )
    return value


def _nearest(key: str, known_inductor: Iterable[str]) -> str:
    key = key[:COMPARED]
    near = difflib.get_close_matches(key, OPTIONS, 3, 0.5)
    near += difflib.get_close_matches(key, sorted(known_inductor), 2, 0.7)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    return f"; valid are {', '.join(OPTIONS)} and Inductor's configuration keys"
