"""Losses of formats are measured on the stored states, kept by the model's weights, and gone by in `enable`."""

import json
import logging

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import hf_kvopt
from hf_kvopt import KV_FORMATS, KVOptError, UnsupportedModel
from hf_kvopt.__main__ import main
from hf_kvopt.calibration.choose import choose
from hf_kvopt.calibration.measure import with_layers
from hf_kvopt.calibration.record import Calibration, FormatLoss, stored
from tests.evals.conftest import model_path

__all__ = ["model_path"]
NAMES = [name for name, fmt in KV_FORMATS.items() if not fmt.is_native]


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_KVOPT_HOME", str(tmp_path / "home"))


def small_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=128, intermediate_size=128, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=128, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def text(rows=2, tokens=256):
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(1))


def loss(kl, share, error=0.0):
    return FormatLoss(kl=kl, kl_error=error, top1=1.0, bf16_share=share)


def keep(model, layers=None, **losses):
    Calibration(model="x", num_tokens=9, losses=losses, layers=layers or {}).save(model)


def test_every_format_is_measured_and_found_again_by_the_weights():
    model = small_model()
    before = model.config._attn_implementation
    found = hf_kvopt.calibrate(model, text())
    assert set(found.losses) == set(NAMES)
    assert found.num_tokens == 2 * 128
    assert 0 < found.losses["int8"].kl < found.losses["int4"].kl
    assert found.losses["int4"].bf16_share < found.losses["k8v4"].bf16_share < found.losses["int8"].bf16_share < 0.6
    assert model.config._attn_implementation == before
    assert stored(small_model()) == found
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert stored(model) is None


def test_a_loss_is_that_of_reading_stored_states():
    """One more reading, by transformers' own attention over gathered copies."""
    model, ids = small_model(), text()
    found = hf_kvopt.calibrate(model, ids, formats=["int4"]).losses["int4"]
    caches = [hf_kvopt.PagedCache(model.config), hf_kvopt.QuantizedPagedCache(model.config, format="int4")]
    logits = []
    with torch.inference_mode():
        for cache in caches:
            parts = [model(part, **{hf_kvopt.CACHE_KEYWORD: cache}).logits for part in ids.split(64, dim=1)]
            logits.append(torch.cat(parts, dim=1)[:, 128:].log_softmax(-1))
    expected = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).double().mean()
    assert found.kl == pytest.approx(float(expected), rel=1e-3)
    same = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()
    assert found.top1 == pytest.approx(float(same), abs=0.01)


def test_layers_alone_add_up_to_about_the_whole_and_are_kept():
    found = hf_kvopt.calibrate(small_model(), text(), formats=["int8"], layers_of=["int4"])
    assert list(found.layers["int4"]) == [0, 1, 2]
    assert sum(found.layers["int4"].values()) == pytest.approx(found.losses["int4"].kl, rel=0.5)
    assert stored(small_model()) == found


@pytest.mark.parametrize(
    ("bound", "cache"),
    [(0.05, "int8"), (0.5, "k8v4"), (3.0, "int4"), (0.0, "paged")],
    ids=["tight", "usual", "wide", "none fits"],
)
def test_auto_takes_the_smallest_cache_within_the_bound(bound, cache, capsys):
    model = small_model()
    keep(model, int8=loss(1e-4, 0.52), k8v4=loss(2e-3, 0.4, error=1e-3), int4=loss(2e-2, 0.28))
    hf_kvopt.enable(model, cache="auto", max_loss=bound)
    assert hf_kvopt.enabled(model).cache == cache
    assert f'cache="{cache}"' in capsys.readouterr().out
    hf_kvopt.disable(model)


def test_auto_judges_by_the_upper_end_of_the_interval():
    model = small_model()
    keep(model, int8=loss(1e-4, 0.52), k8v4=loss(4e-3, 0.4, error=2e-3))
    assert choose(model, 0.5).cache == "int8"
    assert choose(model, 0.7).cache == "k8v4"


def test_auto_may_leave_the_most_sensitive_layers_native(capsys):
    model = small_model()
    losses = {"int8": loss(1e-4, 0.52), "int4": loss(2e-2, 0.28)}
    keep(model, {"int4": {0: 1e-3, 1: 1.7e-2, 2: 2e-3}}, **losses)
    found = choose(model, 0.5)
    # A third of the layers at 1.0 and the rest at 0.28 is 0.52: no better than int8 and more loss.
    assert found.cache == "int8"
    losses["int8"] = loss(1e-4, 0.55)
    keep(model, {"int4": {0: 1e-3, 1: 1.7e-2, 2: 2e-3}}, **losses)
    hf_kvopt.enable(model, "auto", max_loss=0.5)
    assert hf_kvopt.enabled(model).options == {"skip_layers": ("sliding", 1)}
    assert "skip_layers=('sliding', 1)" in capsys.readouterr().out
    expected, skipped = with_layers(stored(model), "int4", 1)
    assert skipped == (1,)
    assert expected.kl == pytest.approx(2e-2 * 3e-3 / 2e-2)


def test_a_format_that_loses_much_is_warned_of_where_it_was_measured(caplog):
    model = small_model()
    with caplog.at_level(logging.WARNING, logger="hf_kvopt"):
        hf_kvopt.enable(model, cache="int4")
        assert "int4 loses" not in caplog.text
        keep(hf_kvopt.disable(model), int8=loss(1e-4, 0.52), int4=loss(5e-2, 0.28))
        hf_kvopt.enable(model, cache="int8")
        assert not [line for line in caplog.messages if "loses" in line]
        hf_kvopt.enable(model, cache="int4")
    assert "int4 loses 5.1 % of perplexity on this model" in caplog.text
    assert "int8 loses 0.01 %" in caplog.text


def test_a_model_that_is_enabled_or_hooked_is_no_obstacle():
    model = small_model()
    keep(model, int4=loss(5e-2, 0.28))
    hf_kvopt.enable(model, cache="int8")
    assert stored(model) is not None
    handle = model.model.layers[0].register_forward_hook(lambda *_: None)
    assert stored(model) is None  # no one can say what the hook computes
    hf_kvopt.enable(model, cache="int4")
    handle.remove()


def test_a_broken_file_is_as_none():
    model = small_model()
    keep(model, int4=loss(5e-2, 0.28))
    path = Calibration(model="x", num_tokens=9, losses={}).save(model)
    path.write_text("{")
    assert stored(model) is None
    path.write_text(json.dumps({"losses": {}}))
    assert stored(model) is None


def test_the_command_measures_prints_and_keeps(model_path, capsys, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("a line of notes\n" * 200)
    arguments = [str(model_path), "--text", str(notes), "--tokens", "256", "--device", "cpu", "--layers", "int4"]
    assert main(["calibrate", *arguments, "--max-loss", "1000"]) == 0
    said = capsys.readouterr().out
    for name in NAMES:
        assert f"\n{name} " in said
    assert "int4, most sensitive layers first" in said
    assert stored(AutoModelForCausalLM.from_pretrained(model_path)).num_tokens == 256
    assert main(["calibrate", *arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["losses"]["int8"]["bf16_share"] < 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "no/such/file"], "--text must be a readable text file"),
        (["--tokens", "100"], "at least 256 tokens"),
        (["--max-loss", "-1"], "max_loss must be per cent"),
        (["--formats", "int5"], "invalid choice: 'int5'"),
    ],
    ids=["file", "tokens", "bound", "format"],
)
def test_a_bad_argument_is_one_line(model_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as leaving:
        main(["calibrate", str(model_path), "--device", "cpu", *arguments])
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err


def test_bad_calls_say_what_to_do():
    model = small_model()
    with pytest.raises(KVOptError, match=r"pass hf_kvopt\.calibrate\(model, ids\)"):
        hf_kvopt.calibrate(model)
    with pytest.raises(KVOptError, match="pass hf_kvopt"):
        hf_kvopt.enable(model, cache="auto")
    with pytest.raises(ValueError, match="at least 256 tokens: got \\(2, 16\\)"):
        hf_kvopt.calibrate(model, text(tokens=16))
    with pytest.raises(ValueError, match="format must be one of"):
        hf_kvopt.calibrate(model, text(), formats=["int5"])
    with pytest.raises(TypeError, match="max_loss is for cache='auto'"):
        hf_kvopt.enable(model, cache="int8", max_loss=0.5)
    assert hf_kvopt.enabled(model) is None
    encoder = T5ForConditionalGeneration(
        T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0)
    )
    with pytest.raises(UnsupportedModel, match="encoder-decoder"):
        hf_kvopt.calibrate(encoder, text())
