"""What is drawn for a case: its form, its disturbance and everything around them."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

from benchmarks.fuzz.forms import (
    BETWEEN,
    FORMS,
    HAND_NAMES,
    LAYOUTS,
    SCALES,
    SDPA_NAMES,
    SOFTMAXES,
    SOURCES,
    WITHOUT_MASKS,
)
from benchmarks.fuzz.masks import APPLICATIONS, ARGUMENTS, BIASES, CONTENTS
from benchmarks.fuzz.near_misses import NEAR_MISSES
from benchmarks.fuzz.writes import TARGETS, WRITES

_MASKS = ("mask", "mask", "keep", "same_input")
_PLAIN_SCALES = ("none", "multiplied", "divided", "query_before", "both_before", "in_place")
STRATA: tuple[tuple[str, str], ...] = tuple(
    (axis, value)
    for axis, values in {
        "near": NEAR_MISSES,
        "write": (*WRITES, "bool", "bool", "bool"),
        "form": FORMS,
        "mask": CONTENTS,
        "put": (*APPLICATIONS, *ARGUMENTS),
        "bias": BIASES,
        "scale": SCALES.keys() - {"none", "multiplied", "divided", "query_before", "both_before"},
    }.items()
    for value in sorted(values)
)
"""One disturbance for each case in turn, so that each occurs often enough."""
# Their texts name q, k and v beside the scores.
_OF_OPERANDS = ("scores_product_out", "scores_of_two_products", "broadcast_keys", "over_dims")


def choices_of(seed: int, index: int) -> dict[str, str]:
    """The choices of a case, without its text."""
    return drawn(seed, index, 0)[1]


def drawn(seed: int, index: int, attempt: int) -> tuple[random.Random, dict[str, str]]:
    """The choices of an attempt at a case, and the generator for its further draws."""
    rng = random.Random(f"{seed}:{index}:{attempt}")
    return rng, _choices(rng, *STRATA[(index + attempt) % len(STRATA)])


def _weighted(rng: random.Random, table: Mapping[str, object]) -> str:
    weights = [getattr(entry, "weight", 1.0) for entry in table.values()]
    return rng.choices(list(table), weights)[0]


def _choices(rng: random.Random, axis: str, value: str) -> dict[str, str]:
    """One value for each axis that the case has, the given one on the given axis."""
    near = value if axis == "near" else "none"
    miss = NEAR_MISSES.get(near)
    found = {"form": _form(rng, axis, value), "near": near}
    hand = bool(FORMS[found["form"]].score_dims)
    found["source"] = rng.choice(SOURCES)
    found["layout"] = rng.choice(list(LAYOUTS))
    found["between"] = rng.choices(list(BETWEEN), [8] + [1] * (len(BETWEEN) - 1))[0]
    found["dtype"] = rng.choices(("float32", "float16", "bfloat16"), (5, 2, 3))[0]
    found["dynamic"] = rng.choices(("no", "yes"), (11, 1))[0]
    if found["form"].startswith("flex_outside"):  # its mask is of one length
        found["dynamic"] = "no"
    found["finish"] = rng.choice(("raw", "reshape", "contiguous_view", "flatten", "projected"))
    found["mask"] = found["put"] = found["bias"] = found["write"] = "none"
    whole = found["form"] in WITHOUT_MASKS or (miss is not None and miss.is_whole)
    # One disturbance hides another: beside the one that was asked for, most is plain.
    calm = axis != "form" and rng.random() < 0.7
    if not whole and (axis in ("mask", "put", "bias") or value == "bool" or not calm):
        _draw_mask(rng, found, hand, axis, value)
    scales = _PLAIN_SCALES if calm or rng.random() < 0.6 else tuple(SCALES)
    found["scale"] = "none" if whole or not hand else rng.choice(scales)
    if axis == "scale":
        found["scale"] = value
    found["softmax"] = "none" if whole or not hand else rng.choice(list(SOFTMAXES))
    if axis == "write":
        targets = ["query", "key", "key", "value", "value", "projection", "tokens"]
        targets += ["scores", "weights"] if hand else []
        found["target"] = rng.choice(_MASKS if value == "bool" else targets)
        if whole:
            found["target"] = "tokens"
        found["moment"] = rng.choice(TARGETS[found["target"]])
        found["write"] = value
    return found


def _form(rng: random.Random, axis: str, value: str) -> str:
    """A form that the disturbance can be written in."""
    if axis == "form":
        return value
    names = list(FORMS)
    miss = NEAR_MISSES[value] if axis == "near" else None
    if axis == "scale" or value in APPLICATIONS:
        names = list(HAND_NAMES)
    elif value in ARGUMENTS:
        names = list(SDPA_NAMES)
    if axis in ("mask", "put", "bias") or value == "bool":
        names = [name for name in names if name not in WITHOUT_MASKS]
    if axis == "mask" and CONTENTS[value].dims:
        names = [name for name in names if _mask_dims(name) in CONTENTS[value].dims]
    if miss is not None:
        if miss.is_whole or miss.stage == "output_bhnd":
            names = ["matmul", "einsum_heads_first"]
            if miss.family != "hand" or miss.is_whole:
                names += ["sdpa_positional", "sdpa_keywords"]
        elif miss.family == "hand":
            names = list(HAND_NAMES)
        if miss.dims:
            names = [name for name in names if FORMS[name].score_dims in miss.dims.split()]
        if miss.stage == "product" or value in _OF_OPERANDS:
            names = [n for n in names if re.fullmatch("(bh|f|b)nd", FORMS[n].q_dims)]
            names = [n for n in names if FORMS[n].heads in ("many", "none")]
            names = [n for n in names if not FORMS[n].score_dims.endswith("kq")]
    return rng.choices(names, [FORMS[name].weight for name in names])[0]


def _mask_dims(form: str) -> str:
    """Dimensions of scores, also of those that PyTorch's attention does not show."""
    return FORMS[form].score_dims or ("fqk" if FORMS[form].q_dims == "fnd" else "bhqk")


def _draw_mask(
    rng: random.Random, found: dict[str, str], hand: bool, axis: str, value: str
) -> None:
    dims = _mask_dims(found["form"])
    puts = APPLICATIONS if hand else ARGUMENTS
    kind = rng.choices(("none", "mask", "bias"), (8, 10, 1))[0]
    if axis == "bias" or (kind == "bias" and axis not in ("mask", "put") and value != "bool"):
        found["bias"] = value if axis == "bias" else rng.choice(list(BIASES))
    elif axis in ("mask", "put") or value == "bool" or kind == "mask":
        fitting = {name: c for name, c in CONTENTS.items() if c.dims in ("", dims)}
        plain = {name: put for name, put in puts.items() if put.expect == "rewrite"}
        calm = axis == "mask" or rng.random() < 0.7
        found["put"] = value if axis == "put" else _weighted(rng, plain if calm else puts)
        calm = axis == "put" and rng.random() < 0.7
        found["mask"] = value if axis == "mask" else "keys" if calm else _weighted(rng, fitting)
