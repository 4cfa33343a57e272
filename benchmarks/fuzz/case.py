"""Random attention modules as source text: case i of a seed is always the same.

Longer than most files: one class writes a module from its tokens to its output, and every part of
it reads the sizes, the form and the draws of the others.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.fuzz.choices import drawn
from benchmarks.fuzz.forms import (
    BEFORE,
    BETWEEN,
    BLOCK_MASKS,
    FORMS,
    LAYOUTS,
    REORDERED,
    SCALES,
    SOFTMAXES,
    Expect,
    Form,
)
from benchmarks.fuzz.masks import APPLICATIONS, ARGUMENTS, BIASES, BROADCASTS, CONTENTS
from benchmarks.fuzz.near_misses import NEAR_MISSES, PLAIN
from benchmarks.fuzz.writes import BOOL_WRITES, VARIABLES, WRITES

_STRICTNESS: tuple[Expect, ...] = ("rewrite", "reason", "equal", "untouched")
_HEADER = '''"""{title}"""

import itertools
import math
import operator

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.nn.attention import flex_attention as flex

DTYPE = torch.{dtype}
'''
_OPERATORS = """
@torch.library.custom_op("svg_ear_fuzz::twice", mutates_args=("x",))
def twice(x: torch.Tensor) -> None:
    x.mul_(2)


@torch.library.custom_op("svg_ear_fuzz::twice_all", mutates_args=("xs",))
def twice_all(xs: list[torch.Tensor]) -> None:
    for x in xs:
        x.mul_(2)
"""
_BY_LAYOUT = """
@torch.compiler.allow_in_graph
def flat_twice(x: torch.Tensor) -> torch.Tensor:
    x.reshape(-1).mul_(2)  # writes into x where this is a view
    return x.sum()
"""
_KERNEL = """
@torch.library.custom_op("svg_ear_fuzz::attend", mutates_args=())
def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return ((query @ key.mT).softmax(-1) @ value).clone()


@attend.register_fake
def _(query, key, value):
    return torch.empty_like(query @ key.mT @ value)
"""
_PACKED = """
@torch.library.custom_op("xformers_flash3::flash_fwd", mutates_args=())
def flash_fwd(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    lse = query.new_zeros(query.shape[1], query.shape[0], dtype=torch.float32)
    for start, end in itertools.pairwise(cu_seqlens_q.tolist()):
        q, k, v = (t[start:end].transpose(0, 1) for t in (query, key, value))
        scores = q @ k.mT * query.shape[-1] ** -0.5
        out[start:end] = (scores.softmax(-1) @ v).transpose(0, 1)
        lse[:, start:end] = scores.logsumexp(-1)
    return out, lse


@flash_fwd.register_fake
def _(query, key, value, cu_seqlens_q, cu_seqlens_k):
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return torch.empty_like(query, memory_format=torch.contiguous_format), lse
"""


@dataclass
class Case:
    """One module of the fuzzer.

    Attributes:
        name: "seed:index".
        choices: what was drawn on each axis: form, source, layout, between, scale, mask, put, bias,
            softmax, dtype, write, target, moment, near, dynamic, finish.
        source: text of a Python module with `Model`, `inputs(n)` and `DTYPE`.
        expect: what the pass has to do, see `forms.Expect`.
        calls: attentions that have to be rewritten or given a reason.
        lengths: numbers of tokens to run it with, the first one while it is traced.
        through_aot: the rewritten graph runs through AOTAutograd.
    """

    name: str
    choices: dict[str, str]
    source: str
    expect: Expect
    calls: int
    lengths: tuple[int, ...]
    through_aot: bool


def draw(seed: int, index: int, focus: Mapping[str, str] | None = None) -> Case:
    """Case `index` of a seed; of those that have the choices of `focus`, where it is given."""
    attempt = 0
    while True:
        rng, choices = drawn(seed, index, attempt)
        if all(choices.get(axis) == value for axis, value in (focus or {}).items()):
            return _Writer(rng, choices, f"{seed}:{index}").case()
        attempt += 1


@dataclass
class _Writer:
    """Writes the text of a case from its choices and further draws of the same generator."""

    rng: random.Random
    choices: dict[str, str]
    name: str
    init: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    def case(self) -> Case:
        rng, c = self.rng, self.choices
        self.form: Form = FORMS[c["form"]]
        self.miss = NEAR_MISSES.get(c["near"])
        self._draw_sizes()
        self._write_tokens()
        self._write_operands()
        attend = self._attention()
        transformed = self.miss is not None and self.miss.stage == "transformed"
        if transformed:
            assert self.miss is not None
            self.body += ["def attend(q, k, v):", *_indented([*attend, "return o"])]
            self._add(rng.choice(self.miss.texts))
        else:
            self.body += attend
        returned = self._finish()
        calls = self.miss.calls if self.miss is not None else 1
        return Case(
            self.name, c, self._source(returned), self._expect(), calls,
            (self.n,) if c["dynamic"] == "no" else (self.n, self.n + rng.choice((1, 5, 16))),
            rng.random() < 0.06 and c["write"] == "none",
        )  # fmt: skip

    def _draw_sizes(self) -> None:
        rng, form = self.rng, self.form
        self.b, self.n = rng.choice((1, 2, 2, 3, 4)), rng.randint(17, 96)
        self.d = rng.choice((24, 8) if rng.random() < 0.04 else (32, 40, 64))
        if self.d > 8 and rng.random() < 0.08:
            self.n = self.d  # shapes that do not tell tokens and channels apart
        self.h = rng.choice((1, 2, 3, 4))
        if form.heads == "grouped":
            self.h = rng.choice((2, 4))
        if form.heads == "none":
            self.h = 1
        if "b" not in form.q_dims and form.q_dims == "nd":
            self.b = 1
        if self.choices["near"] in ("attention_of_attention", "over_dims") and self.b == 1:
            self.b = 2
        self.g = {"grouped": self.h // 2, "one": 1}.get(form.heads, self.h)
        self.c = rng.choice((self.h * self.d, 48, 33))
        if self.choices["form"] == "multihead_module":
            self.c = self.h * self.d
        self.m_is_n = form.keys == "self"
        self.numbers = {
            "h": self.h, "d": self.d, "g": self.g, "r": self.h // self.g, "half": self.d // 2,
        }  # fmt: skip

    def _add(self, text: str) -> None:
        text = re.sub(r"%\((\w+)\)d", lambda found: str(self.numbers[found[1]]), text)
        self.body += [line for line in text.split("\n") if line]

    def _write_tokens(self) -> None:
        self._add("b, n, _ = x.shape")
        keys = self.form.keys
        self.text_tokens = 11 if keys in ("cross", "joint") else 0
        m = {"cross": "y.shape[1]", "joint": "n + y.shape[1]"}.get(keys, "n")
        if keys == "joint":
            self._add("x = torch.cat([x, y], 1)")
            self._add("n = x.shape[1]")
            m = "n"
        self._add(f"m = {m}")
        if keys == "prefix":
            self._add("z = x[:, : n // 2]")
            self._add("n = n // 2")
        if self.miss is None and self.rng.random() < 0.3:
            self._add(f"x = F.layer_norm(x, ({self.c},))")
        if self.choices["target"] == "tokens" if "target" in self.choices else False:
            self._add("x = x * 1.0")

    def _write_operands(self) -> None:
        """q, k and v in the dimensions of the form."""
        keys, rng = self.form.keys, self.rng
        of_k = "y" if keys == "cross" else "x"
        of_q = "z" if keys == "prefix" else "x"
        wide, narrow = self.h * self.d, self.g * self.d
        source = self.choices["source"]
        alone = keys in ("cross", "prefix") or self.g != self.h
        if (
            source in ("chunk", "split", "unbind", "permuted_qkv", "tensor_split", "select")
            and alone
        ):
            source = "kv_together"
        self._project(source, of_q, of_k, wide, narrow)
        target = self.choices.get("target")
        if target == "projection":
            self._add("base = pk if pk.is_contiguous() else pk.clone()")
            self._add("pk = base")
        same = rng.random() < 0.6
        first = rng.choice(LAYOUTS[self.choices["layout"]])
        for letter, heads, tokens in (("q", self.h, "n"), ("k", self.g, "m"), ("v", self.g, "m")):
            layout = first if same else rng.choice(LAYOUTS[rng.choice(list(LAYOUTS))])
            text = layout.format(f"p{letter}", n=tokens, h=heads, d=self.d)
            self._add(f"{letter} = {text}")
        if self.form.keys == "joint" and rng.random() < 0.3:
            self._add("q, k, v = (t.contiguous() for t in (q, k, v))")
        self._between()
        order = REORDERED[self.form.q_dims]
        if self.form.q_dims != "bhnd":
            for letter in "qkv":
                self._add(f"{letter} = {order.format(letter)}")
        if self.choices["scale"] in ("query_before", "key_before", "both_before"):
            for letter in {"q": "q", "k": "k", "b": "qk"}[self.choices["scale"][0]]:
                text = rng.choice(BEFORE)
                self._add(text.replace("%s", letter))
        if target in ("query", "key", "value"):
            letter = VARIABLES[target]
            self._add(f"{letter} = ({letter} * 1.0).contiguous()")
            if self.choices["write"] == "held_view":
                self._add(f"held = {letter}.view(-1)")
            self._written("before")
        if target == "tokens":
            self._written("before")

    def _project(self, source: str, of_q: str, of_k: str, wide: int, narrow: int) -> None:
        linear = f"nn.Linear({self.c}, %d)"
        if source in ("three_linears", "no_bias", "sliced", "functional"):
            bias = ", bias=False" if source == "no_bias" else ""
            for letter, tokens, width in (
                ("q", of_q, wide),
                ("k", of_k, narrow),
                ("v", of_k, narrow),
            ):
                more = 5 if source == "sliced" else 0
                self.init.append(f"self.{letter} = nn.Linear({self.c}, {width + more}{bias})")
                text = f"self.{letter}({tokens})"
                if source == "functional":
                    text = f"F.linear({tokens}, self.{letter}.weight, bias=self.{letter}.bias)"
                if source == "sliced":
                    text += f"[..., :{width}]"
                self._add(f"p{letter} = {text}")
            return
        if source == "parameters":
            for letter, tokens, width in (
                ("q", of_q, wide),
                ("k", of_k, narrow),
                ("v", of_k, narrow),
            ):
                self.init.append(
                    f"self.{letter} = nn.Parameter(torch.randn({self.c}, {width}) / 6)"
                )
                self._add(f"p{letter} = " + self.rng.choice((
                    f"{tokens} @ self.{letter}", f"torch.matmul({tokens}, self.{letter}.mT.mT)",
                    f"torch.einsum('bnc,cd->bnd', {tokens}, self.{letter})",
                )))  # fmt: skip
            return
        if source == "kv_together":
            self.init.append(f"self.q = {linear % wide}")
            self.init.append(f"self.kv = {linear % (2 * narrow)}")
            self._add(f"pq = self.q({of_q})")
            self._add(f"pk, pv = self.kv({of_k}).chunk(2, dim=-1)")
            return
        self.init.append(f"self.qkv = {linear % (3 * wide)}")
        self._add("qkv = self.qkv(x)")
        self._add({
            "chunk": "pq, pk, pv = qkv.chunk(3, -1)",
            "split": f"pq, pk, pv = torch.split(qkv, {wide}, dim=-1)",
            "unbind": f"pq, pk, pv = qkv.unflatten(-1, (3, {wide})).unbind(2)",
            "permuted_qkv": f"pq, pk, pv = qkv.view(b, n, 3, {wide}).permute(2, 0, 1, 3)",
            "tensor_split": "pq, pk, pv = torch.tensor_split(qkv, 3, dim=-1)",
            "select": f"pq, pk, pv = (qkv.view(b, n, 3, {wide}).select(2, i) for i in range(3))",
        }[source])  # fmt: skip

    def _between(self) -> None:
        how = self.choices["between"]
        if how.startswith("rope"):
            self._add(
                f"angles = torch.arange(n + m)[:, None] * 0.1 ** (torch.arange({self.d // 2}) / 4)"
            )
            doubled = (
                "torch.cat([angles, angles], -1)"
                if how == "rope_halves"
                else "angles.repeat_interleave(2, -1)"
            )
            self._add(f"angles = {doubled}")
        for letter, tokens in (("q", "n"), ("k", "m")):
            if how.startswith("rope"):
                self._add(
                    f"cos, sin = (t(angles)[:{tokens}].to(DTYPE) for t in (torch.cos, torch.sin))"
                )
            self._add(BETWEEN[how].replace("%s", letter))

    def _attention(self) -> list[str]:
        """Statements from the products to the output o."""
        before, self.body = self.body, []
        rng, miss = self.rng, self.miss
        self._positions()
        if miss is not None and miss.stage == "whole":
            self._add(rng.choice(miss.texts))
        elif miss is not None and miss.stage == "transformed":
            self._add(rng.choice(PLAIN))
        elif self.form.score_dims:
            self._by_hand()
        else:
            self._by_pytorch()
        self._written("after")
        found, self.body = self.body, before
        return found

    def _positions(self) -> None:
        c = self.choices
        if c["mask"] != "none" or c["bias"] != "none" or c["put"] == "twice":
            self._add("i, j = torch.arange(n)[:, None], torch.arange(m)[None]")

    def _broadcasts(self, text: str) -> str:
        dims = self.form.score_dims or ("fqk" if self.form.q_dims == "fnd" else "bhqk")
        keys, rows, place = BROADCASTS[dims]
        text = text.replace("KEYS", self.rng.choice(keys)).replace("ROWS", rows)
        parts = text.split("POS(")
        for part in parts[1:]:
            depth, end = 1, 0
            while depth:
                depth += {"(": 1, ")": -1}.get(part[end], 0)
                end += 1
            text = text.replace(f"POS({part[:end]}", place.format(f"({part[: end - 1]})"), 1)
        return text

    def _masks(self, table: Mapping[str, object]) -> str:
        """Writes `mask`; returns the statements that put it on."""
        if self.choices["mask"] == "none":
            return ""
        self._add(self._broadcasts(self.rng.choice(CONTENTS[self.choices["mask"]].texts)))
        if self.choices.get("target") == "mask":
            self._add("mask = mask.clone(memory_format=torch.contiguous_format)")
        if self.choices.get("target") == "keep" and self.choices["mask"] == "keys":
            self.body.insert(0, "keep = keep.clone()")
        put = table[self.choices["put"]]
        return self._broadcasts(self.rng.choice(put.texts))  # type: ignore[attr-defined]

    def _by_pytorch(self) -> None:
        rng, c = self.rng, self.choices
        rest = ""
        put = self._masks(ARGUMENTS)
        self._add(put)
        if c["bias"] != "none":
            self._add(self._broadcasts(rng.choice(BIASES[c["bias"]])))
            self._add("mask = bias.to(q.dtype)")
        masked = c["mask"] != "none" or c["bias"] != "none"
        self._written("masked")
        text = rng.choice(self.form.scores)
        named = (
            "=" in text.removeprefix("o =") or "aten" in text or "*(" in text or rng.random() < 0.5
        )
        if "aten" in text:
            named = False
        if masked:
            rest = ", attn_mask=mask" if named and c["form"] != "sdpa_aten" else ", mask"
            if "keyword" in c["form"] or "value=v" in text:
                rest = ", attn_mask=mask"
        if rng.random() < 0.3:
            rest += ", scale=0.3"
        if (
            rng.random() < 0.2
            and "attn_mask" not in rest
            and not masked
            and c["form"] != "sdpa_aten"
        ):
            rest = ", attn_mask=None" + rest
        if rng.random() < 0.2 and (not masked or "attn_mask" in rest):
            rest += ", dropout_p=0.0, is_causal=False"
        self._add(text.replace("%(rest)s", rest))
        if c["form"] == "multihead_module":
            self.init.append(
                f"self.mha = nn.MultiheadAttention({self.c}, {self.h}, batch_first=True)"
            )
        if c["form"].startswith("flex_outside"):
            made = rng.choice(BLOCK_MASKS[c["form"].removesuffix("_grouped")])
            self.init += [f"B, N = {self.b}, {self.n}", *made.split("\n")]
        self._near("output")

    def _by_hand(self) -> None:
        rng, c, form = self.rng, self.choices, self.form
        self._add(rng.choice(form.scores))
        self._written("scores")
        scaling = self._broadcasts(rng.choice(SCALES[c["scale"]]))
        if c["scale"] == "parameter":
            self.init.append("self.temperature = nn.Parameter(torch.rand(1) + 0.2)")
        late = (
            rng.random() < 0.15
            and c["put"].startswith(("filled", "where"))
            and c["put"] in ("filled", "where")
        )
        put = self._masks(APPLICATIONS)
        for text in (put, scaling) if late else (scaling, put):
            self._add(text)
        if c["bias"] != "none":
            self._add(self._broadcasts(rng.choice(BIASES[c["bias"]])))
            self._add(
                rng.choice(("s = s + bias", "s += bias", "s = bias + s", "s = torch.add(s, bias)"))
            )
        self._near("scores")
        self._written("masked")
        if not self._near("softmax"):
            dim = "-1" if form.score_dims.endswith("k") else "-2"
            kind = c["softmax"] if c["softmax"] != "rows" or dim == "-1" else "method"
            if rng.random() < 0.3:
                dim = str(len(form.score_dims) + int(dim))
            self._add(rng.choice(SOFTMAXES[kind]).replace("DIM", dim))
            if c["softmax"] == "module":
                self.init.append(f"self.softmax = nn.Softmax(dim={dim})")
            if c["softmax"] == "dropout_off":
                self.init.append("self.dropout = nn.Dropout(0.1)")
        if c["dtype"] != "float32" and re.search(
            r"\b(mask|bias|c|float64|double|self)\b", "\n".join(self.body)
        ):
            self._add(rng.choice(("w = w.to(v.dtype)", "w = w.type_as(v)", "w = w.to(DTYPE)")))
        self._written("softmax")
        self._near("weights")
        if not self._near("product"):
            self._add(rng.choice(form.outs))
        self._near("output")

    def _near(self, stage: str) -> bool:
        """Writes the near miss if it stands at this stage."""
        if self.miss is None or self.miss.stage != stage:
            return False
        self._add(self._broadcasts(self.rng.choice(self.miss.texts)))
        return True

    def _written(self, moment: str) -> None:
        c = self.choices
        if c["write"] == "none" or c["moment"] != moment:
            return
        target = c["target"]
        texts = BOOL_WRITES if c["write"] == "bool" else WRITES[c["write"]]
        variable = VARIABLES[target]
        text = self.rng.choice(texts)
        if target in ("scores", "weights") and c["write"] in (
            "flat",
            "strided",
            "bits",
            "held_view",
        ):
            self._add(f"{variable} = {variable}.contiguous()")
        held = "held" if target in ("query", "key", "value") else f"{variable}.view(-1)"
        self._add(re.sub(r"\bT\b", variable, text.replace("HELD", held)))

    def _finish(self) -> str:
        c, dims = self.choices, self.form.out_dims or self.form.q_dims
        if self.miss is not None and self.miss.stage == "output_bhnd":
            out = "o"
            text = self.rng.choice(self.miss.texts).replace("OUT", out)
            self._add(text)
        extra = any(re.match(r"\s*(o, )?extra = ", line) for line in self.body)
        strict = self.miss is not None and c["finish"] != "raw"
        if strict or c["form"] == "multihead_module" or dims not in ("bhnd", "bnhd"):
            return "o, extra" if extra else "o"
        if c["finish"] != "raw":
            if dims == "bhnd":
                self._add("o = o.transpose(1, 2)")
            self._add({
                "reshape": "o = o.reshape(b, n, -1)",
                "contiguous_view": f"o = o.contiguous().view(b, n, {self.h * self.d})",
                "flatten": "o = o.flatten(2)",
                "projected": "o = self.out(o.flatten(2).to(DTYPE))",
            }[c["finish"]])  # fmt: skip
            if c["finish"] == "projected":
                self.init.append(f"self.out = nn.Linear({self.h * self.d}, {self.c})")
        return "o, extra" if extra else "o"

    def _expect(self) -> Expect:
        c = self.choices
        found: list[Expect] = [self.form.expect]
        if self.miss is not None:
            found.append(self.miss.expect)
        if c["mask"] != "none":
            table = APPLICATIONS if self.form.score_dims else ARGUMENTS
            found += [CONTENTS[c["mask"]].expect, table[c["put"]].expect]
        if c["bias"] != "none" or self.d not in (32, 40, 64) or c["scale"] == "parameter":
            found.append("reason")
        if c["softmax"] == "written_out":
            found.append("reason")
        if c["scale"] in ("constant_written", "constant_of_dtype"):
            found.append("equal")
        if c["write"] != "none":
            changed = c["target"] in ("scores", "weights") and c["moment"] != "after"
            found.append("equal" if changed else "reason")
        return max(found, key=_STRICTNESS.index)

    def _source(self, returned: str) -> str:
        text = "\n".join(self.body)
        init = list(dict.fromkeys(self.init))
        if "self.bias[" in text:
            init.append("self.bias = nn.Parameter(torch.randn(130, 130))")
        if "self.table" in text:
            init.append(f"self.table = nn.Parameter(torch.randn({self.d}, 7))")
        arguments = ["x"] + (["y"] if self.text_tokens else [])
        made = [f"torch.randn({self.b}, n, {self.c}).to(DTYPE) * 2"]
        if self.text_tokens:
            made.append(f"torch.randn({self.b}, {self.text_tokens}, {self.c}).to(DTYPE) * 2")
        keys = {"cross": str(self.text_tokens), "joint": f"n + {self.text_tokens}"}.get(
            self.form.keys, "n"
        )
        if re.search(r"\bkeep\b", text):
            arguments.append("keep")
            kept = [f"({keys}) * {self.rng.randint(5, 9)} // 10" for _ in range(self.b)]
            lengths = f"torch.tensor([{', '.join(kept)}])[:, None]"
            made.append(f"torch.arange({keys}) < {lengths}")
        if re.search(r"\bsame\b", text):
            made[-1] = f"*(lambda t: (t, t.view(-1)))({made[-1]})"
            arguments.append("same")
        if re.search(r"\ballowed\b", text):
            arguments.append("allowed")
            queries = {"joint": keys, "prefix": "n // 2"}.get(self.form.keys, "n")
            made.append(f"(torch.rand({queries}, {keys}) < 0.7) | (torch.arange({keys}) == 0)")
        lines = [
            _HEADER.format(title=f"Case {self.name}: {self._title()}", dtype=self.choices["dtype"]),
            _OPERATORS if re.search(r"\btwice", text) else "",
            _BY_LAYOUT if "flat_twice" in text else "",
            _KERNEL if "svg_ear_fuzz.attend" in text else "",
            _PACKED if "flash_fwd" in text else "",
            "class Model(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in init),
            "",
            f"    def forward(self, {', '.join(arguments)}):",
            *_indented(self.body, 2),
            f"        return {returned}",
            "",
            "",
            f"def inputs(n={self.n}):",
            "    torch.manual_seed(1)",
            f"    return ({', '.join(made)},)",
            "",
        ]
        return "\n".join(lines)

    def _title(self) -> str:
        skipped = ("none", "no")
        return ", ".join(f"{k}={v}" for k, v in self.choices.items() if v not in skipped)


def _indented(lines: list[str], levels: int = 1) -> list[str]:
    return ["    " * levels + line for line in lines]
