"""Every file in examples/ runs with `--tiny`; graphs run as the pass leaves them."""

from __future__ import annotations

import ast
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
from process_groups import torchrun

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {
    path.stem: path for path in (ROOT / "examples").glob("*.py") if path.stem != "tiny_diffusers"
}
PIPELINES = (
    "wan", "wan22_two_experts", "hunyuan_video", "cogvideox", "minimax_h3", "lora", "quantised",
    "step_cache",
)  # fmt: skip


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run an example as a script of this process; skip it without what it imports."""
    for node in ast.walk(ast.parse(EXAMPLES[name].read_text())):
        for module in [node.module or ""] if isinstance(node, ast.ImportFrom) else []:
            if importlib.util.find_spec(module.partition(".")[0]) is None:
                pytest.skip(f"{module} is not installed")
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES[name]), "--tiny", *arguments])
    runpy.run_path(str(EXAMPLES[name]), run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_runs_sparse(
    name: str,
    without_inductor: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(name, monkeypatch=monkeypatch)
    said = capsys.readouterr().out
    assert "2 of 2 layers ran sparse" in said
    assert said.count("ran sparse") == (2 if name == "wan22_two_experts" else 1)


@pytest.mark.slow
def test_tuning(
    without_inductor: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("tune", "--out", str(tmp_path / "tiny.json"), monkeypatch=monkeypatch)
    assert (tmp_path / "tiny.json").exists()
    assert "4 steps" in capsys.readouterr().out


@pytest.mark.slow
def test_comparing(without_inductor: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run("compare", "--out", str(tmp_path), monkeypatch=monkeypatch)
    assert (tmp_path / "index.html").exists()


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    said = torchrun(2, EXAMPLES["ulysses"], ["--tiny"], tmp_path)
    assert said.count("2 of 2 layers ran sparse") == 1


def test_every_example_is_run_and_short() -> None:
    assert set(EXAMPLES) == {*PIPELINES, "tune", "compare", "ulysses"}
    for path in EXAMPLES.values():
        assert len(path.read_text().splitlines()) < 70, path.name
