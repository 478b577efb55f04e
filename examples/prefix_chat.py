"""A conversation, an agent's tool results and several drafts of one answer: each prompt is computed once.

Run `python examples/prefix_chat.py` (the bundled model, no network), or with `--model HUB_ID --device cuda`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvopt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(Path(__file__).parents[1] / "evals/reference_model/model"))
parser.add_argument("--new-tokens", type=int, default=24)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, device_map=args.device)
hf_kvopt.enable(model, cache="paged", prefix_sharing=True)
store = hf_kvopt.prefix_store(model)


def answer(ids: torch.Tensor, **options: object) -> torch.Tensor:
    """Generate after `ids` [1, length], and print how many of its tokens were known."""
    known = store.match_length(ids)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.new_tokens, pad_token_id=0, **options
    )
    print(f"  {ids.shape[1]:4d} tokens in the prompt, {known:4d} of them known before")
    return output


def then(ids: torch.Tensor, text: str) -> torch.Tensor:
    """Return `ids` followed by more text."""
    more = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].to(args.device)
    return torch.cat([ids, more], dim=1)


system = '"""Helpers for reading and writing text files, with tests."""\n\nimport os\nimport sys\n\n\n'
start = tokenizer(system, return_tensors="pt")["input_ids"].to(args.device)

print("a chat: each turn computes what was said since the last one")
history = start
for message in ("def read_lines(path):\n", "\n\ndef write_lines(path, lines):\n", "\n\nclass Reader:\n"):
    history = answer(then(history, message))

print("an agent: tool results are short, the history behind them is long")
for result in ("\n# exit status 0\n", "\n# 3 files changed\n", "\n# tests passed\n"):
    history = answer(then(history, result))

print("branching: drafts of one answer share its prompt, in one call and across calls")
torch.manual_seed(0)
drafts = answer(then(start, "def parse("), num_return_sequences=3, do_sample=True)
drafts = answer(then(start, "def parse("), num_return_sequences=3, do_sample=True)
print(f"  {len(drafts)} drafts")

stats = store.stats()
print(
    f"known in all: {stats.hit_tokens} of {stats.prompt_tokens} prompt tokens, {stats.used_bytes / 2**20:.1f} MiB kept"
)
