"""Effect of one line: the same text in less time and memory, on a document of 4,096 tokens.

Run `python examples/quickstart.py` (the bundled model, no network, under a minute on two cores), or with
`--model HUB_ID --device cuda`; `--text FILE` reads a document of yours, `--html FILE` keeps the page.
"""

import argparse
import inspect
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.bar import Bar
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
from transformers.generation.streamers import BaseStreamer

import hf_kvopt

BUNDLED = Path(__file__).parents[1] / "evals/reference_model"
QUESTIONS = ("\n\nclass FirstAction(Action):\n    def __call__(", "\n\ndef second_parser(args):\n    parser = ")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(BUNDLED / "model"), help="hub id or folder (the bundled model)")
parser.add_argument("--draft", help="a draft head's folder, or prompt_lookup (the bundled head)")
parser.add_argument("--text", type=Path, help="the document (a module of Python's library)")
parser.add_argument("--context", type=int, default=4096, help="tokens of the document (%(default)s)")
parser.add_argument("--new-tokens", type=int, default=64, help="%(default)s")
parser.add_argument("--device", default="cpu", help="%(default)s")
parser.add_argument("--html", type=Path, help="also write the page to this file")
args = parser.parse_args()
is_bundled = args.model == str(BUNDLED / "model")
draft = args.draft or (str(BUNDLED / "eagle3") if is_bundled else "prompt_lookup")

logging.set_verbosity_error()  # a text that is cut below is longer than the model takes
logging.disable_progress_bar()
# In float32 all tokens are equal; in bfloat16 any two attentions diverge at a near tie.
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, device_map=args.device)
tokenizer = AutoTokenizer.from_pretrained(args.model)
text = args.text.read_text() if args.text else inspect.getsource(argparse)
document = tokenizer(text, return_tensors="pt")["input_ids"][:, : args.context]


class Clock(BaseStreamer):
    """Records when tokens come: of a prompt, then of each step."""

    def __init__(self) -> None:
        self.times = [time.perf_counter()]

    def put(self, value: torch.Tensor) -> None:
        """Record the time of a piece."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing: all times are recorded."""


class Measured(NamedTuple):
    """Result of one call."""

    tokens: torch.Tensor  # [new tokens]
    first_s: float  # from the call to its first token
    rate: float  # tokens a second after the first
    kv_bytes: int


def ask(question: str) -> Measured:
    """Generate an answer with whatever is enabled on the model."""
    asked = tokenizer(question, return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids, clock = torch.cat([document, asked], dim=1).to(args.device), Clock()
    length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **length,
        do_sample=False,
        streamer=clock,
        return_dict_in_generate=True,
    )
    tokens, first = out.sequences[0, ids.shape[1] :], clock.times[2]
    rate = (len(tokens) - 1) / (time.perf_counter() - first)
    return Measured(tokens, first - clock.times[0], rate, held(out[hf_kvopt.CACHE_KEYWORD]))


def held(cache: Any) -> int:
    """Count the bytes of the keys and values in a cache, ours or transformers'."""
    if isinstance(cache, hf_kvopt.PagedCache):
        return cache.stats().used_bytes
    return sum(states.nbytes for layer in cache.layers for states in (layer.keys, layer.values))


console = Console(record=True, width=110)
SIDES: dict[str, dict[str, Any]] = {
    "transformers' default": {},
    'enable(cache="paged")': {"cache": "paged"},
    'enable(cache="int8")': {"cache": "int8"},
    f'enable(draft="{Path(draft).name}")': {"cache": "paged", "draft": draft},
    "prefix_sharing=True": {"cache": "paged", "prefix_sharing": True},
}
measured: dict[str, list[Measured]] = {}
for name, settings in SIDES.items():
    console.print(f"{name} ...", style="dim")
    hf_kvopt.disable(model)
    if settings:
        hf_kvopt.enable(model, **settings)  # the one line
    # Two questions on one document. The first call also compiles, so the second one is reported.
    measured[name] = [ask(question) for question in QUESTIONS]

plain = measured["transformers' default"]
table = Table(title=f"A second question on {document.shape[1]:,} tokens, {args.new_tokens} new ones, {args.device}")
for column in ("", "same text", "first token", "tokens/s", "KV memory"):
    table.add_column(column, justify="left" if not column else "right")
same_text = all(second.tokens.equal(plain[1].tokens) for _, second in measured.values())
for name, (_, second) in measured.items():
    same = int((second.tokens == plain[1].tokens).cumprod(0).sum())
    is_same = "yes" if same == args.new_tokens else f"first {same} of {args.new_tokens}"
    table.add_row(name, is_same, f"{second.first_s:.2f} s", f"{second.rate:.0f}", f"{second.kv_bytes / 2**20:.1f} MiB")
console.print("\n", table)

bars = Table(title="Seconds of the second answer (shorter is better)", box=None, show_header=False)
seconds = {name: one[1].first_s + (args.new_tokens - 1) / one[1].rate for name, one in measured.items()}
for name, taken in seconds.items():
    bars.add_row(name, Bar(max(seconds.values()), 0, taken, width=60, color="green"), f"{taken:.2f}")
console.print("\n", bars)
answer = QUESTIONS[1] + tokenizer.decode(plain[1].tokens, skip_special_tokens=True)
console.print(
    "\nThe answer, the same from all:" if same_text else "\nThe default's answer:", answer, style="dim", markup=False
)
if args.html:
    console.save_html(str(args.html))
    print(f"written: {args.html}")
