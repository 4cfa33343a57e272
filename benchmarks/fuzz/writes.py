"""Writes in place: by what means, into what, and when.

T stands for the tensor, HELD for a view of it that was made before it was first read. Most texts
need a contiguous tensor with memory of its own.
"""

from __future__ import annotations

WRITES: dict[str, tuple[str, ...]] = {
    "method": (
        "T.zero_()", "T.mul_(2.0)", "T.neg_()", "T.sin_()", "T.add_(1.0)", "T.clamp_(max=0.1)",
        "T.fill_(0.25)",
    ),
    "operator": (
        "T *= 2.0", "T += 0.5", "T -= 1.0", "T /= 3.0", "operator.imul(T, 2.0)", "T **= 2",
    ),
    "held_view": (
        "HELD.zero_()", "HELD[:99] = 0.5", "HELD.mul_(-2)", "HELD.data.neg_()", "HELD.sub_(1.0)",
    ),
    "setitem": (
        "T[...] = 0.5", "T[..., :5] = 0.0", "T[0] = T[0] * 2", "T[..., 1::2] *= -1",
        "operator.setitem(T, 0, 0.5)", "T.__setitem__(0, 1.0)",
    ),
    "slice": (
        "T[..., 3:9].mul_(3.0)", "T[0].zero_()", "T.narrow(-1, 0, 4).fill_(1.0)",
        "T.select(0, 0).neg_()", "torch.narrow(T, -1, 0, 4).zero_()",
    ),
    "ravel": ("T.ravel().zero_()", "torch.ravel(T)[:200].zero_()", "T.ravel()[7:99].mul_(-2)"),
    "flat": (
        "T.view(-1).mul_(2)", "T.reshape(-1)[:200].zero_()", "T.flatten().neg_()",
        "torch.flatten(T).fill_(0.1)", "T.view(T.numel()).zero_()",
    ),
    "data": ("T.data.mul_(2.0)", "T.data[:] = 0.1", "T.data.zero_()", "T.data[0].neg_()"),
    "detach": ("T.detach().neg_()", "T.detach()[...] = 0", "torch.detach(T).mul_(3)"),
    "strided": (
        "T.as_strided((50,), (1,)).fill_(2.0)", "torch.as_strided(T, (9, 3), (4, 1)).zero_()",
    ),
    "parts": (
        "T.unbind(0)[0].zero_()", "T.split(3, -1)[1].neg_()", "T.chunk(2, -1)[0].zero_()",
        "T.tensor_split(3, -1)[0].fill_(1.0)", "torch.hsplit(T, [1, 2])[0].zero_()",
        "[*T][0].mul_(2)", "torch.unsafe_chunk(T, 2, -1)[0].zero_()",
    ),
    "diagonal": (
        "T.diagonal(dim1=-2, dim2=-1).fill_(2.0)", "torch.diagonal(T, 0, -2, -1).zero_()",
        "torch.linalg.diagonal(T).zero_()",
    ),
    "unfold": ("T.unfold(-1, 4, 4).zero_()", "T.unfold(-1, 4, 4)[..., 0].neg_()"),
    "turned": (
        "T.mT.mul_(2)", "T.transpose(0, 1)[0].zero_()", "T.swapaxes(0, -1)[1].neg_()",
        "T.movedim(0, -1)[..., 0].fill_(0.5)", "T.mH.zero_()", "T.adjoint()[..., 0].zero_()",
        "torch.moveaxis(T, -1, 0)[:3].zero_()",
    ),
    "same_size": (
        "T.view_as(T).neg_()", "T.expand_as(T).zero_()", "T.squeeze(0).sub_(1.0)",
        "T.unsqueeze(0).mul_(2)", "T.unflatten(0, (1, -1)).zero_()", "torch.atleast_3d(T).zero_()",
        "torch.broadcast_to(T, T.shape).zero_()",
    ),
    "itself": (
        "T.positive().zero_()", "T.to(T.dtype).neg_()", "T.contiguous().zero_()",
        "T.type_as(T).mul_(2)", "torch.asarray(T).zero_()", "torch.as_tensor(T).zero_()",
        "T.cpu().mul_(3)", "T.to('cpu').zero_()", "T.real.zero_()", "T.conj().zero_()",
        "T.resolve_conj().zero_()", "(+T).zero_()", "T.requires_grad_(False).neg_()",
        "nn.Identity()(T).zero_()", "F.dropout(T, 0.5, False).zero_()",
        "T.reshape(T.shape).zero_()", "torch.reshape(T, T.shape).neg_()",
    ),
    "bits": (
        "T.view(torch.int16).zero_()", "T.view(torch.uint8)[..., ::2] = 0",
        "T.view(dtype=torch.int16).fill_(0)",
    ),
    "out": (
        "torch.mul(T, 2.0, out=T)", "torch.neg(T, out=T)", "torch.add(T, 1.0, out=T[...])",
        "torch.clamp(T, max=0.1, out=T)", "torch.zeros(T.shape, out=T)",
        "torch.cumsum(T.clone(), -1, out=T)", "torch.sin(T, out=T)",
    ),
    "out_tuple": (
        "torch.aminmax(T.clone(), dim=-1, out=(T[..., 0], T[..., 1]))",
        "torch.max(T.clone(), -1, out=(T[..., 0], T.argmax(-1)))",
        "torch.sort(T.clone(), dim=-1, out=(T, torch.empty(T.shape, dtype=torch.int64)))",
    ),
    "foreach": (
        "torch._foreach_mul_([T], 2.0)", "torch._foreach_zero_([T])",
        "torch._foreach_add_((T,), 1.0)", "torch._foreach_copy_([T], [T.flip(0) * 2])",
        "torch._foreach_neg_([T])", "torch._foreach_lerp_([T], [T * 0], 0.5)",
    ),
    "activation": (
        "F.relu_(T)", "F.relu(T, inplace=True)", "nn.ReLU(inplace=True)(T)", "torch.relu_(T)",
        "F.hardtanh(T, inplace=True)", "F.silu(T, inplace=True)", "F.threshold(T, 0.1, 3.0, True)",
        "F.elu_(T)", "F.relu(T, True)", "F.leaky_relu(T, 0.5, True)", "F.silu(T, True)",
        "F.hardswish(T, inplace=True)",
    ),
    "initialiser": ("nn.init.zeros_(T)", "nn.init.constant_(T, 0.5)", "nn.init.ones_(T)"),
    "indexed": (
        "T.index_fill_(0, torch.tensor([0]), 1.0)",
        "T.index_copy_(0, torch.tensor([0]), T[:1] * 2)", "T.masked_fill_(T > 0, 0.0)",
        "T.index_put_((torch.tensor([0]),), T.new_tensor(2.0))",
        "T.index_add_(0, torch.tensor([0]), T[:1].clone())", "T[T > 0] = 0",
        "T[torch.tensor([0])] = 0.0",
        "T.scatter_(-1, torch.zeros(T.shape, dtype=torch.int64), 2.0)",
        "torch.index_put_(T, (torch.tensor([0]),), T.new_tensor(0.0))",
    ),
    "copied": (
        "T.copy_(T.flip(-1) * 2)", "T.copy_(torch.zeros_like(T))", "T[..., :4].copy_(T[..., 4:8])",
        "torch.Tensor.copy_(T, T * 3)",
    ),
    "aten": (
        "torch.ops.aten.mul_.Scalar(T, 2.0)", "torch.ops.aten.zero_(T)",
        "torch.ops.aten.copy_.default(T, T.flip(-1) * 2)",
        "torch.ops.aten.mul.out(T, T * 2, out=T)", "torch.ops.aten.fill_.Scalar(T, 0.3)",
        "torch.ops.aten.neg_.default(T)",
    ),
    "triangle": ("T.tril_()", "T.triu_(1)", "torch.tril(T, out=T)"),
    "by_layout": ("extra = flat_twice(T.mT) + flat_twice(T)", "extra = flat_twice(T)"),
    "custom_operator": ("twice(T)", "twice_all([T, T.new_zeros(2)])"),
    "no_schema": (
        "with torch.no_grad():\n    T.mul_(2)", "for t in T.unbind(0):\n    t.neg_()",
        "(lambda t: t.zero_())(T)", "setattr(T, 'data', T.data.mul_(2))",
    ),
    "through_numpy": ("T.float().numpy()[...] = 0.0", "T.float().data.numpy()[0] = 0.5"),
}  # fmt: skip
"""Writes into a tensor of floats by their means."""

BOOL_WRITES: tuple[str, ...] = (
    "T.zero_()", "T[..., :3] = False", "T.logical_not_()", "T.ravel()[:9] = False",
    "T.data[..., 2:] = False", "T.view(torch.uint8).zero_()",
    "torch.logical_not(T, out=T)", "T &= False", "T.fill_(True)", "T.reshape(-1)[:20].zero_()",
    "T.detach().zero_()", "torch._foreach_zero_([T])",
    "T.unbind(0)[0].zero_()", "T.copy_(~T)", "T.bitwise_not_()", "T.flatten()[: m // 2].zero_()",
    "T.select(-1, 0).fill_(True)",
    "T.unsqueeze(0).zero_()", "T.squeeze().zero_()", "T ^= True", "T.to(torch.bool).zero_()",
    "T.mul_(False)", "T.masked_fill_(T, False)",
)  # fmt: skip
"""Writes into a mask."""

TARGETS: dict[str, tuple[str, ...]] = {
    "query": ("before", "scores", "softmax", "after"),
    "key": ("before", "scores", "softmax", "after"),
    "value": ("before", "scores", "softmax", "after"),
    "projection": ("scores", "softmax", "after"),
    "scores": ("scores", "softmax"),
    "weights": ("softmax", "after"),
    "tokens": ("before", "scores"),
    "mask": ("masked", "softmax", "after"),
    "keep": ("masked", "softmax", "after"),
    "same_input": ("masked", "softmax", "after"),
}
"""What is written, and after which stages: before the products, or after that stage."""

VARIABLES = {
    "query": "q", "key": "k", "value": "v", "projection": "base", "scores": "s", "weights": "w",
    "tokens": "x", "mask": "mask", "keep": "keep", "same_input": "same",
}  # fmt: skip
"""The variable that is written; `same` is an input in the memory of `keep`."""
