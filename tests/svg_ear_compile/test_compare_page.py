"""The page of a comparison: one file, everything escaped, and it works in a browser."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from svg_ear_compile.compare.frames import as_bytes, frames_of
from svg_ear_compile.compare.page import page_of
from svg_ear_compile.compare.sheets import Layout, difference_sheets_of, gain_of, sheets_of
from tests.svg_ear_compile.made_comparisons import disc_clip, made_comparison

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \"'{{code}} {{nothing}}"


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found[1])


def picture_of(uri):
    head, _, content = uri.partition(",")
    assert head == "data:image/webp;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def frame_of(sheets, layout, index):
    each = layout.columns * layout.rows
    row, column = divmod(index % each, layout.columns)
    top, left = row * layout.pitch_y, column * layout.pitch_x
    sheet = picture_of(sheets[index // each])
    return sheet[top : top + layout.height, left : left + layout.width]


class Tags(HTMLParser):
    """Every tag with its attributes, and whether those that need an end have one."""

    VOID = frozenset({"meta", "input", "br", "img"})

    def __init__(self):
        super().__init__()
        self.found, self.open = [], []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def tags_of(page):
    tags = Tags()
    tags.feed(page)
    assert not tags.open
    return tags.found


@pytest.mark.parametrize("shape", [(7, 48, 64), (5, 63, 33), (3, 200, 120), (1, 9, 17)])
def test_sheets_hold_every_frame_where_the_layout_says(shape):
    clip = disc_clip(3, *shape)
    layout = Layout.of(clip, 640)
    assert (layout.height, layout.width) == shape[1:]
    sheets = sheets_of(clip, layout)
    for index, frame in enumerate(clip):
        shown = frame_of(sheets, layout, index).astype(int)
        assert np.abs(shown - as_bytes(frame)).mean() < 5


def test_long_clips_take_several_sheets_of_a_size_that_phones_open():
    clip = np.repeat(disc_clip(0, 3, 90, 160), 500, axis=0)
    clip[1400] = 65535 - clip[1400]
    layout = Layout.of(clip, 640)
    sheets = sheets_of(clip, layout)
    assert len(sheets) == -(-len(clip) // (layout.columns * layout.rows)) > 1
    for uri in sheets:
        assert max(picture_of(uri).shape) <= 4096
    shown = frame_of(sheets, layout, 1400).astype(int)
    assert np.abs(shown - as_bytes(clip[1400])).mean() < 4


def test_wide_clips_are_shown_smaller_at_their_aspect():
    layout = Layout.of(np.zeros((2, 720, 1280, 3), np.uint16), 640)
    assert (layout.width, layout.height) == (640, 360)


def test_differences_are_of_raw_frames_and_one_gain_serves_a_page():
    dense = frames_of(np.full((3, 32, 48, 3), 0.5))
    clip = dense.copy()
    clip[1, 8:24, 16:32, 1] += 655  # a hundredth of white: an eight-bit picture would show 2.5
    assert gain_of([(clip, dense)]) == 16
    layout = Layout.of(clip, 640)
    sheets = difference_sheets_of(clip, dense, layout, 16)
    assert frame_of(sheets, layout, 0).max() <= 2
    middle = frame_of(sheets, layout, 1)
    assert middle[12:20, 20:28].mean() == pytest.approx(16 * 655 // 257, abs=3)
    assert middle[:4].max() <= 4
    assert gain_of([(clip, dense), (65535 - clip * 0, dense)]) == 2


def test_the_page_is_one_file_that_asks_for_nothing_and_escapes_what_it_was_given():
    found = made_comparison({EVIL: 0.02, "b": 0.01}, prompts=(EVIL, "two"), size=(3, 24, 32))
    page = page_of(found)
    for tag, attributes in tags_of(page):
        assert tag not in ("img", "link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "action"):
            assert name not in attributes
        assert not [name for name in attributes if name.startswith("on")]
    assert re.findall(r"https?://[^\"' )]+", page) == ["http://www.w3.org/2000/svg"]
    assert page.count("<script") == 2
    assert "alert(1)</script>" not in page
    assert html.escape(EVIL) in page  # the setting's name, its braces left alone
    data = data_of(page)
    assert data["names"] == ["dense", EVIL, "b"]
    assert {clip["prompt"] for clip in data["clips"]} == {EVIL, "two"}


def test_equal_clips_clips_of_one_frame_and_dense_alone_recommended_make_a_page_too():
    for strengths, size in (({"same": 0.0}, (5, 24, 32)), ({"a": 0.5, "b": 0.0}, (1, 9, 11))):
        page = page_of(made_comparison(strengths, size=size, seeds=(4,)))
        tags_of(page)
        assert "NaN" not in page
        assert ">inf" not in page
    assert "Stay with <b>dense</b>" in page_of(
        made_comparison({"slow": 0.01}, seconds={"slow": 12}, size=(3, 24, 32))
    )


def test_the_page_says_whether_generations_repeat_only_where_it_is_known():
    found = made_comparison({"a": 0.01, "b": 0.02}, size=(3, 24, 32))
    assert "gave equal frames (a, b)." in page_of(found)  # dense was generated once
    object.__setattr__(found.clips["b"][0, 0], "repeat_psnr", 41.25)
    assert "differ by 41.2 dB (b): smaller" in page_of(found)
    for clips in found.clips.values():
        for clip in clips.values():
            object.__setattr__(clip, "repeat_psnr", None)
    assert "generated twice" not in page_of(found)


def test_a_page_keeps_to_its_size_with_smaller_pictures_and_then_fewer_clips():
    found = made_comparison({"a": 0.05}, seeds=(0, 1, 2, 3), size=(2, 360, 640))
    full = page_of(found)
    assert data_of(full)["layout"]["width"] == 640
    smaller = page_of(found, size_limit=len(full) // 2)
    assert data_of(smaller)["layout"]["width"] < 640
    assert len(data_of(smaller)["clips"]) == 4
    assert len(smaller) < len(full) * 0.6
    fewer = page_of(found, size_limit=1)
    assert len(data_of(fewer)["clips"]) == 1
    assert "1 of 4 pairs" in fewer


# What the page does to these is read through its frame: width of the screen, keys, what is drawn.
WRAPPER = """<!doctype html><body style="margin:0">
<iframe id="page" src="index.html" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="seen"></pre><script>
page.onload = async () => {{
  const seen = {{}}, doc = page.contentDocument, win = page.contentWindow;
  const wait = () => new Promise((done) => setTimeout(done, 120));
  const press = async (key) => {{
    doc.body.dispatchEvent(new win.KeyboardEvent("keydown", {{ key, bubbles: true }}));
    await wait();
  }};
  const pixels = (id) => {{
    const canvas = doc.getElementById(id);
    const all = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return all.reduce((sum, value) => sum + value, 0) / all.length;
  }};
  await wait();
  await press("Home");
  seen.overflow = doc.documentElement.scrollWidth - win.innerWidth;
  seen.first = doc.getElementById("frame").textContent;
  seen.left = pixels("canvas-left"); seen.right = pixels("canvas-right");
  await press("ArrowLeft"); seen.last = doc.getElementById("frame").textContent;
  await press("d"); seen.difference = pixels("canvas-right");
  seen.hint = !doc.getElementById("hint").hidden;
  await press("2"); seen.setting = doc.getElementById("right").selectedOptions[0].text;
  seen.equal = pixels("canvas-right");
  await press("w"); seen.wipe = doc.getElementById("stage").className;
  seen.overflow_wipe = doc.documentElement.scrollWidth - win.innerWidth;
  const clip = doc.getElementById("clip");
  clip.value = "1"; clip.dispatchEvent(new win.Event("change")); await wait();
  seen.listed = clip.selectedOptions[0].text;
  seen.curves = doc.querySelectorAll("#curves path.curve").length;
  await press(" "); seen.playing = doc.getElementById("play").getAttribute("aria-pressed");
  document.getElementById("seen").textContent = JSON.stringify(seen);
}};
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser_the_players_run_by_keyboard_and_fit_the_screen(tmp_path, width):
    found = made_comparison(
        {"a quite long name of a setting, density 0.1": 0.05, "same": 0.0},
        prompts=("a long " * 30, EVIL),
        seeds=(0,),
        size=(5, 48, 64),
    )
    (tmp_path / "index.html").write_text(page_of(found))
    (tmp_path / "wrapper.html").write_text(WRAPPER.format(width=width))
    shown = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--allow-file-access-from-files", "--force-prefers-reduced-motion",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000",
            "--window-size=1300,1000", "--enable-logging=stderr", "--dump-dom",
            (tmp_path / "wrapper.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert not [line for line in said if "index.html" in line]
    dumped = re.search(r'<pre id="seen">(.*?)</pre>', shown.stdout, re.S)
    assert dumped, shown.stdout[-2000:]
    seen = json.loads(html.unescape(dumped[1]))
    assert seen["overflow"] <= 0
    assert seen["overflow_wipe"] <= 0
    assert (seen["first"], seen["last"]) == ("1 / 5", "5 / 5")
    # A quarter of every sum is opacity: 63.75 is a canvas that is black.
    assert seen["left"] > 70
    assert seen["right"] == pytest.approx(seen["left"], rel=0.1)
    assert seen["difference"] > 66
    assert seen["hint"] is True
    assert seen["setting"].startswith("same")
    assert seen["equal"] < 64.5
    assert seen["wipe"] == "stage wipe"
    assert seen["listed"].startswith(EVIL[:40])
    assert seen["curves"] == 2 + 2 + 3
    assert seen["playing"] == "true"
