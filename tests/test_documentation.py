"""The code, the commands and the links of README.md and docs/ work as they stand there.

Python blocks run in the order of their page on tiny models, with Inductor left out: each graph runs
as the pass leaves it. A block that cannot run has ``<!-- not run: reason -->`` on the line before.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documented_models import LAYERS, wan_inputs, wan_pipeline, write_budget
from tiny_diffusers import wan_transformer

import svg_ear_compile
from svg_ear_compile import cli
from svg_ear_compile.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>\S[^\n]*) -->\n)?```(?P<language>[\w{}-]*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
LINK = re.compile(r"\]\((?!https?:|#)(?P<target>[^)#\s]+)")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: number of its first line of code.
        reason: why it is not run, None if it is.
    """

    language: str
    code: str
    line: int
    reason: str | None


def blocks_of(text: str) -> Iterator[Block]:
    """The fenced blocks of a page in their order."""
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        yield Block(found["language"], found["code"], line, found["reason"])


@pytest.fixture
def sparse_without_inductor(monkeypatch: pytest.MonkeyPatch, without_inductor: None) -> None:
    """Short videos go sparse, and graphs run as they are."""
    parse = Settings.parse

    def lowered(options: Any = None, mode: str | None = None) -> Settings:
        options = dict(options or {})
        return parse(options if "budget" in options else {"min_tokens": 1, **options}, mode)

    monkeypatch.setattr(Settings, "parse", staticmethod(lowered))


_SLOW = ("pipelines.md",)  # every recipe is a pipeline of its own


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else []) for name in PAGES],
)
def test_the_code_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse_without_inductor: None
) -> None:
    page = PAGES[name]
    blocks = [b for b in blocks_of(page.read_text()) if b.language == "python" and not b.reason]
    if not blocks:
        return
    monkeypatch.chdir(tmp_path)
    model = wan_transformer()
    write_budget(model, tmp_path / "budget.json")
    names: dict[str, Any] = {"model": model, "inputs": wan_inputs(), "pipe": wan_pipeline()}
    for block in blocks:
        # Newlines before the code: an error names the line of the page.
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
    if name in ("README.md", "quickstart.md"):
        (transformer,) = names["handle"].report().models
        assert [layer.path for layer in transformer.layers] == list(LAYERS)
        assert all(0.2 <= layer.density < 1 for layer in transformer.layers)
        assert np.isfinite(names["video"]).all()


@pytest.mark.parametrize("name", PAGES)
def test_only_marked_blocks_are_left_out(name: str) -> None:
    text = PAGES[name].read_text()
    blocks = list(blocks_of(text))
    assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks)
    assert text.count("<!-- not run") == sum(block.reason is not None for block in blocks)
    for block in blocks:
        if block.language == "json":
            json.loads(block.code)
        elif block.language not in ("python", "{eval-rst}"):
            assert block.reason, f"{name}:{block.line} is not run and does not say why"


def commands() -> list[tuple[str, ...]]:
    """Every command of ours in the pages' shell blocks, without what follows a `#`."""
    found = []
    for page in PAGES.values():
        for block in blocks_of(page.read_text()):
            if block.language in ("", "sh", "bash"):
                for line in block.code.replace("\\\n", " ").splitlines():
                    found.append(tuple(shlex.split(line, comments=True)))
    return [words for words in found if words and words[0] in ("svg-ear", "make")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_exist_with_their_options(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
        return
    # A subcommand is a word before the first option.
    subcommands = [word for word in words[1:3] if word.isalpha()]
    with pytest.raises(SystemExit) as end:
        cli.main([*subcommands, "--help"])
    assert end.value.code == 0
    helped = capsys.readouterr().out
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"{option}\b", helped), f"{' '.join(words)}: there is no {option}"


def sentences_of_the_code() -> list[str]:
    """Every string in the package, with a mark where a value stands."""
    found = []
    for room in ("svg_ear_compile", "passes", "kernels", "cost_model"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(re.sub("%[a-z]", "…", node.value))
    return found


def test_messages_of_the_troubleshooting_page_are_ours() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+…[^`]*)`", page, re.MULTILINE)
    assert len(messages) > 15
    code = "\n".join(sentences_of_the_code())
    missing = [
        (message, part)
        for message in messages
        for part in filter(None, (part.strip(" .():;") for part in message.split("…")))
        if part not in code
    ]
    assert not missing


def test_the_reference_has_every_public_name() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    documented = set(re.findall(r"^\.\. auto\w+:: svg_ear_compile\.(\w+)", page, re.MULTILINE))
    assert {name for name in svg_ear_compile.__all__ if name[0] != "_"} <= documented


def test_the_readme_names_how_to_test() -> None:
    assert {("make", "test"), ("make", "demo")} <= {words[:2] for words in commands()}


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    page = PAGES.get(name, ROOT / name)
    missing = [
        found["target"]
        for found in LINK.finditer(page.read_text())
        if not (page.parent / found["target"]).exists()
    ]
    assert not missing
