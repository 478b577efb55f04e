"""Training of the reference model: `python -m evals.reference_model.train --out DIR`.

Llama with grouped-query attention on Python sources. Hidden matrices learn with Muon (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon), embeddings and norms with AdamW. The learning rate follows
warm-up, constant, decay to zero (WSD, arXiv:2404.06395); the row length grows 512, 2,048, 8,192. Everything
is a function of the step, so a stopped run resumes from `DIR/state.pt` and draws the same batches.
"""

import argparse
import json
import logging
import platform
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evals.reference_model import attention, corpus
from evals.reference_model.batches import BatchStream, row_len_at
from evals.reference_model.tokenizer import VOCAB_SIZE, train_tokenizer
from evals.reference_model.workers import GradientWorkers

logger = logging.getLogger(__name__)
CONTEXT = 8192


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model: 8 layers, 4 query heads over 2 KV heads of 64, about 7 M parameters."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation(attention.register())
    for name, weight in model.named_parameters():
        # Each layer begins as the identity, so that depth does not slow the first steps.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
    return model


def build_optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Optimize the matrices between layers with Muon and the rest with AdamW."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embeddings = [p for n, p in model.named_parameters() if "embed" in n]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": embeddings, "weight_decay": 0.0}, {"params": vectors, "weight_decay": 0.0}],
            lr=args.adam_lr,
            betas=(0.9, 0.95),
            eps=1e-10,
            fused=True,
        ),
    ]


def learning_rate_factor(tokens: int, args: argparse.Namespace) -> float:
    """Return the WSD factor in [0, 1] after `tokens` of `args.tokens`."""
    decay_start = args.tokens * (1 - args.decay_share)
    warm = min(1.0, (tokens + args.batch_tokens) / args.warmup_tokens)
    return warm * min(1.0, max(0.0, (args.tokens - tokens) / (args.tokens - decay_start)))


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write weights in bf16, tied ones once, and a configuration that loads them in float32."""
    weights = {name: value.detach().to(torch.bfloat16) for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]
    model.save_pretrained(out, state_dict=weights)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(out)
    _edit_json(out / "config.json", {"dtype": "float32"})
    # transformers 5 would write its own class name, which earlier versions do not know.
    _edit_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})


def _edit_json(path: Path, changes: dict[str, object]) -> None:
    machine_bound = {"is_local", "local_files_only", "_attn_implementation"}
    content = {k: v for k, v in json.loads(path.read_text()).items() if k not in machine_bound}
    path.write_text(json.dumps(content | changes, indent=2) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for model/, state.pt and log.jsonl")
    parser.add_argument("--source", type=Path, action="append", default=[], help="further standard library")
    parser.add_argument("--tokens", type=int, default=44_000_000)
    parser.add_argument("--batch-tokens", type=int, default=8_192)
    parser.add_argument("--lr", type=float, default=5e-3, help="of Muon, in units of AdamW's step")
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warmup-tokens", type=int, default=1_000_000)
    parser.add_argument("--decay-share", type=float, default=0.3)
    parser.add_argument("--long-share", type=float, nargs=2, default=(0.15, 0.015), help="2,048, 8,192")
    parser.add_argument("--save-every", type=int, default=100, help="steps")
    parser.add_argument("--max-steps", type=int, default=None, help="stop early, to time")
    parser.add_argument("--workers", type=int, default=2, help="threads, each on pieces of its own")
    parser.add_argument("--piece-tokens", type=int, default=1_024, help="what a thread takes at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, list[list[int]], list[bool]]:
    """Collect the files, train or load the tokenizer, and encode: one list of ids per file."""
    files = corpus.training_files([corpus.default_source(), *args.source])
    folder = args.out / "model"
    if (folder / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    else:
        library = [f.text for f in files if not f.is_test]
        tokenizer = train_tokenizer(library, CONTEXT)
        tokenizer.save_pretrained(folder)
    encoded = tokenizer([f.text for f in files], add_special_tokens=False)["input_ids"]
    documents = [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in encoded]
    provenance = {
        "python": platform.python_version(),
        "further_sources": [source.name for source in args.source],
        "license": "PSF-2.0",
        "files": len(files),
        "bytes": sum(len(f.text.encode()) for f in files),
        "tokens": sum(map(len, documents)),
        "sha256": corpus.corpus_hash(files),
        "heldout": corpus.HELDOUT,
    }
    (args.out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
    logger.info("%s", provenance)
    return tokenizer, documents, [f.is_test for f in files]


def save(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    optimizers: list[torch.optim.Optimizer],
    step: int,
) -> None:
    """Write the loadable model and, atomically, the state to resume from."""
    save_model(model, tokenizer, args.out / "model")
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
    torch.save(state, args.out / "state.tmp")
    (args.out / "state.tmp").replace(args.out / "state.pt")


def run(
    args: argparse.Namespace,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    optimizers: list[torch.optim.Optimizer],
    stream: BatchStream,
    first_step: int,
) -> None:
    """Run the steps from `first_step` on; log one JSON line every ten of them."""
    num_steps = args.tokens // args.batch_tokens
    last_step = min(num_steps, args.max_steps or num_steps)
    workers = GradientWorkers(model, args.workers, compiled=args.compile)
    start, log = time.perf_counter(), (args.out / "log.jsonl").open("a")
    bar = tqdm(range(first_step, last_step), initial=first_step, total=last_step, mininterval=5)
    for step in bar:
        row_len = row_len_at(step / num_steps, args.long_share)
        factor = learning_rate_factor(step * args.batch_tokens, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * (args.lr if isinstance(optimizer, torch.optim.Muon) else args.adam_lr)
        rows = stream.batch(step, row_len, args.batch_tokens).to(model.device)
        loss = workers.backward(list(rows.split(max(1, args.piece_tokens // row_len))))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 10 == 9:
            row = {"step": step + 1, "row_len": row_len, "loss": round(loss, 4), "lr_factor": factor}
            row["seconds"] = round(time.perf_counter() - start, 1)
            log.write(json.dumps(row) + "\n")
            log.flush()
            bar.set_postfix(loss=row["loss"], row_len=row_len)
        if (step + 1) % args.save_every == 0 or step + 1 == last_step:
            save(args, model, tokenizer, optimizers, step + 1)


def main(argv: list[str] | None = None) -> None:
    """Train from scratch, or resume from `--out`."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer, documents, is_test = prepare(args)
    device = torch.device(args.device)
    model = build_model(tokenizer)
    nn.Module.to(model, device)
    optimizers = build_optimizers(model, args)
    step = 0
    if (args.out / "state.pt").exists():
        state = torch.load(args.out / "state.pt", map_location=device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]
        logger.info("resumed at step %d", step)
    run(args, model, tokenizer, optimizers, BatchStream(documents, is_test, seed=args.seed), step)


if __name__ == "__main__":
    main()
