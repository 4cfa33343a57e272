"""`svg-ear bench`: its figures on a shape of a second, and what it answers to wrong arguments."""

import pytest
import torch

from svg_ear_compile import bench
from svg_ear_compile.bench import SHAPES, Shape
from svg_ear_compile.cli import main


def test_every_density_is_timed_with_text_and_a_batch():
    found = list(bench.bench(Shape(2, 2, 500, 13, 40), [0.1, 0.5], "cpu"))
    assert [timing.density for timing in found] == [0.1, 0.5]
    assert 0.05 < found[0].reached < 0.3 < found[1].reached < 0.7
    # Less is computed exactly: the error is larger.
    assert 0 < found[1].error < found[0].error < 1
    assert found[0].dense_ms == found[1].dense_ms > 0
    assert found[0].speedup == found[0].dense_ms / found[0].sparse_ms


def test_an_output_that_is_not_finite_gets_no_time(monkeypatch):
    made = bench.captured_attention(torch.device("cpu"))

    def broken(*args, **kwargs):
        result = made(*args, **kwargs)
        result.out.view(-1)[3] = torch.nan
        return result

    monkeypatch.setattr(bench, "captured_attention", lambda device: broken)
    with pytest.raises(RuntimeError, match=r"density 0.5 is not finite"):
        list(bench.bench(Shape(1, 1, 300, 0, 32), [0.5], "cpu"))


def test_the_command_prints_a_row_for_each_density(capsys, monkeypatch):
    monkeypatch.setitem(SHAPES, "short", Shape(1, 1, 600, 0, 32))
    assert main(["bench", "--shape", "short", "--densities", "0.2,0.4", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "600 tokens" in out
    assert " × " in out
    assert "0.4" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "wan99b"], "unknown shape 'wan99b'; known are wan14b-720p"),
        (["--densities", "many"], "--densities must be numbers"),
        (["--densities", "1"], "between 0 and 1"),
        (["--device", "meta"], "no kernels for a device of type 'meta'"),
        (["--device", "cuda:99"], "no device 'cuda:99'"),
        (["--device", "toaster"], "'toaster' is no device"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_two(capsys, arguments, message):
    assert main(["bench", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
