"""The command `svg-ear explain` under odd names, wrong models and Ctrl-C: one line each."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformer_models import TOKENS, odd_stack

from svg_ear_compile.capture import capture_attention
from svg_ear_compile.cli import main
from svg_ear_compile.cost_model import measure as measuring


def explain(model: str, *arguments: str) -> int:
    return main(["explain", "--model", f"transformer_models:{model}", *arguments])


def test_keys_with_paths_markup_and_control_characters_are_shown_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "inside" / "drawings"
    assert explain("odd_stack", "--option", f"min_tokens={TOKENS}", "--draw", str(folder)) == 0
    (drawn,) = folder.iterdir()
    assert drawn.name.isascii()
    assert drawn.suffix == ".svg"
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]
    out = capsys.readouterr().out
    assert "[bold]x[/bold]" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_calls_of_a_layer_with_an_odd_name_are_captured_under_it() -> None:
    model, inputs = odd_stack()
    names: list[str] = []
    capture_attention(model, inputs, {}, lambda call: names.append(call.layer))
    (key,) = model.blocks
    assert names == [f"blocks.{key}"]


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("wrong_pair", (), "must return (model, args) or (model, args, kwargs); the command takes"),
        ("wrong_pair", (), "takes a module or a function, got 3"),
        ("pipeline", (), "got the pipeline Pipeline: give its transformer"),
        ("with_arguments", (), "a callable without arguments, but with_arguments: missing a"),
        ("wrong_inputs", (), "args must be a tuple, not 4"),
        ("raising", (), "ZeroDivisionError: first line (--traceback shows where)"),
        ("unspeakable", (), "its message cannot be written: ZeroDivisionError"),
        ("__name__", (), "has no callable '__name__'"),
        ("a.b", (), "MODULE:CALLABLE"),
        ("raising", ("--option", "densty=1"), "did you mean 'density'"),  # before it is made
        ("raising", ("--budget", "/nowhere"), "the budget cannot be used"),
        ("\x1b[31m", (), "MODULE:CALLABLE"),
        ("explained_stack", ("--option", "a=" + "(" * 5000), "unknown option 'a'"),
        ("explained_stack", ("--option", "density=0.1", "--option", "density=0.2"), "given twice"),
        ("explained_stack", ("--option", "budget=x", "--budget", "y"), "given twice"),
        ("explained_stack", ("--option", "density=" + "9" * 5000), "density must be float"),
        ("explained_stack", ("--option", "seed=" + "9" * 400), "seed must be at most"),
        ("explained_stack", ("--option", "density={}"), "density must be float, got a dict"),
        ("explained_stack", ("--budget", "/nowhere"), "the budget cannot be used"),
        ("explained_stack", ("--budget", "/"), "it is a folder"),
        ("explained_stack", ("--draw", "/dev/null/x"), "/dev/null"),
    ],
)
def test_mistakes_are_one_line(
    model: str, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--option", f"min_tokens={TOKENS}") if "--draw" in arguments else ()
    assert explain(model, *arguments, *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert said.strip().isprintable()


def test_the_traceback_is_there_for_who_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("raising", "--traceback") == 2
    said = capsys.readouterr().err
    assert "in raising" in said
    assert said.splitlines()[-1].startswith("svg-ear: ZeroDivisionError")


def test_an_interruption_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert explain("interrupted") == 130
    assert capsys.readouterr().err == "svg-ear: interrupted\n"
    tune = ["tune", "--model", "transformer_models:interrupted", "--density", "0.2"]
    assert main([*tune, "--out", str(tmp_path / "x.json")]) == 130
    said = capsys.readouterr().err
    assert said == "svg-ear: interrupted; run the same command again to continue\n"


def test_an_interrupted_calibration_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measuring, "measure_roofs", interrupt)
    assert main(["calibrate", "--device", "cpu"]) == 130
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "svg-ear: interrupted; nothing was saved: run it again"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_written_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def measured(*args: object, **kwargs: object) -> None:
        pytest.fail("it was measured")

    (tmp_path / "svg_ear_compile").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measuring, "measure_roofs", measured)
    assert main(["calibrate", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "svg_ear_compile") in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("transformer_models.py:raising", "a module, not a file: leave .py out of transformer_m"),
        ("transformer_models:raising", "density must be between 0 and 1, got 2.0"),
        ("transformer_models:pipeline_and_options", "not (a Pipeline, a dict)"),
    ],
)
def test_mistakes_of_tune_are_told_before_the_model_is_made(
    model: str, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    density = "2" if model.endswith("s:raising") else "0.2"
    tune = ["tune", "--model", model, "--density", density, "--out", str(tmp_path / "b.json")]
    assert main(tune) == 2
    assert said in capsys.readouterr().err
