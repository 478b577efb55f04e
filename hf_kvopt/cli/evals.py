"""python -m hf_kvopt eval NAME ...: run an eval, from a checkout or from an installed wheel.

A wheel holds the folder `evals` inside this package, a checkout beside it. Rows are written to `evals/results` of a
checkout, else to `hf_kvopt-results` in the working directory.
"""

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
# The first of these that contains `evals` is put on the path.
_PLACES = (_PACKAGE.parent, _PACKAGE / "_evals")
_NEEDS = ("rich", "matplotlib", "datasets")
EVALS = {
    "equality": "greedy, beams, samples, batches: equal tokens in float32",
    "speed": "prefill and decode against transformers' caches, interleaved",
    "perplexity": "loss of each cache, read through it in chunks",
    "batching": "rows that join and leave a running batch, under load, against padded batches",
    "policies": "what eviction policies lose, by the memory that they hold",
    "needle": "what is found again through a cache, by depth and context",
    "drift": "long greedy answers: first other token, and errors that add up",
    "prefix": "first token with and without shared prompts",
    "tiers": "first token of a known prompt: recomputed, from the device, the host and the disk",
    "fragmentation": "1,000 completions over a fixed pool: waste, concurrency",
    "memory": "KV bytes: textbook figures, and predicted against held by live caches",
    "acceptance": "accepted lengths and speed-up of drafts",
    "why": "naive against cached decoding, tiled softmax",
    "kernels": "every Triton kernel compiled ahead of time: registers, spills, matrix units",
    "gpu": "everything on a CUDA machine, in one call",
    "report": "one page: goal, measured, where, when",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval that the first argument names with the remaining arguments; return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    name = args[0] if args else "--help"
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in EVALS:
        print(f"unknown eval {name!r}: expected one of {', '.join(EVALS)}\n{_usage()}", file=sys.stderr)
        return 2
    missing = [package for package in _NEEDS if importlib.util.find_spec(package) is None]
    if missing:
        print(f"eval needs {', '.join(missing)}: pip install 'hf-kvopt[evals]'", file=sys.stderr)
        return 2
    place = next((place for place in _PLACES if (place / "evals" / "report").is_dir()), None)
    if place is None:
        print(f"no folder evals in {' or '.join(map(str, _PLACES))}: install hf-kvopt anew", file=sys.stderr)
        return 2
    # Evals start subprocesses, which need the folder on their path too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(place), os.environ.get("PYTHONPATH"))))
    sys.path.insert(0, str(place))
    sys.argv = [f"python -m hf_kvopt eval {name}", *args[1:]]
    try:
        runpy.run_module(f"evals.{name}", run_name="__main__", alter_sys=False)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _usage() -> str:
    lines = [f"  {name:<14} {about}" for name, about in EVALS.items()]
    return "\n".join(["usage: python -m hf_kvopt eval NAME ... (each takes --help)", "", *lines])


if __name__ == "__main__":
    sys.exit(main())
