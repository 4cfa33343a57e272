"""The line about a compiled model: what it counts, when it warns, who sees it, what strict does."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformer_models import TOKENS, WIDTH, stack, wan

from svg_ear_compile import ModelCall, NotSparseError, summary
from svg_ear_compile.passes.site import Reason
from svg_ear_compile.trial_runs import TrialRuns

SPARSE = {"density": 0.4, "min_tokens": TOKENS}
LOGGER = "svg_ear_compile.summary"
Lines = Callable[[], list[str]]


pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """The lines so far, each behind its level, which are forgotten."""

    def taken() -> list[str]:
        found = [f"{r.levelname} {r.getMessage()}" for r in caplog.records if r.name == LOGGER]
        caplog.clear()
        return found

    return taken


class Attention(nn.Module):
    """One attention call, of a kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.bias = nn.Parameter(torch.zeros(TOKENS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        if self.kind == "bias":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        elif self.kind == "dropout":
            out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=self.kind == "causal")
        return out.transpose(1, 2).flatten(2)


def run(model: Callable[..., Any], *inputs: Any, options: dict[str, Any], **kwargs: Any) -> Any:
    with torch.no_grad():
        return torch.compile(model, backend="svg_ear", options=options)(*inputs, **kwargs)


def attend(kind: str, **options: Any) -> None:
    model = Attention(kind).eval().requires_grad_(False)
    run(model, torch.randn(1, TOKENS, WIDTH), options=SPARSE | options)


def test_the_line_counts_what_went_sparse_and_why_the_rest_did_not(lines: Lines) -> None:
    model, inputs, kwargs = wan()
    run(model, *inputs, options={"density": 0.3, "min_tokens": 64}, **kwargs)
    assert lines() == [
        "INFO svg_ear: WanTransformer3DModel: 2 of 4 attentions sparse at density 0.3 "
        "(192 video tokens); dense: 2 cross_attention; predicted times: prior, not calibrated, "
        "uncertain by 50% (better: svg-ear calibrate --device cpu)"
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"routing": "top_p", "top_p": 0.7}, "2 of 2 attentions sparse at top-p 0.7 ("),
        ({"routing": "threshold", "threshold": 0.01}, "sparse at threshold 0.01 ("),
        ({"density": 1.0}, "0 of 2 attentions sparse; dense: 2 as asked for;"),
    ],
)
def test_the_budget_is_named_as_it_was_given(
    options: dict[str, Any], said: str, lines: Lines
) -> None:
    model, inputs = stack()
    run(model, *inputs, options={"min_tokens": TOKENS, **options})
    (line,) = lines()
    assert line.startswith("INFO")
    assert said in line


def test_blocks_that_are_alike_get_one_line(lines: Lines) -> None:
    for _ in range(2):  # two models of one class, each with two blocks
        model, inputs = stack()
        for block in model.blocks:
            block.compile(backend="svg_ear", fullgraph=True, options=SPARSE)
        with torch.no_grad():
            model(*inputs)
        torch._dynamo.reset()
    (line,) = lines()
    assert line.startswith("INFO svg_ear: Block: 1 of 1 attentions sparse at density 0.4 (128 ")
    model, inputs = stack()
    run(model, *inputs, options=SPARSE | {"density": 0.3})
    assert len(lines()) == 1  # another density is news


def test_a_graph_that_serves_several_lengths_counts_by_the_traced_one(lines: Lines) -> None:
    model, (x, timestep) = stack()
    torch._dynamo.mark_dynamic(x, 1)
    run(model, x, timestep, options={"density": 0.4, "min_tokens": TOKENS + 1})
    (line,) = lines()
    assert "0 of 2 attentions sparse; dense: 2 short" in line


@pytest.mark.parametrize(
    ("kind", "cure"), [("bias", "pass a bool mask of padding"), ("dropout", "call model.eval()")]
)
def test_long_attention_that_stays_dense_is_warned_of(kind: str, cure: str, lines: Lines) -> None:
    attend(kind)
    (line,) = lines()
    reason = {"bias": Reason.MASK, "dropout": Reason.DROPOUT}[kind]
    assert line.startswith("WARNING svg_ear: Attention: 0 of 1 attentions sparse")
    assert f"128 video tokens: {reason.value}): {reason.sentence}" in line
    assert f"Cure: {cure}" in line
    torch._dynamo.reset()
    with pytest.raises(NotSparseError, match=reason.value):
        attend(kind, strict=True)
    torch._dynamo.reset()
    attend(kind, strict=True, min_tokens=TOKENS + 1)  # not long any more
    assert [line.split()[0] for line in lines()] == ["INFO"]


def test_attention_that_is_never_sparse_is_no_news(lines: Lines) -> None:
    attend("causal", strict=True)
    (line,) = lines()
    assert line.startswith("INFO svg_ear: Attention: 0 of 1 attentions sparse; dense: 1 causal")


def test_a_guess_about_the_device_is_worth_a_calibration(
    lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = stack()
    run(model, *inputs, options={"strict": True})
    (line,) = lines()
    assert line.startswith("INFO")
    assert "dense: 2 short. Too few tokens: sparse from " in line
    monkeypatch.setattr(summary, "LONG_TOKENS", TOKENS)
    torch._dynamo.reset()
    run(model, *inputs, options={})
    (line,) = lines()
    assert line.startswith("WARNING")
    assert "Cure: run svg-ear calibrate --device cpu." in line


@pytest.mark.filterwarnings("ignore:svg_ear is for inference")
def test_strict_minds_gradients() -> None:
    model, inputs = stack()
    compiled = torch.compile(model, backend="svg_ear", options=SPARSE | {"strict": True})
    with pytest.raises(NotSparseError, match=r"under torch\.no_grad"):
        compiled(*inputs)
    linear = torch.compile(nn.Linear(4, 4), backend="svg_ear", options={"strict": True})
    assert linear(torch.ones(2, 4)).requires_grad  # no attention, no complaint


def test_every_reason_is_by_nature_or_has_a_cure() -> None:
    assert set(summary.CURES).isdisjoint(summary.NEVER_SPARSE)
    assert set(summary.CURES) | summary.NEVER_SPARSE == set(Reason)


def unconfigured(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The logger as in a process that has not configured logging; pytest configures it anew."""
    monkeypatch.setattr(logging.root, "handlers", [])
    log = logging.getLogger(LOGGER)
    for each in (log, logging.getLogger("svg_ear_compile")):
        monkeypatch.setattr(each, "handlers", [])
        monkeypatch.setattr(each, "level", logging.NOTSET)
        monkeypatch.setattr(each, "_cache", {})
    return log


def test_the_line_is_seen_without_any_configuration(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unconfigured(monkeypatch)
    for _ in range(2):
        summary.say_once(logging.INFO, "one")
    summary.say_once(logging.INFO, "two")
    assert capsys.readouterr().err == "one\ntwo\n"


def test_the_line_does_not_continue_a_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unconfigured(monkeypatch)
    with tqdm(total=3) as bar:
        bar.update()
        summary.say_once(logging.INFO, "one")
    err = capsys.readouterr().err
    assert "one" in re.split("[\r\n]", err)


def test_the_users_configuration_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = unconfigured(monkeypatch)
    logging.getLogger("svg_ear_compile").setLevel(logging.WARNING)  # TORCH_LOGS does the same
    summary.say_once(logging.INFO, "one")
    summary.say_once(logging.WARNING, "two")
    logging.basicConfig(format="mine %(message)s")
    summary.say_once(logging.WARNING, "three")
    assert capsys.readouterr().err == "two\nmine three\n"
    logging.getLogger("svg_ear_compile").setLevel(logging.NOTSET)
    log.setLevel(logging.ERROR)
    summary.say_once(logging.WARNING, "four")
    assert capsys.readouterr().err == ""


def test_trial_runs_say_nothing(lines: Lines) -> None:
    model, inputs = stack()
    runs = TrialRuns(model, [ModelCall(inputs)], "inductor", None, False)
    with torch.no_grad():
        runs._compiled(*inputs)
    runs.close()
    assert lines() == []
