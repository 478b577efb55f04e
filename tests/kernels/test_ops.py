"""The registered ops on a CPU without the interpreter: torch path, torch.compile, schemas, import without Triton."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_kvopt.errors import KVOptError, UnsupportedDevice
from hf_kvopt.kernels.devices import check_format_runs
from hf_kvopt.kernels.paged_kv import PagedKV
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import attention_reference, visible_pairs
from hf_kvopt.kernels.store import store_kv
from hf_kvopt.kernels.triton import ops as dispatch
from hf_kvopt.kernels.triton.launch import Target, family_of
from hf_kvopt.quant import FORMATS, get_format

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is about the torch path")


def make_pools(name, dtype=torch.float32, num_blocks=6, num_kv_heads=2, dim=32):
    fmt = get_format(name)
    shape = (num_blocks, 16, num_kv_heads)
    pool = torch.zeros(*shape, fmt.packed_dim(dim), dtype=fmt.code_dtype or dtype)
    scale = torch.zeros(*shape, *fmt.scale_shape, dtype=torch.float16) if fmt.has_scale else None
    return pool, pool.clone(), scale, None if scale is None else scale.clone()


def step(q, k, v, k_pool, v_pool, k_scale, v_scale, block_table, seq_lens, slots):
    """What a layer does at each step."""
    store_kv(k, v, k_pool, v_pool, slots, k_scale, v_scale)
    kv = PagedKV(k_pool, v_pool, block_table, seq_lens, k_scale, v_scale)
    decoded = dispatch.paged_decode(q, kv, Pattern(0.2))
    prefilled = dispatch.paged_prefill(q, kv, Pattern(0.2), return_lse=True)
    return decoded.out, prefilled.out, prefilled.lse


def step_arguments(name):
    torch.manual_seed(0)
    k_pool, v_pool, k_scale, v_scale = make_pools(name)
    q, k, v = torch.randn(2, 4, 20, 32), torch.randn(2, 2, 20, 32), torch.randn(2, 2, 20, 32)
    table = torch.tensor([[4, 1], [3, 0]], dtype=torch.int32)
    slots = (table.long()[:, :, None] * 16 + torch.arange(16)).flatten(1)[:, :20].flatten()
    lens = torch.tensor([20, 20], dtype=torch.int32)
    return [q, k, v, k_pool, v_pool, k_scale, v_scale, table, lens, slots]


def test_stored_tokens_are_attended_to():
    arguments = step_arguments("native")
    q, k, v = arguments[:3]
    decoded, prefilled, lse = step(*arguments)
    seen = visible_pairs(20, torch.tensor([20, 20]), 20)
    expected = attention_reference(q, k, v, seen, 0.2)
    assert torch.allclose(decoded, expected.out, atol=1e-6)
    assert torch.equal(decoded, prefilled)
    assert torch.allclose(lse, expected.lse, atol=1e-6)
    dense = dispatch.flash_prefill(q, k, v, Pattern(0.2))
    assert torch.allclose(dense.out, expected.out, atol=1e-6)
    assert dense.lse is None


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_step_compiles_to_one_graph_and_writes_the_pools(name):
    eager, compiled = step_arguments(name), step_arguments(name)
    expected = step(*eager)
    torch._dynamo.reset()
    # aot_eager: the trace, functionalization of the mutations and fake tensors, without a C++ compiler.
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(compiled[3:7], eager[3:7], strict=True):
        assert theirs is None or torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    assert eager[3].view(torch.uint8).any()


def test_schemas_and_fakes_agree_with_the_ops():
    q, k, v, k_pool, v_pool, k_scale, v_scale, table, lens, slots = step_arguments("int8")
    ops = torch.ops.hf_kvopt
    torch.library.opcheck(ops.store_kv.default, (k, v, k_pool, v_pool, slots, k_scale, v_scale))
    kv = PagedKV(k_pool, v_pool, table, lens, k_scale, v_scale)
    for op in (ops.paged_decode.default, ops.paged_prefill.default):
        torch.library.opcheck(op, (q, *kv, 0.2), {"window": 5})
        torch.library.opcheck(op, (q, *kv, *Pattern(0.2, starts=torch.zeros(2, dtype=torch.int32))))
    torch.library.opcheck(ops.flash_prefill.default, (q, k, v, 0.2), {"sinks": torch.randn(4)})
    torch.library.opcheck(ops.merge_state.default, (torch.randn(3, 1, 2, 4, 8), torch.randn(3, 1, 4, 2)))


def test_int4_pools_give_outputs_of_unpacked_width():
    arguments = step_arguments("int4")
    fake = torch.ops.hf_kvopt.paged_decode(
        *(x.to("meta") for x in (arguments[0], arguments[3], arguments[4], *arguments[7:9])), None, None, None, 0.2
    )
    assert fake[0].shape == step(*arguments)[0].shape == (2, 20, 4, 32)


def test_a_gradient_is_refused_rather_than_lost():
    q = torch.randn(1, 2, 3, 32, requires_grad=True)
    with pytest.raises(KVOptError, match="no gradient"):
        dispatch.flash_prefill(q, q, q, Pattern(0.2))
    with torch.no_grad():
        dispatch.flash_prefill(q, q, q, Pattern(0.2))


def test_e4m3_is_refused_below_8_9_and_names_the_way_out():
    ampere = Target("sm80", 108, (8, 0))
    with pytest.raises(UnsupportedDevice, match=r"fp8_e4m3 needs compute capability 8\.9: got 8\.0; use int8"):
        check_format_runs(get_format("fp8_e4m3"), ampere)
    for name in ("native", "int8", "int4", "fp8_e5m2"):
        check_format_runs(get_format(name), ampere)
    for target in (Target("sm80", 128, (8, 9)), Target("sm90", 132, (9, 0)), Target("cdna3", 304, (0, 0))):
        check_format_runs(get_format("fp8_e4m3"), target)


def test_every_card_has_a_family_and_old_ones_are_refused():
    known = {(8, 0): "sm80", (8, 6): "sm80", (8, 9): "sm80", (9, 0): "sm90", (10, 0): "sm100", (12, 0): "sm80"}
    assert {capability: family_of(capability) for capability in known} == known
    with pytest.raises(UnsupportedDevice, match=r"at least 8\.0: got 7\.5"):
        family_of((7, 5))


def test_package_imports_and_runs_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from hf_kvopt.kernels.triton import ops as dispatch\n"
        "from hf_kvopt.kernels.triton.optional import HAS_TRITON\n"
        "from hf_kvopt.kernels.pattern import Pattern\n"
        "assert not HAS_TRITON\n"
        "q = torch.randn(1, 2, 3, 32)\n"
        "assert dispatch.flash_prefill(q, q, q, Pattern(0.2)).out.shape == (1, 3, 2, 32)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
