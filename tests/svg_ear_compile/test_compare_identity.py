"""Clips are kept for what they depend on: weights, budgets and the values of the call."""

import copy
import json
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from svg_ear_compile import compare
from svg_ear_compile.compare.folder import Folder
from svg_ear_compile.compare.identity import identity_of, weights_digest
from svg_ear_compile.compare.pipeline import Pipeline
from svg_ear_compile.compare.setting import settings_of
from svg_ear_compile.cost_model.budget import Choice
from tests.svg_ear_compile.compared_pipelines import tiny_dit, tiny_wan
from tests.svg_ear_compile.made_budgets import budget_for


class Scaled(nn.Module):
    """A model that has a timestep and weights, and no attention."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(3, 3, bias=False).requires_grad_(False)

    def forward(self, x, timestep):
        return self.inner(x)


class Plain:
    """A pipeline whose frames follow from its weights, the seed and `given`."""

    def __init__(self, seed: int = 0) -> None:
        self.transformer = Scaled(seed)
        self.calls = 0

    def __call__(self, prompt, generator, given=None):
        self.calls += 1
        frames = torch.rand(4, 9, 9, 3, generator=generator)
        return self.transformer(frames, 0).sigmoid()


def test_clips_of_other_weights_are_not_used_again(tmp_path):
    compare(lambda: Plain(0), ["a"], tmp_path, densities=[0.5], seeds=1)
    again = Plain(0)
    compare(lambda: again, ["a"], tmp_path, densities=[0.5], seeds=1)
    assert again.calls == 0
    with pytest.raises(ValueError, match="a comparison with other weights: give another folder"):
        compare(lambda: Plain(1), ["a"], tmp_path, densities=[0.5], seeds=1)


def test_a_folder_that_says_nothing_of_weights_is_refused(tmp_path):
    compare(lambda: Plain(0), ["a"], tmp_path, densities=[0.5], seeds=1)
    kept = json.loads((tmp_path / "comparison.json").read_text())
    del kept["weights"]
    (tmp_path / "comparison.json").write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="a comparison with other weights"):
        compare(lambda: Plain(0), ["a"], tmp_path, densities=[0.5], seeds=1)


def test_a_budget_is_told_by_the_content_of_its_file(tmp_path):
    model, path = tiny_dit().transformer, tmp_path / "tuned.json"
    pipeline = Pipeline(Plain())
    identities = []
    for note in ("", "tuned again"):
        budget_for(model, {"a": (Choice(0.2),)}, 192, note=note).save(path)
        settings = settings_of([], [{"name": "tuned", "budget": str(path)}], 0)
        identities.append(identity_of(pipeline, settings))
    Folder(tmp_path / "clips", identities[0])
    Folder(tmp_path / "clips", identities[0])
    with pytest.raises(ValueError, match="with other budgets"):
        Folder(tmp_path / "clips", identities[1])


def test_budgets_paths_and_slices_in_settings_are_plain_values(tmp_path):
    path = tmp_path / "tuned.json"
    budget = budget_for(tiny_dit().transformer, {"a": (Choice(0.2),)}, 192)
    budget.save(path)
    options = [{"budget": path}, {"name": "b", "budget": budget}, {"exact_tokens": [slice(0, 3)]}]
    plain = [setting.to_json() for setting in settings_of([], options, 0)]
    assert json.loads(json.dumps(plain)) == plain
    assert plain[0]["options"] == {"budget": str(path)}
    assert plain[1]["options"]["budget"]["tokens"] == budget.tokens


def test_another_scheduler_is_another_configuration():
    pipeline, call = tiny_wan()
    before = identity_of(Pipeline((pipeline, call)), ())
    assert identity_of(Pipeline(tiny_wan()), ()) == before
    pipeline.scheduler = type(pipeline.scheduler)(shift=5.0)
    after = identity_of(Pipeline((pipeline, call)), ())
    assert [name for name in before if before[name] != after[name]] == ["configurations"]


class Kind(Enum):
    ONE = 1
    TWO = 2


@dataclass
class Held:
    value: object


def picture(value: int, mode: str = "L") -> Image.Image:
    return Image.fromarray(np.full((3, 5), value, np.uint8)).convert(mode)


NAN = torch.tensor([1.0, torch.nan])
DIFFERENT = [
    (1, 2), (1, 1.0), (1, True), ("1", 1), (None, "None"), ([1, 2], [2, 1]), ([[1], 2], [[1, 2]]),
    (["ab", "c"], ["a", "bc"]), ({"a": 1}, {"a": 2}), ({"a": "b"}, {"b": "a"}), ({1}, {2}),
    (torch.zeros(4), torch.zeros(2, 2)), (torch.zeros(2), torch.zeros(2).int()),
    (NAN, torch.tensor([2.0, torch.nan])), (torch.zeros(9999), torch.eye(1, 9999)[0]),
    (torch.zeros(2), torch.tensor([0.0, -0.0])), (torch.tensor([1j]), torch.tensor([1j]).conj()),
    (torch.arange(6).view(2, 3), torch.arange(6).view(2, 3).flip(0)),
    (torch.arange(4).view(2, 2), torch.arange(4).view(2, 2).T),
    (np.zeros(4), np.zeros((2, 2))), (np.zeros(2), np.zeros(2, np.int64)),
    (np.ones(2), np.zeros(2)),
    (picture(1), picture(2)), (picture(1), picture(1, "RGB")), ([picture(1)], [picture(2)]),
    (Kind.ONE, Kind.TWO), (Held(1), Held(2)), (Scaled(0), Scaled(1)),
    (torch.float16, torch.bfloat16), (Path("a"), Path("b")),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_arguments_of_the_call_are_told_by_their_values(one, other):
    digests = [
        identity_of(Pipeline((Plain(), {"given": given})), ())["call"]
        for given in (one, copy.deepcopy(one), other)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_an_argument_that_is_a_file_is_told_by_its_bytes(tmp_path):
    given = {"given": tmp_path / "picture"}
    digests = []
    for content in (b"a", b"b"):
        given["given"].write_bytes(content)
        digests.append(identity_of(Pipeline((Plain(), given)), ())["call"])
    assert digests[0] != digests[1]


@pytest.mark.parametrize(
    ("odd", "what"),
    [
        (lambda: None, "a function"), ([{"a": object()}], "an object"), (Plain, "a type"),
        (np.array([None]), "a ndarray"), (torch.zeros(2, device="meta"), "a Tensor"),
    ],
)  # fmt: skip
def test_an_argument_that_has_no_digest_is_answered(tmp_path, odd, what):
    with pytest.raises(TypeError, match=f"the call given, which holds {what}: .* give numbers"):
        compare(lambda: (Plain(), {"given": odd}), ["a"], tmp_path, densities=[0.5])


def test_a_change_of_every_element_of_any_weight_is_seen():
    def made(**changed):
        model = nn.Module()
        model.large = nn.Parameter(torch.zeros(5001, 301).T)
        model.one = nn.Parameter(torch.tensor(1.0))
        model.none = nn.Parameter(torch.zeros(0, 3))
        model.small = nn.Parameter(torch.zeros(7, dtype=torch.bfloat16))
        model.register_buffer("kept", torch.zeros(5, dtype=torch.float8_e4m3fn))
        model.register_buffer("remade", torch.zeros(5), persistent=False)
        for name, value in changed.items():
            getattr(model, name).data = value
        return weights_digest(model)

    assert made() == made() == made(remade=torch.ones(5))
    changes = {
        "large": torch.ones(5001, 301).T, "one": torch.tensor(2.0), "none": torch.zeros(3, 0),
        "small": torch.zeros(7, dtype=torch.float16), "kept": torch.ones(5).to(torch.float8_e4m3fn),
    }  # fmt: skip
    assert len({made(), *(made(**{name: value}) for name, value in changes.items())}) == 6
    # Of few elements, each is read; of many, the first and the last.
    for at in (0, 6):
        small = torch.zeros(7, dtype=torch.bfloat16)
        small[at] = 1
        assert made(small=small) != made()
    for at in (0, -1):
        large = torch.zeros(5001, 301).T.contiguous()
        large.view(-1)[at] = 1
        assert made(large=large) != made()


def test_weights_that_accelerate_offloads_are_read_where_they_lie():
    digests = []
    for seed in (0, 1):
        model = Scaled(seed)
        plain = weights_digest(model)
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.inner.weight.is_meta
        assert weights_digest(model) == plain
        digests.append(plain)
    assert digests[0] != digests[1]


def test_weights_that_diffusers_offloads_to_disk_are_read_there(tmp_path):
    digests = []
    for seed in (0, 1):
        model = nn.Sequential(nn.ModuleList([Scaled(seed), Scaled(seed + 2)]))
        plain, cpu = weights_digest(model), torch.device("cpu")
        apply_group_offloading(
            model, cpu, cpu, offload_type="block_level", num_blocks_per_group=1,
            offload_to_disk_path=str(tmp_path / str(seed)),
        )  # fmt: skip
        for parameter in model.parameters():
            parameter.fill_(torch.nan)  # memory that nobody wrote
        assert weights_digest(model) == plain
        digests.append(plain)
    assert digests[0] != digests[1]


def test_weights_that_are_nowhere_are_told_by_their_shapes():
    nowhere = [weights_digest(Scaled(seed).to("meta")) for seed in (0, 1)]
    assert nowhere[0] == nowhere[1] != weights_digest(Scaled(0))


def test_quantised_weights_are_read_part_by_part():
    quantization = pytest.importorskip("torchao.quantization")
    digests = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(128, 64))
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        assert is_traceable_wrapper_subclass(model[0].weight)
        digests.append(weights_digest(model))
    assert digests[0] == digests[2] != digests[1]
