"""A long prompt in a quarter to a half of the memory: one question through caches of several formats.

Run `python examples/quantized_long_context.py` (the bundled model, no network), or with `--model HUB_ID --device cuda
--tokens 32000`.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvopt

ROOT = Path(__file__).parents[1]
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(ROOT / "evals/reference_model/model"))
parser.add_argument("--text", default=str(ROOT / "evals/reference_model/tokenizer.py"), help="a text file to read")
parser.add_argument("--tokens", type=int, default=3000)
parser.add_argument("--new-tokens", type=int, default=32)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model)
model = AutoModelForCausalLM.from_pretrained(
    args.model, dtype=torch.float32 if args.device == "cpu" else "auto", device_map=args.device,
    attn_implementation="hf_kvopt",
)  # fmt: skip
ids = tokenizer(Path(args.text).read_text(), return_tensors="pt")["input_ids"]
ids = ids.repeat(1, -(-args.tokens // ids.shape[1]))[:, : args.tokens].to(args.device)

reference = None
for cache in (
    hf_kvopt.PagedCache(model.config),
    hf_kvopt.QuantizedPagedCache(model.config, format="int8"),
    hf_kvopt.QuantizedPagedCache(model.config, format="k8v4"),
    hf_kvopt.QuantizedPagedCache(model.config, format="int4"),
):
    with cache:
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), **{hf_kvopt.CACHE_KEYWORD: cache}, max_new_tokens=args.new_tokens,
            do_sample=False, pad_token_id=0,
        )[0, ids.shape[1] :]  # fmt: skip
        reference = output if reference is None else reference
        equal = int((output == reference[: len(output)]).long().cumprod(0).sum())
        size = cache.stats().used_bytes / 2**20
        print(f"{cache.formats.format:8} {size:7.2f} MiB for {args.tokens} tokens, {equal} of {len(output)} alike")
