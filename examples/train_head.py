"""Train a small EAGLE-3 head for the bundled model on a few files, and load it: 15 seconds on a CPU, no network.

    python examples/train_head.py

This command also trains a real head, given a model, more text, and more steps (its options: --help).
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

import hf_kvopt

MODEL = Path(__file__).parents[1] / "evals" / "reference_model" / "model"
TEXT = Path(sysconfig.get_path("stdlib")) / "json"


def main() -> None:
    """Train, load, check, and print the tokens a step that the head would give on a file it was not trained on."""
    with tempfile.TemporaryDirectory() as out:
        heldout = TEXT / "decoder.py"
        data = [path for path in sorted(TEXT.glob("*.py")) if path != heldout]
        command = ["--model", MODEL, "--data", *data, "--heldout", heldout, "--eval-rows", 8, "--out", out]
        command += ["--head", "eagle3", "--layers", 2, 5, -1, "--draft-vocab", 1024, "--steps", 2, "--row-len", 128]
        command += ["--batch-size", 4, "--max-steps", 36, "--eval-every", 12, "--optimizer", "muon", "--lr", 5e-3]
        subprocess.run([sys.executable, "-m", "hf_kvopt", "train-draft", *map(str, command)], check=True)

        head = hf_kvopt.DraftHead.from_pretrained(out)
        head.check(AutoModelForCausalLM.from_pretrained(MODEL))  # refuses a head of another model
        print(f"{type(head).__name__} with {sum(p.numel() for p in head.parameters()):,} parameters of its own")
        for line in (Path(out) / "log.jsonl").read_text().splitlines():
            row = json.loads(line)
            print(f"step {row['step']:>3}  loss {row['loss']:6.3f}  {row['accepted']:.2f} tokens a step of decoding")


if __name__ == "__main__":
    main()
