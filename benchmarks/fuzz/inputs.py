"""Mutated budgets, calibrations, checkpoints and options: each is used or refused in one sentence.

    python -m benchmarks.fuzz.inputs --cases 10000 --seed 1 --record

A case fails if it raises anything but our own errors, says something that a terminal cannot show,
takes longer than two seconds, or is accepted although what was read is not valid. Files are mutated
as text and as data; a calibration or a measurement that was changed must not be read at all.

Longer than other files: the four kinds of input share their mutations and the judge of a case.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from svg_ear_compile.checkpoint import Checkpoint
from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model import calibration as calibrations
from svg_ear_compile.cost_model import device_profile
from svg_ear_compile.cost_model.budget import (
    Budget,
    Choice,
    Performance,
    Point,
    Schedule,
    fingerprint,
)
from svg_ear_compile.cost_model.device import Device
from svg_ear_compile.cost_model.prior import prior
from svg_ear_compile.cost_model.stages import ELEMENT_SIZES, Amount
from svg_ear_compile.kernels.checked import InvalidTypeError, InvalidValueError
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.settings import Settings

RECORD = Path(__file__).parents[1] / "results" / "fuzz" / "inputs.json"
LIMIT_S = 2.0
REFUSALS = (InvalidValueError, InvalidTypeError, OSError)

_DEVICE = Device("cuda", "Fuzzed GPU", "2.13.0", "3.9.0", "0a1b2c3d")
_BUDGET = Budget(
    budgets.VERSION, fingerprint("VideoDiT", {"width": 64}, {"w": (64, 64)}), 1000, _DEVICE,
    "target_speedup 2", "tuned", Schedule(2, (500.0,), 50.0),
    {
        "blocks.0.attn": (Choice(0.3), Choice(0.1)),
        "blocks.1.attn": (Choice(1.0), Choice(0.2, 7, 13, "centroid")),
        "blocks.2.attn": (Choice(0.2, threshold=1e-4), Choice(0.1, threshold=2e-4)),
    },
    Performance(0.01, 12.5, 2.0, 0.2), Performance(0.011, 12.7, 1.97, 0.2),
    frontier=(Point(1.5, 0.25),),
    note="made by hand",
)  # fmt: skip
_MEASURED = {
    f"blocks.{i} 0.1 None/None gaussian {c}": 0.1 * i + c for i in range(4) for c in (0, 1)
}

_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 17, 2**31, 2**63, 2**64, 10**19, -(10**19), 10**400, 0.0, -0.0,
    -5.0, 1e-320, 1e308, math.nan, math.inf, -math.inf, "", "a", "0.1", "\x1b[2J", "[bold]",
    "\ud800", "\u202e", "\0", "x" * 5000, "dense", "tuned", [], [1], {}, {"": 0}, [[[]]],
)  # fmt: skip
_NUMBER = re.compile(rb"(?<=[ \[])-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?(?=[,\n\]}])")
_LITERALS = (
    b"NaN", b"-Infinity", b"1e999", b"-1e999", b"1E400", b"9" * 5000, b"0" * 99, b"[" * 200,
    b"[" * 100_000, b'{"a":' * 20_000, b'"' + b'\\"' * 2000, b"\xff\xfe", b"\xef\xbb\xbf", b"\x00",
    b"\x1b[31m", b"\r", b"\\ud800", b"'", b"//", b",", b"}", b"]", b"{", b"[", b'"', b":", b"-",
    b".", b"1e5", b"true", b"null", b"\xe2\x80\xae", b" " * 5000,
)  # fmt: skip


class TooSlowError(Exception):
    """A case did not end within `LIMIT_S`."""


class WrongError(Exception):
    """A case was accepted or answered as it must not be."""


@dataclass
class Outcomes:
    """What became of the cases of one kind.

    Attributes:
        accepted, refused: how many were used, and how many were refused or skipped.
        slowest_s: seconds of the slowest.
        failures: seed of the case and what went wrong.
    """

    accepted: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    failures: list[str] = field(default_factory=list)


def mutated_data(data: Any, random_: random.Random) -> Any:
    """A copy of JSON data with one to three of its values or keys changed."""
    data = copy.deepcopy(data)
    for _ in range(random_.randint(1, 3)):
        places = list(_places(data))
        if not places:
            return random_.choice(_ODD)
        holder, key = random_.choice(places)
        how = random_.randrange(6)
        if how == 3:
            del holder[key]
        elif how < 3 or isinstance(holder, list):
            holder[key] = copy.deepcopy(random_.choice(_ODD))
        elif how == 4:
            holder[random_.choice(["", "a\x1b[31m", "density", "\ud800", "[red]", "x" * 999])] = 1
        else:
            holder[f"{key}s"] = holder.pop(key)
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    keys = data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
    for key in keys:
        yield data, key
        yield from _places(data[key])


def mutated_bytes(content: bytes, random_: random.Random) -> bytes:
    """A file's content with flipped bits, cuts, insertions and repetitions."""
    for _ in range(random_.choice((1, 1, 1, 2, 5))):
        at = random_.randrange(len(content) + 1)
        end = min(len(content), at + random_.choice((1, 2, 10, 100)))
        how = random_.randrange(6)
        if how == 0 and at < len(content):
            flipped = content[at] ^ (1 << random_.randrange(8))
            content = content[:at] + bytes([flipped]) + content[at + 1 :]
        elif how == 1:
            content = content[:at]
        elif how == 2:
            content = content[:at] + content[end:]
        elif how == 3:
            content = content[:at] + random_.choice(_LITERALS) + content[end:]
        elif how == 4:
            content = content[:end] + content[at:]  # said twice: keys, lines, brackets
        else:
            content = content[:at] + random_.randbytes(random_.randint(1, 9)) + content[at:]
    return content


def spoiled(path: Path, random_: random.Random) -> str:
    """Change a file that holds JSON, or put something else in its place; returns how."""
    content = path.read_bytes()
    how = random_.choice(
        ("number", "number", "data", "data", "bytes", "bytes", "repeated key", "nested", "special",
         "nothing")
    )  # fmt: skip
    if how == "nothing":  # a control: what is sound has to be used
        return how
    if how == "number":
        start, end = random_.choice([m.span() for m in _NUMBER.finditer(content)])
        value = float(content[start:end])
        other = random_.choice((-value, value / 2, 2 * value + 1, value + 17, -5.0, 0.0, 17.0))
        whole = content[start:end].isdigit()
        text = str(int(other) if whole else other).encode()
        path.write_bytes(content[:start] + text + content[end:])
    elif how == "data":
        data = mutated_data(json.loads(content), random_)
        path.write_text(json.dumps(data), encoding="utf-8")
    elif how == "bytes":
        path.write_bytes(mutated_bytes(content, random_))
    elif how == "nested":
        numbers = [match.span() for match in re.finditer(rb"(?<=: )[0-9][^,\n]*", content)]
        start, end = random_.choice(numbers)
        depth = random_.choice((20, 40, 1000, 5000, 100_000))
        path.write_bytes(content[:start] + b"[" * depth + b"]" * depth + content[end:])
    elif how == "repeated key":
        lines = content.split(b"\n")
        at = random_.choice([i for i, line in enumerate(lines) if b": " in line])
        comma = b"" if lines[at].endswith((b",", b"[", b"{")) else b","
        path.write_bytes(b"\n".join([*lines[: at + 1], comma, *lines[at:]]))
    else:
        how = random_.choice(("folder", "pipe", "loop", "device", "large", "empty", "gone"))
        path.unlink()
        _SPECIAL[how](path)
    return how


def _large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 << 20)


_SPECIAL: dict[str, Callable[[Path], object]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "large": _large,
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: None,
}


def try_budget(folder: Path, random_: random.Random) -> bool:
    """A spoiled budget file through the options; True if it was accepted."""
    path = folder / random_.choice(("budget.json", "[bold]\x1b[31m.json", "a*b?.json"))
    _BUDGET.save(path)
    how = spoiled(path, random_)
    found = Settings.parse({"budget": str(path)}).budget
    assert found is not None
    starts = found.schedule.phase_starts
    if how == "repeated key" or found.version != budgets.VERSION or not found.layers:
        raise WrongError(f"accepted after: {how}")
    if sorted(set(starts), reverse=not found.schedule.ascending) != list(starts):
        raise WrongError(f"accepted phases from {starts}")
    for choices in found.layers.values():
        for choice in choices:
            sound = 0.0 <= choice.density <= 1.0 and choice.plan(AttentionPlan()) is not None
            if not sound or (choice.q_clusters is not None and choice.q_clusters < 1):
                raise WrongError(f"accepted {choice}")
        if len(choices) != len(starts) + 1:
            raise WrongError(f"accepted {len(choices)} choices for {len(starts) + 1} phases")
    for outcome in (found.predicted, found.measured, found.uniform):
        if any(value is not None and not 0 <= value < 1e300 for value in asdict(outcome).values()):
            raise WrongError(f"accepted {outcome}")
    if not 0 < found.tokens < 2**31:
        raise WrongError(f"accepted {found.tokens} tokens")
    return True


def try_calibration(folder: Path, random_: random.Random) -> bool:
    """A spoiled calibration in the cache; True if it was read, unchanged."""
    saved = asdict(prior(_DEVICE)) | {"origin": "calibrated"}
    known = calibrations.json_record.decode(calibrations.Calibration, saved)
    path = calibrations.save(known)
    if random_.random() < 0.05:  # the folder itself
        path.unlink()
        path.parent.rmdir()
        how = random_.choice(("pipe", "loop", "device", "empty", "gone"))
        _SPECIAL[how](path.parent)
    elif random_.random() < 0.9:  # the checksum refuses every change: some files stay as they are
        spoiled(path, random_)
    found = device_profile.load(_DEVICE)
    for dtype in ELEMENT_SIZES:
        ms = found.stage_ms("dense", Amount(1e12, 1e9, 1.0), dtype, 128)
        if not 0.0 < ms < 1e9:
            raise WrongError(f"predicted {ms} ms")
    if found.origin == "calibrated" and found != known:
        raise WrongError("a changed calibration was read")
    return found.origin == "calibrated"


def try_checkpoint(folder: Path, random_: random.Random) -> bool:
    """A spoiled checkpoint among a neighbour's files; True if all of it was read."""
    path = folder / random_.choice(("tuned.checkpoint", "a[b]*.checkpoint", "\x1b[31m?.checkpoint"))
    facts = ["model", 1000, ["1.0e0"]]
    with Checkpoint(path, facts) as written:
        for key, value in _MEASURED.items():
            written.add(key, value)
    for name in (b".bak", b"\xff\xfe", b".1", b".01", b".1x", b".2"):
        if random_.random() < 0.3:
            beside = Path(os.fsdecode(os.fsencode(path) + name))
            if random_.random() < 0.5:
                beside.write_bytes(mutated_bytes(path.read_bytes(), random_))
            else:
                _SPECIAL[random_.choice(("folder", "pipe", "loop", "large", "empty"))](beside)
    if random_.random() < 0.1:
        path.unlink()
        _SPECIAL[random_.choice(("folder", "pipe", "loop", "empty", "gone"))](path)
    else:
        path.write_bytes(mutated_bytes(path.read_bytes(), random_))
    with Checkpoint(path, facts) as found:
        if not found.finished.items() <= _MEASURED.items():
            raise WrongError("a changed measurement was read")
    with Checkpoint(path, ["another"]) as other:
        if other.finished:
            raise WrongError("a measurement of something else was read")
    return len(found.finished) == len(_MEASURED)


class _Foreign:
    """Raises whatever is done to it."""

    def __repr__(self) -> str:
        raise ZeroDivisionError

    __str__ = __eq__ = __hash__ = __bool__ = __float__ = __index__ = __len__ = __repr__  # type: ignore[assignment]


def try_options(folder: Path, random_: random.Random) -> bool:
    """A random set of options; True if it was accepted."""
    names = [*AttentionPlan.__dataclass_fields__, *Settings.__dataclass_fields__, "mode"]
    odd_names: tuple[Any, ...] = (
        "densty", "", "x" * 10**5, "\x1b[31m", "[red]", "\ud800", "max-autotune", 3, None, b"seed",
        ("density",), 2.5,
    )  # fmt: skip
    values: tuple[Any, ...] = (
        *_ODD, 0.2, 3, 10**5000, b"x", (1, 2), {1, 2}, object(), _Foreign(), "centroid",
        "euclidean", "top_p", "threshold", "default", "max-autotune", folder / "nowhere", _BUDGET,
        slice(0, 10**400), slice(-(2**40), None), slice(5, 2), [slice(3)] * 2000, "0:5," * 10**5,
        Budget(1, "x", -3, {}, 7, [], None, {"a": _Foreign()}),  # type: ignore[arg-type]
    )  # fmt: skip
    options: Any = {}
    for _ in range(random_.randint(0, 3)):
        key = random_.choice(odd_names) if random_.random() < 0.15 else random_.choice(names)
        options[key] = random_.choice(values)
    if random_.random() < 0.03:
        options = random_.choice((list(options), "density=0.1", 3, _Foreign()))
    mode = random_.choice((None, None, None, None, "default", "fast", [], 3, "\x1b", "x" * 10**5))
    found = Settings.parse(options, mode)
    plan = found.plan
    if AttentionPlan.decode(plan.encode()) != plan or not 0 <= plan.density <= 1:
        raise WrongError(f"accepted {plan}")
    if found.min_tokens is not None and not 0 <= found.min_tokens < 2**31:
        raise WrongError(f"accepted {found.min_tokens} tokens")
    for span in found.exact_tokens or ():
        if any(bound is not None and abs(bound) >= 2**31 for bound in span):
            raise WrongError(f"accepted {span} as tokens")
    if not 0 <= plan.seed < 2**63 or plan.first_iterations > 100:
        raise WrongError(f"accepted {plan}")
    return True


KINDS: dict[str, Callable[[Path, random.Random], bool]] = {
    "budget": try_budget,
    "calibration": try_calibration,
    "checkpoint": try_checkpoint,
    "options": try_options,
}


class _Said(logging.Handler):
    """Looks at what is logged as a terminal would."""

    def emit(self, record: logging.LogRecord) -> None:
        _check_sentence(record.getMessage())


def _check_sentence(said: str) -> None:
    if not said.strip() or len(said) > 2000 or not said.isprintable():
        raise WrongError(f"said {said!a:.300}")


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    def late(signal_number: int, frame: object) -> None:
        raise TooSlowError(f"not done after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def run(cases: int, seed: int, kinds: Sequence[str] = tuple(KINDS)) -> dict[str, Outcomes]:
    """Try that many cases, the kinds in turn; outcomes by kind.

    Sets the cache folder of this process for as long as it runs.
    """
    found = {kind: Outcomes() for kind in kinds}
    handler, logger = _Said(), logging.getLogger("svg_ear_compile")
    cache = os.environ.get("XDG_CACHE_HOME")
    logger.addHandler(handler)
    propagated, logger.propagate = logger.propagate, False
    try:
        for case in range(cases):
            kind = kinds[case % len(kinds)]
            with tempfile.TemporaryDirectory() as folder:
                os.environ["XDG_CACHE_HOME"] = folder
                _try(kind, Path(folder), f"{seed}/{case}", found[kind])
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
        del os.environ["XDG_CACHE_HOME"]
        if cache is not None:
            os.environ["XDG_CACHE_HOME"] = cache
    return found


def _try(kind: str, folder: Path, case: str, outcomes: Outcomes) -> None:
    began = time.perf_counter()
    try:
        with _within(LIMIT_S):
            accepted = KINDS[kind](folder, random.Random(case))
            outcomes.accepted += accepted
            outcomes.refused += not accepted
    except REFUSALS as refusal:
        outcomes.refused += 1
        if not isinstance(refusal, OSError):
            try:
                _check_sentence(str(refusal))
            except WrongError as error:
                outcomes.failures.append(f"{kind} {case}: {error}")
    except Exception as error:
        outcomes.failures.append(f"{kind} {case}: {type(error).__name__}: {error!s:.300}")
    outcomes.slowest_s = max(outcomes.slowest_s, time.perf_counter() - began)


def main() -> int:
    """Run, print, and record where asked to; exit code 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.name}")
    given = parser.parse_args()
    began = time.perf_counter()
    found = run(given.cases, given.seed)
    total: Counter[str] = Counter()
    for kind, outcomes in found.items():
        total += Counter(failures=len(outcomes.failures))
        print(
            f"{kind}: {outcomes.accepted} used, {outcomes.refused} refused, "
            f"{len(outcomes.failures)} failed, the slowest {outcomes.slowest_s:.2f} s"
        )
        for failure in outcomes.failures[:20]:
            print(f"  {failure}", file=sys.stderr)
    if given.record:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "cases": given.cases,
            "seed": given.seed,
            "seconds": time.perf_counter() - began,
            "outcomes": {kind: asdict(outcomes) for kind, outcomes in found.items()},
            "provenance": provenance(),
        }
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if total["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
