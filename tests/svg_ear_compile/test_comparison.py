"""Settings of a comparison, and what its clips say: pairs, noise and the recommended setting."""

import ast
import io
import json
import math

import pytest
from rich.console import Console

from svg_ear_compile.compare.command import report
from svg_ear_compile.compare.comparison import LEAST_NOISE
from svg_ear_compile.compare.setting import DENSE, Setting, settings_of
from tests.svg_ear_compile.made_comparisons import made_comparison


def names(*args):
    return [setting.name for setting in settings_of(*args)]


def test_settings_are_named_after_what_tells_them_apart():
    assert names([0.1, 0.25], [], 0) == ["density 0.1", "density 0.25"]
    assert names([0.2], [], 5) == ["density 0.2"]
    both = [{"density": d, "min_tokens": 64} for d in (0.1, 0.2)]
    assert names([], [*both, {"min_tokens": 64, "density": 0.1, "dense_steps": 3}], 0) == [
        "density 0.1", "density 0.2", "density 0.1, dense_steps 3",
    ]  # fmt: skip
    assert names([], [{}], 0) == ["defaults"]
    assert names([], [{"name": " fast ", "density": 0.1}], 0) == ["fast"]


def test_a_settings_own_dense_steps_come_before_the_default():
    first, second = settings_of([0.1], [{"density": 0.2, "dense_steps": 1}], 4)
    assert (first.dense_steps, second.dense_steps) == (4, 1)
    assert first.options == {"density": 0.1}
    assert second.options == {"density": 0.2}


@pytest.mark.parametrize(
    ("densities", "settings", "error", "message"),
    [
        ([], [], ValueError, "nothing to compare"),
        ([0.1, 0.1], [], ValueError, "two settings are called"),
        ([], [{"name": "dense", "density": 0.5}], ValueError, "two settings are called 'dense'"),
        ([1.5], [], ValueError, "density"),
        (["0.1"], [], TypeError, "density"),
        ([], [{"densty": 0.1}], ValueError, "did you mean 'density'"),
        ([], [[0.1]], TypeError, "must map names of options"),
        ([], [{3: 0.1}], TypeError, "must map names of options"),
        ([], [{"name": 3}], TypeError, "name of a setting must be text"),
        ([], [{"name": "  "}], TypeError, "name of a setting must be text"),
        ([], [{"dense_steps": -1}], ValueError, "dense_steps must be a whole number"),
        ([], [{"dense_steps": 1.5}], ValueError, "dense_steps must be a whole number"),
        ([], [{"dense_steps": True}], ValueError, "dense_steps must be a whole number"),
    ],
)
def test_a_wrong_setting_is_answered_before_anything_is_generated(
    densities, settings, error, message
):
    with pytest.raises(error, match=message):
        settings_of(densities, settings, 0)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (Setting("s", {"density": 0.2}), "density=0.2"),
        (
            Setting("s", {"density": 0.2, "seed": 3}, 5),
            "density=0.2, options={'seed': 3}, dense_steps=5",
        ),
        (Setting("s", {"budget": "b.json"}), "budget='b.json'"),
    ],
)
def test_the_code_of_a_setting_accelerates_a_pipeline(setting, line):
    code = setting.code()
    compile(code, "code", "exec")
    assert code.splitlines() == [
        "import svg_ear_compile",
        f"svg_ear_compile.accelerate(pipe, {line})",
    ]


def test_the_code_of_the_dense_setting_does_nothing():
    assert not ast.parse(DENSE.code()).body


def test_the_fastest_setting_above_the_floor_is_recommended():
    found = made_comparison(
        {"poor": 0.2, "fair": 0.02, "good": 0.005}, seconds={"poor": 3, "fair": 5, "good": 7}
    )
    assert found.recommended.setting.name == "fair"
    assert "30 dB" in found.recommended.why


def test_one_clip_below_the_floor_is_enough_to_refuse_a_setting():
    found = made_comparison({"fast": 0.02, "slow": 0.005}, seconds={"fast": 4, "slow": 6})
    worst = found.summary(found.settings[0]).psnr
    assert worst.least < worst.median < worst.greatest
    between = (worst.least + worst.median) / 2
    object.__setattr__(found, "floor_db", between)
    assert found.recommended.setting.name == "slow"


def test_dense_is_recommended_where_nothing_keeps_the_floor_or_is_faster():
    poor = made_comparison({"a": 0.3, "b": 0.2}, seconds={"a": 3, "b": 3})
    assert poor.recommended.setting is DENSE
    assert "b comes nearest" in poor.recommended.why
    slow = made_comparison({"a": 0.001}, seconds={"a": 11})
    assert slow.recommended.setting is DENSE
    assert "no setting was faster" in slow.recommended.why
    # Dense ran from 10 to 10.2 seconds: a gain of one per cent is noise.
    noise = made_comparison({"a": 0.001}, seconds={"a": 9.9})
    assert noise.time_noise >= LEAST_NOISE
    assert noise.recommended.setting is DENSE


def test_speedups_are_of_pairs_and_clips_that_compiled_do_not_count():
    found = made_comparison({"a": 0.01}, seconds={"a": 4})
    # Every clip of one seed took as much longer in both: the pairs agree exactly.
    speedup = found.summary(found.settings[0]).speedup
    assert speedup.least == pytest.approx(2.5)
    assert speedup.greatest == pytest.approx(2.5)
    slow = found.clips["a"][0, 1]
    object.__setattr__(slow, "seconds", 400.0)
    object.__setattr__(slow, "compiled", True)
    assert set(found.timed(found.settings[0])) == {(0, 0), (0, 2)}
    assert found.summary(found.settings[0]).seconds.greatest < 5
    for clip in found.clips["a"].values():
        object.__setattr__(clip, "compiled", True)
    assert len(found.timed(found.settings[0])) == 3


def test_paired_differences_are_by_clip_and_equal_clips_differ_by_nothing():
    found = made_comparison({"equal": 0.0, "same": 0.0, "other": 0.02})
    equal, same, other = found.settings
    zero = found.paired(equal, same, lambda figures: figures.psnr)
    assert (zero.least, zero.greatest) == (0, 0)
    assert found.paired(equal, other, lambda figures: figures.psnr).least == math.inf
    differences = [
        found.clips["other"][key].figures.ssim - found.clips["equal"][key].figures.ssim
        for key in found.pairs
    ]
    spread = found.paired(other, equal, lambda figures: figures.ssim)
    assert (spread.least, spread.greatest) == (min(differences), max(differences))
    assert found.paired(equal, DENSE, lambda figures: figures.psnr) is None


def test_every_figure_is_plain_json():
    found = made_comparison({"equal": 0.0, "other": 0.02}, prompts=("a", "b"))
    read = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert read["format"] == 1
    assert [setting["name"] for setting in read["settings"]] == ["dense", "equal", "other"]
    dense, equal, other = read["settings"]
    assert dense["summary"]["psnr"] is None
    assert equal["summary"]["psnr"]["median"] is None
    assert len(other["clips"]) == 6
    assert other["clips"][0]["figures"]["psnr"] > 20
    assert other["clips"][0]["repeats"] is True


@pytest.mark.parametrize("has_peaks", [True, False])
def test_no_word_of_the_printed_headings_is_cut_in_a_narrow_terminal(has_peaks):
    found = made_comparison({"density 0.1": 0.02, "density 0.3": 0.01})
    if not has_peaks:
        for clips in found.clips.values():
            for clip in clips.values():
                object.__setattr__(clip, "peak_bytes", None)
    console = Console(width=80, file=io.StringIO(), record=True)
    report(found, console)
    head = console.export_text().partition("━╇")[0]
    for word in ("setting", "density", "seconds", "speed-up", "PSNR", "SSIM", "flicker"):
        assert word in head
    assert ("GiB" in head) == has_peaks
