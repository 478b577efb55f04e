"""`python -m hf_kvopt train-draft` on tiny models: data, runs, resuming, several processes."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_kvopt
from hf_kvopt.__main__ import COMMANDS, main
from hf_kvopt.cli.watch import run_while_busy
from hf_kvopt.speculation.training.data import TokenRows, count_tokens
from tests.helpers import VOCAB, generate, tiny_model, unpadded

pytestmark = pytest.mark.usefixtures("one_thread")


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words w0 ... w96, the last of which ends a text."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w96", unk_token="w0")


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    tiny_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Return texts that the target wrote itself."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    prompts = torch.randint(3, VOCAB, (40, 4), generator=torch.Generator().manual_seed(0))
    rows = generate(tiny_model(), unpadded(prompts), max_new_tokens=28)
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows.tolist()))
    return path


def train(target, data, out, *options):
    """Run the command in this process; return the rows of its log."""
    args = ["--model", target, "--data", data, "--out", out, "--row-len", 32, "--batch-size", 4, "--steps", 3, "--cpu"]
    assert main(["train-draft", *map(str, [*args, *options])]) == 0
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["eagle3", "eagle1", "medusa", "medusa --shared-lm-head --medusa-layers 2"])
def test_training_learns_to_draft_what_the_target_writes(kind, target, data, tmp_path):
    layers = ["--layers", 0, 1, -1] if kind == "eagle3" else []
    options = ["--head", *kind.split(), "--heldout", data, "--max-steps", 40, "--eval-every", 20, "--lr", 1e-2]
    log = train(target, data, tmp_path, *options, *layers)
    assert [row["step"] for row in log] == [20, 40]
    assert log[1]["loss"] < log[0]["loss"]
    assert log[1]["heldout_loss"] < log[0]["heldout_loss"]
    assert log[1]["accepted"] > 1.15
    assert len(log[1]["by_depth"]) == 3
    head = hf_kvopt.DraftHead.from_pretrained(tmp_path)
    head.check(tiny_model())


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(target, data, tmp_path):
    options = ["--layers", 0, 1, -1, "--draft-vocab", 41, "--optimizer", "muon", "--save-every", 5, "--eval-every", 100]
    train(target, data, tmp_path / "whole", *options, "--max-steps", 12)
    # Past the end of the first epoch of ten batches; the schedule is that of twelve steps in both.
    interrupted = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_kvopt.speculation.training.train.Trainer.save", stop_after_save(10))
        with pytest.raises(KeyboardInterrupt):
            train(target, data, interrupted, *options, "--max-steps", 12)
    train(target, data, interrupted, *options, "--max-steps", 12)
    whole, parts = (hf_kvopt.DraftHead.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def stop_after_save(step):
    from hf_kvopt.speculation.training.train import Trainer

    save = Trainer.save

    def save_and_stop(self):
        save(self)
        if self.step == step:
            raise KeyboardInterrupt

    return save_and_stop


def own_text(target, out, *options):
    """Train on text that the target writes itself; return the exit status."""
    args = ["--preset", "cpu", "--model", target, "--out", out, "--row-len", 32, "--batch-size", 4, "--write", 640]
    args += [
        "--layers",
        0,
        1,
        -1,
        "--draft-vocab",
        64,
        "--intermediate-size",
        64,
        "--eval-rows",
        4,
        "--dtype",
        "float32",
    ]
    args += ["--mixed-precision", "no", "--save-dtype", "float32"]
    return main(["train-draft", *map(str, [*args, *options])])


@pytest.fixture(scope="module")
def talker(tmp_path_factory) -> Path:
    """Return the tiny target with a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    tiny_model().save_pretrained(folder)
    words = tokenizer()
    words.chat_template = "{% for m in messages %}{{ 'w90 ' }}{{ m['content'] }} w96 {% endfor %}"
    words.save_pretrained(folder)
    return folder


def test_a_head_is_trained_on_text_that_the_target_writes(talker, tmp_path, capfd):
    assert own_text(talker, tmp_path, "--max-steps", 30, "--eval-every", 15, "--lr", 1e-2) == 0
    said = capfd.readouterr().err
    assert said.index("about 0 min: writing 640 tokens 0 min, training 30 steps of 128 tokens") < said.index(
        "writing text"
    )
    assert "tokens/s loss" in said
    assert " accepted " in said
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[1]["heldout_loss"] < log[0]["heldout_loss"]
    head = hf_kvopt.DraftHead.from_pretrained(tmp_path)
    assert "lm_head.weight" not in head.state_dict()
    prompt = unpadded(torch.arange(3, 9)[None])
    expected = generate(tiny_model(), prompt, max_new_tokens=20)
    assert torch.equal(
        generate(tiny_model(), prompt, max_new_tokens=20, custom_generate=hf_kvopt.speculative(head)), expected
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_command_goes_on(number, talker, tmp_path, capfd, monkeypatch):
    from hf_kvopt.speculation.training.train import Trainer

    options = ["--max-steps", 12, "--eval-every", 100, "--save-every", 100]
    assert own_text(talker, tmp_path / "whole", *options) == 0
    train_on = Trainer._train_on

    def interrupted(self, *batch):
        if self.step == 6:
            signal.raise_signal(number)
        return train_on(self, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_on", interrupted)
        assert own_text(talker, tmp_path / "parts", *options) == 128 + number
    assert "ended at step 7 of 12, saved in" in capfd.readouterr().err
    assert own_text(talker, tmp_path / "parts", *options) == 0
    assert "going on from step 7 of 12" in capfd.readouterr().err
    whole, parts = (hf_kvopt.DraftHead.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_signal_while_text_is_written_keeps_the_finished_parts(talker, tmp_path, monkeypatch):
    from hf_kvopt.speculation.training import fill

    monkeypatch.setattr(fill, "_PART_ROWS", 8)
    add = fill.FeatureStore.add

    def add_and_ask(self, *made):
        add(self, *made)
        if self.num_rows == 16:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(fill.FeatureStore, "add", add_and_ask)
        assert own_text(talker, tmp_path, "--max-steps", 1) == 128 + signal.SIGTERM
    parts = sorted((tmp_path / "features").glob("*.safetensors"))
    assert len(parts) == 2
    before = [path.stat().st_mtime_ns for path in parts]
    assert own_text(talker, tmp_path, "--max-steps", 1) == 0
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 3
    assert [path.stat().st_mtime_ns for path in parts] == before


def test_features_of_texts_are_kept_and_train_as_those_made_anew(target, data, tmp_path):
    options = ["--layers", 0, 1, -1, "--max-steps", 10, "--eval-every", 10, "--heldout", data, "--eval-rows", 8]
    anew = train(target, data, tmp_path / "anew", *options)
    kept = train(target, data, tmp_path / "kept", *options, "--keep-features")
    # Rows come in another order, and features were rounded to bfloat16.
    assert kept[0]["heldout_loss"] == pytest.approx(anew[0]["heldout_loss"], rel=0.1)


@pytest.mark.parametrize("damage", ["empty", "missing", "other"])
def test_a_state_that_cannot_be_resumed_is_refused_in_one_line(damage, talker, tmp_path, capfd):
    assert own_text(talker, tmp_path, "--max-steps", 2) == 0
    state = tmp_path / "state" / "trainer.pt"
    if damage == "empty":
        state.write_bytes(b"")
    elif damage == "missing":
        state.unlink()
    options = ["--intermediate-size", 96] if damage == "other" else []
    with pytest.raises(SystemExit) as stopped:
        own_text(talker, tmp_path, "--max-steps", 4, *options)
    assert stopped.value.code == 2
    assert "cannot be resumed from" in capfd.readouterr().err.splitlines()[-1]


def test_help_tells_defaults_and_presets(capsys):
    for options, row_len in ([], 512), (["--preset", "cpu"], 384), (["--preset", "gpu"], 2048):
        with pytest.raises(SystemExit):
            main(["train-draft", *options, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert f"tokens a row ({row_len})" in said
        assert "cpu --write 300000 --keep-features" in said


def test_the_draft_vocabulary_is_the_most_frequent_of_the_data(target, data, tmp_path):
    train(target, data, tmp_path, "--layers", 0, 1, -1, "--draft-vocab", 41, "--max-steps", 1)
    head = hf_kvopt.DraftHead.from_pretrained(tmp_path)
    tokens = [t for line in data.read_text().splitlines() for t in json.loads(line)["input_ids"]]
    counts = torch.bincount(torch.tensor(tokens), minlength=VOCAB)
    assert counts[head.t2d].min() >= counts[~head.t2d].max()


@pytest.mark.slow
def test_two_processes_train_one_head(target, data, tmp_path):
    args = ["--model", target, "--data", data, "--out", tmp_path, "--row-len", 32, "--batch-size", 2, "--steps", 2]
    args += ["--layers", 0, 1, -1, "--max-steps", 6, "--eval-every", 3, "--heldout", data, "--cpu", "--accumulate", 2]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "hf_kvopt", "train-draft"]
    done = run_while_busy([*launch, *args])
    assert done is not None
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [3, 6]
    # Two processes of two rows, two batches a step: eight rows a step, of forty.
    state = torch.load(tmp_path / "state" / "trainer.pt")
    assert (state["epoch"], state["batch"]) == (1, 2)
    hf_kvopt.DraftHead.from_pretrained(tmp_path).check(tiny_model())


def rows_of(sources, row_len=4, **options):
    return [row.tolist() for row in TokenRows([str(s) for s in sources], tokenizer(), row_len, seed=None, **options)]


def test_texts_follow_one_another_with_their_end_between(tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2\nw3")
    (tmp_path / "b.txt").write_text("w4 w5 w6 w7")
    assert rows_of([tmp_path]) == [[1, 2, 3, 96], [4, 5, 6, 7]]
    assert rows_of([tmp_path / "b.txt", tmp_path / "a.txt"], 3) == [[4, 5, 6], [7, 96, 1], [2, 3, 96]]


def test_records_are_tokens_text_or_messages(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"input_ids": [5, 6, 7, 8]}\n{"input_ids": [9, 10, 11, 12]}')
    assert rows_of([tmp_path / "a.jsonl"]) == [[5, 6, 7, 8], [9, 10, 11, 12]]
    (tmp_path / "b.json").write_text('{"body": "w1 w2 w3"}')
    assert rows_of([tmp_path / "b.json"], text_column="body") == [[1, 2, 3, 96]]
    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "w1 w2"}]}')
    rows = TokenRows([str(tmp_path / "c.jsonl")], tokenizer(), 3)
    rows._tokenizer.chat_template = "w9 {{ messages[0]['content'] }}"
    assert [row.tolist() for row in rows] == [[9, 1, 2]]


def test_each_epoch_has_an_order_of_its_own(data):
    rows = TokenRows([str(data)], tokenizer(), 32)
    first, again = torch.stack(list(rows)), torch.stack(list(rows))
    rows.set_epoch(1)
    second = torch.stack(list(rows))
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert count_tokens(rows, 10**6, VOCAB).sum() == first.numel()


def test_data_that_cannot_be_read_is_refused(tmp_path, target, data):
    with pytest.raises(ValueError, match=r"missing\.txt' is not there"):
        rows_of([tmp_path / "missing.txt"])
    with pytest.raises(ValueError, match="hold no file"):
        rows_of([tmp_path])
    (tmp_path / "a.jsonl").write_text('{"body": "w1"}')
    with pytest.raises(ValueError, match=r"got \['body'\]; name the text with --text-column"):
        rows_of([tmp_path / "a.jsonl"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--layers", 0, 1, -1, "--batch-size", 400], "must fill one batch of 400 rows"),
        (["--layers", 0, 1, 2], "target_layer_ids"),
        ([], "at least 4 layers"),
        (["--data", "nowhere.txt"], "nowhere.txt' is not there"),
        (["--model", "no/such/model"], "no/such/model"),
        (["--batch-size", 0], "whole number of at least 1: got '0'"),
        (["--lr", "-1"], "above 0: got '-1'"),
        (["--lr", "fast"], "above 0: got 'fast'"),
        (["--warmup", 2], "from 0 to 1: got '2'"),
        (["--dtype", "float33"], "float33"),
        (["--steps", 32], "--steps must be below --row-len: got 32 and 32"),
        (["--write", 100], "--write needs --keep-features"),
        (["--write", 100, "--keep-features", "--layers", 0, 1, 7], "target_layer_ids"),
        (["--preset", "tpu"], "'tpu'"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_is_refused_in_one_line(options, said, target, data, tmp_path, capfd):
    with pytest.raises(SystemExit) as stopped:
        train(target, data, tmp_path / "out", *options)
    assert stopped.value.code == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("python -m hf_kvopt train-draft: error: ")
    assert said in last
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "status", "said"), [([], 0, "train-draft"), (["--help"], 0, "train-draft"), (["x"], 2, "'x'")]
)
def test_the_command_line_lists_its_commands(args, status, said, capsys):
    assert main(args) == status
    out = capsys.readouterr()
    assert said in (out.err if status else out.out)
    assert all(name in out.out + out.err for name in COMMANDS)
