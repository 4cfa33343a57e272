"""The text of an `Explanation`: calls that are alike in one entry, on lines of a given width."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from svg_ear_compile.kernels.checked import printable
from svg_ear_compile.planning import SiteReport

_NUMBER = re.compile(r"(?<![^.#])\d+(?![^.#])")  # a whole part of a path, or a call of a layer


@dataclass(frozen=True)
class Alike:
    """Calls that differ in nothing but their numbers.

    Attributes:
        name: common name, with a range or ``*`` where the numbers differ.
        count: number of calls.
        site: one of them.
    """

    name: str
    count: int
    site: SiteReport


def grouped(sites: Iterable[SiteReport]) -> list[Alike]:
    """The calls by everything that a report says of them, in order of first execution."""
    groups: dict[tuple[str, SiteReport], list[str]] = {}
    for site in sites:
        pattern = _NUMBER.sub("*", site.site)
        unnamed = replace(site, site="", layer="", bound_by=None)
        groups.setdefault((pattern, unnamed), []).append(site.site)
    return [Alike(_common(names), len(names), site) for (_, site), names in groups.items()]


def _common(names: Sequence[str]) -> str:
    """One name for names that differ in numbers only: "blocks.0-29.attn1"."""
    numbers = list(zip(*(map(int, _NUMBER.findall(name)) for name in names), strict=True))
    # Of two numbers that differ, some pairs may be missing: two ranges would promise all.
    one = sum(len(set(found)) > 1 for found in numbers) == 1
    words = iter([_range(set(found), len(names), one) for found in numbers])
    return _NUMBER.sub(lambda match: next(words), names[0]) or "(function)"


def _range(numbers: set[int], names: int, alone: bool) -> str:
    least, most = min(numbers), max(numbers)
    if least == most:
        return str(least)
    whole = len(numbers) == names == most - least + 1
    return f"{least}-{most}" if whole and alone else "*"


def lines_of(site: SiteReport) -> Iterator[str]:
    """What a report says of a call: role and shape, the decision, the reason for it."""
    shape = " × ".join("?" if size is None else str(size) for size in site.shape) or "?"
    exact = f", exact tokens {site.places} ({site.origin})" if site.places else ""
    yield f"{site.role}, {shape}{exact}"
    if site.reason is not None:
        yield f"dense, {site.reason}: {site.sentence}"
        return
    yield _decision(site)
    if site.plan is not None and not site.plan.is_dense:
        yield site.sentence


def _decision(site: SiteReport) -> str:
    plan = site.plan
    if plan is None or plan.is_dense:
        return "dense, as asked for"
    how = {
        "density": f"density {plan.density:g}",
        "top_p": f"top-p {plan.top_p:g}",
        "threshold": f"threshold {plan.threshold:g}",
    }[plan.routing]
    words = [f"sparse, {how}" if site.is_sparse else f"dense at this length, else {how}"]
    if site.clusters:
        words.append(f"{' × '.join(map(str, site.clusters))} clusters")
    words.append(plan.compensation)
    if site.expected is not None:
        words.append(f"error {site.expected.error:.2g}")
    return ", ".join(words)


def entry(alike: Alike, digits: int, width: int) -> str:
    """The lines of one entry; the name stands in one piece, however long it is.

    Args:
        alike: the calls.
        digits: width of the largest count of all entries.
        width: of the lines, in characters.
    """
    head = f"{alike.count:>{digits}} × {printable(alike.name)}"
    return "\n".join([head, *(wrapped(line, width, digits + 3) for line in lines_of(alike.site))])


def wrapped(text: str, width: int, indent: int = 0) -> str:
    """Printable text in lines of a width, all but the first line indented by two more."""
    return textwrap.fill(
        printable(text),
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )
