"""The perplexity eval reads through the cache in chunks, pairs what it compares, and holds bars."""

import json
import math
import os
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import QuantizedCache

import hf_kvopt
from evals._common.cli import BadArgumentError
from evals._common.corpora import CORPORA
from evals._common.memory import kv_bytes
from evals._common.models import Subject
from evals._common.outliers import add_outliers
from evals._common.prompts import load_texts
from evals._common.reading import Scores, read_segments
from evals._common.shapes import random_model
from evals._common.shards import Shard, join_shards
from evals._common.sides import FORMATS, Side, accepted_sides
from evals.perplexity.__main__ import main
from evals.perplexity.bars import BUNDLED, MEMORY, OUTLIERS, QWEN, REAL, Bar, bars_for, judge
from evals.perplexity.segments import make_segments
from evals.perplexity.summary import summarize
from hf_kvopt import CACHE_KEYWORD
from hf_kvopt.cli.watch import run_while_busy

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--context", "25", "--segments", "4", "--batch", "2", "--chunks", "5"]
LOSSY = "tests.evals.lossy_caches"


def short_run(out: Path, *arguments: str) -> tuple[int, list[dict]]:
    status = main([*SHORT, "--shape", "tiny", "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 256, shape, generator=torch.Generator().manual_seed(0))


def test_a_cache_that_keeps_all_loses_nothing_and_one_that_rounds_loses(tmp_path: Path) -> None:
    status, rows = short_run(tmp_path / "rows.json", "--sides", "paged+hf_kvopt", f"{LOSSY}:rounded+sdpa")
    assert status == 0
    baseline, paged, rounded = rows
    assert baseline["delta"] == 0.0
    assert abs(paged["delta"]) < 1e-6
    assert paged["kl_mean"] < 1e-6 < 1e-4 < rounded["kl_mean"] <= rounded["kl_p99"]
    assert paged["top1_agreement"] == 1.0
    for row in rows:
        assert row["num_tokens"] == 4 * 24
        assert row["delta_low"] <= row["delta"] <= row["delta_high"]
        assert row["perplexity"] == pytest.approx(baseline["perplexity"] * (1 + row["delta"]), rel=1e-6)
        for field in ("revision", "date", "device", "torch", "transformers", "chunk", "context", "baseline", "dtype"):
            assert row[field] not in (None, "")


def test_perplexity_is_that_of_one_forward_whatever_the_chunk() -> None:
    model = random_model("tiny")
    ids = random_ids(2, 18)
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    for chunk in (1, 7, 17, 512):
        reading = read_segments(model, [Side("dynamic", "sdpa")], ids, chunk)[0]
        torch.testing.assert_close(reading.scores.nll, expected, rtol=1e-4, atol=1e-4)


def test_behind_a_prefill_only_what_follows_is_scored(tmp_path: Path) -> None:
    model, ids = random_model("tiny"), random_ids(2, 18)
    whole, behind = (read_segments(model, [Side("dynamic", "sdpa")], ids, 4, prefill)[0] for prefill in (0, 9))
    torch.testing.assert_close(behind.scores.nll, whole.scores.nll[:, 9:], rtol=1e-4, atol=1e-4)
    assert behind.held == whole.held
    status, rows = short_run(
        tmp_path / "rows.json", "--prefill", "10", "--sides", "int4+hf_kvopt", "int4_exact+hf_kvopt"
    )
    assert status == 0
    assert [(row["prefill"], row["num_tokens"]) for row in rows] == [(10, 4 * 14)] * 3
    plain, stored, exact = rows
    assert stored["kl_mean"] != exact["kl_mean"] > 0
    # The prefill is held, though it is not scored.
    config = model.config
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads
    assert plain["kv_bytes_per_token"] == heads * config.head_dim * 4
    with pytest.raises(SystemExit):
        short_run(tmp_path / "none.json", "--prefill", "24")


def test_chunks_show_a_loss_that_one_forward_hides(tmp_path: Path) -> None:
    arguments = ["--sides", f"{LOSSY}:first_read_exact+sdpa", "--chunks", "1", "5", "512"]
    _, rows = short_run(tmp_path / "rows.json", *arguments)
    loss = {row["chunk"]: row["kl_mean"] for row in rows if "exact" in row["side"]}
    assert loss[512] == 0.0
    assert min(loss[1], loss[5]) > 1e-4


def test_kl_and_top1_compare_with_the_baseline_token_by_token() -> None:
    model = random_model("tiny")
    ids = random_ids(1, 9)
    sides = [Side("dynamic", "sdpa"), Side(f"{LOSSY}:rounded", "sdpa")]
    a, b = (reading.scores for reading in read_segments(model, sides, ids, 3))
    assert a.kl.abs().max() == 0.0
    assert a.same_top1.all()
    logits = []
    for side in sides:
        cache = side.make_cache(model, 9)
        with torch.inference_mode():
            out = [model(ids[:, i : i + 3], **{CACHE_KEYWORD: cache}).logits for i in (0, 3, 6)]
        logits.append(torch.cat(out, dim=1)[:, :-1].log_softmax(dim=-1))
    expected = F.kl_div(logits[1], logits[0], log_target=True, reduction="none").sum(dim=-1)
    torch.testing.assert_close(b.kl, expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(b.same_top1, logits[0].argmax(-1) == logits[1].argmax(-1))
    assert torch.equal(b.is_right, logits[1].argmax(-1) == ids[:, 1:])


def scores(nll: torch.Tensor) -> Scores:
    return Scores(nll, torch.zeros_like(nll), torch.ones_like(nll, dtype=torch.bool), nll < 1)


def test_the_interval_is_paired() -> None:
    nll = 3 + torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    summary = summarize(scores(nll), scores(nll + 0.01))
    # Segments differ by far more than the sides do; the same loss on each leaves no doubt.
    assert summary.delta == pytest.approx(math.expm1(0.01), rel=1e-4)
    assert summary.delta_high - summary.delta_low < 1e-6


def test_the_interval_covers_what_segments_disagree_about() -> None:
    nll = torch.zeros(50, 4)
    lost = torch.randn(50, 1, generator=torch.Generator().manual_seed(2)) * 0.1
    summary = summarize(scores(nll), scores(nll + lost))
    expected = 1.96 * float(lost.std()) / math.sqrt(50)
    assert (summary.delta_high - summary.delta_low) / 2 == pytest.approx(expected, rel=0.15)


def test_p99_is_a_token_that_one_in_a_hundred_exceeds() -> None:
    kl = torch.arange(1000.0).view(10, 100)
    flat = scores(torch.zeros(10, 100))
    summary = summarize(flat, flat._replace(kl=kl))
    assert (summary.kl_p99, summary.kl_p999) == (989.0, 998.0)
    assert summary.kl_low < summary.kl_mean == 499.5 < summary.kl_high


def test_segments_begin_with_the_start_token_and_join_short_texts_only() -> None:
    tokenizer = Words()
    subject = Subject("words", random_model("tiny"), tokenizer)  # type: ignore[arg-type]
    texts = ["5 6 7 8 9", "10 11", "12 13", "14 15 16 17", "18 19 20"]
    segments = make_segments(subject, texts, 4, None)
    assert segments.tolist() == [[1, 5, 6, 7], [1, 10, 11, 12], [1, 14, 15, 16], [1, 18, 19, 20]]
    assert make_segments(subject, texts, 4, 2).tolist() == [[1, 5, 6, 7], [1, 14, 15, 16]]


class Words:
    """A tokenizer of numbers."""

    bos_token_id = 1

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def test_outliers_move_all_keys_alike_and_spare_the_model() -> None:
    model, twin = random_model("tiny"), random_model("tiny")
    add_outliers(model)
    head_dim = model.config.head_dim
    ids = random_ids(2, 12)
    with torch.inference_mode():
        caches = [m(ids)[CACHE_KEYWORD] for m in (model, twin)]
        shift = (caches[0].layers[0].keys - caches[1].layers[0].keys)[0, 0]
    moved = shift.abs().amax(dim=0) > 1
    half = head_dim // 2
    assert moved.nonzero().flatten().tolist() == [half - 2, half - 1, head_dim - 2, head_dim - 1]
    assert 40 <= shift[0][moved].abs().min() <= shift[0][moved].abs().max() <= 60 * math.sqrt(2)
    biases = [layer.self_attn.k_proj.bias for layer in model.model.layers]
    assert not torch.equal(biases[0], biases[1])
    assert torch.equal(biases[0], add_outliers(random_model("tiny")).model.layers[0].self_attn.k_proj.bias)


def test_bytes_of_transformers_quantized_cache_count_codes_and_scales() -> None:
    model = random_model("tiny")
    cache = QuantizedCache("fp8", model.config)
    with torch.inference_mode():
        model(random_ids(1, 6), **{CACHE_KEYWORD: cache})
        model(random_ids(1, 1), **{CACHE_KEYWORD: cache})
    codes = 2 * 2 * 2 * 7 * model.config.head_dim  # layers, keys and values, heads, tokens
    scales = 2 * 2 * 4
    assert kv_bytes(cache).used == codes + scales


@pytest.mark.parametrize("cache", [*FORMATS, "transformers_fp8"])
def test_every_quantized_side_is_read_and_holds_less_than_bfloat16(tmp_path: Path, cache: str) -> None:
    attention = "sdpa" if cache.startswith("transformers") else "hf_kvopt"
    seals = cache in hf_kvopt.KV_FORMATS and hf_kvopt.KV_FORMATS[cache].sealed is not None
    context = "321" if seals else "33"  # the first block and the newest ones are exact
    _, rows = short_run(tmp_path / "rows.json", "--context", context, "--sides", f"{cache}+{attention}")
    assert rows[1]["kl_mean"] > 0
    share = "bf16_share_32k" if seals else "bf16_share"
    assert rows[1][share] < 1 < rows[0]["bf16_share"]
    assert rows[1]["kv_reserved_bytes_per_token"] >= rows[1]["kv_bytes_per_token"] > 0


def test_a_model_placed_by_accelerate_gives_the_same_figures(tmp_path: Path, model_path: Path) -> None:
    arguments = [*SHORT, "--model", str(model_path), "--sides", "int4+hf_kvopt"]
    assert main([*arguments, "--out", str(tmp_path / "here.json"), "--device", "cpu"]) == 0
    assert main([*arguments, "--out", str(tmp_path / "auto.json"), "--device-map", "auto"]) == 0
    here, auto = (json.loads((tmp_path / name).read_text()) for name in ("here.json", "auto.json"))
    for a, b in zip(here, auto, strict=True):
        assert a["kl_mean"] == pytest.approx(b["kl_mean"], rel=1e-3, abs=1e-7)


def test_several_processes_and_a_device_map_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = Namespace(num_processes=2, process_index=1, device=torch.device("cpu"), destroy_process_group=object())
    at_exit: list[object] = []
    monkeypatch.setattr("evals._common.shards.PartialState", lambda cpu: state)
    monkeypatch.setattr("evals._common.shards.atexit.register", at_exit.append)
    assert join_shards(Namespace(device=None, device_map=None)) == Shard(1, 2)
    assert at_exit == [state.destroy_process_group]
    with pytest.raises(BadArgumentError, match="got 2 processes"):
        join_shards(Namespace(device=None, device_map="auto"))


def test_wikitext_is_found_by_its_paper_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*args: object, **kwargs: object) -> Dataset:
        asked.append((args, kwargs))
        return Dataset.from_dict({"text": ["a", "b"]})

    monkeypatch.setattr("evals._common.prompts.load_dataset", load)
    texts = load_texts(Namespace(text=None, dataset="wikitext-2", split="test", column="text"))
    assert list(texts) == ["a", "b"]
    assert asked == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


def test_a_backend_that_is_not_installed_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(*args: object, **kwargs: object) -> None:
        raise ImportError("You need to install it")

    monkeypatch.setattr("evals._common.sides.QuantizedCache", absent)
    with pytest.raises(SystemExit):
        short_run(tmp_path / "rows.json", "--sides", "transformers_quanto+sdpa")
    assert "QuantizedCache('quanto') cannot be made: You need to install it" in capsys.readouterr().err


def namespace(**given: object) -> Namespace:
    return Namespace(
        **{"model": None, "shape": None, "text": None, "dataset": None, "outliers": False, "prefill": 0, **given}
    )


def test_losses_are_judged_on_models_that_have_bars() -> None:
    assert bars_for(namespace()) == (*BUNDLED, *MEMORY)
    assert bars_for(namespace(outliers=True)) == (*OUTLIERS, *MEMORY)
    assert bars_for(namespace(shape="tiny")) == bars_for(namespace(model="x")) == MEMORY
    for name in ("smollm2", QWEN):
        assert bars_for(namespace(model=name)) == (*REAL[name], *MEMORY)
        # Another model, and another question.
        assert bars_for(namespace(model=name, outliers=True)) == bars_for(namespace(model=name, prefill=5)) == MEMORY
        assert bars_for(namespace(model=name, text="prose")) == (*REAL[name], *MEMORY)
        assert bars_for(namespace(model=name, text="my.txt")) == bars_for(namespace(model=name, dataset="x")) == MEMORY
    assert bars_for(namespace(text="prose")) == MEMORY


def test_a_bar_is_met_at_its_limit_and_never_by_nan() -> None:
    bars = (Bar("int8", "delta", 0.1),)
    side = Side("int8", "hf_kvopt")
    met = [judge(bars, side, 16, {"delta": (value, None, None)})[0].is_met for value in (0.1, 0.1001, math.nan)]
    assert met == [True, False, False]
    assert judge(bars, side, 16, {"kl_mean": (1.0, None, None)}) == []
    assert judge(bars, Side("int4", "sdpa"), 16, {"delta": (1.0, None, None)}) == []


def test_a_verdict_says_where_its_interval_reaches_over_the_limit() -> None:
    bars, side = (Bar("int8", "delta", 0.1),), Side("int8", "hf_kvopt")
    words = [judge(bars, side, 16, {"delta": f})[0].word for f in ((0.05, 0.0, 0.2), (0.2, 0.05, 0.3), (0.3, 0.2, 0.4))]
    assert words == ["met, not beyond doubt", "MISSED, not beyond doubt", "MISSED"]


def test_peers_that_refuse_a_model_are_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*args: object, **kwargs: object) -> None:
        raise AssertionError("group size must divide")

    model, sides = random_model("tiny"), [Side("int4", "hf_kvopt"), Side("transformers_fp8", "sdpa")]
    assert accepted_sides(model, sides) == sides
    monkeypatch.setattr("evals._common.sides.QuantizedCache", refuses)
    assert accepted_sides(model, sides) == sides[:1]
    assert "transformers_fp8+sdpa is left out" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["programs", "prose"])
def test_settings_are_chosen_on_other_text_than_figures_are_quoted_of(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evals._common.corpora.packaged_texts", lambda name: tmp_path)
    monkeypatch.setattr("evals._common.corpora._read", str)
    choosing, verdict, both = (CORPORA[text](part) for part in ("choosing", "verdict", "all"))
    assert min(len(choosing), len(verdict)) > 1
    assert not set(choosing) & set(verdict)
    assert set(both) == set(choosing) | set(verdict)


def test_check_turns_the_exit_status_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--sides", "int8+hf_kvopt", "--check", "--context", "33"]
    monkeypatch.setattr("evals.perplexity.__main__.bars_for", lambda args: (Bar("int8", "bf16_share", 1.0),))
    status, rows = short_run(tmp_path / "rows.json", *arguments)
    assert (status, rows[1]["bars"][0]["met"]) == (0, True)
    monkeypatch.setattr("evals.perplexity.__main__.bars_for", lambda args: (Bar("int8", "bf16_share", 0.01),))
    status, rows = short_run(tmp_path / "more.json", *arguments)
    assert (status, rows[1]["bars"][0]["met"]) == (1, False)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    short_run(
        tmp_path / "rows.json", "--sides", "int8+hf_kvopt", "--chunks", "5", "7", "--plot", str(tmp_path / "p.png")
    )
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--chunks", "0"], "at least 1, got 0"),
        (["--context", "1"], "at least 2, got 1"),
        (["--sides", "int5+hf_kvopt"], "unknown cache 'int5'"),
        (["--shape", "tiny", "--check", "--sides", "paged+hf_kvopt"], "--check has no bar"),
        (["--context", "9000000"], "less than one segment of 9000000 tokens"),
        (["--dataset", "./no/such/set"], "'./no/such/set'"),
    ],
)
def test_a_bad_argument_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], said: str
) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--out", str(tmp_path / "rows.json")])
    assert leaving.value.code == 2
    assert said in capsys.readouterr().err


def test_shards_part_the_work_and_put_it_together_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    items = list(range(7))
    parts = [Shard(process, 3).of(items) for process in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    everything = [(process, item) for process, part in enumerate(parts) for item in part]
    monkeypatch.setattr("evals._common.shards.gather_object", lambda own: everything)
    assert Shard(1, 3).gather(parts[1]) == items
    assert Shard(0, 1).gather(items) == items


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    arguments = [*SHORT, "--segments", "5", "--shape", "tiny", "--device", "cpu", "--sides", "int4+hf_kvopt"]
    # --multi_gpu is how accelerate is told to start several processes on one machine, also where they are on its CPU.
    options = ["--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port=0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_while_busy([*launch, "-m", "evals.perplexity", *arguments, "--out", two], cwd=ROOT, env=env)
    assert done is not None
    assert done.returncode == 0, done.stderr
    main([*arguments, "--out", str(one)])
    alone, shared = (json.loads(path.read_text()) for path in (one, two))
    assert [row["processes"] for row in shared] == [2, 2]
    for a, b in zip(alone, shared, strict=True):
        assert a["num_segments"] == b["num_segments"] == 5
        for field in ("perplexity", "delta", "delta_low", "delta_high", "kl_mean", "kl_p99", "kv_bytes_per_token"):
            assert a[field] == pytest.approx(b[field], rel=1e-5, abs=1e-9)
