"""Interpreted kernels: small shapes, every slot that a row does not own poisoned with NaN."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from triton import language as tl
from triton.runtime import interpreter

from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.quant import dequantize, get_format, quantize


def pytest_configure(config):
    # numpy speaks up where a GPU would not: 1 / 0 and log2(0) of rows that see nothing, inf - inf.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.fixture(scope="session", autouse=True)
def _cheaper_interpreter():
    """Spare the interpreter half of its time; each change is of its bookkeeping, none of what a kernel computes."""
    with pytest.MonkeyPatch.context() as patches:
        # Whether a sum of small test integers overflows is asked in 64 bits at each addition.
        builder = interpreter.interpreter_builder
        patches.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        if hasattr(interpreter, "_LangPatchScope"):
            patches.setattr(interpreter, "_patch_lang", _patched_once_a_launch(interpreter._patch_lang))
        patches.setattr(interpreter, "_get_np_dtype", _by_name(interpreter._get_np_dtype))
        semantic = type(interpreter.interpreter_semantic)
        patches.setattr(semantic, "broadcast_impl_value", _unless_alike(semantic.broadcast_impl_value))
        patches.setattr(tl.core, "_unwrap_shape", _once_a_shape(tl.core._unwrap_shape))
        yield


def _patched_once_a_launch(original):
    """Patch triton.language once a launch, where the interpreter does it at each call of an inner function."""

    def patch(fn):
        names = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(name.program_id) for name in names):
            return original(fn)
        return interpreter._LangPatchScope()

    return patch


def _by_name(original):
    """Look a dtype up, where the interpreter builds a table of all of them each time."""
    known = {}

    def get(dtype):
        scalar = dtype.scalar
        if scalar.name not in known:
            known[scalar.name] = original(scalar)
        return known[scalar.name]

    return get


def _once_a_shape(original):
    """Unwrap each shape once."""
    known = {}

    def unwrap(shape):
        values = tuple(getattr(size, "value", size) for size in shape)
        if values not in known:
            known[values] = original(shape)
        return known[values]

    return unwrap


def _unless_alike(original):
    """Return operands of one shape as they are."""

    def broadcast(self, lhs, rhs):
        if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape == rhs.type.shape:
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch):
    """Fill what launchers allocate with NaN, so that an element that a kernel forgets is seen."""
    original = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


class Paged(NamedTuple):
    """Pools that hold the rows of a batch at permuted blocks, and what is in them, dense."""

    k_pool: Tensor
    v_pool: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    block_table: Tensor
    seq_lens: Tensor
    k: Tensor  # [batch, num_kv_heads, max_len, k_dim] float32 as stored, zero outside of the lengths
    v: Tensor

    @property
    def kv(self) -> PagedKV:
        return PagedKV(self.k_pool, self.v_pool, self.block_table, self.seq_lens, self.k_scale, self.v_scale)


def make_paged(
    seq_lens,
    num_kv_heads=2,
    k_dim=32,
    v_dim=None,
    block_size=16,
    dtype=torch.float32,
    formats=("native", "native"),
    scale_dtype=torch.float16,
    spare_columns=1,
) -> Paged:
    """Fill pools through torch indexing; what no row owns holds NaN, table entries beyond a row hold -1."""
    v_dim = v_dim or k_dim
    counts = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(counts) + 2
    order = torch.randperm(num_blocks).tolist()
    table = torch.full((len(seq_lens), max(counts) + spare_columns), -1, dtype=torch.int32)
    for row, count in enumerate(counts):
        table[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    built = []
    for dim, name in ((k_dim, formats[0]), (v_dim, formats[1])):
        fmt = get_format(name)
        dense = torch.randn(len(seq_lens), num_kv_heads, max(seq_lens) or 1, dim).to(dtype)
        codes, scale = quantize(dense.transpose(1, 2), fmt, scale_dtype)
        stored = dequantize(codes, scale, fmt).transpose(1, 2).clone()
        shape = (num_blocks, block_size, num_kv_heads)
        pool = torch.empty(*shape, codes.shape[-1], dtype=codes.dtype)
        # 0x7f: NaN in both float8 formats, and a large code in the integer ones.
        pool.view(torch.uint8).fill_(0x7F) if pool.element_size() == 1 else pool.fill_(torch.nan)
        scales = None if scale is None else torch.full((*shape, *fmt.scale_shape), torch.nan, dtype=scale_dtype)
        for row, length in enumerate(seq_lens):
            for j in range(length):
                block = int(table[row, j // block_size])
                pool.view(torch.uint8)[block, j % block_size] = codes.contiguous().view(torch.uint8)[row, j]
                if scales is not None:
                    scales[block, j % block_size] = scale[row, j]
            stored[row, :, length:] = 0.0
        built.append((pool, scales, stored))
    (k_pool, k_scale, k), (v_pool, v_scale, v) = built
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    return Paged(k_pool, v_pool, k_scale, v_scale, table, lens, k, v)


def make_query(batch, num_heads, q_len, head_dim, dtype=torch.float32) -> Tensor:
    """Return queries as a model hands them over: a transposed view of [batch, q_len, num_heads, head_dim]."""
    return torch.randn(batch, q_len, num_heads, head_dim).to(dtype).transpose(1, 2)


def same_dtype_torch(q, k, v, seen, scale, softcap=None, sinks=None, mask=None) -> Tensor:
    """Plain attention with every intermediate in q's dtype: how far an honest implementation is off."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.to(q.dtype).repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        mask = mask[..., : k.shape[2]]
        seen = seen & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min)
        scores = scores if mask.dtype == torch.bool else scores + mask
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)), dim=-1)
    p = torch.softmax(scores, dim=-1).nan_to_num(0.0)[..., : k.shape[2]].to(q.dtype)
    return (p @ v).transpose(1, 2)


def assert_close(out: Tensor, reference: Tensor, honest: Tensor | None = None) -> None:
    """|out - ref| <= 2 |same dtype torch - ref| + 1e-5, both as maxima over the tensor."""
    allowed = 1e-5 if honest is None else 2 * (honest.float() - reference.float()).abs().max().item() + 1e-5
    assert out.shape == reference.shape
    assert not out.isnan().any(), f"{int(out.isnan().sum())} NaN of {out.numel()}"
    error = (out.float() - reference.float()).abs().max().item()
    assert error <= allowed, f"error {error:.3e} beyond {allowed:.3e}"


def assert_lse(lse: Tensor, reference: Tensor, tolerance: float = 1e-4) -> None:
    """-inf must agree exactly, the rest closely."""
    assert torch.equal(lse == -torch.inf, reference == -torch.inf)
    assert not lse.isnan().any()
    finite = reference != -torch.inf
    assert torch.allclose(lse[finite], reference[finite], atol=tolerance, rtol=1e-4)
