"""Options: what is taken, what is refused, and what the message says."""

from __future__ import annotations

from dataclasses import asdict

import pytest

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
            name not in ("top_p", "min_block_ratio", "threshold", "min_tokens")
            and value is not None
        ):
            assert getattr(Settings.parse({name: value}).plan, name) == value


@pytest.mark.parametrize(
    ("options", "mode", "error", "message"),
    [
        ({"densty": 0.1}, None, ValueError, "did you mean 'density'"),
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
    ],
)
def test_wrong_options_are_named(
    options: dict[str, object], mode: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Settings.parse(options, mode)
