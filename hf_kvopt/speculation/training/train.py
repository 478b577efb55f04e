"""Training of an EAGLE or Medusa head for a frozen target; `python -m hf_kvopt train-draft` (cli/train_draft.py).

    texts ──► rows (of the texts, or written by the target)      features.FeatureStore keeps them, or
                │                                                 losses.look makes them anew at each step
                └──► head.rollout ──► loss ──► optimizers         save() ──► head, state to resume from

The output folder holds the last saved head (load it with `hf_kvopt.DraftHead.from_pretrained`), log.jsonl, features/
where features are kept, and state/ to resume from: the same command resumes.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import get_scheduler as make_schedule

from hf_kvopt.attention.register import ATTENTION_NAME
from hf_kvopt.speculation.training.data import TokenRows, count_tokens
from hf_kvopt.speculation.training.estimate import estimate
from hf_kvopt.speculation.training.features import FeatureStore, Seen, look
from hf_kvopt.speculation.training.fill import fill, made_from, num_rows_of
from hf_kvopt.speculation.training.losses import RolledOutLoss, accepted_lengths, walk
from hf_kvopt.speculation.training.screen import Screen
from hf_kvopt.speculation.training.setup import feature_layers, make_head, make_optimizers
from hf_kvopt.speculation.training.stopping import Stopping

_COUNTED_ROWS = 2048  # rows of text from which the draft vocabulary is chosen


class Trainer:
    """A training run: owns the head, its optimizers, the data and the output folder; it can be saved between steps.

    Args:
        args: arguments of the command line.
        screen: shows how far it is.
        stopping: tells whether the user wants it to end.

    Raises:
        ValueError, OSError: a target or data that cannot be read, or that do not fit the settings.
    """

    def __init__(self, args: argparse.Namespace, screen: Screen, stopping: Stopping) -> None:
        self.args, self.screen, self.stopping = args, screen, stopping
        self.accelerator = Accelerator(
            cpu=args.cpu, mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate
        )
        torch.manual_seed(args.seed)
        dtype = getattr(torch, args.dtype)
        target = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation=ATTENTION_NAME)
        self.target: PreTrainedModel = target.eval().requires_grad_(False).to(self.accelerator.device)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(args.model)
        self.texts = self._texts(args.data, args.seed) if args.data else None
        self._require_enough()
        self.layers = feature_layers(args, self.target)
        self.heldout = self._read_heldout()
        self.step, self.epoch, self.batch = 0, 0, 0

    def run(self) -> None:
        """Make the rows, then train up to `--max-steps`, from the step of the last save.

        Raises:
            KeyboardInterrupt: the user ended it; what was done is saved.
        """
        self.args.out.mkdir(parents=True, exist_ok=True)
        self._make_ready()
        self.resume()
        args, is_main = self.args, self.accelerator.is_main_process
        losses: list[float] = []
        start, tokens = time.perf_counter(), args.batch_size * args.row_len * args.accumulate
        self.screen.begin(args.head, args.max_steps, self.step)
        for input_ids, seen in self._batches():
            losses.append(self._train_on(input_ids, seen))
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            self.screen.show(self.step, tokens, loss=f"{losses[-1]:.3f}", accepted=f"{self.accepted:.2f}")
            is_last = self.step >= args.max_steps
            if is_main and (self.step % args.eval_every == 0 or is_last):
                row = {"step": self.step, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - start}
                self._log({**row, **self.evaluate()})
                losses = []
            must_end = self._must_end()
            if self.step % args.save_every == 0 or is_last or must_end:
                self.save()
            if must_end and not is_last:
                raise KeyboardInterrupt
            if is_last:
                break
        self.accelerator.end_training()

    @torch.no_grad()
    def evaluate(self) -> dict[str, object]:
        """Simulate greedy chain decoding of the held-out rows: tokens a step, and acceptance by depth."""
        if self.heldout is None:
            return {}
        accepted: list[list[int]] = []
        args, loss = self.args, 0.0
        batches = self.heldout[0].split(args.batch_size)
        for number, rows in enumerate(batches):
            here = slice(number * args.batch_size, (number + 1) * args.batch_size)
            input_ids = rows.to(self.accelerator.device)
            seen = Seen(*(x[here].to(self.accelerator.device) for x in self.heldout[1]))
            with self.accelerator.autocast():
                outcome = RolledOutLoss(self.head, args.steps)(input_ids, seen)
            loss += outcome.loss.item() / len(batches)
            accepted += accepted_lengths(outcome, input_ids, seen.best).tolist()
        start = args.row_len // 2 if args.eval_from is None else args.eval_from
        gains = walk(accepted, start)
        # Share of the steps of that walk that reached a depth and got one token further.
        depths = [sum(g > d for g in gains) / max(1, sum(g >= d for g in gains)) for d in range(1, args.steps + 1)]
        return {
            "heldout_loss": round(loss, 4),
            "accepted": round(sum(gains) / max(1, len(gains)), 3),
            "by_depth": [round(depth, 3) for depth in depths],
        }

    def save(self) -> None:
        """Write the head and the state to resume from; an interrupted save leaves the previous one intact."""
        self.accelerator.wait_for_everyone()
        out, new = self.args.out, self.args.out / "state.new"
        self.accelerator.save_state(str(new), safe_serialization=True)
        if self.accelerator.is_main_process:
            state: dict[str, Any] = {"step": self.step, "epoch": self.epoch, "batch": self.batch}
            state["schedules"] = [s.state_dict() for s in self.schedules]
            torch.save(state, new / "trainer.pt")
            shutil.rmtree(out / "state", ignore_errors=True)
            new.rename(out / "state")
            dtype = getattr(torch, self.args.save_dtype)
            weights = {n: w.to(dtype) if w.is_floating_point() else w for n, w in self.head.state_dict().items()}
            self.head.save_pretrained(out, state_dict=weights)
            # save_pretrained records the dtype of training, which from_pretrained would load.
            self.head.config.dtype = dtype
            self.head.config.save_pretrained(out)
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Load the state in `--out`, if there is one.

        Raises:
            ValueError: it cannot be read, or belongs to a run with other settings.
        """
        folder = self.args.out / "state"
        if not folder.exists():
            return
        try:
            state = torch.load(folder / "trainer.pt", weights_only=False)
            self.accelerator.load_state(str(folder))
            self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
            for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
                schedule.load_state_dict(saved)
        except (OSError, EOFError, KeyError, RuntimeError, ValueError, UnpicklingError) as error:
            raise ValueError(
                f"{folder} cannot be resumed from: got {type(error).__name__} {str(error).splitlines()[:1]}; give the "
                "arguments that the run began with, another --out, or remove that folder to begin anew"
            ) from error
        self.screen.say(f"going on from step {self.step} of {self.args.max_steps}, as saved in {folder}")

    def _make_ready(self) -> None:
        """Make the rows that are kept, the head and its optimizers."""
        args, rows = self.args, self.texts
        dataset: Any = rows
        vocab_size = self.target.config.get_text_config(decoder=True).vocab_size
        if args.keep_features:
            num_heldout = 0 if args.heldout else args.eval_rows
            source = made_from(args, self.layers)
            dataset = store = FeatureStore(args.out / "features", source, num_heldout, args.seed)
            left = max(0, num_rows_of(args) - store.num_rows)
            self._say_estimate(left * args.row_len)
            if self.accelerator.is_main_process:
                fill(store, args, self.target, self.tokenizer, self.layers, rows, self.screen, self.stopping)
            self.accelerator.wait_for_everyone()
            self.heldout = self.heldout or store.heldout()
            counts = store.count_tokens(vocab_size)
        else:
            assert rows is not None  # the command line asks for --data
            self._say_estimate(0)
            counts = count_tokens(rows, _COUNTED_ROWS, vocab_size)
        self.head = make_head(args, self.target.cpu(), counts).to(self.accelerator.device)
        self.target.to(self.accelerator.device)
        self.head.bind(self.target)
        self.optimizers = make_optimizers(self.head, args)
        warmup = max(1, round(args.warmup * args.max_steps))
        self.schedules = [make_schedule("cosine", o, warmup, args.max_steps) for o in self.optimizers]
        module: nn.Module = RolledOutLoss(self.head, args.steps)
        loader: Any = DataLoader(dataset, batch_size=args.batch_size, drop_last=True)
        self.dataset, self.accepted = dataset, 0.0
        prepared = self.accelerator.prepare(module, loader, *self.optimizers)
        self.loss, self.loader, self.optimizers = prepared[0], prepared[1], list(prepared[2:])
        self.run_loss = torch.compile(self.loss, dynamic=False) if args.compile else self.loss

    def _say_estimate(self, num_tokens: int) -> None:
        if self.accelerator.is_main_process:
            self.screen.say(estimate(self.args, self.target, self.layers, num_tokens, self.args.max_steps))

    def _train_on(self, input_ids: Tensor, seen: Seen) -> float:
        with self.accelerator.accumulate(self.loss):
            outcome = self.run_loss(input_ids, seen)
            self.accelerator.backward(outcome.loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.loss.parameters(), self.args.clip)
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            for schedule in self.schedules:
                schedule.step()
        gains = walk(accepted_lengths(outcome, input_ids, seen.best).tolist(), 0)
        mean = sum(gains) / max(1, len(gains))
        self.accepted = mean if not self.accepted else 0.9 * self.accepted + 0.1 * mean
        return outcome.loss.item()

    def _batches(self) -> Iterator[tuple[Tensor, Seen]]:
        """Yield batches without end, from the one after the last that was trained on."""
        while True:
            self.dataset.set_epoch(self.epoch)
            loader = self.accelerator.skip_first_batches(self.loader, self.batch)
            for batch in loader:
                self.batch += 1
                if isinstance(batch, Tensor):
                    with self.accelerator.autocast():
                        yield batch, look(self.target, self.layers, batch)
                else:
                    yield batch[0], Seen(*batch[1:])
            self.epoch, self.batch = self.epoch + 1, 0

    def _must_end(self) -> bool:
        """Return whether any process was asked to end; all of them agree."""
        if self.accelerator.num_processes == 1:
            return self.stopping.is_asked
        asked = torch.tensor(float(self.stopping.is_asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked) > 0)

    def _require_enough(self) -> None:
        args = self.args
        if self.texts is None or args.write:
            return
        needed = args.batch_size * self.accelerator.num_processes
        if sum(1 for _ in islice(self.texts, needed)) < needed:
            raise ValueError(
                f"data must fill one batch of {needed} rows of {args.row_len} tokens: got less; give more data, or a "
                "smaller --batch-size or --row-len"
            )

    def _texts(self, sources: list[str], seed: int | None) -> TokenRows:
        args = self.args
        return TokenRows(
            sources, self.tokenizer, args.row_len, text_column=args.text_column, split=args.split, seed=seed
        )

    def _read_heldout(self) -> tuple[Tensor, Seen] | None:
        if not self.args.heldout:
            return None
        rows = self._texts(self.args.heldout, None)
        kept = [row for _, row in zip(range(self.args.eval_rows), rows, strict=False)]
        if not kept:
            return None
        device = self.accelerator.device
        seen = [look(self.target, self.layers, part.to(device)) for part in torch.stack(kept).split(8)]
        return torch.stack(kept), Seen(*(torch.cat(parts).cpu() for parts in zip(*seen, strict=True)))

    def _log(self, row: dict[str, object]) -> None:
        self.screen.say(json.dumps(row))
        with (self.args.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
