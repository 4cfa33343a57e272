"""Masks that are padding are proven so, others are refuted, and the operator obeys."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from attention_cases import SEEDS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from svg_ear_compile.kernels import padding
from svg_ear_compile.kernels.plan import AttentionPlan

attention, key_padding = torch.ops.svg_ear.attention, torch.ops.svg_ear.key_padding
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
ALL_BLOCKS = AttentionPlan(density=0.999999, q_clusters=3, k_clusters=5).encode()
QUERIES, KEYS = 37, 41


def parts(seed: int, batch: int, heads: int, device: str) -> tuple[Tensor, Tensor]:
    """Keys (B, H, 1, N_k) and rows (B, H, N_q, 1) that take part, some of each."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(batch, heads, 1, KEYS, generator=generator) < 0.7
    rows = torch.rand(batch, heads, QUERIES, 1, generator=generator) < 0.7
    keys[..., 0], rows[..., 0, :] = True, True
    return keys.to(device), rows.to(device)


@given(seed=SEEDS, batch=st.sampled_from((1, 2)), heads=st.sampled_from((1, 3)))
@DEVICES
def test_padding_of_keys_and_queries_is_taken_apart(
    device: str, seed: int, batch: int, heads: int
) -> None:
    keys, rows = parts(seed, batch, heads, device)
    found_keys, found_rows, proven = key_padding(keys & rows)
    assert proven.device.type == "cpu"
    assert proven
    assert torch.equal(found_keys, keys)
    assert torch.equal(found_rows, rows)


@given(seed=SEEDS)
@DEVICES
def test_one_entry_more_or_less_is_refuted(device: str, seed: int) -> None:
    keys, rows = parts(seed, 2, 1, device)
    keys[..., 1], rows[..., 1, :] = True, True
    mask = keys & rows
    where = torch.randint(QUERIES * KEYS, (), generator=torch.Generator().manual_seed(seed))
    row, key = divmod(int(where), KEYS)
    mask[1, 0, row, key] = not mask[1, 0, row, key]
    assert not key_padding(mask)[2]
    bias = torch.zeros(mask.shape, device=device).masked_fill(~mask, -math.inf)
    assert not key_padding(bias)[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [-math.inf, -1e4, -3e4])
@DEVICES
def test_a_bias_is_padding_if_it_is_nothing_else(
    device: str, dtype: torch.dtype, value: float
) -> None:
    keys, rows = parts(0, 2, 1, device)
    bias = torch.zeros(2, 1, 1, KEYS, device=device, dtype=dtype).masked_fill(~keys, value)
    found, _, proven = key_padding(bias)
    assert proven
    assert torch.equal(found, keys)
    for other in (-5.0, 0.25, math.nan):
        wrong = bias.clone()
        wrong[0, 0, 0, 3] = other
        assert not key_padding(wrong)[2]
    # A row without keys and a row with all of them are one to a softmax.
    square = bias.expand(2, 1, QUERIES, KEYS).clone().masked_fill(~rows, value)
    assert not key_padding(square)[2]


def test_a_long_mask_is_read_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "_ROWS_AT_A_TIME", 8)
    keys, rows = parts(3, 1, 2, "cpu")
    found_keys, found_rows, proven = key_padding(keys & rows)
    assert proven
    assert torch.equal(found_keys, keys)
    assert torch.equal(found_rows, rows)
    mask = keys & rows
    mask[0, 1, -1] = keys[0, 1, 0].logical_not()
    assert not key_padding(mask)[2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "sliced": lambda mask: torch.cat([mask, ~mask[..., :9]], -1)[..., : mask.shape[-1]],
    "offset": lambda mask: torch.cat([~mask[..., :3], mask], -1)[..., 3:],
    "stepped": lambda mask: mask.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda mask: mask.mT.contiguous().mT,
    "heads after rows": lambda mask: mask.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded heads": lambda mask: mask[:, :1].expand_as(mask),
}


@pytest.mark.parametrize("keys", [8, 24, 52, 37])
@pytest.mark.parametrize("layout", LAYOUTS)
@DEVICES
def test_every_layout_is_read_as_a_dense_one(device: str, layout: str, keys: int) -> None:
    for rows in (torch.tensor([1, 0, 1, 1, 0]), torch.tensor([1, 1, 0, 1, 1])):
        taken = torch.arange(keys) % 3 > 0
        mask = (rows.bool()[:, None] & taken).expand(2, 3, 5, keys).clone().to(device)
        for wrong in (False, True):
            mask[0, 0, 3, keys // 2] ^= wrong
            laid = LAYOUTS[layout](mask)
            wanted = key_padding(laid.clone(memory_format=torch.contiguous_format))
            found = key_padding(laid)
            assert torch.equal(found[2], wanted[2])
            assert bool(found[2]) is not wrong
            if not wrong:
                assert torch.equal(found[0], wanted[0])
                assert torch.equal(found[1], wanted[1])
            torch.library.opcheck(key_padding.default, (laid,), test_utils="test_faketensor")


def write_data(mask: Tensor) -> None:
    mask.data[0, 0, 5, 7] ^= True


def write_as_numpy(mask: Tensor) -> None:
    mask.numpy()[0, 0, 5, 7] ^= True


def write_through_storage(mask: Tensor) -> None:
    torch.tensor([], dtype=torch.bool).set_(mask.untyped_storage()).view(mask.shape)[0, 0, 5] = (
        False
    )


@pytest.mark.parametrize("write", [write_data, write_as_numpy, write_through_storage])
def test_no_proof_outlives_a_write_that_nothing_counts(write: Callable[[Tensor], None]) -> None:
    keys, rows = parts(0, 1, 1, "cpu")
    rows[0, 0, 5] = True
    mask = keys & rows
    assert key_padding(mask)[2]
    version = mask._version
    write(mask)
    assert mask._version == version
    found, found_rows, proven = key_padding(mask)
    assert not proven or torch.equal(found & found_rows, mask)
    with torch.inference_mode():
        other = mask.clone()
        key_padding(other)
        other.fill_(True)
        assert key_padding(other)[2]


@DEVICES
def test_opcheck(device: str) -> None:
    keys, rows = parts(0, 2, 1, device)
    torch.library.opcheck(key_padding.default, (keys & rows,))
    torch.library.opcheck(key_padding.default, (torch.zeros(1, 1, 1, 9, device=device),))
    q, k, v = qkv(device)
    proof = key_padding(keys & rows)
    torch.library.opcheck(
        attention.default, (q, k, v, keys & rows, None, *proof), {"plan": ALL_BLOCKS}
    )


def qkv(device: str) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(2, 4, QUERIES, 32, device=device)
    k, v = (torch.randn(2, 2, KEYS, 32, device=device) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("density", [0.999999, 1.0])
@pytest.mark.parametrize("heads", [1, 2])
@DEVICES
def test_attention_under_a_proof_is_pytorchs(device: str, heads: int, density: float) -> None:
    q, k, v = qkv(device)
    keys, rows = parts(1, 2, heads, device)
    mask = keys & rows
    other = mask.clone()
    other[:, :, 3] = ~other[:, :, 3]
    other[:, :, 3, 0] = True
    plan = AttentionPlan(density=density, q_clusters=3, k_clusters=5).encode()
    for square in (mask, other):
        out, lse = attention(
            q, k, v, square, None, *key_padding(square), plan=plan, return_lse=True
        )
        per_head = square.repeat_interleave(4 // heads if heads > 1 else 1, 1)
        wanted = F.scaled_dot_product_attention(q, k, v, per_head, enable_gqa=True)
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
        logits = 32**-0.5 * q @ k.repeat_interleave(2, 1).mT
        logits = logits.masked_fill(~per_head, -math.inf)
        torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("density", [0.999999, 1.0])
@DEVICES
def test_rows_that_the_graph_shows_need_no_proof(device: str, density: float) -> None:
    q, k, v = qkv(device)
    keys, rows = parts(1, 2, 2, device)
    plan = AttentionPlan(density=density, q_clusters=3, k_clusters=5).encode()
    out, lse = attention(q, k, v, keys, None, None, rows, plan=plan, return_lse=True)
    mask = (keys & rows).repeat_interleave(2, 1)
    wanted = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    assert (lse[~rows.repeat_interleave(2, 1)[..., 0]] == -math.inf).all()
    averaged, _ = attention(
        q, k, v, keys, None, None, rows, plan=plan, averages_empty_rows=True
    )  # fmt: skip
    mean = v.repeat_interleave(2, 1).mean(2, keepdim=True)
    wanted = torch.where(rows.repeat_interleave(2, 1), wanted, mean)
    torch.testing.assert_close(averaged, wanted, rtol=1e-4, atol=1e-5)


@DEVICES
def test_a_filled_row_without_keys_is_the_mean_of_all_values(device: str) -> None:
    q, k, v = qkv(device)
    keys, rows = parts(1, 2, 1, device)
    keys[1] = False
    logits = 32**-0.5 * q @ k.repeat_interleave(2, 1).mT
    wanted = logits.masked_fill(~(keys & rows), -1e9).softmax(-1) @ v.repeat_interleave(2, 1)
    for plan in (ALL_BLOCKS, AttentionPlan(density=1.0).encode()):
        square = keys & rows
        out, _ = attention(
            q, k, v, square, None, *key_padding(square), plan=plan, averages_empty_rows=True
        )  # fmt: skip
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    one_row = logits.masked_fill(~keys, -1e9).softmax(-1) @ v.repeat_interleave(2, 1)
    out, _ = attention(q, k, v, keys, plan=ALL_BLOCKS, averages_empty_rows=True)
    torch.testing.assert_close(out, one_row, rtol=1e-4, atol=1e-5)


def test_a_long_mask_that_is_no_padding_says_nothing_of_rows() -> None:
    """The proof ends before the last rows are read."""
    tokens = 4300
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, tokens, 32, generator=generator)
    square = torch.rand(1, 1, tokens, tokens, generator=generator) < 0.5
    square[..., -1, :] = False
    wanted = (32**-0.5 * q @ k.mT).masked_fill(~square, -1e9).softmax(-1) @ v
    out, _ = attention(
        q, k, v, square, None, *key_padding(square), plan=ALL_BLOCKS, averages_empty_rows=True
    )  # fmt: skip
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_a_proof_comes_whole() -> None:
    q, k, v = qkv("cpu")
    keys, rows = parts(1, 2, 1, "cpu")
    with pytest.raises(ValueError, match="padding_rows"):
        attention(q, k, v, keys & rows, None, keys, None, torch.tensor(True))
    with pytest.raises(ValueError, match="attn_mask"):
        attention(q, k, v, None, None, keys, rows, torch.tensor(True))
