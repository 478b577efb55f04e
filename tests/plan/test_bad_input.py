"""Invalid input gives one error that names the field and shows a valid example."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_kvopt.__main__ import main
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.plan import BadInput, memory, parse_bytes

SMALL = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 128,
}


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("80 gb", 80 * 10**9), ("0.5TiB", 2**39), ("512", 512)],
)
def test_bytes_know_both_kinds_of_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "24Gib/s", "24 parsec", "32k", "0GB"])
def test_a_bad_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="budget must be bytes such as 24GiB or 80GB: got"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": None}, 'no field model_type: expected for example "model_type": "llama"'),
        ({"model_type": "lama"}, "'lama' is unknown to this transformers; near it are llama"),
        ({"num_hidden_layers": None}, 'no field num_hidden_layers: expected for example "num_hidden_layers": 32'),
        ({"num_attention_heads": None}, "no field num_attention_heads"),
        ({"hidden_size": None}, "no field hidden_size"),
        ({"hidden_size": "wide"}, "no valid llama config: .*hidden_size"),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is unknown"),
        ({"num_key_value_heads": -1}, "needs num_key_value_heads of at least 1: got -1"),
        ({"num_key_value_heads": 0}, "needs num_key_value_heads of at least 1: got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads: got 3 and 4"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a number of at least 1: got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a number from 1 to 10,000: got 0"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be a number from 1 to 10,000: got 1000000"),
        ({"head_dim": -8}, "needs head_dim of at least 1: got -8"),
        ({"model_type": "mistral", "sliding_window": -5}, "needs sliding_window of at least 1: got -5"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": -4}, "needs kv_lora_rank of at least 1: got -4"),
        ({"torch_dtype": "float99"}, "torch_dtype must be a dtype of torch: got 'float99'"),
        ({"model_type": "llava", "text_config": SMALL | {"num_hidden_layers": 10**6}}, "num_hidden_layers must be"),
        ({"hidden_size": 63}, r"hidden size \(63\) is not a multiple of the number of attention heads"),
    ],
)
def test_a_config_that_lacks_a_field_is_refused_by_its_name(change: dict[str, Any], said: str) -> None:
    fields = {name: value for name, value in (SMALL | change).items() if value is not None}
    with pytest.raises(BadInput, match=said):
        memory(fields)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"context": "long"}, "context must be a positive number of tokens"),
        ({"batch": 0}, "batch must be a whole number of at least 1"),
        ({"batch": "8"}, "batch must be a whole number"),
        ({"format": "int5"}, "format must be one of native, int8"),
        ({"cache": "paper"}, "cache must be one of paged, dynamic, static"),
        ({"cache": "dynamic", "format": "int8"}, "format belongs to our caches"),
        ({"block_size": 24}, "block_size must be a power of two"),
        ({"dtype": "float8"}, "dtype must be float32, bfloat16 or float16"),
        ({"device": "H900"}, "device must be auto, cpu or one of B200"),
        ({"budget": "1 parsec"}, "budget must be bytes such as 24GiB"),
        ({"compileable": True}, "compileable=True needs max_tokens"),
        (
            {"max_tokens": 100},
            "max_tokens must hold 1 x 4,096 tokens, each row in whole blocks: got 100; raise it to 4096",
        ),
        ({"context": 90, "batch": 3, "max_tokens": 240, "compileable": True}, "whole blocks: got 240; raise it to 2"),
        ({"encoder_context": 4}, "encoder_context is for encoder-decoder models"),
    ],
)
def test_a_bad_setting_is_refused_by_its_name(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        memory(SMALL, **options)


def test_a_head_that_cannot_be_packed_names_the_way_out() -> None:
    with pytest.raises(BadInput, match="head_dim must be a multiple of 2 for codes of 4 bits: got 15; use int8"):
        memory({"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 30}, format="int4", weights=False)


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_a_model_that_does_not_generate_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"no class of transformers generates with a {kind} config"):
        memory({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "model_type": kind})


def test_a_model_without_keys_and_values_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="cache of its own"):
        memory({"model_type": "mamba", "num_hidden_layers": 2, "hidden_size": 64}, weights=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["memory", "/no/such/config.json"], "no config at"),
        (["memory", "{config}", "--context", "32q"], "context must be a positive number of tokens"),
        (["memory", "{config}", "--batch", "many"], "--batch: must be a whole number of at least 1: got 'many'"),
        (["memory", "{config}", "--batch", "²"], "--batch: must be a whole number"),
        (["memory", "{config}", "--block-size", "0"], "--block-size: must be a whole number"),
        (["memory", "{config}", "--plot", "."], "it is a folder"),
        (["memory", "nosuch/model"], "cannot get the config of 'nosuch/model'"),
        (["plan", "{config}", "--batch", "²"], "--batch: must be a whole number"),
        (["memory", "{config}", "--budget", "24 parsec"], "whose unit 'parsec' is unknown"),
        (["memory", "{config}", "--budget", "1KiB"], "is impossible: the weights alone"),
        (["memory", "{config}", "--device", "H900"], "device must be"),
        (["memory", "{config}", "--plot", "/no/such/folder/x.png"], "cannot write the plot"),
        (["memory", "{broken}"], "is no config: expected a JSON object"),
        (["memory", "{config}", "--nonsense"], "unrecognized arguments"),
    ],
)
def test_the_command_line_says_it_in_one_line_with_status_2(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, broken = tmp_path / "config.json", tmp_path / "broken.json"
    config.write_text(json.dumps(SMALL))
    broken.write_text("{")
    with pytest.raises(SystemExit) as leaving:
        main([word.format(config=config, broken=broken) for word in arguments])
    assert leaving.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert said in message


def test_an_unknown_command_lists_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memroy"]) == 2
    assert "unknown command 'memroy': expected one of memory" in capsys.readouterr().err


def test_a_plot_without_matplotlib_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as leaving:
        main(["memory", str(config), "--plot", str(tmp_path / "x.png")])
    assert leaving.value.code == 2
    assert "pip install 'hf-kvopt[evals]'" in capsys.readouterr().err
