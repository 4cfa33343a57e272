"""Near misses: graphs that look like plain attention and are not quite, or are in an odd setting.

Texts as in `forms` and `masks`. Each changes one stage of the attention, or the whole module.

Longer than other files: it is one list, and every entry is a text of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.fuzz.forms import Expect


@dataclass(frozen=True)
class NearMiss:
    """One kind of near miss.

    Attributes:
        stage: "scores", "weights" or "output": the texts come after it; "softmax", "product",
            "whole": they replace it; "output_bhnd": after an output (b, h, n, d); "transformed":
            they call `attend(q, k, v)`.
        family: "hand", "sdpa" or "any" attention.
        dims: dimensions of scores that the texts are for, "" for all.
        calls: softmax attentions, counted for what has to be found or given a reason.
    """

    stage: str
    texts: tuple[str, ...]
    expect: Expect = "untouched"
    family: str = "hand"
    dims: str = ""
    calls: int = 0

    @property
    def is_whole(self) -> bool:
        """True if it replaces the whole attention."""
        return self.stage in ("whole", "transformed")


_ATTEND = "F.scaled_dot_product_attention"
PLAIN = (f"o = {_ATTEND}(q, k, v)", f"o = {_ATTEND}(q, k, v, scale=0.3)",
"o = (q @ k.mT * 0.3).softmax(-1) @ v",
         "o = F.softmax(torch.matmul(q, k.transpose(-2, -1)) / 4, dim=-1) @ v")  # fmt: skip
"""Attention for the stage "transformed", of operands (..., n, d)."""

NEAR_MISSES: dict[str, NearMiss] = {
    # What happens to scores.
    "integer_scores": NearMiss("scores", (
        "s = (s * 4).to(torch.int32).float().to(v.dtype)", "s = (s * 3).long().to(v.dtype)",
        "s = s.int().to(v.dtype)", "s = s.to(torch.int8).type_as(v)", "s = s.bool().to(v.dtype)",
        "s = (s * 2).type(torch.int16).to(v.dtype)", "s = s.to(dtype=torch.int64).to(DTYPE)",
        "s = s.short().to(v.dtype)", "s = s.char().to(v)",
        "s = s.type('torch.IntTensor').to(v.dtype)",
    )),
    "rounded_scores": NearMiss("scores", (
        "s = torch.div(s, .25, rounding_mode='floor')", "s = s.div(0.5, rounding_mode='trunc')",
        "s = s // 0.5", "s = torch.floor_divide(s, 0.3)", "s = (s * 3).round()", "s = s.floor()",
        "s.div_(0.4, rounding_mode='floor')", "s = s.round(decimals=0)", "s = s.trunc()",
    )),
    "narrowed_scores": NearMiss("scores", (
        "s = s.half().to(v.dtype)", "s = s.bfloat16().to(v.dtype)",
    ), expect="equal"),
    "capped_scores": NearMiss("scores", (
        "s = 3.0 * torch.tanh(s / 3.0)", "s = s.tanh() * 2", "s = s.clamp(-1, 1)",
        "s = torch.clamp(s, max=0.5)", "s = s.abs()", "s = F.relu(s)", "s = s.square()",
        "s = s.sigmoid()", "s = F.leaky_relu(s, 0.3)", "s = s.pow(3)", "s = s % 1.0", "s = s.sin()",
        "s = s.exp()", "s = s.clamp_min(0.0)", "s = F.hardtanh(s)", "s = s.nan_to_num(posinf=1.0)",
        "s = F.threshold(s, 0.1, -2.0)", "s = F.layer_norm(s, s.shape[-1:])",
    ), expect="equal"),
    "moved_scores": NearMiss("scores", (
        "s = s.roll(1, -1)", "s = s.flip(-1)", "s = s.roll(2, -2)", "s = s.sort(-1).values",
        "s = s[..., torch.arange(m).flip(0)]", "s = s.cumsum(-1)", "s = s.tril()", "s = s.triu(1)",
        "s = s.roll(shifts=3, dims=-1)", "s = torch.flip(s, dims=(-2,))",
    ), expect="untouched", dims="bhqk fqk bqk"),
    "shifted_scores": NearMiss("scores", (
        "s = s - s.amax(-1, keepdim=True)", "s = s - s.max(dim=-1, keepdim=True).values",
        "s = s + 1.0", "s = s - 3", "s = s + torch.tensor(0.5)", "s = s - s.mean()", "s = s + 0",
        "s = torch.add(s, 2, alpha=3)", "s = 1 + s",
    ), expect="equal", dims="bhqk fqk bqk"),
    "score_identity": NearMiss("scores", (
        "s = s.clone()", "s = s.contiguous()", "s = s * 1", "s = s.view(s.shape)",
        "s = s.view_as(s)", "s = s.to(s.dtype)", "s = nn.Identity()(s)", "s = s.reshape(s.shape)",
        "s = s[:]", "s = s.detach()", "s = s.unsqueeze(0).squeeze(0)", "s = s.mT.mT",
        "s = s.expand_as(s)", "s = s.flatten(0, 1).view(s.shape)", "s = s[..., :m]", "s = s.data",
        "s = +s", "s = s.chunk(1, 0)[0]", "s = s.movedim(0, 0)",
    ), expect="reason", calls=1),
    "scores_of_two_products": NearMiss("scores", (
        "s = s + (q * 0.3) @ (k.flip(1)).mT", "s = s + q @ q.mT", "s = s + s.mT",
        "s = s + q[..., :1]", "s = s * (q @ q.mT)", "s = s + q.sum(-1, keepdim=True)",
        "s = s + (q @ self.table.to(DTYPE))[..., :1]",
    ), expect="equal", dims="bhqk"),
    "top_scores": NearMiss("scores", (
        "s = s.masked_fill(s < s.topk(5, -1).values[..., -1:], -math.inf)",
        "s = s.masked_fill(s < 0, -math.inf) + 0.0 * s", "s = s.masked_fill(s < 0.0, -1e4)",
        "s = torch.where(s > s.mean(-1, keepdim=True), s, -1e4)",
        "s = torch.where(s > s.median(), s, torch.full_like(s, -1e4))",
    ), expect="equal", dims="bhqk fqk bqk"),
    "scores_out": NearMiss("scores", (
        "s = torch.mul(s, 0.5, out=torch.empty_like(s))",
        "t = torch.empty_like(s)\ntorch.mul(s, 0.5, out=t)\ns = t", "torch.mul(s, 3.0, out=s)",
        "t = torch.zeros_like(s)\ntorch.add(s, 1.0, out=t[..., :])\ns = t",
        "t = s.clone()\ntorch.div(s, 4, out=t)\ns = s + 0 * t",
    ), expect="equal"),
    "scores_written_partly": NearMiss("scores", (
        "s[..., 0] = 2.0", "s[..., :3] *= 4", "s[:, 0] = 0.0", "s[..., 0, :].zero_()",
        "s.diagonal(dim1=-2, dim2=-1).fill_(3.0)",
        "s.fill_diagonal_(1.0) if s.dim() == 2 else s[0].neg_()", "s.select(-1, 3).fill_(1.5)",
        "s.narrow(-1, 2, 5).sub_(3.0)", "s[..., ::2].neg_()",
    ), expect="equal"),
    # What the softmax is.
    "wrong_dim": NearMiss("softmax", (
        "w = s.softmax(-2)", "w = F.softmax(s, dim=-2)", "w = torch.softmax(s, s.dim() - 2)",
        "w = nn.Softmax(dim=-2)(s)",
    ), dims="bhqk fqk bqk"),
    "over_heads": NearMiss("softmax", (
        "w = s.softmax(1)", "w = s.softmax(dim=0)", "w = F.softmax(s, 1)",
    ), dims="bhqk"),
    "flattened_softmax": NearMiss("softmax", (
        "w = s.flatten(-2).softmax(-1).view(s.shape)",
        "w = s.reshape(s.shape[0], -1).softmax(1).view_as(s)", "w = s.mT.softmax(-1)",
        "w = s.mT.softmax(-1).mT", "w = s.transpose(-1, -2).softmax(-2)",
    ), expect="equal", dims="bhqk fqk bqk"),
    "no_softmax": NearMiss("softmax", (
        "w = s.sigmoid()", "w = F.relu(s) / m", "w = s / m", "w = torch.sigmoid(s - 2.0)",
        "w = F.elu(s) + 1", "w = s.tanh()", "w = F.softplus(s)", "w = F.normalize(s, dim=-1)",
        "w = F.gumbel_softmax(s * 0, dim=-1) * 0 + s", "w = F.softmin(s, dim=-1)",
        "w = F.logsigmoid(s)",
    ), dims="bhqk fqk bqk"),
    "log_softmax": NearMiss("softmax", (
        "w = F.log_softmax(s, dim=-1)", "w = s.log_softmax(-1)", "w = torch.log_softmax(s, -1)",
    ), dims="bhqk fqk bqk"),
    "other_softmax": NearMiss("softmax", (
        "w = F.log_softmax(s, dim=-1).exp()", "w = s.log_softmax(-1).exp()",
        "w = (s - s.logsumexp(-1, keepdim=True)).exp()",
        "w = s.exp() / s.exp().sum(-1, keepdim=True)",
        "e = (s - s.amax(-1, keepdim=True)).exp()\nw = e / e.sum(-1, keepdim=True)",
        "w = torch.exp(F.log_softmax(s, -1))", "w = F.softmin(-s, dim=-1)",
    ), expect="equal", dims="bhqk fqk bqk"),
    "softmax_plus_one": NearMiss("softmax", (
        "e = s.exp()\nw = e / (1.0 + e.sum(-1, keepdim=True))",
        "w = F.pad(s, (0, 1)).softmax(-1)[..., :-1]",
        "w = torch.cat([s, s[..., :1] * 0], -1).softmax(-1)[..., :m]",
        "w = torch.cat([s.new_zeros(*s.shape[:-1], 1), s], -1).softmax(-1)[..., 1:]",
    ), dims="bhqk fqk bqk"),
    "softmax_out": NearMiss("softmax", (
        "t = torch.empty_like(s)\ntorch.softmax(s, -1, out=t)\nw = t",
        "w = torch.softmax(s, -1, out=s)",
        "t = torch.zeros_like(s)\nw = torch.softmax(s, -1, out=t)\nt.mul_(0.5)",
    ), expect="equal", dims="bhqk fqk bqk"),
    "softmax_of_dtype": NearMiss("softmax", (
        "w = s.softmax(-1, dtype=torch.float64).to(v.dtype)",
        "w = F.softmax(s.double(), -1).to(v.dtype)",
        "w = s.softmax(-1, dtype=torch.bfloat16).to(v.dtype)",
    ), expect="equal", dims="bhqk fqk bqk"),
    # What happens to weights.
    "number_added": NearMiss("weights", (
        "w = w + 1e-2", "w += 0.01", "w = torch.add(w, 0.02)", "w = w.add(1e-2)", "w = 0.01 + w",
        "w = w - 1e-2", "w.add_(0.02)", "w = torch.sub(w, 0.01)", "w = w + torch.tensor(0.02)",
        "w = w + torch.full((), 0.01)", "w = torch.add(input=w, other=0.01)",
        "w = w + w.new_full((1,), 0.02)", "w = w + torch.full_like(w, 0.01)",
    )),
    "scaled_weights": NearMiss("weights", (
        "w = w * 1.5", "w = w / 2", "w *= 0.5", "w = 2 * w", "w.mul_(1.3)", "w = w.div(3)",
        "w = -w", "w = w * torch.tensor(2.0)", "w = torch.mul(w, other=0.7)",
    ), expect="equal"),
    "second_softmax": NearMiss("weights", (
        "w = w.softmax(-1)", "w = F.softmax(w, dim=-1)", "w = (w * 9).softmax(-1)",
        "w = torch.softmax(w, -2)",
    )),
    "changed_weights": NearMiss("weights", (
        "w = w.clamp(max=0.05)", "w = F.relu(w - 0.02)", "w = w.masked_fill(w < 0.02, 0.0)",
        "w = w.square()", "w = w.sqrt()", "w = w.tril()", "w = torch.where(w > 0.02, w, 0.0)",
        "w = w.round(decimals=2)", "w = w.flip(-1)", "w = w.roll(1, -1)", "w = w.cumsum(-1)",
        "w = w.log()", "w = 1 - w", "w = w ** 2", "w = w.pow(0.5)", "w = w.triu_()",
        "w = (w > 0.02).to(w.dtype)", "w = w.neg()",
    )),
    "masked_weights": NearMiss("weights", (
        "w = w.masked_fill(~KEYS, 0.0)", "w = w * KEYS", "w = torch.where(KEYS, w, 0.0)",
        "w = w.masked_fill(~KEYS, -1e4)", "w *= KEYS.to(w.dtype)",
        "w = w.masked_fill(KEYS, -math.inf).exp()", "w.masked_fill_(~KEYS, 0)",
    )),
    "normalised_weights": NearMiss("weights", (
        "w = w / w.sum(-1, keepdim=True)", "w = w / (w.sum(-2, keepdim=True) + 1e-3)",
        "w = F.normalize(w, p=1.0, dim=-2)", "w = w / (1e-9 + w.sum(dim=-2, keepdim=True))",
        "w = F.normalize(w, dim=-1)",
    ), expect="equal", dims="bhqk fqk bqk"),
    "nan_to_num": NearMiss("weights", (
        "w = w.nan_to_num()", "w = torch.nan_to_num(w, 0.0)", "w = w.nan_to_num_(0.5)",
        "w = torch.nan_to_num(w, nan=0.3)",
    ), expect="equal"),
    "integer_weights": NearMiss("weights", (
        "w = (w * 99).int().to(v.dtype)", "w = (w * 50).to(torch.int32).to(v.dtype)",
        "w = (w > 0.01).to(v.dtype)", "w = w.bool().to(v.dtype)", "w = (w * 60).long().type_as(v)",
        "w = (w * 70).to(torch.uint8).to(v)",
    )),
    "dropout_on": NearMiss("weights", (
        "w = F.dropout(w, 0.3)", "w = F.dropout(w, p=0.5, training=True)",
        "w = torch.dropout(w, 0.2, True)", "w = F.dropout(input=w, p=0.4)",
        "w = F.dropout(w, 0.1, True, True)", "w = torch.dropout(input=w, p=0.2, train=True)",
        "w = F.alpha_dropout(w, 0.2, True)", "w = nn.Dropout(0.3)(w)",
        "w = torch.feature_dropout(w, 0.5, True)", "w = torch.native_dropout(w, 0.3, True)[0]",
        "torch.dropout_(w, 0.3, True)",
    )),
    "weights_returned": NearMiss("weights", (
        "extra = w", "extra = w.mean(1)", "extra = w.amax(-1)", "extra = w[0]", "extra = w.sum(-2)",
        "extra = w.argmax(-1)", "extra = w.detach()", "extra = w.view(-1)", "extra = [w]",
    )),
    "scores_returned": NearMiss("scores", (
        "extra = s", "extra = s.mean()", "extra = s.amax(-1)", "extra = s.view(-1)[:5]",
        "extra = s.logsumexp(-1)", "extra = s[..., 0]",
    ), expect="equal"),
    # What the second product is.
    "weights_turned": NearMiss("product", (
        "o = w.mT @ v", "o = torch.matmul(w.transpose(-1, -2), v)",
        "o = torch.einsum('...ij,...id->...jd', w, v)", "o = w.flip(-2).mT @ v",
        "o = torch.einsum('...ji,...jd->...id', w, v)",
    ), dims="bhqk fqk bqk"),
    "values_of_heads_mixed": NearMiss("product", (
        "o = torch.einsum('bhij,bgjd->bhid', w, v)", "o = torch.einsum('bhij,bhjd->bid', w, v)",
        "o = torch.einsum('bhij,bhjd->bhd', w, v)", "o = torch.einsum('bhij,bhjd->bhi', w, v)",
        "o = torch.einsum('bhij,bhjc->bhc', w, v)", "o = w.mean(1, keepdim=True) @ v",
        "o = torch.einsum('bhij,bhid->bhjd', w, v)",
        "o = torch.einsum('bhij,bhjd->bihd', w, v).sum(2)", "o = w @ v.flip(1)",
        "o = w.sum(2, keepdim=True) @ v",
    ), expect="equal", dims="bhqk"),
    "product_out": NearMiss("product", (
        "o = torch.empty_like(q)\ntorch.matmul(w, v, out=o)",
        "o = torch.zeros_like(q)\ntorch.matmul(w, v, out=o)",
        "o = torch.matmul(w, v, out=torch.empty_like(q))",
        "o = q.new_full(q.shape, 7.0)\nt = torch.matmul(w, v, out=o)\no = o + t",
        "t = q.new_zeros(2, *q.shape)\ntorch.matmul(w, v, out=t[0])\no = t.sum(0)",
    ), expect="equal", dims="bhqk bqk fqk", calls=1),
    "scores_product_out": NearMiss("scores", (
        "t = torch.empty_like(s)\ntorch.matmul(q, k.mT, out=t)\ns = t",
        "torch.matmul(q, k.mT * 0.5, out=s)", "torch.matmul(q.flip(-2), k.mT, out=s)",
    ), expect="equal", dims="bhqk bqk fqk"),
    "product_with_more": NearMiss("product", (
        "o = torch.baddbmm(v, w, v)", "o = torch.baddbmm(v, w, v, alpha=0.5)",
        "o = torch.baddbmm(v, w, v, beta=0, alpha=2.0)", "o = v.baddbmm(w, v, beta=0.5)",
        "o = torch.baddbmm(v, w, v, beta=0)",
        "o = torch.bmm(w, v, out_dtype=None) if False else w @ v + v",
    ), expect="equal", dims="fqk bqk"),
    "rows_of_values": NearMiss("product", (
        "o = w @ torch.cat([v[..., :8], v[..., 8:] * 2], -1)", "o = w @ v[..., :8]",
        "o = w @ v.flip(-2)", "o = w[..., : m // 2] @ v[..., : m // 2, :]",
        "o = w[..., 1:] @ v[..., 1:, :]", "o = w[..., :5, :] @ v", "o = w @ torch.ones_like(v)",
        "o = w @ q", "o = w @ k", "o = (w @ v) + (w @ k)",
    ), expect="equal", dims="bhqk fqk bqk"),
    # What attends to what.
    "over_dims": NearMiss("whole", (
        "w = (q.transpose(1, 2) @ k.transpose(1, 2).mT * 0.3).softmax(-1)\n"
        "o = (w @ v.transpose(1, 2)).transpose(1, 2)",
        "w = (q.mT @ k * 0.1).softmax(-1)\no = v @ w.mT",
        "w = (k.mT @ q * 0.1).softmax(-2)\no = v @ w",
        f"o = {_ATTEND}(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)",
        f"o = {_ATTEND}(q.mT, k.mT, v.mT).mT",
        f"o = {_ATTEND}(q.transpose(0, 2), k.transpose(0, 2), v.transpose(0, 2)).transpose(0, 2)",
        "w = torch.einsum('bhid,bgid->bihg', q, k).mul(0.3).softmax(-1)\n"
        "o = torch.einsum('bihg,bgid->bhid', w, v)",
    ), expect="equal"),
    "broadcast_keys": NearMiss("whole", (
        "s = torch.einsum('bhid,bhjd->bhij', q, k[..., :1])\n"
        "o = torch.einsum('bhij,bhjd->bhid', s.softmax(-1), v)",
        "s = torch.einsum('bhid,bhjd->bhij', q[..., :1], k)\no = s.softmax(-1) @ v",
        "s = q @ k[..., :8, :].mT\no = s.softmax(-1) @ v[..., :8, :]",
        "s = q @ k[:1].mT\no = s.softmax(-1) @ v", "s = q @ k.mT\no = s.softmax(-1) @ v[:, :1]",
        "s = q[:1] @ k.mT\no = s.softmax(-1) @ v", "s = q[:, :1] @ k.mT\no = s.softmax(-1) @ v",
        "s = q @ k.mT\no = s.softmax(-1) @ v[..., :1]",
        "s = q @ k.mT\no = torch.einsum('bhij,bhjd->bhid', s.softmax(-1), v[:, :, :1])",
        f"o = {_ATTEND}(q, k[:, :1], v)", f"o = {_ATTEND}(q, k, v[..., :8])",
        f"o = {_ATTEND}(q[:, :1], k, v)", f"o = {_ATTEND}(q, k[:1], v)",
        f"o = {_ATTEND}(q, k[:, :, :1], v[:, :, :1])", "s = q @ k.mT\no = s.softmax(-1) @ v[0, 0]",
        "s = q @ k[0, 0].mT\no = s.softmax(-1) @ v",
    ), expect="equal"),
    "broadcast_einsum": NearMiss("whole", tuple(
        f"s = torch.einsum('bhid,bhjd->bhij', {q}, {k})\n"
        f"o = torch.einsum('bhij,bhjd->bhid', s.softmax(-1), {v})"
        for q, k, v in (
            ("q", "k[:1]", "v"), ("q", "k[:, :1]", "v"), ("q", "k", "v[:1]"), ("q[:1]", "k", "v"),
            ("q[:, :1]", "k", "v"), ("q", "k", "v[:, :1]"), ("q", "k[:1]", "v[:1]"),
            ("q", "k[:, :1]", "v[:, :1]"), ("q[:, :, :1]", "k", "v"), ("q", "k[:, :, :1]", "v"),
        )
    ), expect="equal"),
    "mixed_dtypes": NearMiss("whole", (
        "s = q.float() @ k.float().mT * 0.2\no = s.softmax(-1) @ v.float()",
        "s = q.float() @ k.float().mT * 0.2\no = (s.softmax(-1) @ v.float()).to(DTYPE)",
        "o = (q @ k.mT * 0.2).softmax(-1).float() @ v.float()",
        "s = q.double() @ k.double().mT * 0.2\no = (s.softmax(-1) @ v.double()).to(DTYPE)",
        "s = (q.bfloat16() @ k.bfloat16().mT).to(DTYPE) * 0.2\no = s.softmax(-1) @ v",
        f"o = {_ATTEND}(q.float(), k.float(), v.float())",
        f"o = {_ATTEND}(q.bfloat16(), k.bfloat16(), v.bfloat16()).to(DTYPE)",
        f"o = {_ATTEND}(q.double(), k.double(), v.double()).to(DTYPE)",
        "o = (q @ k.mT * 0.2).softmax(-1).bfloat16() @ v.bfloat16()",
    ), expect="equal"),
    "interleaved": NearMiss("whole", (
        "s, t = q @ k.mT * 0.3, q @ (k * 0.5).mT\nw, u = s.softmax(-1), t.softmax(-1)\n"
        "extra = u @ v\no = w @ v",
        "bias = torch.zeros(n, m).masked_fill(~allowed, -1e9).to(DTYPE)\n"
        "s, t = q @ k.mT + bias, q @ k.mT * 0.2 + bias\nw, u = s.softmax(-1), t.softmax(-1)\n"
        "extra = u @ v\no = w @ v",
        "s, t = (q @ k.mT * c for c in (0.3, 0.1))\n"
        "s, t = (x.masked_fill(~allowed, -1e4) for x in (s, t))\n"
        "w, u = s.softmax(-1), t.softmax(-1)\nextra = u @ v\no = w @ v",
    ), expect="reason", dims="bhqk", calls=2),
    "tied": NearMiss("whole", (
        "o = (q @ q.mT * 0.2).softmax(-1) @ q", "o = (k @ k.mT * 0.2).softmax(-1) @ v",
        "o = (q @ k.mT * 0.2).softmax(-1) @ k", f"o = {_ATTEND}(q, q, q)",
        f"o = {_ATTEND}(q, k, k)", f"o = {_ATTEND}(k, k, v)", f"o = {_ATTEND}(q, v, v)",
        "t = q\nq = k\no = (q @ t.mT * 0.2).softmax(-1) @ t",
        f"o = {_ATTEND}(q, q, v) + {_ATTEND}(k, k, v)",
    ), expect="reason", calls=1),
    "attention_of_attention": NearMiss("output_bhnd", (
        f"o = {_ATTEND}(o, k, v)", f"o = {_ATTEND}(q, o, v)", f"o = {_ATTEND}(q, k, o)",
        f"o = {_ATTEND}(o, o, o)", "o = (o @ k.mT * 0.2).softmax(-1) @ v",
        f"o = {_ATTEND}(query=o, key=k, value=v) + o", "o = ((q @ o.mT) * 0.2).softmax(-1) @ o",
        f"o = o.contiguous()\no = {_ATTEND}(o, k, v)",
        f"o = {_ATTEND}(q, k, v, (o.detach().amax((1, 3)) > -99)[:, None, None])",
        f"o = {_ATTEND}(q, k, v, o.mean(-1).mean(1)[:, None, None] * 0)",
        f"a = o\no = {_ATTEND}(a.flip(1), k, v)\no = {_ATTEND}(o, k, a)",
        f"o = o.transpose(1, 2).reshape(b, n, -1).view(b, n, %(h)d, %(d)d).transpose(1, 2)\n"
        f"o = {_ATTEND}(o, k, v)",
    ), expect="reason", family="any", calls=2),
    "two_attentions": NearMiss("output_bhnd", (
        f"o = o + {_ATTEND}(q, k, v)", f"o = o * {_ATTEND}(q.flip(2), k, v)",
        "o = o - ((q @ k.mT) * 0.4).softmax(-1) @ v", f"o = o + {_ATTEND}(q, k, v, scale=0.4)",
        "t = q @ k.mT\no = o + t.softmax(-1) @ v + (t * 2).softmax(-1) @ v",
        f"o = torch.stack([o, {_ATTEND}(q, k, v)]).sum(0)",
    ), expect="reason", family="any", calls=2),
    "shared_mask_written": NearMiss("output_bhnd", tuple(
        f"mask = {made}\no = {first}\n{write}\no = o + {second}"
        for made in ("keep[:, None, None].expand(b, 1, n, m).clone()",
        "keep[:, None, None].repeat(1, 1, n, 1)",
                     "torch.zeros(b, 1, n, m, dtype=DTYPE).masked_fill(~keep[:, None, "
                     "None], -math.inf)")
        for first, second in ((f"{_ATTEND}(q, k, v, mask)", f"{_ATTEND}(q, k, v, mask)"),
                              (f"{_ATTEND}(q, k, v, attn_mask=mask)",
                              f"{_ATTEND}(q, k, v, attn_mask=mask)"))
        for write in ("mask.ravel()[:m // 2] = 0", "mask.view(-1)[5:9].zero_()",
        "mask.data[..., 3:, 2] = 0",
                      "mask.diagonal(dim1=-2, dim2=-1).zero_()", "torch.mul(mask, 0, out=mask)",
                      "mask.T.zero_()",
                      "mask[:, 0].zero_()", "mask.unbind(0)[0].zero_()", "mask.detach().zero_()",
                      "mask.flatten()[: n * m // 3].zero_()",
                      "torch._foreach_zero_([mask])", "mask.as_strided((7,), (1,)).zero_()",
                      "mask.tril_()", "mask.zero_()")
    ), expect="reason", family="any", calls=3),
    # What comes after.
    "output_viewed": NearMiss("output_bhnd", (
        "o = o.contiguous().view(b, -1)", "o = OUT.view(b * %(h)d, n, %(d)d)",
        "o = OUT.view(b, -1)", "o = OUT.view(-1)", "o = OUT.view(b, %(h)d, -1)",
        "o = OUT.view(b, %(h)d, n * %(d)d, 1).squeeze(-1)", "o = OUT.mT.view(b, %(h)d, %(d)d, n)",
        "o = OUT.as_strided((99,), (1,))", "o = OUT.view(-1, %(d)d)[3:]",
        "o = OUT.view(torch.int16) if DTYPE == torch.float16 else OUT", "o = OUT.squeeze()",
        "o = OUT.ravel()", "o = OUT\no = o.view(o.shape[0], -1).t()",
    ), expect="reason", calls=1),
    "output_written": NearMiss("output", (
        "o *= 2", "o[:, 0] = 1.0", "o.zero_()", "extra = o[0]\no.mul_(3)",
        "extra = o.detach()\no += 1", "o.data.neg_()", "extra = o.view(o.shape)\no.add_(1)",
        "o.ravel()[:9].zero_()", "torch.mul(o, 2, out=o)", "extra = o.mT\no[..., :2] = 0.0",
        "q[:] = 0\nv.zero_()", "o.reshape(-1)[:50] = 3.0", "o.transpose_(-1, -2)",
        "o.unsqueeze_(0)\nextra = o[..., 0]", "o = o.squeeze_().unsqueeze_(0)",
    ), expect="reason", family="any", calls=1),
    "strides_read": NearMiss("output", (
        "extra = torch.as_strided(o, o.shape, o.stride())",
        "extra = o.as_strided((5,), (o.stride(0),))", "extra = o * float(o.is_contiguous())",
        "extra = torch.empty_strided(o.size(), o.stride()).zero_()",
        "extra = torch.empty_like(o).zero_()", "extra = o.clone()", "extra = o + 0",
        "extra = o.storage_offset()", "extra = o.expand_as(o)",
    ), expect="reason", family="any", calls=1),
    # PyTorch's attention with arguments that are seldom given.
    "sdpa_arguments": NearMiss("whole", (
        f"o = {_ATTEND}(q, k, v, None, 0.0, True)", f"o = {_ATTEND}(q, k, v, is_causal=True)",
        f"torch.manual_seed(1)\no = {_ATTEND}(q, k, v, dropout_p=0.3)",
        f"torch.manual_seed(1)\no = {_ATTEND}(q, k, v, None, 0.2)",
        f"o = {_ATTEND}(q, k, v, is_causal=bool(n > 1))",
        f"o = {_ATTEND}(q, k, v, self.bias[:n, :m].to(DTYPE))",
        f"o = {_ATTEND}(q, k, v, attn_mask=self.bias[:n, :m].to(DTYPE), scale=0.2)",
        f"o = {_ATTEND}(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, "
        f"is_causal=True, scale=None)",
    ), expect="untouched", calls=1),
    "sdpa_odd_scale": NearMiss("whole", (
        f"o = {_ATTEND}(q, k, v, scale=-0.2)", f"o = {_ATTEND}(q, k, v, scale=0.0)",
        f"o = {_ATTEND}(q, k, v, scale=1)",
        f"o = {_ATTEND}(q, k, v, scale=1 / math.sqrt(q.size(-1)))",
        f"o = {_ATTEND}(q, k, v, scale=3)", f"o = {_ATTEND}(q, k, v, None, 0.0, False, scale=0.5)",
        f"o = {_ATTEND}(q, k, v, scale=n ** -0.25)",
    ), expect="equal", calls=1),
    # Settings around it.
    "jagged": NearMiss("output_bhnd", (
        "t = torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), torch.arange(0, "
        "b * n + 1, n))\nextra = (t * 2).values()",
        "t = torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), torch.tensor([0, 5, "
        "b * n]))\nextra = F.relu(t).values()",
    ), expect="reason", family="any", calls=1),
    "transformed": NearMiss("transformed", (
        "o, extra = torch.func.jvp(lambda q, k, v: (q @ k.mT * 0.3).softmax(-1) @ v, (q, "
        "k, v), (k, q, v))",
        "o = torch.func.vmap(attend)(q, k, v)",
        "o = torch.func.vmap(attend, in_dims=1, out_dims=1)(q, k, v)",
        "o, extra = torch.func.jvp(lambda q: F.softmax(torch.matmul(q, k.transpose(-2, "
        "-1)) / 4, dim=-1) @ v, (q,), (k,))",
    ), expect="equal"),
    "checkpointed": NearMiss("transformed", (
        "o = torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)",
    ), expect="reason", calls=1),
    "autocast": NearMiss("transformed", (
        "with torch.autocast('cpu', torch.bfloat16):\n    o = attend(q, k, v).to(DTYPE)",
        "with torch.autocast('cpu', torch.bfloat16):\n    o = attend(q, k, v)\no = o.float()",
        "with torch.autocast('cpu', enabled=False):\n    o = attend(q, k, v)",
    ), expect="reason", calls=1),
    "gradient_modes": NearMiss("transformed", (
        "with torch.no_grad():\n    o = attend(q, k, v)",
        "with torch.enable_grad():\n    o = attend(q, k, v).detach()",
        "with torch.inference_mode():\n    o = attend(q, k, v)",
        "o = torch.no_grad()(attend)(q, k, v)",
        "torch._C._set_grad_enabled(False)\no = attend(q, k, v)",
    ), expect="reason", calls=1),
}  # fmt: skip
"""Every kind of near miss by name."""
