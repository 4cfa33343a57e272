"""The size rule."""

from svg_ear_compile.cost_model.size_rule import min_tokens


def test_a_gpu_needs_more_tokens_than_a_cpu_and_unknown_devices_count_as_gpus() -> None:
    assert min_tokens("cpu") < min_tokens("cuda")
    assert min_tokens("xpu") == min_tokens("cuda")
