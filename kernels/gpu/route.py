"""Stage 3 on a GPU: the block mask, and lists of the exact keys (kv_indices) built on the device.

A row of blocks is a query cluster with all key clusters. The exact keys of a row are copied into
one list without gaps, so that key clusters of uneven sizes fill whole key tiles. Two parts are not
copied, because each is one range of the sorted order: the largest exact block of the row, and the
always exact keys. With a density budget, the exact blocks of a row without the last one taken have
fewer keys than the budget. The blocks without the largest one cannot have more keys than that, so
the budget bounds the length of the list.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rank_key(score):
    """Unsigned integers that sort like the scores, NaN highest."""
    score = tl.where(score != score, float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def take_until(key, weight, budget):
    """`routing.take_until` of one row without a sort.

    The level is the highest key such that entries at or above it have the weight of the budget; it
    is found bit by bit. All entries above the level are taken, and entries at the level from the
    lowest index on.

    Returns:
        taken [K] bool.
    """
    level = tl.full([], 0, tl.uint32)
    for step in range(32):
        candidate = level | (tl.full([], 0x80000000, tl.uint32) >> step)
        reached = tl.sum(tl.where(key >= candidate, weight, 0.0), 0)
        level = tl.where(reached >= budget, candidate, level)
    above = key > level
    tied = key == level
    tied_weight = tl.where(tied, weight, 0.0)
    before = tl.sum(tl.where(above, weight, 0.0), 0) + tl.cumsum(tied_weight, 0) - tied_weight
    return above | (tied & (before < budget))


@triton.jit(
    do_not_specialize=["first_head", "heads", "kv_heads", "q_clusters", "k_clusters", "density"]
)
def route_kernel(
    log_error_ptr,  # (L, Qc, Kc) float32
    routing_table_ptr,  # (L, Qc, Kc) float32, see `score_kernel`
    q_start_ptr,  # (G, Qc + 3) int32
    k_start_ptr,  # (G_kv, Kc + 3) int32
    block_mask_ptr,  # (G, Qc, Kc) bool, out, or in where ROUTING is "reused"
    row_area_ptr,  # (G, Qc) int32, out
    first_head,
    heads,
    kv_heads,
    q_clusters,
    k_clusters,
    density,  # bits of the float64, as an integer: Triton passes floats as float32
    top_p,
    min_block_ratio,
    log_threshold,
    BLOCK_K: tl.constexpr,
    ROUTING: tl.constexpr,
):
    """One row of the block mask and its area."""
    i = tl.program_id(0)
    local = tl.program_id(1).to(tl.int64)
    g = first_head + local
    g_kv = (g // heads) * kv_heads + (g % heads) // (heads // kv_heads)
    j = tl.arange(0, BLOCK_K)  # [BK]
    inside = j < k_clusters
    pair = (local * q_clusters + i) * k_clusters + j
    k_start = k_start_ptr + g_kv * (k_clusters + 3) + j
    start = tl.load(k_start, mask=inside, other=0)
    size = tl.load(k_start + 1, mask=inside, other=0) - start  # [BK]
    q_start = q_start_ptr + g * (q_clusters + 3) + i
    rows = tl.load(q_start + 1) - tl.load(q_start)
    occupied = size > 0
    keys = size.to(tl.float32)
    at_mask = block_mask_ptr + (g * q_clusters + i) * k_clusters + j
    if ROUTING != "reused":
        log_error = tl.load(log_error_ptr + pair, mask=inside, other=float("-inf"))
        # m_i is the same for the whole row and cannot change the order.
        score = log_error - tl.log(tl.maximum(keys, 1.0))
        score = tl.where(occupied, score, float("-inf"))
    if ROUTING == "reused":
        taken = (tl.load(at_mask, mask=inside, other=0) != 0) & occupied
    elif ROUTING == "density":
        # `routing.area_budget`, in float64 as there.
        clustered = tl.load(k_start_ptr + g_kv * (k_clusters + 3) + k_clusters).to(tl.float64)
        budget = tl.ceil(density.to(tl.int64).to(tl.float64, bitcast=True) * clustered)
        taken = take_until(rank_key(score), keys, budget.to(tl.float32))
        taken = taken & occupied
    elif ROUTING == "threshold":
        log_mass = tl.load(routing_table_ptr + pair, mask=inside, other=float("-inf"))
        largest = tl.max(log_mass, 0)
        log_row_mass = largest + tl.log(tl.sum(tl.exp(log_mass - largest), 0))
        log_rho = log_error - 2.0 * log_row_mass - tl.log(tl.maximum(keys, 1.0))
        taken = ((log_rho >= log_threshold) | (log_rho != log_rho)) & occupied
    else:
        logit = tl.load(routing_table_ptr + pair, mask=inside, other=0.0)
        mass_logit = tl.where(occupied, logit + tl.log(tl.maximum(keys, 1.0)), float("-inf"))
        mass_key = rank_key(mass_logit)
        mass = tl.exp(mass_logit - tl.max(mass_logit, 0))
        top = take_until(mass_key, mass, top_p * tl.sum(mass, 0))
        budget = tl.sum(tl.where(top & occupied, keys, 0.0), 0)
        floor_count = tl.ceil(min_block_ratio * tl.sum(occupied.to(tl.float32), 0))
        guaranteed = take_until(mass_key, occupied.to(tl.float32), floor_count)
        guaranteed = guaranteed & occupied
        left = budget - tl.sum(tl.where(guaranteed, keys, 0.0), 0)
        rest_score = tl.where(guaranteed, float("-inf"), score)
        best = take_until(rank_key(rest_score), tl.where(guaranteed, 0.0, keys), left)
        taken = guaranteed | (best & occupied)
    # A row without queries has no exact block and no area.
    taken = taken & (rows > 0)
    if ROUTING != "reused":
        tl.store(at_mask, taken, mask=inside)
    tl.store(row_area_ptr + g * q_clusters + i, tl.sum(tl.where(taken, size, 0), 0))


@triton.jit(do_not_specialize=["first_head", "heads", "kv_heads", "q_clusters", "k_clusters"])
def kv_offset_kernel(
    block_mask_ptr,  # (G, Qc, Kc) bool
    k_start_ptr,  # (G_kv, Kc + 3) int32
    bias_ptr,  # (L, Qc, Kc) float32 log2, out: -inf where the block is exact or empty
    offset_ptr,  # (L, Qc, Kc) int32, out: place in the list of a row of each of its exact blocks
    first_ptr,  # (L, Qc, Kc) int32, out: place of the block's first key in the sorted order
    row_ptr,  # (L, Qc, 3) int32, out: keys in the list; start and keys of the largest block
    first_head,
    heads,
    kv_heads,
    q_clusters,
    k_clusters,
    BLOCK_K: tl.constexpr,
):
    """Exact blocks of one row in the list, one after the other; the logit bias of skipped blocks.

    Past the blocks of the list, the offset is the number of keys in the list.
    """
    i = tl.program_id(0)
    local = tl.program_id(1).to(tl.int64)
    g = first_head + local
    g_kv = (g // heads) * kv_heads + (g % heads) // (heads // kv_heads)
    j = tl.arange(0, BLOCK_K)  # [BK]
    inside = j < k_clusters
    pair = (local * q_clusters + i) * k_clusters + j
    k_start = k_start_ptr + g_kv * (k_clusters + 3) + j
    start = tl.load(k_start, mask=inside, other=0)
    size = tl.load(k_start + 1, mask=inside, other=0) - start  # [BK]
    at_mask = block_mask_ptr + (g * q_clusters + i) * k_clusters + j
    taken = (tl.load(at_mask, mask=inside, other=0) != 0) & (size > 0)
    largest = tl.argmax(tl.where(taken, size, 0), 0)
    in_list = taken & (j != largest)
    list_size = tl.where(in_list, size, 0)
    offset = tl.cumsum(list_size, 0) - list_size
    list_keys = tl.sum(list_size, 0)
    counted = in_list.to(tl.int32)
    row = (local * q_clusters + i) * k_clusters
    slot = row + tl.cumsum(counted, 0) - counted
    tl.store(offset_ptr + slot, offset, mask=in_list)
    tl.store(first_ptr + slot, start, mask=in_list)
    past = inside & (j >= tl.sum(counted, 0))
    tl.store(offset_ptr + row + j, tl.zeros([BLOCK_K], tl.int32) + list_keys, mask=past)
    in_range = taken & (j == largest)
    row_to = row_ptr + (local * q_clusters + i) * 3
    tl.store(row_to, list_keys)
    tl.store(row_to + 1, tl.sum(tl.where(in_range, start, 0), 0))
    tl.store(row_to + 2, tl.sum(tl.where(in_range, size, 0), 0))
    bias = tl.log2(tl.maximum(size.to(tl.float32), 1.0))
    bias = tl.where(taken | (size == 0), float("-inf"), bias)
    tl.store(bias_ptr + pair, bias, mask=inside)


@triton.jit(
    do_not_specialize=[
        "first_head",
        "heads",
        "kv_heads",
        "tokens",
        "q_clusters",
        "k_clusters",
        "pitch",
    ]
)
def kv_indices_kernel(
    offset_ptr,  # (L, Qc, Kc) int32, see `kv_offset_kernel`
    first_ptr,  # (L, Qc, Kc) int32
    row_ptr,  # (L, Qc, 3) int32
    order_ptr,  # (G_kv, N) int32
    kv_indices_ptr,  # (L, Qc, pitch) int32, out: key tokens in the list of each row
    first_head,
    heads,
    kv_heads,
    tokens,
    q_clusters,
    k_clusters,
    pitch,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Copy the tokens of BLOCK_J exact blocks into the list of one row."""
    i = tl.program_id(0)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)  # [BJ]
    local = tl.program_id(2).to(tl.int64)
    g = first_head + local
    g_kv = (g // heads) * kv_heads + (g % heads) // (heads // kv_heads)
    row = local * q_clusters + i
    list_keys = tl.load(row_ptr + row * 3)
    offset_row = offset_ptr + row * k_clusters
    offset = tl.load(offset_row + j, mask=j < k_clusters, other=list_keys)
    following = tl.load(offset_row + j + 1, mask=j + 1 < k_clusters, other=list_keys)
    size = following - offset
    start = tl.load(first_ptr + row * k_clusters + j, mask=size > 0, other=0)
    for first in range(0, tl.max(size, 0), BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)  # [BN]
        copied = n[None, :] < size[:, None]
        token = tl.load(order_ptr + g_kv * tokens + start[:, None] + n[None, :], mask=copied)
        tl.store(kv_indices_ptr + row * pitch + offset[:, None] + n[None, :], token, mask=copied)
