"""Whole comparisons: of real models through the backend, and of a stand-in that is interrupted."""

import json
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

import svg_ear_compile
from svg_ear_compile import compare
from svg_ear_compile.cli import main
from svg_ear_compile.compare.comparison import Comparison
from svg_ear_compile.compare.folder import Folder
from svg_ear_compile.compare.pipeline import Pipeline
from svg_ear_compile.compare.running import run
from svg_ear_compile.compare.setting import DENSE
from svg_ear_compile.generation import Generation
from tests.svg_ear_compile.compared_pipelines import SPARSE, tiny_dit, tiny_wan


class Timed(nn.Module):
    """A model that has a timestep and no attention."""

    def forward(self, x, timestep):
        return x


class Plain:
    """A pipeline that draws its frames from prompt and seed, and remembers its calls."""

    def __init__(self, fails_at=None, error=KeyboardInterrupt):
        self.transformer = Timed()
        self.calls = []
        self.fails_at = fails_at
        self.error = error

    def __call__(self, prompt, generator, side=9):
        if len(self.calls) == self.fails_at:
            raise self.error
        self.calls.append((prompt, generator.initial_seed()))
        return torch.rand(1, 4, side, side, 3, generator=generator)


def compared(pipeline, out, **given) -> Comparison:
    given = {"densities": (0.2, 0.4), "seeds": 2, **given}
    return compare(lambda: pipeline, given.pop("prompts", ["a", "b"]), out, **given)


def figures_of(found):
    return [
        {**clip, "seconds": None, "compiled": None, "repeats": None}
        for setting in found.to_json()["settings"]
        for clip in setting["clips"]
    ]


def test_the_function_is_the_packages_and_its_folder_a_package():
    assert svg_ear_compile.compare is compare
    assert callable(run)


@pytest.mark.parametrize(
    ("make", "compiler"), [(tiny_dit, "inductor"), (tiny_wan, "through_aot")], ids=["dit", "wan"]
)
def test_a_real_pipeline_dense_and_sparse(make, compiler, tmp_path, request):
    if compiler == "through_aot":
        request.getfixturevalue(compiler)
    made = make()
    pipeline = made[0] if isinstance(made, tuple) else made
    half = {"density": 0.3, **SPARSE}
    exact = {"density": 1.0, **SPARSE}
    found = compare(
        lambda: made, ["astronaut"], tmp_path, settings=[half, exact], seeds=(3,), fps=8
    )
    sparse, equal = (found.clips[setting.name][0, 3] for setting in found.settings)
    assert 0.2 < sparse.density < 0.6
    assert 10 < sparse.figures.psnr < math.inf
    # Density 1 is what the compiler alone gives.
    assert equal.density is None
    assert equal.figures.psnr == math.inf
    assert equal.repeat_psnr == math.inf
    assert sparse.seconds > 0
    assert not sparse.compiled
    assert sparse.peak_bytes is None
    assert found.summary(DENSE).speedup is None
    # The pipeline is given back as it came.
    assert all(m._compiled_call_impl is None for m in pipeline.transformer.modules())
    assert (tmp_path / "index.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "figures.json").read_text())["seeds"] == [3]


def test_every_setting_sees_the_same_prompts_and_seeds_after_one_that_does_not_count(tmp_path):
    pipeline, heard = Plain(), []
    found = compared(pipeline, tmp_path, on_progress=lambda *now: heard.append(now))
    each = [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert pipeline.calls == 3 * [("a", 0), *each]
    assert heard[-1][1:] == (12, 12)
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    assert all(c.figures.psnr == math.inf for c in found.clips["density 0.2"].values())
    assert found.recommended.setting is DENSE


def test_no_generation_sees_what_another_one_remembered(tmp_path, monkeypatch):
    calls, call = [], Generation.call

    def counted(generation, said):
        calls.append(said)
        return call(generation, said)

    monkeypatch.setattr(Generation, "call", counted)
    pipeline = Plain()
    compared(pipeline, tmp_path)
    # Dense ones remember nothing.
    assert len(calls) == len(pipeline.calls) - 5


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path):
    whole = compared(Plain(), tmp_path / "whole")
    first = Plain(fails_at=8)
    with pytest.raises(KeyboardInterrupt):
        compared(first, tmp_path / "parts")
    second = Plain()
    parts = compared(second, tmp_path / "parts")
    # 4 dense clips and 2 of the first setting were kept; each setting warms up once more.
    assert len(second.calls) == (1 + 2) + (1 + 4)
    assert figures_of(parts) == figures_of(whole)
    for name, clips in whole.clips.items():
        for key, clip in clips.items():
            np.testing.assert_array_equal(clip.frames, parts.clips[name][key].frames)
    third = Plain()
    again = compared(third, tmp_path / "parts")
    assert third.calls == []
    assert again.to_json() == parts.to_json()
    assert not list(tmp_path.rglob("*.unfinished"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": 3}, "other seeds"),
        ({"prompts": ["a", "c"]}, "other prompts"),
        ({"densities": (0.2,)}, "other settings"),
        ({"dense_steps": 1}, "other settings"),
    ],
)
def test_another_comparison_in_the_same_folder_is_refused(tmp_path, changed, message):
    compared(Plain(), tmp_path)
    with pytest.raises(ValueError, match=message):
        compared(Plain(), tmp_path, **changed)
    # What only the page shows may change.
    compared(Plain(), tmp_path, floor_db=40.0, fps=24)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "nested", "pipe"])
@pytest.mark.parametrize("suffix", [".npy", ".json"])
def test_a_damaged_clip_is_generated_again_with_a_warning(tmp_path, caplog, damage, suffix):
    wanted = compared(Plain(), tmp_path)
    (path,) = (tmp_path / "clips").glob(f"setting1-prompt1-seed0{suffix}")
    content = path.read_bytes()
    if damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.write_bytes({
            "cut": content[:-40], "garbage": b"[1]", "empty": b"", "nested": b"[" * 10**5,
        }[damage])  # fmt: skip
    pipeline = Plain()
    found = compared(pipeline, tmp_path)
    assert pipeline.calls == [("b", 0)] * 2
    assert "damaged" in caplog.text
    assert figures_of(found) == figures_of(wanted)


@pytest.mark.parametrize(
    ("name", "value"), [("peak_bytes", "x"), ("density", 17), ("seconds", -1), ("compiled", 3)]
)
def test_a_figure_that_cannot_be_is_damage(tmp_path, caplog, name, value):
    compared(Plain(), tmp_path)
    (path,) = (tmp_path / "clips").glob("setting1-prompt1-seed0.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    compared(Plain(), tmp_path)
    assert f"damaged and is generated again: {name}" in caplog.text


def test_clips_are_compared_with_a_dense_clip_that_is_generated_again(tmp_path):
    compared(Plain(), tmp_path)
    (tmp_path / "clips" / "setting0-prompt1-seed0.json").unlink()
    pipeline = Plain()
    compared(pipeline, tmp_path)
    assert pipeline.calls == [("b", 0)] * 6


def test_a_folder_that_is_a_file_or_whose_record_is_damaged_is_answered(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used as a folder"):
        Folder(tmp_path / "file", {})
    Folder(tmp_path / "clips", {"a": 1})
    for damage in ("{", "[]", "[" * 10**5, '{"a": 1, "a": 1}'):
        (tmp_path / "clips" / "comparison.json").write_text(damage)
        with pytest.raises(ValueError, match=r"damaged|other a"):
            Folder(tmp_path / "clips", {"a": 1})


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, "got None"),
        (Timed(), "got the model Timed"),
        (Plain, "got the class Plain"),
        ((Plain(), ["side", 9]), r"must return \(pipeline, keyword arguments\)"),
        ((Plain(), {"prompt": "a"}), "gives the call prompt"),
        ((Plain(), {"size": 9}), "size, which Plain does not take"),
        (lambda prompt, seed: None, "no model that is called with a timestep"),
    ],
)
def test_what_is_no_pipeline_is_answered(made, message):
    with pytest.raises(TypeError, match=message):
        Pipeline(made)


def with_transformer(call):
    return type("Odd", (), {"transformer": Timed(), "__call__": call})()


def test_a_pipeline_whose_call_takes_no_prompt_or_seed_is_answered():
    with pytest.raises(TypeError, match="Odd takes no prompt"):
        Pipeline(with_transformer(lambda self, text, seed: None))
    with pytest.raises(TypeError, match="takes neither generator nor seed"):
        Pipeline(with_transformer(lambda self, prompt: None))


def test_a_call_gets_only_what_its_signature_names():
    got = []

    def call(self, prompt, seed, output_type="pil", callback_on_step_end=None):
        callback_on_step_end(self, 0, None, {})
        got.append((prompt, seed, output_type))
        return np.zeros((2, 9, 9, 3))

    steps = []
    Pipeline(with_transformer(call)).generate("a", 4, steps.append)
    assert got == [("a", 4, "np")]
    assert steps == [1]


def test_frames_that_are_not_finite_name_the_setting_prompt_and_seed(tmp_path):
    broken = with_transformer(lambda self, prompt, seed: np.full((2, 9, 9, 3), np.nan))
    with pytest.raises(ValueError, match=r"not finite \(dense, prompt 1, seed 0\)"):
        compared(broken, tmp_path)


def test_a_model_that_is_compiled_already_is_refused(tmp_path):
    pipeline = Plain()
    pipeline.transformer.compile()
    with pytest.raises(ValueError, match="transformer is compiled already"):
        compared(pipeline, tmp_path)
    pipeline.transformer = torch.compile(Timed())
    with pytest.raises(ValueError, match="transformer is compiled already"):
        compared(pipeline, tmp_path / "other")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": []}, "prompts must be a list"),
        ({"prompts": "a fox"}, "prompts must be a list"),
        ({"prompts": ["a", " "]}, "a prompt must be text"),
        ({"seeds": 0}, "one or more different numbers"),
        ({"seeds": (1, 1)}, "one or more different numbers"),
        ({"seeds": (1.5,)}, "a seed must be a whole number"),
        ({"fps": 0}, "fps must be a number above 0"),
        ({"floor_db": math.inf}, "floor_db must be a number above 0"),
    ],
)
def test_wrong_arguments_are_answered_before_the_pipeline_is_made(tmp_path, given, message):
    given = {"prompts": ["a"], "densities": (0.2,), **given}
    prompts = given.pop("prompts")
    with pytest.raises(ValueError, match=message):
        compare(lambda: pytest.fail("made"), prompts, tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "given", "message"),
    [
        (Plain(), {}, "make must be a function that returns a pipeline, .* got a Plain"),
        (Timed(), {}, "make must be a function .* got the model Timed"),
        (3, {}, "make must be a function .* got 3"),
        (None, {"densities": 0.2}, "densities must be a list, got 0.2"),
        (None, {"densities": "0.2"}, "densities must be a list, got '0.2'"),
        (None, {"settings": {"density": 0.2}}, "settings must be a list, got a dict"),
    ],
)
def test_arguments_of_the_wrong_type_are_answered_before_the_pipeline_is_made(
    tmp_path, make, given, message
):
    make = make or (lambda: pytest.fail("made"))
    with pytest.raises(TypeError, match=message):
        compare(make, ["a"], tmp_path / "out", **({"densities": [0.2]} | given))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_answered_before_the_pipeline_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used as a folder of clips"):
        compare(lambda: pytest.fail("made"), ["a"], tmp_path / "file", densities=[0.2])


def test_a_comparison_is_written_in_few_words(tmp_path):
    assert len(repr(compared(Plain(), tmp_path))) < 2000


def test_a_missing_library_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(compare.__globals__, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"scikit-image and pillow: pip install"):
        compare(Plain, ["a"], tmp_path, densities=(0.2,))


made_by_command = Plain()
interrupted = Plain(fails_at=3)
not_callable = "a string"


def make_plain():
    return made_by_command


def make_interrupted():
    return interrupted


def command(tmp_path, *more, pipeline="make_plain"):
    (tmp_path / "prompts.txt").write_text("\n a fox \n\na [bold]cat[/bold]\n")
    return main([
        "compare", "--pipeline", f"{__name__}:{pipeline}",
        "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"), *more,
    ])  # fmt: skip


def test_the_command_prints_figures_and_the_path_of_the_page(tmp_path, capsys):
    (tmp_path / "settings.json").write_text('[{"name": "[red]odd", "density": 0.5}]')
    more = ("--densities", "0.2", "--settings", str(tmp_path / "settings.json"), "--seeds", "1")
    assert command(tmp_path, *more) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "out" / "index.html") in out
    assert "[red]odd" in out
    assert "Recommended: dense" in out
    assert "Nothing ran sparse under density 0.2" in out
    prompts = json.loads((tmp_path / "out" / "figures.json").read_text())["prompts"]
    assert prompts == ["a fox", "a [bold]cat[/bold]"]


def test_ctrl_c_is_one_line_that_says_how_to_go_on(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(tmp_path, "--densities", "0.2", "--seeds", "2", pipeline="make_interrupted")
    assert stopped.value.code == 130
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert "2 of 8 clips are kept" in line
    assert "run the same command again" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((), "nothing to compare"),
        (("--densities", "0.2;0.3"), "--densities must be numbers"),
        (("--densities", "2"), "density"),
        (("--densities", "0.2", "--seeds", "0"), "--seeds must be from 1"),
        (("--densities", "0.2", "--seeds", "9" * 12), "--seeds must be from 1 to 10,000"),
        (("--settings", "missing.json"), "missing.json"),
        (("--densities", "0.2", "--pipeline", "no_colon"), "MODULE:CALLABLE"),
        (("--densities", "0.2", "--pipeline", f"{__name__}:not_callable"), "no callable"),
        (("--densities", "0.2", "--prompts", "missing.txt"), "missing.txt"),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_code_two(tmp_path, capsys, more, message):
    assert command(tmp_path, *more) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


@pytest.mark.parametrize("content", ["{", '{"density": 0.2}', "[" * 100_000])
def test_a_wrong_file_of_settings_or_prompts_is_one_line(tmp_path, capsys, content):
    (tmp_path / "settings.json").write_text(content)
    assert command(tmp_path, "--settings", str(tmp_path / "settings.json")) == 2
    assert "settings.json" in capsys.readouterr().err
    for wrong in (b"\xff\xfe\x00", b" \n"):
        (tmp_path / "wrong.txt").write_bytes(wrong)
        more = ("--densities", "0.2", "--prompts", str(tmp_path / "wrong.txt"))
        assert command(tmp_path, *more) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "wrong.txt" in line
    os.mkfifo(tmp_path / "pipe")
    for option in ("--settings", "--prompts"):
        assert command(tmp_path, option, str(tmp_path / "pipe")) == 2
        assert "pipe: it is a pipe" in capsys.readouterr().err
