"""The plan follows from its own arithmetic, states small gains as such, and its Python lines run."""

import dataclasses
from typing import Any

import pytest

from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.plan import BadInput, Device, Plan, memory, plan
from hf_kvopt.plan.devices import DEVICES
from hf_kvopt.plan.geometry import LayerKV
from hf_kvopt.plan.layout import Layout
from hf_kvopt.plan.options import Option
from hf_kvopt.plan.steps import MEMORY_SHARE, StepModel
from hf_kvopt.plan.weights import Part, Weights
from tests.plan.test_textbook import LLAMA3_70B

LLAMA3_8B = LLAMA3_70B | {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
}
# A CPU that needs no measurement.
CPU = Device("cpu (test)", 64 * 10**9, 2e10, 1e11, None, "made up")


def planned(model: Any = LLAMA3_8B, **question: Any) -> Plan:
    return plan(model, **{"device": "H200", "context": "32k", **question})


def choice(made: Plan, topic: str) -> Any:
    return next(one for one in made.choices if one.topic == topic)


def test_every_topic_has_a_choice_with_a_reason() -> None:
    topics = [one.topic for one in planned().choices]
    assert topics == [
        *("attention", "cache", "format", "block size"),
        *("prefix sharing", "speculation", "compile", "parallelism"),
    ]
    assert all(one.choice and one.reason and one.gain for one in planned().choices)


def test_short_contexts_stay_native_and_say_how_little_a_format_saves() -> None:
    made = planned(context="2k", workload="batch")
    assert made.option.format == "native"
    said = " ".join(choice(made, "format").rejected)
    assert "fp8_e4m3" in said
    # 2,048 tokens of 128 KiB beside 15 GB of weights: a fiftieth of what is read.
    assert "KV is 2% of the KV and weights that a step reads" in choice(made, "format").reason


def test_long_contexts_in_batches_are_quantized() -> None:
    made = planned(batch=32, context="16k", workload="batch", goal="throughput")
    assert made.option.format == "int8"
    assert made.predicted.kv_bytes < 0.53 * made.predicted.default_kv_bytes


def test_a_format_is_chosen_where_native_does_not_fit() -> None:
    made = planned(device="RTX4090", context="64k", workload="document")
    assert made.num_devices == 1
    assert made.predicted.default_num_devices == 2
    assert made.option.format != "native"
    assert "do not fit beside the weights" in " ".join(choice(made, "format").rejected)
    used = made.predicted.weight_bytes + made.predicted.kv_bytes
    assert used <= 0.9 * DEVICES["RTX4090"].memory_bytes


def test_predicted_memory_is_that_of_the_memory_report() -> None:
    made = planned(batch=4)
    held = {"max_tokens": made.predicted.max_tokens, "compileable": made.option.is_compiled}
    options = {"format": made.option.format, "block_size": made.block_size, **held}
    want = memory(LLAMA3_8B, context="32k", batch=4, **options)
    assert (made.predicted.kv_bytes, made.predicted.weight_bytes) == (want.used_bytes, want.weight_bytes)
    assert made.predicted.most_kv_bytes == want.reserved_bytes


def test_large_models_are_spread_over_as_few_devices_as_hold_them() -> None:
    made = planned(LLAMA3_70B, device="A100-40")
    # 141 GB of weights and some KV: four devices of 36 usable GB would have 3 GB left, int4 KV of 32k takes 2.9.
    need = made.predicted.weight_bytes + made.predicted.kv_bytes
    assert need <= made.num_devices * 36e9
    assert need > made.num_devices / 2 * 36e9
    assert f"DistributedConfig(tp_size={made.num_devices})" in "\n".join(made.code)


def test_cards_without_fp8_are_told_so() -> None:
    said = " ".join(choice(planned(device="A100-80"), "format").rejected)
    assert "fp8_e4m3: needs compute capability 8.9, A100-80 has 8.0" in said


def test_shared_beginnings_turn_prefix_sharing_on() -> None:
    assert planned(device=CPU, workload="document", context="4k").option.shares_prefix
    assert not planned(device=CPU, workload="batch", context="4k").option.shares_prefix


def test_large_batches_do_not_speculate_and_small_ones_that_copy_do() -> None:
    assert planned(device=CPU, workload="code", context="2k", batch=64).option.draft == "none"
    assert planned(device=CPU, workload="code", context="2k").option.draft == "prompt_lookup"
    assert planned(device=CPU, workload="code", context="2k", goal="throughput").option.draft == "none"


def test_models_with_states_share_draft_and_compile_nothing() -> None:
    fields = {
        "model_type": "jamba",
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_experts": 4,
        "use_mamba_kernels": False,
    }
    made = planned(fields, workload="code", context="4k")
    assert made.option == Option("native", False, False, "none")
    assert "forget their states" in choice(made, "prefix sharing").reason
    del fields["num_experts"], fields["use_mamba_kernels"]
    fields |= {"model_type": "falcon_h1"}
    made = planned(fields, device=CPU, workload="chat", context="4k")
    assert made.option.shares_prefix
    assert made.option.draft == "none"


def test_written_in_attention_keeps_its_own() -> None:
    made = planned({"model_type": "bloom", "n_layer": 2, "n_head": 4, "hidden_size": 64}, context="1k")
    assert choice(made, "attention").choice == "the model's own"
    assert "attention=False" in "\n".join(made.code)


def test_a_compiled_step_is_chosen_where_launches_are_the_limit() -> None:
    made = planned(context="2k", workload="batch")
    assert made.option.is_compiled
    assert "compileable=True" in "\n".join(made.code)
    assert not planned(device=CPU, context="2k", workload="batch").option.is_compiled


def test_a_step_is_its_bytes_over_the_bandwidth() -> None:
    card, dense = DEVICES["H200"], Part(8e9, 16e9)
    layers = [LayerKV("full", None, 8, 128, 8, 128, "GQA", 32)] * 32
    steps = StepModel(device=card, weights=Weights(8 * 10**9, 16 * 10**9, dense), layers=layers, layout=Layout())
    per_byte, launches = 1 / (card.bandwidth * MEMORY_SHARE), 32 * 4e-5
    compiled = [steps.decode(1, 32768, 4e9, speedup=n, is_compiled=True).seconds for n in (1.0, 2.0)]
    assert compiled == pytest.approx([20e9 * per_byte + launches, 18e9 * per_byte + launches])
    # Eager, the host is slower than that, and a prompt of a few tokens waits for it too.
    eager = steps.decode(1, 32768, 4e9)
    assert (eager.seconds, eager.limit) == (pytest.approx(32 * 1.2e-3), "the host")
    assert steps.prefill(1, 8, 8).seconds == pytest.approx(32 * 1.2e-3)


def test_experts_are_read_by_how_many_tokens_choose_them() -> None:
    weights = Weights(100, 200, Part(20, 40), Part(80, 160), expert_share=0.25)
    assert weights.num_active == 40
    assert weights.bytes_read(1) == 80
    assert weights.bytes_read(1000) == pytest.approx(200)


def test_what_is_not_divided_is_read_by_every_device() -> None:
    weights = Weights(100, 200, Part(20, 40, split_bytes=30), Part(80, 160, split_bytes=160), expert_share=0.25)
    # Ten bytes are undivided on each of two devices, the rest is halved.
    assert weights.bytes_read(1, num_devices=2) == pytest.approx(10 + 30 / 2 + 160 / 4 / 2)


def test_mixtral_reads_two_experts_of_eight() -> None:
    fields = LLAMA3_8B | {
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
    }
    made = planned(fields, context="2k", workload="batch")
    # 46.7 G parameters, 12.9 G of them active, as the model's card says.
    assert made.predicted.weight_bytes == pytest.approx(2 * 46.7e9, rel=0.01)


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ({"workload": "poetry"}, "workload must be one of chat, agent, document, code, batch"),
        ({"goal": "fun"}, "goal must be one of latency, throughput"),
        ({"device": "H900"}, "device must be auto, cpu or one of B200"),
        ({"budget": "1MiB"}, "budget of 1.0 MiB a device is impossible: weights take"),
        ({"device": CPU, "budget": "1MiB"}, "budget of 1.0 MiB is impossible: weights take"),
        ({"context": 1}, "context must hold a prompt and a new token: got 1"),
        ({"context": "32 miles"}, "context must be a positive number of tokens"),
        ({"batch": 0}, "batch must be a whole number"),
    ],
)
def test_a_bad_question_names_its_field(question: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        planned(**question)


def test_models_without_a_cache_are_refused() -> None:
    with pytest.raises(UnsupportedModel):
        planned({"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 64})


def test_every_device_has_plausible_facts_and_a_source() -> None:
    for device in DEVICES.values():
        assert 10e9 < device.memory_bytes < 300e9
        assert 0.2e12 < device.bandwidth < 10e12
        assert 5e13 < device.flops < 3e15
        assert device.source
    assert {field.name for field in dataclasses.fields(StepModel)} >= {"device", "weights"}
