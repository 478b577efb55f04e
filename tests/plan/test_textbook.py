"""Figures of guides and papers, and the mistake of a source that is wrong."""

import pytest

from hf_kvopt.plan.memory import MemoryReport, memory

KIB, MIB, GIB, GB = 1024, 1024**2, 1024**3, 1000**3
LLAMA_7B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
LLAMA3_70B = LLAMA_7B | {
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}
GPT2_SMALL = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257}
GPT3 = GPT2_SMALL | {"n_layer": 96, "n_head": 96, "n_embd": 12288}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}


def fp16(fields: dict, context: int, **options: object) -> MemoryReport:
    return memory(fields, context=context, dtype="float16", weights=False, **options)


def test_a_7b_model_of_full_heads_stores_16_kib_a_token_and_layer() -> None:
    report = fp16(LLAMA_7B, 100_000)
    assert {layer.bytes_per_token for layer in report.layers} == {16 * KIB}
    assert report.attention == "MHA"
    # 51.2 GB is the guides' figure with 16 KiB taken as 16,000 bytes; with 1,024 it is 52.4 GB.
    assert report.content_bytes * 1000 / 1024 / GB == pytest.approx(51.2, abs=0.01)
    assert report.content_bytes / GB == pytest.approx(52.4, abs=0.05)


def test_512_mb_at_32k_forgets_the_32_heads() -> None:
    """Show that one guide's 2 x 32 layers x 128 x 2 bytes x 32k is a single head's 512 MiB; all 32 take 16 GiB."""
    right = fp16(LLAMA_7B, 32 * KIB).content_bytes
    one_head = fp16(LLAMA_7B | {"num_key_value_heads": 1, "head_dim": 128}, 32 * KIB).content_bytes
    assert one_head == 512 * MIB
    assert right == 32 * one_head == 16 * GIB


def test_llama_3_70b_stores_4096_bytes_a_token_and_layer() -> None:
    report = fp16(LLAMA3_70B, 32_000)
    assert {layer.bytes_per_token for layer in report.layers} == {4096}
    assert report.attention == "GQA"
    assert report.content_bytes / GB == pytest.approx(10.5, abs=0.05)
    assert report.bytes_per_token == 80 * 4096


def test_gpt_2_small_takes_35_2_mib_at_1000_tokens() -> None:
    assert fp16(GPT2_SMALL, 1000).content_bytes / MIB == pytest.approx(35.2, abs=0.05)


def test_gpt_3_takes_4_4_gib_at_1000_tokens() -> None:
    assert fp16(GPT3, 1000).content_bytes / GIB == pytest.approx(4.4, abs=0.05)


def test_latent_attention_stores_a_latent_and_a_rotary_key_whatever_the_heads() -> None:
    """Check DeepSeek-V3, arXiv:2412.19437: 512 + 64 channels a token and layer, 70 KB a token over 61 layers."""
    report = fp16(DEEPSEEK_V3, 1000)
    assert {layer.bytes_per_token for layer in report.layers} == {(512 + 64) * 2}
    assert report.attention == "MLA"
    assert report.bytes_per_token == 61 * 1152 == 70_272


@pytest.mark.parametrize(("format", "ratio"), [("int8", 0.53), ("fp8_e4m3", 0.53), ("k8v4", 0.41), ("int4", 0.30)])
def test_formats_keep_within_their_share_of_16_bits_with_scales_counted(format: str, ratio: float) -> None:
    native, small = fp16(LLAMA3_70B, 32_000), fp16(LLAMA3_70B, 32_000, format=format)
    assert small.bytes_per_token / native.bytes_per_token <= ratio
    # float16, of 8 KV heads in 80 layers: one a vector, and of sealed keys a mean of 128 channels in 64 tokens.
    scales = {"int8": 1 + 1, "fp8_e4m3": 1 + 1, "k8v4": 3 + 1, "int4": 3 + 1}[format]
    assert small.scale_bytes_per_token == 80 * 8 * 2 * scales


def test_weights_are_those_of_the_model_cards() -> None:
    models = GPT2_SMALL, LLAMA_7B, LLAMA3_70B
    counts = [memory(fields, context=8, dtype="float16").num_parameters for fields in models]
    assert counts == [124_439_808, 6_738_415_616, 70_553_706_496]


def test_a_sliding_layer_stops_growing_at_its_window() -> None:
    fields = LLAMA_7B | {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": 4096}
    sizes = [fp16(fields, n).used_bytes for n in (8192, 100_000)]
    # A query sees itself and 4,095 before it; up to a block less one is not freed yet.
    assert sizes == [32 * 4096 * (4096 + 16)] * 2
    assert fp16(fields, 8192).bytes_per_token == 0
