"""Frames in every form that a pipeline may return, and figures whose values are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from svg_ear_compile.compare.figures import Figures, figures_of, flicker, psnr
from svg_ear_compile.compare.frames import as_bytes, as_floats, frames_of


class Output:
    def __init__(self, frames):
        self.frames = frames


def random_bytes(seed=0, shape=(4, 9, 11)):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


@st.composite
def float_clips(draw):
    shape = tuple(draw(st.integers(low, high)) for low, high in ((1, 4), (7, 13), (7, 13)))
    seed = draw(st.integers(0, 1000))
    return np.random.default_rng(seed).random((*shape, 3))


@given(float_clips())
def test_sixteen_bits_keep_floats_to_a_hundred_thousandth(clip):
    assert np.abs(as_floats(frames_of(clip)) - clip).max() <= 1e-5


@given(float_clips())
def test_every_form_of_a_clip_gives_the_same_frames(clip):
    clip = clip.astype(np.float32)
    wanted = frames_of(clip)
    tensor = torch.from_numpy(clip)
    for same in (
        Output(clip), clip[None], Output(clip[None]), Output([clip]), list(clip), [list(clip)],
        tensor, tensor[None], Output(tensor.permute(0, 3, 1, 2)[None]), (clip,),
        [tensor.permute(0, 3, 1, 2)],
    ):  # fmt: skip
        np.testing.assert_array_equal(frames_of(same), wanted)


def test_eight_bit_pictures_come_through_exactly():
    clip = random_bytes()
    pictures = [Image.fromarray(frame) for frame in clip]
    for form in (clip, Output([pictures]), pictures, torch.from_numpy(clip)):
        np.testing.assert_array_equal(as_bytes(frames_of(form)), clip)
    half = torch.rand(3, 8, 8, 3, dtype=torch.bfloat16)
    assert np.abs(as_floats(frames_of(half)) - half.float().numpy()).max() <= 1e-5


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (None, TypeError, "NoneType"),
        ([], TypeError, "empty list"),
        (["a path.mp4"], TypeError, "must return one clip"),
        (Output(np.zeros((1, 16, 4, 9, 9))), TypeError, r"shape \(16, 4, 9, 9\)"),
        (np.zeros((4, 9, 9)), TypeError, r"shape \(4, 9, 9\)"),
        (np.zeros((0, 9, 9, 3)), TypeError, r"shape \(0, 9, 9, 3\)"),
        (np.zeros((2, 6, 9, 3)), TypeError, "6 x 9 pixels are too small"),
        (np.zeros((2, 9, 9, 3), np.int64), TypeError, "int64"),
        (np.full((2, 9, 9, 3), np.nan), ValueError, "frame 0 has values that are not finite"),
        (np.full((2, 9, 9, 3), 255.0), ValueError, "from 255 to 255"),
        (np.full((2, 9, 9, 3), -1.0), ValueError, r"floats in \[0, 1\]"),
    ],
)
def test_what_is_no_clip_is_answered(result, error, message):
    with pytest.raises(error, match=message):
        frames_of(result)


@given(float_clips())
def test_a_clip_against_itself_is_equal(clip):
    frames = frames_of(clip)
    found = figures_of(frames, frames)
    assert found.psnr == math.inf
    assert set(found.psnr_frames) == {math.inf}
    assert found.ssim == pytest.approx(1)
    assert found.flicker_ratio in (None, pytest.approx(1.0))


@pytest.mark.parametrize("offset", [0.25, 0.01])
def test_psnr_of_a_constant_offset_is_its_square_in_decibels(offset):
    dense = np.random.default_rng(0).random((3, 9, 11, 3)) / 2
    found = figures_of(frames_of(dense + offset), frames_of(dense))
    assert found.psnr == pytest.approx(-20 * math.log10(offset), abs=0.01)
    assert found.psnr_frames == pytest.approx((found.psnr,) * 3, abs=0.01)
    assert psnr(frames_of(dense + offset), frames_of(dense)) == pytest.approx(found.psnr)


def test_a_clips_psnr_is_of_its_mean_error_and_each_frame_is_scored_by_itself():
    dense = np.full((4, 9, 9, 3), 0.5)
    clip = dense.copy()
    clip[2] += 0.2
    found = figures_of(frames_of(clip), frames_of(dense))
    assert [math.isinf(value) for value in found.psnr_frames] == [True, True, False, True]
    assert found.psnr == pytest.approx(-10 * math.log10(0.04 / 4), abs=0.01)


def test_steady_movement_does_not_flicker_and_a_flash_does():
    ramp = np.linspace(0, 1, 9)[:, None, None, None] * np.ones((9, 8, 8, 3))
    assert max(flicker(frames_of(ramp))) < 0.01
    flash = np.full((5, 8, 8, 3), 0.5)
    flash[2] += 0.1
    found = flicker(frames_of(flash))
    assert found == pytest.approx((25.5, 51.0, 25.5), abs=0.02)
    assert flicker(frames_of(flash[:2])) == ()


def test_flicker_is_told_relative_to_the_dense_clip():
    rng = np.random.default_rng(0)
    dense = 0.5 + 0.02 * rng.normal(size=(9, 16, 16, 3))
    clip = dense + 0.02 * rng.normal(size=dense.shape)
    found = figures_of(frames_of(clip), frames_of(dense))
    assert found.flicker_ratio == pytest.approx(math.sqrt(2), rel=0.05)
    still = frames_of(np.full((5, 8, 8, 3), 0.5))
    assert figures_of(still, still).flicker_ratio is None


def test_clips_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 9, 11, 3\) and \(3, 9, 11, 3\)"):
        figures_of(frames_of(random_bytes()), frames_of(random_bytes()[:3]))


def test_figures_survive_json():
    clip, dense = frames_of(random_bytes(0)), frames_of(random_bytes(1))
    clip[1] = dense[1]
    found = figures_of(clip, dense)
    assert Figures.from_json(found.to_json()) == found
    assert found.to_json()["psnr_frames"][1] is None
