"""Training of an EAGLE or Medusa head for a frozen target; `python -m hf_kvopt train-draft` (cli/train_draft.py).

The target computes features during training; nothing is stored. The output folder holds the last saved head (load it
with `hf_kvopt.DraftHead.from_pretrained`), log.jsonl, and state/ to resume from: the same command resumes.
"""

import argparse
import json
import logging
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers import get_scheduler as make_schedule

from hf_kvopt.speculation.training.data import TokenRows
from hf_kvopt.speculation.training.losses import RolledOutLoss, accepted_lengths, look, walk
from hf_kvopt.speculation.training.setup import make_head, make_optimizers

logger = logging.getLogger(__name__)


class Trainer:
    """A training run: owns the head, its optimizers, the data and the output folder; it can be saved between steps.

    Args:
        args: arguments of the command line.

    Raises:
        ValueError, OSError: a target or data that cannot be read, or that do not fit the settings.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.accelerator = Accelerator(
            cpu=args.cpu, mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate
        )
        torch.manual_seed(args.seed)
        dtype = getattr(torch, args.dtype)
        target = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval().requires_grad_(False)
        self.target: PreTrainedModel = target.to(self.accelerator.device)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(args.model)
        self.rows = self._rows(args.data, args.seed)
        needed = args.batch_size * self.accelerator.num_processes
        if sum(1 for _ in islice(self.rows, needed)) < needed:
            raise ValueError(
                f"data must fill one batch of {needed} rows of {args.row_len} tokens: got less; give more data, or a "
                "smaller --batch-size or --row-len"
            )
        self.heldout = self._read_heldout()
        self.head = make_head(args, self.target.cpu(), self.rows).to(self.accelerator.device)
        self.target.to(self.accelerator.device)
        self.head.bind(self.target)
        self.optimizers = make_optimizers(self.head, args)
        warmup = max(1, round(args.warmup * args.max_steps))
        self.schedules = [make_schedule("cosine", o, warmup, args.max_steps) for o in self.optimizers]
        module: nn.Module = RolledOutLoss(self.head, args.steps)
        loader = DataLoader(self.rows, batch_size=args.batch_size, drop_last=True)
        prepared = self.accelerator.prepare(module, loader, *self.optimizers)
        self.loss, self.loader, self.optimizers = prepared[0], prepared[1], list(prepared[2:])
        self.run_loss = torch.compile(self.loss, dynamic=False) if args.compile else self.loss
        self.step, self.epoch, self.batch = 0, 0, 0

    def run(self) -> None:
        """Train up to `--max-steps`, from the step of the last save."""
        self.resume()
        args, is_main = self.args, self.accelerator.is_main_process
        args.out.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=args.max_steps, initial=self.step, disable=not is_main, mininterval=5, desc=args.head)
        losses: list[float] = []
        start = time.perf_counter()
        for input_ids in self._batches():
            losses.append(self._train_on(input_ids))
            if not self.accelerator.sync_gradients:
                continue
            self.step += 1
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            is_last = self.step >= args.max_steps
            if is_main and (self.step % args.eval_every == 0 or is_last):
                row = {"step": self.step, "loss": sum(losses) / len(losses), "seconds": time.perf_counter() - start}
                self._log({**row, **self.evaluate()})
                losses = []
            if self.step % args.save_every == 0 or is_last:
                self.save()
            if is_last:
                break
        bar.close()
        self.accelerator.end_training()

    @torch.no_grad()
    def evaluate(self) -> dict[str, object]:
        """Simulate greedy chain decoding of the held-out rows: tokens a step, and acceptance by depth."""
        if not self.heldout:
            return {}
        accepted: list[list[int]] = []
        head, loss = self.head, 0.0
        for rows in self.heldout:
            input_ids = rows.to(self.accelerator.device)
            seen = look(self.target, head, input_ids)
            with self.accelerator.autocast():
                outcome = RolledOutLoss(head, self.args.steps)(input_ids, seen)
            loss += outcome.loss.item() / len(self.heldout)
            accepted += accepted_lengths(outcome, input_ids, seen.best).tolist()
        start = self.args.eval_from
        gains = walk(accepted, self.args.row_len // 2 if start is None else start)
        # Share of the steps of that walk that reached a depth and got one token further.
        depths = [sum(g > d for g in gains) / max(1, sum(g >= d for g in gains)) for d in range(1, self.args.steps + 1)]
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
        """Load the state in `--out`, if there is one."""
        folder = self.args.out / "state"
        if not (folder / "trainer.pt").exists():
            return
        self.accelerator.load_state(str(folder))
        state = torch.load(folder / "trainer.pt", weights_only=False)
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        for schedule, saved in zip(self.schedules, state["schedules"], strict=True):
            schedule.load_state_dict(saved)
        logger.info("resumed at step %d", self.step)

    def _train_on(self, input_ids: Tensor) -> float:
        with self.accelerator.accumulate(self.loss):
            with self.accelerator.autocast():
                seen = look(self.target, self.head, input_ids)
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
        return outcome.loss.item()

    def _batches(self) -> Iterator[Tensor]:
        """Yield batches without end, from the one after the last that was trained on."""
        while True:
            self.rows.set_epoch(self.epoch)
            loader = self.accelerator.skip_first_batches(self.loader, self.batch)
            for input_ids in loader:
                self.batch += 1
                yield input_ids
            self.epoch, self.batch = self.epoch + 1, 0

    def _rows(self, sources: list[str], seed: int | None) -> TokenRows:
        args = self.args
        return TokenRows(
            sources, self.tokenizer, args.row_len, text_column=args.text_column, split=args.split, seed=seed
        )

    def _read_heldout(self) -> list[Tensor]:
        if not self.args.heldout:
            return []
        rows = self._rows(self.args.heldout, None)
        kept = [row for _, row in zip(range(self.args.eval_rows), rows, strict=False)]
        return list(torch.stack(kept).split(self.args.batch_size)) if kept else []

    def _log(self, row: dict[str, object]) -> None:
        tqdm.write(json.dumps(row))
        with (self.args.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(row) + "\n")
