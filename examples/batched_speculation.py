"""Speculation over a padded batch: every row accepts its own number of tokens, and its text equals plain decoding's.

python examples/batched_speculation.py [--model HUB_ID] [--draft HEAD_ID | prompt_lookup | lookahead]
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvopt

BUNDLED = Path(__file__).parents[1] / "evals" / "reference_model"
PROMPTS = [
    "import os\n\ndef read_text(path):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "for name in sorted(os.listdir(folder)):\n",
]


def main() -> None:
    """Generate with and without speculation and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(BUNDLED / "model"))
    parser.add_argument("--draft", default=str(BUNDLED / "eagle3"))
    parser.add_argument("--new-tokens", type=int, default=96)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="hf_kvopt").eval()
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    settings = {"max_new_tokens": args.new_tokens, "do_sample": False}

    is_name = args.draft in ("prompt_lookup", "lookahead")
    draft = args.draft if is_name else hf_kvopt.DraftHead.from_pretrained(args.draft)
    speculation = hf_kvopt.speculative(draft)

    # The first calls compile and load what the others use.
    for _ in range(2):
        started = time.perf_counter()
        plain = model.generate(
            **inputs, **{hf_kvopt.CACHE_KEYWORD: hf_kvopt.PagedCache(config=model.config)}, **settings
        )
        between = time.perf_counter()
        fast = model.generate(**inputs, custom_generate=speculation, **settings)
        ended = time.perf_counter()

    stats = speculation.stats
    print(f"equal tokens: {torch.equal(plain, fast)}")
    print(f"plain {between - started:.2f} s, speculative {ended - between:.2f} s")
    print(f"{stats.mean_accepted_length:.2f} tokens a verification and row over {stats.steps} verifications")
    print(tokenizer.decode(fast[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
