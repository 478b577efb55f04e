"""Many questions about one long document, and a few-shot batch: explicit caches of a store, saved for the next run.

Run `python examples/prefix_documents.py` (the bundled model, no network), or with `--model HUB_ID --device cuda`.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvopt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(Path(__file__).parents[1] / "evals/reference_model/model"))
parser.add_argument("--document-tokens", type=int, default=1500)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(
    args.model, attn_implementation="hf_kvopt", dtype=torch.float32, device_map=args.device
)
options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def ask(store: hf_kvopt.PrefixStore, texts: list[str]) -> torch.Tensor:
    """Answer all texts in one batch through a cache of the store, and print the time."""
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(texts, return_tensors="pt", padding=True).to(args.device)
    begin = time.perf_counter()
    cache = store.cache(inputs["input_ids"], inputs["attention_mask"])
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        **{hf_kvopt.CACHE_KEYWORD: cache},
        **options,
    )
    store.commit(cache, output)  # from now on the answers are known too
    print(f"  {len(texts)} rows of up to {inputs['input_ids'].shape[1]} tokens: {time.perf_counter() - begin:.2f} s")
    return output


source = Path(__file__).read_text()
document = tokenizer.decode(tokenizer(source * 40)["input_ids"][: args.document_tokens], skip_special_tokens=True)
questions = [f"{document}\n# Question {i}: what does line {7 * i} do?\n#" for i in range(4)]

store = hf_kvopt.PrefixStore(model, max_tokens=16_384)
print("one long document: the first question reads it, the others do not")
answers = [ask(store, [question]) for question in questions]

print("a few-shot batch: the examples are computed once, also where nothing is known yet")
shots = "".join(f"assert double({i}) == {2 * i}\n" for i in range(40))
together = ask(store, [shots + f"assert double({n}) ==" for n in (41, 120, 7, 1999)])

print("saved, and read by the next process: nothing is computed again but the last token of each prompt")
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "prefixes.safetensors"
    store.save(path)
    later = hf_kvopt.PrefixStore.load(path, model)
    again = ask(later, [questions[0]])

print(f"the same answer from the loaded store: {again.equal(answers[0])}")
stats = store.stats()
print(f"known: {stats.hit_tokens} of {stats.prompt_tokens} prompt tokens; {stats.num_blocks} blocks kept")
