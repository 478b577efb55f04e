"""lm-evaluation-harness over every cache: the same scores as transformers' own cache, with less memory.

pip install 'hf-kvopt[neighbours]'; python examples/lm_eval_harness.py [MODEL [CACHE ...]]

One task chooses how three lines of Python go on, the other writes it, which counts where it is word for word as
expected. Put tasks of the harness, such as ["arc_easy"], in the place of `tasks()` where the hub can be reached.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvopt

BUNDLED = str(Path(__file__).parents[1] / "evals" / "reference_model" / "model")
ROWS = [
    {"context": "import os\n\ndef exists(path):\n    return os.path.", "choices": ["abspath", "banana"], "label": 0},
    {"context": "import os, sys\n\nfor line in sys.", "choices": ["zebra", "stdin"], "label": 1},
    {"context": "class Stack:\n    def __init__(", "choices": ["self", "banana"], "label": 0},
]
# The first one is transformers' own.
CACHES = ["DynamicCache", "paged", *(name for name, fmt in hf_kvopt.KV_FORMATS.items() if not fmt.is_native)]


def tasks(folder: str) -> list[ConfigurableTask]:
    """Write the rows to a file, and make one task that scores choices and one that generates."""
    path = Path(folder) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "doc_to_text": "{{context}}",
    }
    choosing = {
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
    }
    writing = {
        "task": "writing",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["(", ":", "\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    return [ConfigurableTask(config={**common, **own}) for own in (choosing, writing)]


def evaluate(model: Any, tokenizer: Any) -> dict[str, float]:
    """Return the accuracy of choices, and the share of completions that are word for word as expected."""
    with tempfile.TemporaryDirectory() as folder:
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        found = lm_eval.simple_evaluate(model=harness, tasks=tasks(folder), bootstrap_iters=0, verbosity="ERROR")
    results = found["results"]
    return {"choosing": results["choosing"]["acc,none"], "writing": results["writing"]["exact_match,none"]}


def main() -> None:
    """Print one line a cache."""
    name = sys.argv[1] if len(sys.argv) > 1 else BUNDLED
    name = hf_kvopt.model_source(name)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)
    for cache in sys.argv[2:] or CACHES:
        if cache != "DynamicCache":
            hf_kvopt.enable(model, cache=cache)
        scores = evaluate(model, tokenizer)
        print(f"{cache:<14}" + "".join(f"{task} {score:.3f}  " for task, score in scores.items()))
        hf_kvopt.disable(model)


if __name__ == "__main__":
    main()
