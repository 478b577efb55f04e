"""Cases of `evals.kernels`: launches over meta tensors, swept one axis at a time around a base case for each kernel."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_kvopt.kernels.packed import Packed
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.sealed_kv import BothForms, Full, SealedKV
from hf_kvopt.kernels.triton import cascade, flash_prefill, merge_state, paged_decode, paged_prefill, store_kv
from hf_kvopt.kernels.triton.configs import decode_config, flash_prefill_config, paged_prefill_config, sealed_config
from hf_kvopt.kernels.triton.launch import Config, Launch, Target, cdiv
from hf_kvopt.kernels.triton.seal_blocks import plan_seal_blocks
from hf_kvopt.kernels.triton.sealed_attention import plan_sealed
from hf_kvopt.quant import get_format
from hf_kvopt.quant.sealed_formats import SEALED, BlockCodec

NUM_KV_HEADS = 8
_HEAVIEST = ("everything", "additive")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Case(NamedTuple):
    """One launch to compile; hashable, so that sweeps can be joined without repeats."""

    # store_kv, paged_decode, cascade, paged_prefill, flash_prefill, merge_state, sealed_decode, sealed_prefill,
    # seal_blocks
    op: str
    k_dim: int = 128
    v_dim: int = 128
    dtype: torch.dtype = BF16
    k_format: str = "native"
    v_format: str = "native"
    pattern: str = "causal"
    q_len: int = 1
    group: int = 4
    block_size: int = 64
    config: Config | None = None

    @property
    def label(self) -> str:
        """Line for the table."""
        dims = f"{self.k_dim}" if self.k_dim == self.v_dim else f"{self.k_dim}/{self.v_dim}"
        formats = self.k_format if self.k_format == self.v_format else f"{self.k_format}+{self.v_format}"
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"q{self.q_len} g{self.group} b{self.block_size}"
        return f"{self.op:13} {dims:>7} {dtype:8} {formats:9} {self.pattern:10} {sizes}"


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor without storage."""
    return torch.empty(shape, dtype=dtype, device="meta")


def pattern_of(name: str, batch: int, num_heads: int, q_len: int, kv_len: int) -> Pattern:
    """Return a pattern by name."""
    sinks = meta(num_heads, dtype=BF16)
    extras: dict[str, dict[str, Any]] = {
        "causal": {},
        "packed": {},
        "full": {"is_causal": False},
        "window": {"window": 4096},
        "starts": {"starts": meta(batch, dtype=torch.int32)},
        "sinks": {"sinks": sinks, "window": 128},
        "softcap": {"softcap": 50.0},
        "tree": {"mask": meta(batch, 1, q_len, kv_len, dtype=torch.bool), "is_causal": False},
        "additive": {"mask": meta(batch, num_heads, q_len, kv_len, dtype=BF16), "is_causal": False},
        # All but a mask, which compiles to another program with fewer loops.
        "everything": {"window": 4096, "softcap": 50.0, "sinks": sinks, "starts": meta(batch, dtype=torch.int32)},
    }
    return Pattern(0.1, **extras[name])


def launches_of(case: Case, target: Target) -> list[Launch]:
    """Return the launches of the case."""
    batch, num_heads = 8, NUM_KV_HEADS * case.group
    if case.op == "merge_state":
        parts = meta(16, batch, 1, num_heads, case.v_dim, dtype=FP32)
        lse = meta(16, batch, num_heads, 1, dtype=FP32)
        out = meta(batch, 1, num_heads, case.v_dim, dtype=case.dtype)
        sinks = meta(num_heads, dtype=BF16) if case.pattern == "sinks" else None
        return [merge_state.plan_merge_state(parts, lse, sinks, out, meta(*lse.shape[1:], dtype=FP32))]
    q = meta(batch, case.q_len, num_heads, case.k_dim, dtype=case.dtype).transpose(1, 2)
    out = meta(batch, case.q_len, num_heads, case.v_dim, dtype=case.dtype)
    lse = meta(batch, num_heads, case.q_len, dtype=FP32)
    widest = max(case.k_dim, case.v_dim)
    if case.op == "flash_prefill":
        k, v = (
            meta(batch, case.q_len, NUM_KV_HEADS, d, dtype=case.dtype).transpose(1, 2) for d in (case.k_dim, case.v_dim)
        )
        packed = None
        if case.pattern == "packed":
            q, k, v, out, lse = q[:1], k[:1], v[:1], out[:1], lse[:1]
            packed = Packed(meta(5, dtype=torch.int32), meta(5, dtype=torch.int32))
        pattern = pattern_of(case.pattern, batch, num_heads, case.q_len, case.q_len)
        is_plain = pattern.is_plain and packed is None
        config = case.config or flash_prefill_config(widest, case.dtype, case.q_len, is_plain, pattern.has_mask, target)
        return [flash_prefill.plan_flash_prefill(q, k, v, pattern, packed, out, lse, target, config)]
    if case.op in ("sealed_decode", "sealed_prefill", "seal_blocks"):
        return _sealed_launches(case, q, out, lse, target)
    formats = (get_format(case.k_format), get_format(case.v_format))
    shape = (1000, case.block_size, NUM_KV_HEADS)
    k_pool, v_pool = (
        meta(*shape, fmt.packed_dim(dim), dtype=fmt.code_dtype or case.dtype)
        for fmt, dim in zip(formats, (case.k_dim, case.v_dim), strict=True)
    )
    k_scale, v_scale = (meta(*shape, *fmt.scale_shape, dtype=FP16) if fmt.has_scale else None for fmt in formats)
    if case.op == "store_kv":
        k, v = (meta(batch, 1, NUM_KV_HEADS, d, dtype=case.dtype).transpose(1, 2) for d in (case.k_dim, case.v_dim))
        slots = meta(batch, dtype=torch.int64)
        return [store_kv.plan_store_kv(k, v, k_pool, v_pool, slots, k_scale, v_scale, target)]
    table, lens = meta(batch, 512, dtype=torch.int32), meta(batch, dtype=torch.int32)
    kv = PagedKV(k_pool, v_pool, table, lens, k_scale, v_scale)
    pattern = pattern_of(case.pattern, batch, num_heads, case.q_len, kv.capacity)
    if case.op == "cascade":
        shared = kv._replace(shared=meta(1, dtype=torch.int32))
        return list(cascade.plan_cascade(q, shared, pattern, out, lse, target)[:2])
    num_rows = case.q_len * case.group
    choose = paged_prefill_config if case.op == "paged_prefill" else decode_config
    config = case.config or choose(widest, case.dtype, formats, num_rows, pattern.has_mask, target)
    if case.op == "paged_prefill":
        return [paged_prefill.plan_paged_prefill(q, kv, pattern, out, lse, target, config)]
    row_tiles = cdiv(num_rows, config.block_m)
    num_splits = paged_decode.choose_splits(batch, NUM_KV_HEADS, row_tiles, kv.capacity, config.block_n, target)
    # The merge that follows is a case of its own.
    return paged_decode.plan_paged_decode(q, kv, pattern, out, lse, None, target, config, num_splits)[:1]


def _sealed_launches(case: Case, q: Tensor, out: Tensor, lse: Tensor, target: Target) -> list[Launch]:
    """Return the launch of a case over sealed blocks, whose format has one name for keys and values."""
    batch, num_heads, q_len, _ = q.shape
    few = case.op == "sealed_decode"
    codecs = SEALED[case.k_format]
    dims = (case.k_dim, case.v_dim)
    k, v = (_both_forms(case, c, d, not few) for c, d in zip(codecs.planes, dims, strict=True))
    if case.op == "seal_blocks":
        return [plan_seal_blocks(k, v, Full(*(meta(batch, dtype=torch.int64) for _ in Full._fields)))]
    table, lens = meta(batch, 512, dtype=torch.int32), meta(batch, dtype=torch.int32)
    kv = SealedKV(k, v, table, table, lens)
    pattern = pattern_of(case.pattern, batch, num_heads, q_len, kv.capacity)
    num_rows, has_groups = q_len * case.group, codecs.v.num_groups(case.v_dim) > 1
    config = case.config or sealed_config(
        max(dims), case.dtype, case.block_size, num_rows, pattern.has_mask, few, has_groups, target
    )
    row_tiles = cdiv(num_rows, config.block_m)
    num_splits = paged_decode.choose_splits(batch, NUM_KV_HEADS, row_tiles, kv.capacity, config.block_n, target)
    return plan_sealed(q, kv, pattern, out, lse, target, config, num_splits if few else 1)[:1]


def _both_forms(case: Case, codec: BlockCodec, dim: int, with_new: bool) -> BothForms:
    slots = (case.block_size, NUM_KV_HEADS)
    return BothForms(
        meta(1000, *slots, codec.width(dim), dtype=torch.uint8),
        meta(1000, *slots, codec.num_groups(dim), dtype=FP16),
        meta(1000, NUM_KV_HEADS, dim, dtype=FP16) if codec.centred else None,
        meta(50, *slots, dim, dtype=case.dtype),
        codec,
        meta(8, case.q_len, NUM_KV_HEADS, dim, dtype=case.dtype).transpose(1, 2) if with_new else None,
    )


def sweep(card_has_e4m3: bool, full: bool) -> list[Case]:
    """Return the cases of one card: a quick subset, or every kernel, format, column and pattern at least once."""
    formats = ["native", "int8", "int4"] + ["fp8_e4m3"] * card_has_e4m3
    cases = [Case("paged_decode", k_format=f, v_format=f) for f in formats]
    cases += [Case("cascade", k_format=f, v_format=f, group=16) for f in formats]
    cases += [Case("paged_prefill", k_format=f, v_format=f, q_len=512) for f in ("native", "int4")]
    cases += [Case("paged_prefill", pattern="tree", q_len=60)]
    cases += [Case("flash_prefill", dim, dim, q_len=4096) for dim in (64, 128, 256)]
    cases += [Case("flash_prefill", pattern="everything", q_len=4096)]
    cases += [Case("store_kv", k_format=f, v_format=f) for f in ("native", *formats[1:])]
    cases += [Case("merge_state", pattern="sinks")]
    cases += [Case("sealed_decode", k_format=f, v_format=f) for f in SEALED]
    cases += [Case("sealed_prefill", k_format=f, v_format=f, q_len=512) for f in SEALED]
    cases += [Case("seal_blocks", k_format="int4", v_format="int4")]
    if full:
        cases += _full_sweep(formats)
    return list(dict.fromkeys(cases))


def _full_sweep(formats: list[str]) -> list[Case]:
    """Return every tile that can be chosen with the patterns that need most registers, and each other axis once.

    Paged prefill is called for more than 64 rows only, so its tile is always the full one; of paged decode only native
    and 8-bit storage have a taller tile.
    """
    cases = []
    for op, q_len in (("paged_decode", 1), ("paged_prefill", 512)):
        for dim, fmt in itertools.product((128, 256), formats):
            # A mask compiles to another program, with fewer loops.
            cases += [Case(op, dim, dim, k_format=fmt, v_format=fmt, pattern=p, q_len=q_len) for p in _HEAVIEST]
        pairs = [("fp8_e5m2", "fp8_e5m2"), ("int8", "int4"), ("native", "int4")]
        cases += [Case(op, k_format=k, v_format=v, q_len=q_len) for k, v in pairs]
        cases += [Case(op, k, v, q_len=q_len) for k, v in ((64, 64), (80, 80), (192, 128))]
        cases += [Case(op, dim, dim, k_format="int4", v_format="int4", q_len=q_len) for dim in (32, 80)]
        cases += [Case(op, dtype=FP16, k_format=f, v_format=f, q_len=q_len) for f in ("native", "int8")]
        cases += [Case(op, dtype=FP32, k_format=f, v_format=f, q_len=q_len) for f in ("native", "int4")]
        cases += [Case(op, block_size=16, k_format=f, v_format=f, q_len=q_len) for f in ("native", "int4")]
        cases += [Case(op, pattern="tree", q_len=q_len), Case(op, group=7, q_len=q_len), Case(op, group=1, q_len=q_len)]
    cases += [
        Case("paged_decode", dim, dim, k_format=fmt, v_format=fmt, pattern=pattern, q_len=8)
        for dim, fmt, pattern in itertools.product((128, 256), ("native", "int8"), _HEAVIEST)
    ]
    # Rows that share a tile of their own: of codes it is one of `paged_decode`, whose patterns are above.
    cases += [
        Case("cascade", dim, dim, pattern=pattern, group=16)
        for dim, pattern in itertools.product((128, 256), ("causal", *_HEAVIEST))
    ]
    cases += [Case("cascade"), Case("cascade", 64, 64, group=16), Case("cascade", dtype=FP32, group=16)]
    # The launch that a compiled generate() replays at the 1B shape that evals.gpu times.
    cases.append(Case("paged_decode", 64, 64, pattern="tree"))
    flash = [
        Case("flash_prefill", dim, dim, pattern=pattern, q_len=4096)
        for dim, pattern in itertools.product((64, 128, 256), ("causal", *_HEAVIEST))
    ]
    flash += [
        Case("flash_prefill", dim, dim, pattern="everything", q_len=q_len)
        for dim, q_len in itertools.product((64, 128, 256), (64, 32, 16))
    ]
    flash += [Case("flash_prefill", k, v, q_len=4096) for k, v in ((32, 32), (80, 80), (192, 128))]
    flash += [Case("flash_prefill", pattern=p, q_len=4096) for p in ("full", "packed", "starts", "tree")]
    flash += [Case("flash_prefill", dtype=dtype, pattern="everything", q_len=4096) for dtype in (FP16, FP32)]
    store = [Case("store_kv", 256, 256, k_format=f, v_format=f, dtype=FP16) for f in (*formats, "fp8_e5m2")]
    store += [Case("store_kv", 192, 128, dtype=FP32, k_format="int8", v_format="int4")]
    return cases + flash + store + [Case("merge_state"), Case("merge_state", 256, 256, dtype=FP32)]
