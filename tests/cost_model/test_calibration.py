"""Calibrations: kept safely, read back strictly."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest
from calibrations import DEVICE, even
from hypothesis import given
from hypothesis import strategies as st

import svg_ear_compile
from svg_ear_compile.cost_model import calibrate as measuring
from svg_ear_compile.cost_model import calibration as keeping
from svg_ear_compile.cost_model import device_profile, json_record
from svg_ear_compile.cost_model.calibration import Calibration, Efficiency, Roofs
from svg_ear_compile.cost_model.device import describe
from svg_ear_compile.cost_model.stages import STAGES
from svg_ear_compile.kernels.checked import InvalidValueError


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "svg_ear_compile" / "calibrations"


def test_a_saved_calibration_is_read_back_and_closed_to_others(cache: Path) -> None:
    saved = dataclasses.replace(even(), device=DEVICE)
    path = keeping.save(saved)
    assert device_profile.load(DEVICE) == saved
    assert path.parent == cache
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert [p.name for p in cache.iterdir()] == [f"{DEVICE.key}.json"]


@pytest.mark.parametrize("change", ["name", "torch", "triton", "kernels", "architecture"])
def test_any_other_fact_of_a_device_has_the_prior(change: str) -> None:
    keeping.save(dataclasses.replace(even(), device=DEVICE))
    other = device_profile.load(dataclasses.replace(DEVICE, **{change: "9.9"}))
    assert other.origin == "prior"


@pytest.mark.parametrize("broken", ["", "{", "[]", '{"version": 1}', '{"version": 99}', "\x00\xff"])
def test_a_broken_file_is_passed_over_and_reported(
    broken: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = keeping.save(dataclasses.replace(even(), device=DEVICE))
    path.write_text(broken, encoding="latin-1")
    assert device_profile.load(DEVICE).origin == "prior"
    assert str(path) in caplog.text


SAVED = dataclasses.replace(even(), device=DEVICE)
ZERO = Efficiency(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": keeping.VERSION + 1}, "its format has version"),
        ({"stages": {}}, "is empty"),
        ({"stages": {"bfloat16/128": {}}}, "has no 'cluster'"),
        ({"stages": {"bfloat16/0": SAVED.stages["bfloat16/128"]}}, "no call class"),
        ({"stages": {"int3/128": SAVED.stages["bfloat16/128"]}}, "no call class"),
        (
            {"stages": {"bfloat16/128": SAVED.stages["bfloat16/128"] | {"dense": ZERO}}},
            "takes no time",
        ),
        ({"roofs": Roofs({}, 1.0, 1.0)}, "is empty"),
        ({"roofs": Roofs({"bfloat16": 0.0}, 1.0, 1.0)}, "must be at least"),
        ({"roofs": Roofs({"bfloat16": 1.0}, 1e308, 1.0)}, "must be at most"),
        ({"host_ms": -1.0}, "must not be negative"),
        ({"host_ms": "fast"}, "host_ms must be float"),
    ],
)
def test_what_cannot_predict_times_is_neither_saved_nor_read(
    change: dict[str, object], message: str, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = dataclasses.replace(SAVED, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        keeping.save(wrong)
    path = keeping.save(SAVED)
    data = dataclasses.asdict(wrong)
    json_record.write(path, data | {"checksum": keeping._checksum(json.loads(json.dumps(data)))})
    assert device_profile.load(DEVICE).origin == "prior"
    assert message in caplog.text


@given(st.data())
def test_a_flipped_bit_is_noticed(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", folder)
        path = keeping.save(SAVED)
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(content)
        found = device_profile.load(DEVICE)
        # A flip in a space or between e and E changes nothing that is read.
        assert found.origin == "prior" or found == SAVED


def test_an_old_or_edited_calibration_without_a_checksum_is_skipped(cache: Path) -> None:
    path = keeping.save(SAVED)
    json_record.write(path, SAVED)
    assert device_profile.load(DEVICE).origin == "prior"


@pytest.mark.parametrize("place", ["file", "folder", "pipe", "cache is a file", "no home"])
def test_a_cache_that_cannot_be_read_is_passed_over_with_one_warning(
    place: str, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = keeping.save(SAVED)
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", _no_home)
    elif place == "cache is a file":
        path.unlink()
        cache.rmdir()
        cache.write_text("")
    else:
        path.unlink()
        if place == "pipe":
            os.mkfifo(path)
        elif place == "folder":
            path.mkdir()
        else:
            path.write_text("\x1b[31m")
    for _ in range(3):
        assert device_profile.load(DEVICE).origin == "prior"
    assert len(caplog.records) == (place != "cache is a file")
    assert all(record.getMessage().isprintable() for record in caplog.records)


def test_an_unreadable_cache_folder_is_passed_over(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def denied(path: Path, *rest: object) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(json_record, "read_bytes", denied)  # the tests may run as root
    assert device_profile.load(DEVICE).origin == "prior"
    assert "Permission denied" in caplog.text


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_a_cache_that_cannot_be_written_is_said_before_measuring(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.parent.joinpath("svg_ear_compile").write_text("in the way")
    monkeypatch.setattr(measuring, "calibrate", None)
    with pytest.raises(OSError, match="svg_ear_compile"):
        svg_ear_compile.calibrate("cpu")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", _no_home)
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        svg_ear_compile.calibrate("cpu")


def test_a_folder_that_is_there_keeps_its_mode(cache: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o755)
    elsewhere.chmod(0o755)
    cache.parent.mkdir()
    cache.symlink_to(elsewhere)
    keeping.save(SAVED)
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o755
    assert device_profile.load(DEVICE) == SAVED


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta", "", "cpu:x", "cuda:-1", 7.5])
def test_devices_that_are_not_here_are_one_sentence(device: Any) -> None:
    with pytest.raises(InvalidValueError) as caught:
        describe(device)
    assert str(caught.value).isprintable()


def test_a_recorded_calibration_serves_that_gpu_under_any_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(device_profile, "RECORDED", tmp_path)
    json_record.write(tmp_path / "test-gpu.json", dataclasses.replace(even(), device=DEVICE))
    found = device_profile.load(dataclasses.replace(DEVICE, torch="2.11.0"))
    assert found.origin == "recorded"
    assert found.basis == "recorded on Test GPU"


def test_recorded_calibrations_are_readable_and_measured() -> None:
    for path in device_profile.RECORDED.glob("*.json"):
        found = json_record.read(Calibration, path)
        assert found.version == keeping.VERSION
        assert found.samples, f"{path} says nothing of what was measured"


def test_an_interrupted_write_leaves_the_old_file(cache: Path) -> None:
    path = keeping.save(dataclasses.replace(even(), device=DEVICE))
    before = path.read_text()
    spoiled = dataclasses.replace(even(), device=DEVICE, host_ms=float("nan"))
    with pytest.raises(ValueError, match="host_ms must be finite"):
        keeping.save(spoiled)
    assert path.read_text() == before
    assert list(cache.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"host_ms": "fast"}, "host_ms must be float, got 'fast'"),
        ({"host_ms": True}, "host_ms must be float, got True"),
        ({"origin": "dreamt"}, "origin must be one of"),
        ({"stages": {"bfloat16/128": {"dense": {"flops": 1}}}}, r"\['dense'\].bytes is missing"),
        ({"roofs": []}, "roofs must be an object"),
        ({"speed": 3}, "'speed' is not known"),
        ({"samples": {}}, "samples must be a list"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, object], message: str) -> None:
    data = json.loads(json.dumps(dataclasses.asdict(even()))) | change
    with pytest.raises(ValueError, match=message):
        json_record.decode(Calibration, data)


def test_the_schema_takes_what_is_written() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_record.schema(Calibration)
    data = json.loads(json.dumps(dataclasses.asdict(even())))
    jsonschema.validate(data, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data | {"host_ms": "fast"}, schema)


def test_the_nearest_class_serves_what_was_not_measured() -> None:
    slow, fast = ({s: Efficiency(x, x, x) for s in (*STAGES["cuda"], "dense")} for x in (9.0, 1.0))
    known = dataclasses.replace(even(), stages={"bfloat16/128": fast, "bfloat16/64": slow})
    for dim, wanted in ((32, slow), (72, slow), (96, fast), (128, fast), (256, fast)):
        for dtype in ("float16", "float32"):
            assert known.stages[known.nearest_class(dtype, dim)] is wanted
