"""Budgets: schedules, scaling, files that are broken or meant for something else."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import tempfile
import time
from pathlib import Path

import pytest
from calibrations import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from svg_ear_compile.cost_model import budget as budgets
from svg_ear_compile.cost_model import json_record
from svg_ear_compile.cost_model.budget import (
    Budget,
    Choice,
    Performance,
    Point,
    Schedule,
    fingerprint,
)
from svg_ear_compile.kernels.checked import InvalidValueError
from svg_ear_compile.kernels.plan import AttentionPlan

SHAPES = {"blocks.0.attn.to_q.weight": (64, 64), "blocks.0.attn.to_q.bias": (64,)}
PRINT = fingerprint("VideoDiT", {"width": 64}, SHAPES)
LAYERS = {
    "blocks.0.attn": (Choice(0.3), Choice(0.1)),
    "blocks.1.attn": (Choice(1.0), Choice(0.2, 7, 13, "centroid")),
    "blocks.2.attn": (Choice(1.0), Choice(1.0)),
    "blocks.3.attn": (Choice(0.2, threshold=1e-4), Choice(0.1, threshold=2e-4)),
}
BUDGET = Budget(
    budgets.VERSION, PRINT, 1000, DEVICE, "target_speedup 2", "tuned",
    Schedule(dense_steps=2, phase_starts=(500.0,), dense_from=50.0), LAYERS,
    frontier=(Point(1.5, 0.25),),
)  # fmt: skip


def test_a_file_reads_back_as_it_was_written_and_a_person_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"
    BUDGET.save(path)
    assert Budget.load(path) == BUDGET
    assert '"density": 0.3' in path.read_text()


def test_the_schema_takes_it_and_refuses_others() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    data = json.loads(json.dumps(dataclasses.asdict(BUDGET)))
    jsonschema.validate(data, budgets.schema())
    del data["layers"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, budgets.schema())


@pytest.mark.parametrize(
    ("timestep", "phase"),
    [(1000.0, 0), (500.5, 0), (500.0, 1), (51.0, 1), (50.0, None), (0.0, None)],
)
@pytest.mark.parametrize("ascending", [False, True])
def test_phases_run_from_noise_to_video(
    timestep: float, phase: int | None, ascending: bool
) -> None:
    if ascending:  # the same schedule read from 0 (noise) to 1000 (video)
        schedule = Schedule(0, (500.0,), 950.0, True)
        assert schedule.phase(1000.0 - timestep) == phase
    else:
        assert BUDGET.schedule.phase(timestep) == phase


@given(
    st.lists(st.floats(0, 1000), unique=True, max_size=5),
    st.lists(st.floats(0, 1000), min_size=2, max_size=9),
    st.booleans(),
)
def test_phases_never_run_backwards(
    starts: list[float], timesteps: list[float], ascending: bool
) -> None:
    schedule = Schedule(0, tuple(sorted(starts, reverse=not ascending)), None, ascending)
    ordered = sorted(timesteps, reverse=not ascending)
    phases = [schedule.phase(t) for t in ordered]
    assert phases == sorted(phases)  # type: ignore[type-var]
    assert all(p is not None and 0 <= p < schedule.phases for p in phases)


def test_choices_by_layer_and_timestep() -> None:
    assert BUDGET.choice("blocks.0.attn", 900.0) == Choice(0.3)
    assert BUDGET.choice("blocks.0.attn", 300.0) == Choice(0.1)
    assert BUDGET.choice("blocks.0.attn", 10.0) == Choice(1.0)
    assert BUDGET.choice("blocks.9.attn", 900.0) is None
    # Where the phase is unknown: sparse, but never sparser than some phase asked for.
    assert BUDGET.densest("blocks.0.attn") == Choice(0.3)
    assert BUDGET.densest("blocks.1.attn") == Choice(0.2, 7, 13, "centroid")
    assert BUDGET.densest("blocks.2.attn") == Choice(1.0)


def test_a_choice_becomes_a_plan_and_keeps_the_rest_of_it() -> None:
    base = AttentionPlan(seed=3, warm_iterations=4, q_clusters=99)
    plan = LAYERS["blocks.1.attn"][1].plan(base)
    assert (plan.density, plan.q_clusters, plan.k_clusters) == (0.2, 7, 13)
    assert (plan.compensation, plan.seed, plan.warm_iterations) == ("centroid", 3, 4)
    assert Choice(1.0).plan(base).is_dense
    routed = LAYERS["blocks.3.attn"][0].plan(base)
    assert (routed.routing, routed.threshold) == ("threshold", 1e-4)


@given(st.integers(500, 2000))
def test_scaling_keeps_densities_and_cluster_sizes(tokens: int) -> None:
    scaled = BUDGET.scaled(tokens)
    assert scaled.tokens == tokens
    for path, choices in BUDGET.layers.items():
        for before, after in zip(choices, scaled.layers[path], strict=True):
            assert after.density == before.density
            if before.q_clusters is not None:
                assert after.q_clusters == max(1, round(before.q_clusters * tokens / 1000))


@pytest.mark.parametrize("tokens", [1, 499, 2001, 10**6])
def test_far_token_counts_are_refused_with_the_range(tokens: int) -> None:
    with pytest.raises(ValueError, match=r"good from 500 to 2,000, not for"):
        BUDGET.scaled(tokens)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (fingerprint("Wan", {"width": 64}, SHAPES), "is for VideoDiT, not for Wan"),
        (fingerprint("VideoDiT", {"width": 65}, SHAPES), "another config"),
        (fingerprint("VideoDiT", None, SHAPES), "another config"),
        (fingerprint("VideoDiT", {"width": 64}, {"w": (64, 65)}), "parameters of other shapes"),
    ],
)
def test_another_model_is_told(other: budgets.Fingerprint, message: str) -> None:
    BUDGET.check_model(PRINT)
    with pytest.raises(ValueError, match=message):
        BUDGET.check_model(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 7}, "version 7"),
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"layers": {}}, "layers is empty"),
        ({"layers": {"a": (Choice(0.1),)}}, "1 choices for 2 phases"),
        ({"layers": {"a": (Choice(0.1), Choice(1.7))}}, r"layers\['a'\]\[1\].density must be in"),
        (
            {"layers": {"a": (Choice(0.1, q_clusters=0), Choice(1.0))}},
            "q_clusters must be at least",
        ),
        ({"schedule": Schedule(phase_starts=(1.0, 2.0))}, "phase_starts must run"),
        ({"schedule": Schedule(-1, (1.0,))}, "dense_steps must not be negative"),
        ({"layers": {"a": (Choice(17.0), Choice(1.0))}}, "density must be in"),
        ({"predicted": Performance(error=-5.0)}, "predicted.error must not be negative"),
        ({"uniform": Performance(density=1.5)}, "uniform.density must be in"),
        ({"frontier": (Point(1.0, 0.1), Point(-1.0, 0.1))}, r"frontier\[1\].ms must not be"),
        ({"outcome": "splendid"}, "outcome must be one of"),
        ({"tokens": 10**12}, "tokens must be at most"),
        ({"schedule": Schedule(phase_starts=(1e300,))}, "must be at most"),
    ],
)
def test_a_budget_whose_parts_do_not_fit_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    broken = dataclasses.replace(BUDGET, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        budgets.check(broken)
    path = tmp_path / "broken.json"
    json_record.write(path, broken)
    with pytest.raises(ValueError, match=message) as caught:
        Budget.load(path)
    assert str(path) in str(caught.value)


def test_a_file_of_version_1_is_read_under_its_former_names(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    former = TEXT.replace('"objective"', '"wish"').replace('"outcome"', '"verdict"')
    path.write_text(former.replace('"version": 2', '"version": 1'))
    assert Budget.load(path) == BUDGET
    for text, message in (
        (former, "'wish' is not known"),
        (TEXT.replace('"version": 2', '"version": 1'), "names of version 2, but says version 1"),
        (TEXT.replace('"version": 2', '"version": 3'), "version 3; this package reads 1 and 2"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            Budget.load(path)


@given(st.data())
def test_a_file_that_was_cut_or_changed_is_read_or_refused_by_name(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "budget.json"
        BUDGET.save(path)
        text = path.read_text()
        at = data.draw(st.integers(0, len(text) - 1))
        cut = data.draw(st.booleans())
        path.write_text(text[:at] + data.draw(st.text(max_size=3)) + text[at + 1 :] * (not cut))
        refusal = ""
        try:
            found = Budget.load(path)
        except ValueError as error:
            refusal = str(error)
        else:
            assert budgets.check(found) is found
        assert not refusal or str(path) in refusal


@pytest.mark.parametrize("form", ["first_order", "second_order"])
def test_a_budget_of_a_form_that_is_gone_has_to_be_tuned_again(form: str, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(dataclasses.asdict(BUDGET)).replace('"gaussian"', f'"{form}"'))
    with pytest.raises(ValueError, match=f'"{form}" was replaced by "gaussian": .* tuned again'):
        Budget.load(path)


TEXT = json.dumps(dataclasses.asdict(BUDGET))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace('"tokens": 1000', '"tokens": ' + str(10**400)), "401 digits"),
        (TEXT.replace('"tokens": 1000', '"tokens": ' + "9" * 5000), "5,000 digits"),
        (TEXT.replace("500.0", "1e999"), "too large: '1e999'"),
        (TEXT.replace("500.0", "NaN"), "NaN is not a finite"),
        (TEXT.replace("500.0", "-Infinity"), "-Infinity is not a finite"),
        (TEXT.replace('"note"', '"objective": "", "note"'), "the key 'objective' stands twice"),
        (TEXT.replace('"blocks.1.attn"', '"blocks.0.attn"'), "'blocks.0.attn' stands twice"),
        (TEXT.replace("500.0", "[" * 1000 + "]" * 1000), "nested deeper"),
        ("[" * 100_000, "nested deeper"),
        ('{"a":' * 100_000, "nested deeper"),
        ('"' + '\\"' * 400_000, "not JSON"),
        (TEXT.replace('"tuned"', "true"), "outcome must be str, got True"),
        (TEXT.replace('"note"', '"\x1b[31mnote"'), "not JSON"),
        (TEXT.replace('"note"', r'"\u001b[31mnote"'), r"'\x1b[31mnote' is not known"),
        (TEXT.replace('"note"', r'"\ud800"'), r"'\ud800' is not known"),
        ("\ufeff" + TEXT, "not JSON"),
        ("", "not JSON"),
        ("{}", "version is missing"),
        (TEXT.replace('"version": 2', '"version": 3'), "version 3; this package reads 1 and 2"),
    ],
)
def test_nonsense_in_a_file_is_one_printable_sentence(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "budget\n.json"
    path.write_text(text, encoding="utf-8")
    began = time.process_time()
    with pytest.raises(InvalidValueError) as caught:
        Budget.load(path)
    assert time.process_time() - began < 1
    said = str(caught.value)
    assert message in said
    assert said.isprintable()
    assert len(said) < 400 + len(str(path))


@pytest.mark.parametrize("depth", [31, 32, 33])
@pytest.mark.parametrize("inside", ["0", r'"[\"[[\\"', '"\\\\"', '"}}}"'])
def test_nesting_is_counted_outside_of_strings(depth: int, inside: str) -> None:
    text = "[" * depth + inside + "]" * depth
    if depth > json_record.MOST_LEVELS:
        with pytest.raises(InvalidValueError, match="nested deeper"):
            json_record.parse(text.encode())
    else:
        assert json_record.parse(text.encode()) == json.loads(text)


def test_only_regular_files_of_some_size_are_read(tmp_path: Path) -> None:
    pipe, folder, large = tmp_path / "pipe", tmp_path / "folder", tmp_path / "large"
    os.mkfifo(pipe)
    folder.mkdir()
    with large.open("wb") as file:
        file.truncate(100 << 20)
    began = time.process_time()
    for path, message in ((pipe, "a pipe"), (folder, "a folder"), (large, "larger than 4 MiB")):
        with pytest.raises(InvalidValueError, match=message):
            Budget.load(path)
    with pytest.raises(InvalidValueError, match="a device"):
        Budget.load(Path("/dev/zero"))
    with pytest.raises(FileNotFoundError):
        Budget.load(tmp_path / "nowhere")
    assert time.process_time() - began < 1


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644)])
def test_the_umask_says_who_may_read_a_budget(umask: int, mode: int, tmp_path: Path) -> None:
    path, other = tmp_path / "budget.json", tmp_path / "other"
    other.write_text("mine")
    other.chmod(0o600)
    path.symlink_to(other)
    before = os.umask(umask)
    try:
        BUDGET.save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.lstat().st_mode) == mode
    assert (other.read_text(), stat.S_IMODE(other.stat().st_mode)) == ("mine", 0o600)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["budget.json", "other"]


def test_a_budget_made_in_python_is_checked_like_a_file() -> None:
    for change in ({"layers": 3}, {"tokens": "many"}, {"device": {}}, {"layers": {3: ()}}):
        with pytest.raises(InvalidValueError):
            budgets.check(dataclasses.replace(BUDGET, **change))  # type: ignore[arg-type]
