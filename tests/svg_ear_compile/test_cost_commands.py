"""The commands as a person types them: calibrate, tune (alone and on two ranks), plot."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
import transformer_models
from made_budgets import budget_for
from PIL import Image
from process_groups import torchrun
from rich.console import Console

from svg_ear_compile import trial_runs
from svg_ear_compile.cli import main
from svg_ear_compile.cost_commands import budget_table
from svg_ear_compile.cost_model import calibrate as measuring
from svg_ear_compile.cost_model import disturbance
from svg_ear_compile.cost_model.budget import Budget, Choice
from svg_ear_compile.cost_model.calibrate import Workload
from svg_ear_compile.policy import calibration_of

TUNE = [
    "tune", "--model", "transformer_models:tuned_stack", "--density", "0.3", "--eager",
    "--densities", "0.1,0.3", "--clusters", "32x16",
]  # fmt: skip
MODEL = ["--model", "transformer_models:explained_stack"]


@pytest.fixture(autouse=True)
def _apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trial_runs, "REPEATS", 2)
    calibration_of.cache_clear()
    torch._dynamo.reset()


def drawn(path: Path) -> bool:
    """A picture of some size that is not blank."""
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        return min(image.size) > 300 and colours is not None and len(colours) > 20


def test_calibrate_then_explain_and_plot(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Workload((("float32", 32),), (128, 256, 512, 640), 384, 1, 128, 1 << 20, ("float32",))
    monkeypatch.setitem(measuring.WORKLOADS, "cpu", small)
    monkeypatch.setattr(measuring, "QUICK_SECONDS", 0.5)
    monkeypatch.setattr(disturbance, "MOST_APART", math.inf)  # other tests run beside this one
    assert main(["explain", *MODEL]) == 0
    assert "prior, not calibrated" in " ".join(capsys.readouterr().out.split())
    assert main(["plot", "times", "--device", "cpu", "--out", str(tmp_path / "x.png")]) == 2
    assert "run svg-ear calibrate first" in capsys.readouterr().err
    assert main(["calibrate", "--quick", "--device", "cpu"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "TFLOP/s" in printed
    assert re.search(r"calls measured [1-3]: float32, head dim 32", printed)
    assert "uncertainty 25%" in printed
    assert main(["explain", *MODEL]) == 0
    assert "calibrated on this machine, uncertain by 25%; better: svg-ear calibrate" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["plot", "times", "--device", "cpu", "--out", str(tmp_path / "x.png")]) == 0
    assert drawn(tmp_path / "x.png")


def test_tune_then_explain_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "budget.json"
    assert main([*TUNE, "--out", str(out), "--phases", "2", "--dense-steps", "2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "24 forwards to measure (0 are in the checkpoint)" in printed
    assert "blocks.2" in printed
    assert Budget.load(out).schedule.phases == 2
    assert json.loads(out.read_text())["objective"] == "density 0.3"
    for what in ("budget", "frontier"):
        picture = tmp_path / f"{what}.png"
        assert main(["plot", what, "--budget", str(out), "--out", str(picture)]) == 0
        assert drawn(picture)
    capsys.readouterr()
    explained = ["explain", "--model", "transformer_models:explained_tuned_stack"]
    assert main([*explained, "--budget", str(out), "--json"]) == 0
    (graph,) = json.loads(capsys.readouterr().out)["graphs"]
    assert [site["layer"] for site in graph["sites"]] == ["blocks.0", "blocks.1", "blocks.2"]
    # The other stack has layers of the same names.
    assert main(["explain", *MODEL, "--budget", str(out)]) == 2
    assert "parameters of other shapes" in capsys.readouterr().err


def test_a_budget_of_odd_names_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = transformer_models.odd_stack()
    layers = {"[red]a\x1b[31m\nb": (Choice(0.2),)}
    found = budget_for(model, layers, 100, note="[/nothing] \x1b]0;title\x07")
    Console(width=100).print(budget_table(found))
    out = capsys.readouterr().out
    assert r"[red]a\x1b[31m\nb" in out
    assert r"[/nothing] \x1b]0;title\x07" in out
    assert all(line.isprintable() for line in out.splitlines())


def test_remarks_on_a_budget_of_short_names_have_lines_of_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, _ = transformer_models.odd_stack()
    note = "the difference between tuning and one density is within noise"
    Console(width=100).print(budget_table(budget_for(model, {"a": (Choice(0.2),)}, 9, note=note)))
    assert note in capsys.readouterr().out


def test_one_heads_blocks_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "blocks.png"
    arguments = ["plot", "blocks", *MODEL, "--out", str(picture)]
    assert main([*arguments, "--layer", "blocks.1", "--head", "1"]) == 0
    with Image.open(picture) as image:
        assert min(image.size) > 300
    assert main([*arguments, "--layer", "blocks.7"]) == 2
    assert "no layer 'blocks.7' could be sparse" in capsys.readouterr().err
    assert main([*arguments, "--head", "9"]) == 2
    assert "head must be below 2" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_make_the_budget_that_one_makes(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    assert main([*TUNE, "--out", str(alone)]) == 0
    said = torchrun(2, "svg_ear_compile.cli", [*TUNE, "--out", str(shared)], tmp_path)
    assert "on each of 2 ranks" in " ".join(said.split())
    one, two = Budget.load(alone), Budget.load(shared)
    assert one.layers == two.layers
    assert one.predicted.error == pytest.approx(two.predicted.error, rel=1e-4)
    # Each rank kept what it measured.
    keys = [
        {json.loads(line)["key"] for line in path.read_text().splitlines() if '"key"' in line}
        for path in (tmp_path / "shared.checkpoint", tmp_path / "shared.checkpoint.1")
    ]
    assert [len(found) for found in keys] == [12, 12]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tune", "--model", "nowhere", "--density", "0.2", "--out", "x"], "MODULE:CALLABLE"),
        ([*TUNE, "--out", "x", "--densities", "2"], "densities must be in (0, 1)"),
        ([*TUNE, "--out", "x", "--clusters", "12"], "QUERIESxKEYS"),
        (["plot", "budget", "--out", "x.png"], "needs --budget"),
        (["plot", "frontier", "--budget", "/nowhere.json", "--out", "x.png"], "/nowhere.json"),
        (["plot", "blocks", "--out", "x.png"], "needs --model"),
        (["calibrate", "--device", "meta"], "'meta'"),
        (["calibrate", "--device", "toaster"], "'toaster' is no device"),
        (["calibrate", "--device", "cuda:99"], "no device 'cuda:99'"),
        (["calibrate", "--devise", "cpu"], "unrecognized arguments"),
        (["plot", "times", "--device", "x\x1b[31m", "--out", "x.png"], r"'x\x1b[31m' is no device"),
        ([*TUNE, "--out", "x", "--clusters", "0x0"], "each at least 1, got '0x0'"),
        ([*TUNE, "--out", "x", "--clusters", "8x-8"], "got '8x-8'"),
        ([*TUNE, "--out", "x", "--clusters", "8x8,"], "got ''"),
        ([*TUNE, "--out", "x", "--clusters", "9" * 5000 + "x1"], "QUERIESxKEYS"),
        ([*TUNE, "--out", "x", "--densities", "nan"], "takes a finite number"),
        ([*TUNE, "--out", "x", "--densities", "0.1,,"], "takes a finite number"),
        ([*TUNE, "--out", "x", "--forms", "cubic"], "takes some of gaussian"),
        ([*TUNE, "--out", "x", "--phases", "0"], "takes a whole number from 1"),
        ([*TUNE, "--out", "x", "--phases", "9" * 5000], "takes a whole number from 1"),
        ([*TUNE, "--out", "x", "--dense-from", "inf"], "takes a finite number"),
        ([*TUNE, "--out", "x.checkpoint"], "must not end in .checkpoint"),
        ([*TUNE, "--out", "."], "is a folder"),
        ([*TUNE, "--out", "/dev/null/x"], "/dev/null"),
        ([*TUNE, "--out", "x", "--max-error", "0.1"], "not allowed with"),
        (["tune", "--out", "x"], "required"),
        (["plot", "pie", "--out", "x.png"], "invalid choice"),
        (["plot", "budget", "--out", "x.exe"], "must end in one of png"),
        (["plot", "blocks", *MODEL, "--head", "-1", "--out", "x.png"], "from 0"),
        (
            ["tune", "--model", "transformer_models:wrong_pair", "--density", "0.2", "--out", "x"],
            "must return (model, calls)",
        ),
        ([], "required"),
    ],
)
def test_wrong_arguments_say_what_is_wrong(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert said.strip().isprintable()
