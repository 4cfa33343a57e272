"""The fuzzer of graphs: what it draws, that the pass stands it, that it finds faults put back."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.fx import Node

from benchmarks.fuzz.case import draw
from benchmarks.fuzz.choices import STRATA, choices_of
from benchmarks.fuzz.forms import FORMS
from benchmarks.fuzz.judge import _difference, _Run, judge
from benchmarks.fuzz.masks import APPLICATIONS, ARGUMENTS, BIASES, CONTENTS
from benchmarks.fuzz.near_misses import NEAR_MISSES
from benchmarks.fuzz.survey import BAD
from benchmarks.fuzz.writes import WRITES
from svg_ear_compile.passes import (
    arguments,
    dataflow,
    effects,
    find,
    handwritten,
    mask,
    memory,
    patterns,
    site,
    steps,
)
from svg_ear_compile.passes import rewrite as rewriting
from svg_ear_compile.passes.site import Padding

Monkey = pytest.MonkeyPatch

PARTS = 6


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_form_and_near_miss_occurs_fifty_times_in_ten_thousand() -> None:
    seen: Counter[tuple[str, str]] = Counter()
    for index in range(10_000):
        seen.update(choices_of(3, index).items())
    wanted = {
        "form": FORMS, "near": NEAR_MISSES, "write": WRITES, "mask": CONTENTS, "bias": BIASES,
        "put": {**APPLICATIONS, **ARGUMENTS},
    }  # fmt: skip
    rare = {
        (axis, value): seen[axis, value]
        for axis, values in wanted.items()
        for value in values
        if seen[axis, value] < 50
    }
    assert not rare


def test_a_case_is_always_the_same_and_another_one_is_another() -> None:
    first = [draw(5, index).source for index in range(40)]
    assert first == [draw(5, index).source for index in range(40)]
    assert len(set(first)) == 40
    assert draw(6, 0).source != first[0]
    focused = draw(5, 3, {"near": "number_added"})
    assert focused.choices["near"] == "number_added"


def test_outputs_are_compared_with_a_float64_result_of_their_shape_alone() -> None:
    eager, wide = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.3], dtype=torch.float64)
    runs = [_Run([t], []) for t in (torch.tensor([1.0, 2.5]), eager)]
    assert _difference(*runs, None) is not None
    assert _difference(*runs, [wide]) is None  # eager is as far from it
    assert _difference(*runs, [wide[:1]]) is not None
    assert _difference(_Run([eager + 0], []), runs[1], [wide[:1]]) is None


@pytest.mark.parametrize("part", range(PARTS))
def test_the_pass_stands_a_graph_of_every_disturbance(part: int) -> None:
    graphs = [i for i in range(part, len(STRATA), PARTS) if not STRATA[i][1].startswith("flex_")]
    failures, invalid = [], 0  # a block mask takes seconds to trace: tests/passes has its own
    for index in graphs:
        case = draw(20, index)
        verdict = judge(case)
        invalid += verdict.outcome == "invalid"
        if verdict.outcome in BAD:
            failures.append(f"{verdict.outcome}: {verdict.detail}\n{case.source}")
    assert not failures, "\n\n".join(failures)
    assert invalid <= len(graphs) // 8


def _numbers_are_never_written(monkey: Monkey) -> None:
    monkey.setattr(dataflow.Dataflow, "is_ever_written", lambda *_: False)


def _numbers_keep_no_dtype(monkey: Monkey) -> None:
    def as_given(value: object, flow: dataflow.Dataflow) -> float | None:
        number = found(value, flow)
        numbers = [a for a in value.args if isinstance(a, float)] if isinstance(value, Node) else []
        return numbers[-1] if number is not None and numbers else number

    found = steps.number
    monkey.setattr(steps, "number", as_given)


def _numbers_may_be_added_to_weights(monkey: Monkey) -> None:
    passing = property(lambda step: replace(step, order=None, reason=None, shift=0) == steps.Step())
    monkey.setattr(steps.Step, "keeps_weights", passing)


def _other_arguments_do_not_matter(monkey: Monkey) -> None:
    monkey.setattr(arguments.Arguments, "rest_has_defaults", property(lambda _: True))
    monkey.setattr(handwritten, "_step", patterns.read_step)


def _an_added_bool_is_padding(monkey: Monkey) -> None:
    def of_any_kind(*given: Any, **named: Any) -> Any:
        made = found(*given, **named)
        value = made.tensor.node.meta["example_value"]
        return replace(made, added=made.added and value.dtype != torch.bool)

    found = handwritten.Mask
    monkey.setattr(handwritten, "Mask", of_any_kind)


def _casts_to_integers_count_as_nothing(monkey: Monkey) -> None:
    def any_cast(given: steps.Given) -> steps.Step | None:
        if cast(given.node) not in {"to", "int", "long", "short", "bool", "type", "char"}:
            return None
        given.args.take_all(except_for="out")
        return steps.Step() if given.args.take("self") in (None, given.scores) else None

    cast = steps.operation
    monkey.setattr(patterns, "_READ_STEP", (any_cast, *patterns._READ_STEP))
    monkey.setattr(handwritten, "_reason_of_dtypes", lambda _: None)


def _fills_are_not_scaled(monkey: Monkey) -> None:
    def scale_alone(reading: Any, factor: float) -> None:
        reading.scale *= factor

    monkey.setattr(handwritten._Reading, "_scale", scale_alone)


def _no_view_shares_memory(monkey: Monkey) -> None:
    monkey.setattr(dataflow, "storages", lambda value: frozenset({id(value)}))


def _lists_are_never_written(monkey: Monkey) -> None:
    def without_lists(self: effects.Effects, node: Node) -> list[Node]:
        return [n for n in found(self, node) if n in node.args]

    found = effects.Effects.written
    monkey.setattr(effects.Effects, "written", without_lists)


def _sites_read_what_was_replaced(monkey: Monkey) -> None:
    monkey.setattr(rewriting._Rewriter, "_now", lambda _, node: node)


def _writes_are_told_by_rank(monkey: Monkey) -> None:
    def of_rank(node: Node, tensors: list[Node]) -> object:
        values = [n.meta.get("example_value") for n in node.all_input_nodes]
        return node.target, [getattr(value, "ndim", None) for value in values]

    monkey.setattr(effects, "_key", of_rank)


def _sites_are_in_the_order_of_their_softmaxes(monkey: Monkey) -> None:
    def by_softmax(gm: Any, flow: dataflow.Dataflow) -> Any:
        places = {call: flow.position[call.node.all_input_nodes[0]] for call in found(gm, flow)}
        return sorted(places, key=places.__getitem__)

    found = find._calls
    monkey.setattr(find, "_calls", by_softmax)


def _only_positional_arguments_are_known(monkey: Monkey) -> None:
    def positional(node: Node) -> Any:
        assert node.args or "input" not in node.kwargs, "tuple index out of range"
        return found(node)

    found = patterns.arguments
    monkey.setattr(patterns, "arguments", positional)


def _repeated_masks_keep_their_batch(monkey: Monkey) -> None:
    def without_looking(flow: Any, operand: Any, reader: Any, fits: Any) -> Any:
        node = operand.node
        if mask.operation(node) in ("repeat", "expand", "clone") and node.all_input_nodes:
            source = node.all_input_nodes[0]
            if len(mask.hints_of(source)) == len(operand.dims):
                return Padding(keys=(replace(operand, node=source),))
        return found(flow, operand, reader, fits)

    found = mask._factors
    monkey.setattr(mask, "_factors", without_looking)


def _outputs_have_strides_of_their_own(monkey: Monkey) -> None:
    monkey.setattr(rewriting, "_in_strides_of", lambda graph, out, old: out)
    monkey.setattr(rewriting, "_check", lambda *_: None)


def _ragged_sizes_are_read(monkey: Monkey) -> None:
    def read(size: Any) -> Any:
        return size if size is None or isinstance(size, int) else int(size)

    for name, module in list(sys.modules.items()):
        if name.startswith("svg_ear_compile.passes.") and hasattr(module, "hint"):
            monkey.setattr(module, "hint", read)


def _any_tensor_is_plain(monkey: Monkey) -> None:
    for module in (memory, find, site):
        monkey.setattr(module, "is_plain", lambda value: isinstance(value, torch.Tensor))
    monkey.setattr(find, "_is_transformed", lambda _: False)


# fmt: off
FAULTS: list[tuple[Callable[[Monkey], None], dict[str, str]]] = [
    (_numbers_are_never_written, {"scale": "constant_written"}),
    (_numbers_are_never_written, {"put": "where_written"}),
    (_numbers_keep_no_dtype, {"scale": "constant_of_dtype"}),
    (_numbers_may_be_added_to_weights, {"near": "number_added"}),
    (_other_arguments_do_not_matter, {"near": "product_out"}),
    (_other_arguments_do_not_matter, {"near": "rounded_scores"}),
    (_an_added_bool_is_padding, {"put": "bool_added"}),
    (_casts_to_integers_count_as_nothing, {"near": "integer_scores"}),
    (_fills_are_not_scaled, {"put": "filled_then_scaled"}),
    (_no_view_shares_memory, {"write": "ravel"}),
    (_no_view_shares_memory, {"near": "shared_mask_written"}),
    (_lists_are_never_written, {"write": "foreach"}),
    (_writes_are_told_by_rank, {"write": "by_layout"}),
    (_sites_are_in_the_order_of_their_softmaxes, {"near": "interleaved"}),
    (_sites_read_what_was_replaced, {"near": "attention_of_attention"}),
    (_only_positional_arguments_are_known, {"form": "matmul", "scale": "divided"}),
    (
        _repeated_masks_keep_their_batch,
        {"form": "sdpa_positional", "mask": "halves_repeated", "write": "bool"},
    ),
    (_outputs_have_strides_of_their_own, {"near": "output_viewed"}),
    (_ragged_sizes_are_read, {"near": "jagged"}),
    (_any_tensor_is_plain, {"near": "transformed"}),
]
# fmt: on


@pytest.mark.parametrize(("put_back", "focus"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_fault_that_is_put_back_is_found(
    put_back: Callable[[Monkey], None], focus: dict[str, str], monkeypatch: Monkey
) -> None:
    with monkeypatch.context() as monkey:
        put_back(monkey)
        found = next(
            case
            for case in (draw(24, index, focus) for index in range(200))
            if judge(case).outcome in ("wrong", "crashed")
        )
    assert judge(found).outcome not in BAD
