"""Options: what is taken, what is refused, and what the message says."""

from __future__ import annotations

import inspect
import time
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import svg_ear_compile
from svg_ear_compile.kernels.checked import InvalidTypeError, InvalidValueError
from svg_ear_compile.kernels.plan import AttentionPlan
from svg_ear_compile.settings import Settings


def test_plan_fields_and_inductor_keys_go_their_ways() -> None:
    settings = Settings.parse({"density": 0.1, "min_tokens": 7, "max_autotune": True}, "default")
    assert settings.plan == AttentionPlan(density=0.1)
    assert settings.min_tokens == 7
    assert settings.inductor == {"max_autotune": True}


def test_mode_becomes_inductor_options_either_way() -> None:
    wanted = {"triton.cudagraphs": True}
    assert Settings.parse({}, "reduce-overhead").inductor == wanted
    assert Settings.parse({"mode": "reduce-overhead"}).inductor == wanted


def test_an_int_is_a_float_where_one_is_wanted() -> None:
    density = Settings.parse({"density": 1}).plan.density
    assert density == 1.0
    assert isinstance(density, float)


@pytest.mark.parametrize("value", [True, False])
def test_a_plan_field_may_be_a_bool(value: bool) -> None:
    assert Settings.parse({"shared_branches": value}).plan.shared_branches is value


def test_every_plan_field_is_an_option() -> None:
    for name, value in asdict(AttentionPlan()).items():
        if (
            name not in ("top_p", "min_block_ratio", "threshold", "min_tokens", "max_key_ratio")
            and name not in ("min_cached_keys", "min_chunk_tokens", "is_tuned")
            and value is not None
        ):
            assert getattr(Settings.parse({name: value}).plan, name) == value


@pytest.mark.parametrize(
    ("options", "mode", "error", "message"),
    [
        ({"densty": 0.1}, None, ValueError, "did you mean 'density'"),
        ({"dense_steps": 2}, None, ValueError, "give it to svg_ear_compile.accelerate or bind"),
        ({"max_autotun": True}, None, ValueError, "max_autotune"),
        ({"qqqq": 1}, None, ValueError, "valid are density"),
        ({"density": "0.1"}, None, TypeError, "density must be float"),
        ({"density": True}, None, TypeError, "density must be float"),
        ({"density": 1.5}, None, ValueError, r"density must be in \[0, 1\]"),
        ({"q_clusters": 1.5}, None, TypeError, "q_clusters must be int"),
        ({"q_clusters": 0}, None, ValueError, "q_clusters must be at least 1"),
        ({"routing": "best"}, None, ValueError, "routing must be one of"),
        ({"compensation": 3}, None, TypeError, "compensation must be str"),
        ({"min_tokens": -1}, None, ValueError, "min_tokens must not be negative"),
        ({"threshold": 0.1}, None, ValueError, 'belongs to routing="threshold"'),
        ({"top_p": 0.5, "routing": "threshold"}, None, ValueError, 'belongs to routing="top_p"'),
        ({"density": 0.1, "routing": "top_p"}, None, ValueError, 'belongs to routing="density"'),
        ({"mode": "default"}, "default", ValueError, "mode is given twice"),
        ({}, "max-autotun", ValueError, "did you mean 'max-autotune'"),
        ({"max_autotune": "no"}, None, TypeError, "max_autotune must be bool"),
        ({"shared_branches": 0}, None, TypeError, "shared_branches must be bool"),
        ({"max_drift": -0.1}, None, ValueError, r"max_drift must be in \[0, 1\]"),
        ({"q_clusters": True}, None, TypeError, "q_clusters must be int"),
        ({"cost_exponent": 0.5}, None, ValueError, "is always 1 now: .* tuned again"),
        ({"compensation": "first_order"}, None, ValueError, 'replaced by "gaussian": .* again'),
        ({3: 0.1}, None, TypeError, "named by strings, got 3"),
        ({("density",): 0.1}, None, TypeError, "named by strings, got a tuple"),
        ({b"density": 0.1}, None, TypeError, "named by strings"),
        ([("density", 0.1)], None, TypeError, "options must be a dict, got a list"),
        ({}, ["default"], TypeError, "mode must be str or None, got a list"),
        ({"mode": {}}, None, TypeError, "mode must be str or None, got a dict"),
        ({"density": 10**400}, None, ValueError, "density must be finite, got a whole number"),
        ({"density": 10**5000}, None, ValueError, "density must be finite"),
        ({"density": float("nan")}, None, ValueError, "density must be finite"),
        ({"density": [0.1]}, None, TypeError, "density must be float, got a list"),
        ({"target_speedup": 10**400}, None, ValueError, "target_speedup must be finite"),
        ({"seed": 2**64}, None, ValueError, "seed must be at most"),
        ({"seed": -1}, None, ValueError, "seed must not be negative"),
        ({"first_iterations": 10**9}, None, ValueError, "first_iterations must be at most 100"),
        ({"warm_iterations": 0}, None, ValueError, "warm_iterations must be at least 1"),
        ({"text_prefix": -1}, None, ValueError, "text_prefix must not be negative"),
        ({"exact_tokens": "0-9"}, None, ValueError, "exact_tokens must be slices such as"),
        ({"exact_tokens": "0:9,"}, None, ValueError, "exact_tokens must be slices such as"),
        ({"exact_tokens": [3]}, None, TypeError, "exact_tokens must be a slice"),
        ({"exact_tokens": slice(0, 9.5)}, None, TypeError, "exact_tokens must be a slice"),
        ({"exact_tokens": slice(0, 9, 2)}, None, ValueError, "without a step"),
        ({"exact_tokens": slice(0, 10**400)}, None, ValueError, "a bound of exact_tokens must be"),
        ({"exact_tokens": slice(-(2**40), None)}, None, ValueError, "a bound of exact_tokens"),
        ({"exact_tokens": "0:5," * 10**5}, None, ValueError, "at most 1000 slices"),
        ({"exact_tokens": [slice(5)] * 1001}, None, ValueError, "at most 1000 slices, got 1001"),
        (
            {"exact_tokens": "0:9", "text_suffix": 2},
            None,
            ValueError,
            "exact_tokens says what text_suffix says",
        ),
        ({"text_suffix": 2**63}, None, ValueError, "text_suffix must be at most"),
        ({"q_clusters": 2**40}, None, ValueError, "q_clusters must be at most"),
        ({"compensation": ["gaussian"]}, None, TypeError, "compensation must be str"),
        ({"x" * 10**6: 1}, None, ValueError, "unknown option 'xxx"),
        ({}, "x" * 10**6, ValueError, "unknown mode 'xxx"),
        ({"\x1b[31mdensity": 1}, None, ValueError, r"\\x1b"),
        ({"max_autotune": 10**5000}, None, TypeError, "max_autotune must be bool"),
        ({"budget": 3}, None, TypeError, "budget must be a path or a Budget, got 3"),
        ({"budget": "nowhere.json"}, None, ValueError, "the budget cannot be used: .*nowhere"),
        ({"budget": "x" * 5000}, None, ValueError, "the budget cannot be used: .{100,480}$"),
        ({"budget": "a\0b"}, None, ValueError, "the budget cannot be used"),
        ({"budget": "/"}, None, ValueError, "it is a folder"),
    ],
)
def test_wrong_options_are_named(
    options: Any, mode: Any, error: type[Exception], message: str
) -> None:
    began = time.process_time()
    with pytest.raises(error, match=message) as caught:
        Settings.parse(options, mode)
    assert isinstance(caught.value, (InvalidValueError, InvalidTypeError))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500
    assert time.process_time() - began < 1


class Unfriendly:
    """Raises whatever is done to it."""

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    __str__ = __eq__ = __hash__ = __bool__ = __float__ = __index__ = __repr__  # type: ignore[assignment]


@pytest.mark.parametrize("key", [*Settings.__dataclass_fields__, "density", "mode", "seed"])
def test_foreign_values_are_refused_by_their_type(key: str) -> None:
    if key in ("plan", "inductor"):
        return
    with pytest.raises(InvalidTypeError, match="got an Unfriendly"):
        Settings.parse({key: Unfriendly()})


@given(
    st.dictionaries(
        st.sampled_from(["density", "seed", "q_clusters", "min_tokens", "top_p", "routing", "mode"])
        | st.text(max_size=9),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=9)
        | st.lists(st.none()),
        max_size=3,
    )
)
def test_any_options_are_settings_or_one_sentence(options: dict[str, Any]) -> None:
    said = ""
    try:
        found = Settings.parse(options)
    except (InvalidValueError, InvalidTypeError) as error:
        said = str(error)
    else:
        assert AttentionPlan.decode(found.plan.encode()) == found.plan
    assert said.isprintable()


@pytest.mark.parametrize("text", ["[]", "{", '{"density": 17}', '{"x": 1}', "[" * 10**5, '"a"'])
def test_an_encoded_plan_is_checked_too(text: str) -> None:
    with pytest.raises((InvalidValueError, InvalidTypeError)):
        AttentionPlan.decode(text)


@pytest.mark.parametrize(
    ("options", "spans"),
    [
        ({}, None),
        ({"exact_tokens": "0:226, -10:"}, ((0, 226), (-10, None))),
        ({"exact_tokens": ":7"}, ((0, 7),)),
        ({"exact_tokens": slice(3, 9)}, ((3, 9),)),
        ({"exact_tokens": [slice(3), slice(-2, None)]}, ((None, 3), (-2, None))),
        ({"exact_tokens": []}, ()),
        ({"text_prefix": 4, "text_suffix": 2}, ((0, 4), (-2, None))),
        ({"text_prefix": 0}, ()),
        ({"text_prefix": None}, None),
    ],
)
def test_exact_tokens_in_every_spelling(options: dict[str, Any], spans: object) -> None:
    assert Settings.parse(options).exact_tokens == spans


def test_what_belongs_to_a_session_is_named_so_and_never_a_typing_error() -> None:
    takes = inspect.signature(svg_ear_compile.bind).parameters
    own = [name for name, p in takes.items() if p.kind is p.KEYWORD_ONLY]
    for name in set(own) - {"budget", "exact_tokens"}:
        with pytest.raises(ValueError, match=f"{name} is no option of the backend"):
            Settings.parse({name: 1})
