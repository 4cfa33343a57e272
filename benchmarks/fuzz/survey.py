"""Runs many cases and counts what became of them, by every choice that the generator made."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.table import Table

from benchmarks.fuzz.case import draw
from benchmarks.fuzz.judge import Verdict, judge

OUTCOMES = ("right", "left", "missed", "wrong", "crashed", "invalid")
BAD = ("missed", "wrong", "crashed")
COUNTED = ("form", "near", "mask", "put", "bias", "scale", "softmax", "write", "target", "moment",
           "source", "layout", "between", "dtype", "dynamic")  # fmt: skip
"""Axes of the table; each has the choices that `case.Case` lists."""


@dataclass(frozen=True)
class Outcome:
    """What became of one case, without its text."""

    index: int
    choices: dict[str, str]
    expect: str
    verdict: Verdict


@dataclass
class Survey:
    """Counts over many cases.

    Attributes:
        outcomes: cases by outcome.
        by_choice: for each axis and choice, cases by outcome.
        reasons: sites that were left, by reason.
        plain, found: by form, the true attentions and those of them that were rewritten. True are
            those that the pass has to rewrite (see `forms.Expect`). A form, mask
            or scale that is expected to give a reason counts in no share, nor does an invalid text.
        failures: cases that are missed, wrong or crashed, with what is wrong.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    by_choice: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)
    found: Counter[str] = field(default_factory=Counter)
    failures: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Count one case."""
        verdict = outcome.verdict
        self.outcomes[verdict.outcome] += 1
        for axis in COUNTED:
            choice = outcome.choices.get(axis, "none")
            self.by_choice.setdefault(axis, {}).setdefault(choice, Counter())[verdict.outcome] += 1
        self.reasons.update(verdict.reasons)
        if outcome.expect == "rewrite" and verdict.outcome != "invalid":
            form = outcome.choices["form"]
            self.plain[form] += 1
            self.found[form] += verdict.rewritten > 0
        if verdict.outcome in BAD:
            self.failures.append(outcome)

    def record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "tried": self.outcomes.total(),
            "outcomes": {name: self.outcomes[name] for name in OUTCOMES},
            "plain_attentions": self.plain.total(),
            "plain_attentions_rewritten": self.found.total(),
            "share_found": self.found.total() / max(self.plain.total(), 1),
            "by_form": {
                form: {"true": count, "found": self.found[form]}
                for form, count in sorted(self.plain.items())
            },
            "reasons": dict(self.reasons.most_common()),
            "by_choice": {
                axis: {choice: dict(counts) for choice, counts in sorted(choices.items())}
                for axis, choices in self.by_choice.items()
            },
            "failures": [
                {"case": o.index, "outcome": o.verdict.outcome, "detail": o.verdict.detail,
                 "choices": o.choices}
                for o in self.failures
            ],
        }  # fmt: skip

    def tables(self) -> Iterator[Table]:
        """One table for the forms, one for each kind of disturbance, one for the reasons."""
        for axis in ("form", "near", "mask", "put", "write", "scale"):
            table = Table(title=f"By {axis}")
            for column in (axis, "tried", *OUTCOMES):
                table.add_column(column, justify="left" if column == axis else "right")
            for choice, counts in sorted(self.by_choice.get(axis, {}).items()):
                cells = [counts.total(), *(counts[name] for name in OUTCOMES)]
                table.add_row(choice, *(str(cell or "") for cell in cells))
            yield table
        yield self._shares()
        table = Table(title="Left, by reason")
        table.add_column("reason")
        table.add_column("sites", justify="right")
        for reason, count in self.reasons.most_common():
            table.add_row(reason, str(count))
        yield table

    def _shares(self) -> Table:
        """Which share of the true attentions was found; forms that are never true are left out."""
        table = Table(
            title="True attentions found, by form",
            caption="True: has to be rewritten. Share: found / (found + left + missed).",
        )
        for column in ("form", "true", "found", "share"):
            table.add_column(column, justify="left" if column == "form" else "right")
        every = ("all forms", self.plain.total(), self.found.total())
        for form, true, found in (
            *((form, self.plain[form], self.found[form]) for form in sorted(self.plain)), every
        ):  # fmt: skip
            table.add_row(form, str(true), str(found), f"{found / true:.1%}" if true else "")
        return table


def run(
    seed: int, indices: Iterable[int], jobs: int = 1, focus: Mapping[str, str] | None = None
) -> Iterator[Outcome]:
    """Judge cases one after the other, or in processes of one thread each."""
    tasks = ((seed, index, focus) for index in indices)
    if jobs == 1:
        yield from map(_judged, tasks)
        return
    # A process grows with what PyTorch remembers of every graph: each is replaced now and then.
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, torch.set_num_threads, (1,), maxtasksperchild=50) as pool:
        yield from pool.imap(_judged, tasks, chunksize=20)


def _judged(task: tuple[int, int, Mapping[str, str] | None]) -> Outcome:
    seed, index, focus = task
    case = draw(seed, index, focus)
    return Outcome(index, case.choices, case.expect, judge(case))
