"""Bad arguments end in a message that names them, before anything is launched."""

import re

import pytest
import torch

from hf_kvopt.errors import KVOptError
from hf_kvopt.kernels.devices import runs_kernel
from hf_kvopt.kernels.packed import Packed
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.triton import ops as dispatch
from hf_kvopt.kernels.triton.checks import check_dense, debug_enabled
from hf_kvopt.kernels.triton.flash_prefill import flash_prefill, flash_prefill_reference
from hf_kvopt.kernels.triton.merge_state import merge_state
from hf_kvopt.kernels.triton.paged_decode import paged_decode
from hf_kvopt.kernels.triton.paged_prefill import paged_prefill
from hf_kvopt.kernels.triton.store_kv import store_kv
from tests.kernels.triton.conftest import make_paged, make_query

OPS = pytest.mark.parametrize("op", [paged_decode, paged_prefill], ids=["decode", "prefill"])


@pytest.fixture
def debug():
    """Turn the checks of values on."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_KVOPT_DEBUG", "1")
        debug_enabled.cache_clear()
        yield
    debug_enabled.cache_clear()


def paged_arguments(formats=("native", "native")):
    paged = make_paged([20, 7], formats=formats)
    return {"q": make_query(2, 4, 1, 32), **paged.kv._asdict(), "scale": 0.2}


def call(op, arguments, **extra):
    """Hand the arguments over as the op takes them."""
    parts = [{n: arguments[n] for n in kind._fields if n in arguments} for kind in (PagedKV, Pattern)]
    return op(arguments["q"], PagedKV(**parts[0]), Pattern(**parts[1]), **extra)


def every_second(tensor):
    """The same shape with a last axis that is not contiguous."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


WRONG_PAGED = {
    "q-3d": ("q", lambda x: x[0], "q must have shape [any, any, any, any]: got [4, 1, 32]"),
    "q-strided": ("q", every_second, "q must have a contiguous last axis"),
    "q-double": ("q", lambda x: x.double(), "q must be float16 or bfloat16 or float32: got float64"),
    "q-half": ("q", lambda x: x.half(), "k_pool must be float16: got float32"),
    "q-heads": ("q", lambda x: x[:, :3], "num_heads must be a multiple of num_kv_heads 2: got 3"),
    "q-dim": ("q", lambda x: x[..., :24], "k_pool must have shape [any, any, any, 24]"),
    "pool-strided": ("k_pool", every_second, "k_pool must be contiguous"),
    "pool-integer": ("v_pool", lambda x: x.to(torch.int32), "pool dtype must be float16, bfloat16, float32 or one of"),
    "pools-differ": ("v_pool", lambda x: x[:-1], "v_pool must have shape"),
    "block-size": (
        "k_pool",
        lambda x: x[:, :12].contiguous(),
        "block_size must be a power of two of at least 16: got 12",
    ),
    "table-long": ("block_table", lambda x: x.long(), "block_table must be int32: got int64"),
    "table-rows": ("block_table", lambda x: x[:1], "block_table must have shape [2, any]: got [1, 3]"),
    "lens-long": ("seq_lens", lambda x: x.long(), "seq_lens must be int32: got int64"),
    "table-strided": ("block_table", every_second, "block_table must have a contiguous last axis"),
    "lens-elsewhere": ("seq_lens", lambda x: x.to("meta"), "seq_lens must be on cpu: got meta; move it there once"),
    "lens-rows": ("seq_lens", lambda x: x[:1], "seq_lens must have shape [2]"),
    "scale-zero": ("scale", lambda x: 0.0, "scale must be finite and not zero"),
    "scale-nan": ("scale", lambda x: float("nan"), "scale must be finite and not zero"),
    "window-zero": ("window", lambda x: 0, "window must be at least 1: got 0"),
    "softcap-negative": ("softcap", lambda x: -1.0, "softcap must be positive and finite"),
    "sinks-heads": ("sinks", lambda x: torch.zeros(3), "sinks must have shape [4]: got [3]"),
    "starts-long": ("starts", lambda x: torch.zeros(2, dtype=torch.int64), "starts must be int32"),
    "mask-2d": ("mask", lambda x: torch.ones(2, 20, dtype=torch.bool), "mask must have shape [2 or 1, 4 or 1, 1 or 1"),
    "mask-int": ("mask", lambda x: torch.ones(2, 1, 1, 20, dtype=torch.int32), "mask must be bool or float16"),
    "scale-for-native": ("k_scale", lambda x: torch.ones(4, 16, 2), "k_scale: native storage takes no scale"),
}


@OPS
@pytest.mark.parametrize("case", WRONG_PAGED)
def test_paged_ops_name_the_argument(op, case):
    name, change, message = WRONG_PAGED[case]
    arguments = paged_arguments()
    arguments[name] = change(arguments.get(name))
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        call(op, arguments)


@OPS
def test_quantized_pools_need_their_scales(op):
    arguments = paged_arguments(("int8", "int8"))
    with pytest.raises(ValueError, match="v_scale: int8 storage needs scale"):
        call(op, {**arguments, "v_scale": None})
    with pytest.raises(ValueError, match="k_scale must have shape"):
        call(op, {**arguments, "k_scale": arguments["k_scale"][:-1]})
    with pytest.raises(TypeError, match="k_scale must be float16 or float32"):
        call(op, {**arguments, "k_scale": arguments["k_scale"].bfloat16()})


@OPS
def test_debug_mode_catches_lengths_over_capacity_and_foreign_tables(op, debug):
    arguments = paged_arguments()
    call(op, arguments)
    arguments["seq_lens"] = torch.tensor([49, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="seq_lens must lie between 0 and the table's capacity 48: got 3 to 49"):
        call(op, arguments)
    arguments = paged_arguments()
    arguments["block_table"][0, 1] = 99
    with pytest.raises(ValueError, match="got 99 at row 0, column 1"):
        call(op, arguments)


def test_scratch_that_is_too_small_is_named():
    arguments = paged_arguments()
    with pytest.raises(ValueError, match="scratch must hold"):
        call(paged_decode, arguments, scratch=torch.empty(3))
    with pytest.raises(TypeError, match="scratch must be float32"):
        call(paged_decode, arguments, scratch=torch.empty(9999, dtype=torch.float16))


def store_arguments():
    pools = torch.zeros(2, 16, 2, 32)
    k = make_query(1, 2, 3, 32)
    return {"k": k, "v": k, "k_pool": pools, "v_pool": pools.clone(), "slot_mapping": torch.arange(3)}


WRONG_STORE = {
    "slots-int32": ("slot_mapping", lambda x: x.int(), "slot_mapping must be int64: got int32"),
    "slots-count": ("slot_mapping", lambda x: x[:2], "slot_mapping must have shape [3]: got [2]"),
    "k-strided": ("k", every_second, "k must have a contiguous last axis"),
    "v-heads": ("v", lambda x: x[:, :1], "v must have shape [1, 2, 3, any]"),
    "pool-heads": ("v_pool", lambda x: x[:, :, :1].contiguous(), "v_pool must have shape [2, 16, 2, 32]"),
    "pool-dtype": ("k_pool", lambda x: x.half(), "k_pool must be float32: got float16"),
}


@pytest.mark.parametrize("case", WRONG_STORE)
def test_store_names_the_argument(case):
    name, change, message = WRONG_STORE[case]
    arguments = store_arguments()
    arguments[name] = change(arguments[name])
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        store_kv(**arguments)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([0, 1, 32], "must lie between -1 and 31: got 0 to 32"),
        ([-2, 1, 2], "got -2 to 2"),
        ([4, 1, 4], "got a slot twice"),
    ],
)
def test_debug_mode_catches_slots_outside_of_the_pool(slots, message, debug):
    with pytest.raises(ValueError, match=message):
        store_kv(**{**store_arguments(), "slot_mapping": torch.tensor(slots)})


def test_dense_attention_names_the_argument(debug):
    q = make_query(1, 2, 3, 32)
    bounds = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(TypeError, match="k must be float32: got float16"):
        flash_prefill(q, q.half(), q.half(), Pattern(1.0))
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8 from 32 to 256: got 24"):
        flash_prefill(q[..., :24], q[..., :24], q, Pattern(1.0))
    two, starts = q.expand(2, -1, -1, -1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="need a batch of 1: got 2"):
        flash_prefill(two, two, two, Pattern(1.0), Packed(bounds, bounds))
    with pytest.raises(ValueError, match="v must have a contiguous last axis: got strides"):
        flash_prefill(q, q, every_second(q), Pattern(1.0))
    with pytest.raises(ValueError, match="k must be on cpu: got meta"):
        flash_prefill(q, q.to("meta"), q, Pattern(1.0))
    with pytest.raises(TypeError, match="cu_seqlens_q must be int32: got int64"):
        flash_prefill(q, q, q, Pattern(1.0), Packed(bounds.long(), bounds))
    far = torch.empty(0, device="meta").as_strided((1, 2, 3, 32), (32, 32, 2**30, 1))
    with pytest.raises(ValueError, match="packed v must span fewer than 2"):
        check_dense(q.to("meta"), q.to("meta"), far, Pattern(1.0), Packed(bounds.to("meta"), bounds.to("meta")))
    with pytest.raises(ValueError, match="take neither starts nor mask"):
        flash_prefill(q, q, q, Pattern(1.0, starts=starts), Packed(bounds, bounds))
    with pytest.raises(ValueError, match="cu_seqlens_k must rise from 0 to at most 3"):
        flash_prefill(q, q, q, Pattern(1.0), Packed(bounds, bounds + 1))


def test_merge_names_the_argument():
    out, lse = torch.zeros(2, 1, 1, 3, 32), torch.zeros(2, 1, 3, 1)
    with pytest.raises(ValueError, match=re.escape("partial_lse must have shape [2, 1, 3, 1]")):
        merge_state(out, lse[:1])
    with pytest.raises(TypeError, match="partial_lse must be float32"):
        merge_state(out, lse.half())
    with pytest.raises(ValueError, match="partial_out must be contiguous"):
        merge_state(every_second(out), lse)


def test_registered_ops_run_the_kernel_here_and_refuse_to_lose_a_gradient():
    q = make_query(1, 2, 3, 32)
    assert runs_kernel(q)
    expected = flash_prefill_reference(q, q, q, Pattern(0.3)).out
    assert torch.allclose(dispatch.flash_prefill(q, q, q, Pattern(0.3)).out, expected, atol=1e-5)
    with pytest.raises(KVOptError, match="no gradient"):
        dispatch.flash_prefill(q.requires_grad_(), q, q, Pattern(0.3))
