"""Bytes of quantized weights equal those that transformers stores, whichever modules the config leaves unpacked."""

import copy
from typing import Any

import pytest
import torch
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.quantizers.base import HfQuantizer

from hf_kvopt.plan import DEVICES, memory, plan
from hf_kvopt.plan.model_config import load_config
from hf_kvopt.plan.weights import Weights, count_weights, model_class
from tests.plan.published import DEEPSEEK_V3, GPT_OSS_20B, LLAMA_3_1_8B, PUBLISHED, QWEN_2_5_7B, QWEN_3_30B_A3B
from tests.plan.test_planner import CPU

SMALL = {"num_hidden_layers": 2, "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 384}
SMALL_MOE = {"num_experts": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 192}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def weights_of(fields: dict[str, Any], device: Any = None, **changes: Any) -> Weights:
    counted = count_weights(load_config(copy.deepcopy(fields) | changes), torch.bfloat16, device)
    assert counted is not None
    return counted


def test_gpt_oss_20b_takes_what_its_checkpoint_takes() -> None:
    # "total_size" of model.safetensors.index.json on the hub, every tensor of which transformers loads.
    weights = weights_of(GPT_OSS_20B)
    assert weights.num_bytes == 13_761_264_768
    assert weights.notes == ("quantization_config: mxfp4 packs experts at 4 bits and scales, the rest is in bfloat16",)


def test_deepseek_v3_takes_what_its_checkpoint_takes_without_the_layer_that_transformers_drops() -> None:
    published, experts = 688_586_727_753, 256 * 3 * 7168 * 2048
    attention = 7168 * 1536 + 1536 * 24576 + 7168 * 576 + 512 * 32768 + 16384 * 7168
    # The 62nd layer predicts one more token: a layer in fp8, an embedding, a head and a projection in bfloat16.
    dropped = experts + attention + 3 * 7168 * 2048 + 2 * (2 * 129280 * 7168 + 2 * 7168 * 7168)
    assert weights_of(DEEPSEEK_V3).num_bytes == pytest.approx(published - dropped, rel=1e-4)


@pytest.mark.parametrize(
    "skipped",
    [
        None,
        ["lm_head"],
        ["lm_head", "model.layers.1"],
        ["model.layers.*.self_attn", "lm_head"],
        ["lm_head", "down_proj", "model.layers.0.mlp.experts", "model.layers.1.self_attn.o_proj"],
        [],
    ],
    ids=str,
)
@pytest.mark.parametrize("fields", [LLAMA_3_1_8B, DEEPSEEK_V3, QWEN_3_30B_A3B], ids=lambda fields: fields["model_type"])
@pytest.mark.parametrize("block", [[128, 128], [64, 32]], ids=str)
def test_fp8_is_counted_as_transformers_stores_it(
    fields: dict[str, Any], skipped: list[str] | None, block: list[int]
) -> None:
    quantization = FP8 | {"modules_to_not_convert": skipped, "weight_block_size": block}
    config = load_config(copy.deepcopy(fields) | SMALL | SMALL_MOE | {"quantization_config": quantization})
    kind = model_class(config)
    assert kind is not None
    with torch.device("meta"):
        model = kind._from_config(config, dtype=torch.bfloat16)
    skips = HfQuantizer.get_modules_to_not_convert(model, skipped)
    settings = FineGrainedFP8Config(modules_to_not_convert=skips, weight_block_size=block)
    replace_with_fp8_linear(model, skips, settings, pre_quantized=True)
    # Scales are float32 while a checkpoint is loaded, for any dtype of the rest.
    want = sum(p.numel() * (4 if "scale" in name else p.element_size()) for name, p in model.named_parameters())
    counted = count_weights(config, torch.bfloat16)
    assert counted is not None
    assert counted.num_bytes == want


def quantized(method: str, **settings: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **settings}}


LINEAR = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
REST = 7_615_616_512 - LINEAR


@pytest.mark.parametrize(
    ("stored", "linear_bytes"),
    [
        (quantized("awq", bits=4, group_size=128, zero_point=True), LINEAR * (4 + 20 / 128) / 8),
        (quantized("awq", bits=4, group_size=64, modules_to_not_convert=[]), LINEAR * (4 + 20 / 64) / 8),
        (quantized("bitsandbytes", load_in_4bit=True), LINEAR * (4 + 32 / 64) / 8),
        (
            quantized("bitsandbytes", load_in_4bit=True, bnb_4bit_use_double_quant=True),
            LINEAR * (4 + (8 + 32 / 256) / 64) / 8,
        ),
        (
            quantized(
                "compressed-tensors",
                config_groups={
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
                    }
                },
                ignore=["lm_head"],
            ),
            LINEAR * (4 + 16 / 32) / 8,
        ),
        (quantized("nvfp4"), LINEAR * (4 + 8 / 16) / 8),
        (quantized("nobody_knows", bits=3), LINEAR * 2),
    ],
    ids=lambda value: value["quantization_config"]["quant_method"] if isinstance(value, dict) else "",
)
def test_each_method_stores_linear_layers_at_its_bits_and_scales(stored: dict[str, Any], linear_bytes: float) -> None:
    counted = weights_of(QWEN_2_5_7B, **stored)
    assert counted.num_bytes == pytest.approx(linear_bytes + 2 * REST)
    assert stored["quantization_config"]["quant_method"] in counted.notes[0]


def test_gptq_adds_scales_zeros_and_the_order_of_columns() -> None:
    counted = weights_of(QWEN_2_5_7B, **quantized("gptq", bits=4, group_size=128, desc_act=True))
    columns = 28 * (3 * 3584 + 3584 + 2 * 3584 + 18944)
    assert counted.num_bytes == pytest.approx(LINEAR * (4 + 20 / 128) / 8 + 4 * columns + 2 * REST)


def test_what_is_loaded_layer_by_layer_leaves_stacked_experts_whole() -> None:
    stored, whole = (
        weights_of(QWEN_3_30B_A3B, **change) for change in (quantized("bitsandbytes", load_in_4bit=True), {})
    )
    assert stored.expert == whole.expert
    assert stored.dense.num_bytes < 0.7 * whole.dense.num_bytes


def test_weights_are_unpacked_where_the_device_has_no_kernels_for_them() -> None:
    plain = copy.deepcopy(DEEPSEEK_V3)
    del plain["quantization_config"]
    for device in (CPU, DEVICES["A100-80"]):
        counted = weights_of(DEEPSEEK_V3, device)
        assert counted.num_bytes == weights_of(plain).num_bytes
        assert "transformers unpacks the weights to bfloat16" in counted.notes[0]
    assert weights_of(DEEPSEEK_V3, DEVICES["H200"]).num_bytes == weights_of(DEEPSEEK_V3).num_bytes
    assert memory(GPT_OSS_20B, device="A100-40").weight_bytes == 13_761_264_768


def test_a_token_multiplies_with_as_many_parameters_as_the_model_cards_say() -> None:
    # In billions, without input embeddings.
    active = {name: weights_of(fields).num_active / 1e9 for name, fields in PUBLISHED.items()}
    assert active["Qwen3-30B-A3B"] == pytest.approx(3.3 - 0.31, abs=0.1)
    assert active["DeepSeek-V3"] == pytest.approx(37 - 0.9, abs=0.6)
    assert active["gpt-oss-20b"] == pytest.approx(3.6, abs=0.05)
    # The tower that sees images is read once for each picture, not at every step.
    assert active["Gemma-3-27B"] == pytest.approx(27.0, abs=0.05)


def test_a_step_reads_each_part_in_its_own_bits() -> None:
    weights = weights_of(GPT_OSS_20B)
    dense = 201088 * 2880 + 24 * (2 * 4096 * 2880 + 2 * 512 * 2880 + 8000 + 64 + 32 * 2880 + 32 + 2 * 2880) + 2880
    experts = 24 * 32 * (3 * 2880 * 2880 * 4.25 / 8 + 2 * (5760 + 2880))
    assert weights.bytes_read(1) == pytest.approx(2 * dense + experts * 4 / 32)


def test_models_that_generate_does_not_compile_are_not_planned_to_be() -> None:
    stored = copy.deepcopy(LLAMA_3_1_8B) | quantized("awq", bits=4, group_size=128)
    made = [plan(fields, device="H200", context="2k", workload="batch") for fields in (LLAMA_3_1_8B, stored)]
    assert [one.option.is_compiled for one in made] == [True, False]
    (said,) = (choice.reason for choice in made[1].choices if choice.topic == "compile")
    assert said == "generate() does not compile weights of this quantization"
