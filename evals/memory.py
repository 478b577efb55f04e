"""Memory of KV caches, computed and measured: `python -m evals.memory`.

    textbook   figures of guides and papers, computed from the config alone; for a wrong figure, what it forgot
    live       predicted used and reserved bytes against `cache.stats()` after a prompt and some decode steps, for tiny
               random models of every kind of attention, in each storage format

Everything is counted, nothing timed. Units: B = bytes, KiB = 1,024, kB = 1,000. The test suite compares predictions for
every architecture that transformers can build; this eval shows one of each kind.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, EncoderDecoderCache, PreTrainedConfig

import hf_kvopt
from evals._common.cli import Parser, add_output_argument, at_least
from evals._common.rows import append_rows, provenance
from evals._common.screen import show_table

_LLAMA_7B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_size": 4096,
}
_LLAMA3_8B = _LLAMA_7B | {"num_key_value_heads": 8}
_LLAMA3_70B = _LLAMA3_8B | {"num_hidden_layers": 80, "num_attention_heads": 64, "hidden_size": 8192}
_GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}
_GPT3 = {"model_type": "gpt2", "n_layer": 96, "n_head": 96, "n_embd": 12288}
_DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
_MODELS = {
    "7B, MHA": _LLAMA_7B,
    "Llama-3 8B, GQA": _LLAMA3_8B,
    "Llama-3 70B, GQA": _LLAMA3_70B,
    "DeepSeek-V3, MLA": _DEEPSEEK_V3,
}
_UNITS = {"B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "kB": 1000, "MB": 1000**2, "GB": 1000**3}
FORMATS = ("native", "int8", "fp8_e4m3", "k8v4", "int4")


class Textbook(NamedTuple):
    """A published figure; `note` states what a wrong one forgot."""

    model: str
    fields: Mapping[str, Any]
    context: int  # tokens; 1: bytes of a token
    layers: int | None  # one layer's, or all layers'
    said: float
    unit: str
    note: str = ""

    @property
    def computed(self) -> float:
        """The figure in `unit`, computed by `hf_kvopt.plan.memory` in 16 bits."""
        report = hf_kvopt.plan.memory(self.fields, context=self.context, dtype="float16", weights=False)
        size = report.content_bytes if self.layers is None else report.content_bytes * self.layers / len(report.layers)
        return size / _UNITS[self.unit]

    @property
    def is_right(self) -> bool:
        """Return whether the published figure equals the computed one, up to 1 %."""
        return abs(self.computed - self.said) <= 0.01 * self.said


TEXTBOOK = (
    Textbook("7B, MHA: a token and layer", _LLAMA_7B, 1, 1, 16, "KiB"),
    Textbook("7B, MHA", _LLAMA_7B, 100_000, None, 52.4, "GB"),
    Textbook("7B, MHA", _LLAMA_7B, 100_000, None, 51.2, "GB", "takes 16 KiB for 16,000 bytes"),
    Textbook("7B, MHA", _LLAMA_7B, 32_768, None, 512, "MiB", "forgets that each of 32 heads has keys and values"),
    Textbook("Llama-3 70B: a token and layer", _LLAMA3_70B, 1, 1, 4096, "B"),
    Textbook("Llama-3 70B", _LLAMA3_70B, 32_000, None, 10.5, "GB"),
    Textbook("GPT-2 small", _GPT2, 1000, None, 35.2, "MiB"),
    Textbook("GPT-3", _GPT3, 1000, None, 4.4, "GiB"),
    Textbook("DeepSeek-V3, arXiv:2412.19437: a token", _DEEPSEEK_V3, 1, None, 70.3, "kB"),
)

_SMALL = {"vocab_size": 97, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}
_WIDE = _SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 32}
# One of each kind: layers differ only in what they store of a token.
KINDS: Mapping[str, Mapping[str, Any]] = {
    "MHA": {"model_type": "gpt2", "vocab_size": 97, "n_layer": 4, "n_head": 4, "n_embd": 64},
    "GQA": _WIDE | {"model_type": "llama"},
    "MQA": {"model_type": "gpt_bigcode", "vocab_size": 97, "n_layer": 4, "n_head": 4, "n_embd": 64, "n_inner": 96},
    "MLA": _SMALL
    | {
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "kv_lora_rank": 32,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "first_k_dense_replace": 4,
    },
    "sliding": _WIDE | {"model_type": "mistral", "sliding_window": 20},
    "sliding and full": _WIDE | {"model_type": "gemma3_text", "sliding_window": 20, "sliding_window_pattern": 2},
    "states and full": _WIDE
    | {"model_type": "jamba", "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "encoder-decoder": {
        "model_type": "t5",
        "vocab_size": 97,
        "d_model": 64,
        "d_kv": 16,
        "num_heads": 4,
        "num_layers": 2,
    },
}


class Live(NamedTuple):
    """One cache of one model, in bytes."""

    kind: str
    format: str
    predicted: tuple[int, int]  # used, reserved
    held: tuple[int, int]

    @property
    def is_equal(self) -> bool:
        """Return whether prediction and measurement agree to the byte."""
        return self.predicted == self.held


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser("evals.memory", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), help="all")
    parser.add_argument("--batch", type=at_least(1), default=3, help="rows of the live caches (%(default)s)")
    parser.add_argument("--prompt", type=at_least(1), default=45, help="tokens of their prompts (%(default)s)")
    parser.add_argument("--steps", type=at_least(0), default=23, help="decode steps behind them (%(default)s)")
    parser.add_argument("--plot", type=Path, help="picture to write (beside --out)")
    add_output_argument(parser, "memory.json")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compute, measure, show, write; return 1 if a prediction differs from what a cache holds."""
    lives = [hold(kind, format, args) for kind in KINDS for format in args.formats if is_taken(kind, format)]
    _show(lives)
    _plot(args.plot or args.out.with_suffix(".png"))
    facts = {"eval": "memory", **provenance(torch.device("cpu"))}
    rows: list[dict[str, Any]] = [
        {"what": "textbook", "model": t.model, "context": t.context, "said": t.said, "unit": t.unit, "note": t.note}
        | {"computed": t.computed, "is_right": t.is_right}
        for t in TEXTBOOK
    ]
    shape = {"batch": args.batch, "prompt": args.prompt, "steps": args.steps}
    rows += [{"what": "live", **live._asdict(), **shape, "is_equal": live.is_equal} for live in lives]
    append_rows(args.out, [row | facts for row in rows])
    return int(not all(live.is_equal for live in lives))


def is_taken(kind: str, format: str) -> bool:
    """Return whether a model of this kind can be stored in a format: latents have no blocks to seal."""
    return "kv_lora_rank" not in KINDS[kind] or hf_kvopt.KV_FORMATS[format].sealed is None


def hold(kind: str, format: str, args: argparse.Namespace) -> Live:
    """Feed a prompt and then single tokens to a tiny model, and compare its cache with the prediction."""
    config = AutoConfig.for_model(**KINDS[kind])
    caches: list[hf_kvopt.PagedCache] = [
        hf_kvopt.QuantizedPagedCache(config, format=format) for _ in range(1 + config.is_encoder_decoder)
    ]
    if format == "native":
        caches = [hf_kvopt.PagedCache(config) for _ in caches]
    _feed(config, caches, args)
    want = hf_kvopt.plan.memory(
        config,
        context=args.prompt + args.steps,
        prompt=args.prompt,
        encoder_context=args.prompt if config.is_encoder_decoder else None,
        batch=args.batch,
        format=format,
        dtype="float32",
        weights=False,
    )
    held = [cache.stats() for cache in caches]
    return Live(
        kind,
        format,
        (want.used_bytes + want.cross_used_bytes, want.reserved_bytes + want.cross_reserved_bytes),
        (sum(stats.used_bytes for stats in held), sum(stats.reserved_bytes for stats in held)),
    )


@torch.no_grad()
def _feed(config: PreTrainedConfig, caches: Sequence[hf_kvopt.PagedCache], args: argparse.Namespace) -> None:
    maker = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = maker.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(3, 97, (args.batch, args.prompt + args.steps), generator=torch.Generator().manual_seed(0))
    pieces = [ids[:, : args.prompt], *ids[:, args.prompt :].split(1, dim=1)]
    if config.is_encoder_decoder:
        cache: Any = EncoderDecoderCache(*caches)
        encoded = model.get_encoder()(ids[:, : args.prompt])
        for piece in pieces:
            model(encoder_outputs=encoded, decoder_input_ids=piece, **{hf_kvopt.CACHE_KEYWORD: cache})
    else:
        for piece in pieces:
            model(piece, **{hf_kvopt.CACHE_KEYWORD: caches[0]}, use_cache=True)


def _show(lives: Sequence[Live]) -> None:
    columns = ["figure", "tokens", "said", "computed", ""]
    rows = [
        [t.model, f"{t.context:,}", f"{t.said:g} {t.unit}", f"{t.computed:,.2f} {t.unit}", "" if t.is_right else t.note]
        for t in TEXTBOOK
    ]
    show_table("textbook figures, 16 bits", columns, rows)
    columns = ["kind", "format", "predicted used", "held", "predicted reserved", "held", ""]
    lines = []
    for x in lives:
        sizes = (x.predicted[0], x.held[0], x.predicted[1], x.held[1])
        lines.append([x.kind, x.format, *(f"{n:,}" for n in sizes), "" if x.is_equal else "DIFFERS"])
    show_table("bytes of live caches", columns, lines)


def _plot(path: Path) -> None:
    """Draw KV memory against context, by kind of attention and by format."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    kinds, formats = figure.subplots(1, 2)
    contexts = [1024 * n for n in (1, 16, 32, 64, 96, 128)]
    for axes, lines in (
        (kinds, [(name, fields, "native") for name, fields in _MODELS.items()]),
        (formats, [(name, _LLAMA3_8B, name) for name in FORMATS]),
    ):
        for name, fields, format in lines:
            sizes = [
                hf_kvopt.plan.memory(fields, context=n, format=format, dtype="bfloat16", weights=False).used_bytes / 1e9
                for n in contexts
            ]
            axes.plot([n / 1024 for n in contexts], sizes, label=name)
        axes.set(xlabel="context, 1,024 tokens", ylim=(0, None), xlim=(0, 128))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    kinds.set(title="by attention, bfloat16", ylabel="GB of KV for one row")
    formats.set(title="Llama-3 8B, by storage format")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
