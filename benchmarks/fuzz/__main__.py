"""`python -m benchmarks.fuzz --graphs N --seed S`: random attention graphs against the pass.

Every case is a module in a random form (products, layout, scale, mask, dtype, writes in place) or a
near miss of attention. It is traced by Dynamo, rewritten as the backend rewrites it, run without
Inductor's code generation at density 1 and 0.999999, and compared with the module itself. Prints
what was tried, right, left with a reason, missed, wrong and crashed, and the text of the first
failures. `--only INDEX` runs one case of the seed again and prints its text.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.fuzz.case import draw
from benchmarks.fuzz.judge import judge
from benchmarks.fuzz.survey import BAD, Survey, run
from benchmarks.provenance import provenance


def main() -> int:
    """Parse the command line, run, print, write the record; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--graphs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--first", type=int, default=0, help="index of the first case")
    parser.add_argument("--only", type=int, help="run this case again and print its text")
    parser.add_argument("--focus", default="", help="only cases with these choices: axis=choice,…")
    parser.add_argument("--show", type=int, default=5, help="failures whose text is printed")
    parser.add_argument("--out", type=Path, help="record as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    focus = dict(pair.split("=", 1) for pair in given.focus.split(",") if pair)
    if given.only is not None:
        case = draw(given.seed, given.only, focus)
        print(case.source)
        print(judge(case))
        return 0
    survey = Survey()
    indices = range(given.first, given.first + given.graphs)
    progress = Console(stderr=True)
    outcomes = run(given.seed, indices, given.jobs, focus)
    for outcome in track(outcomes, "graphs", given.graphs, console=progress):
        survey.add(outcome)
        if outcome.verdict.outcome in BAD:
            verdict = outcome.verdict
            progress.print(f"{verdict.outcome} {given.seed}:{outcome.index}", verdict.detail)
    console = Console(width=110)
    for table in survey.tables():
        console.print(table)
    record = survey.record()
    for failure in survey.failures[: given.show]:
        case = draw(given.seed, failure.index, focus)
        print(f"\n# {failure.verdict.outcome}: {failure.verdict.detail}\n{case.source}")
    print({key: record[key] for key in ("tried", "outcomes", "plain_attentions",
                                        "plain_attentions_rewritten", "share_found")})  # fmt: skip
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        arguments = {"graphs": given.graphs, "seed": given.seed, "first": given.first}
        whole = {**provenance(), **arguments, "focus": focus, **record}
        given.out.write_text(json.dumps(whole, indent=1))
    return 1 if survey.failures else 0


if __name__ == "__main__":
    sys.exit(main())
