"""`python -m hf_kvopt doctor`: installed versions, proof of kernels, supported formats, fallbacks, one trial."""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple

import torch
from packaging.requirements import Requirement

from hf_kvopt import compat
from hf_kvopt.cli.screen import Parser, as_json, pairs, table
from hf_kvopt.cli.trial import Trial, run_trials
from hf_kvopt.cli.watch import IDLE_S, run_while_busy
from hf_kvopt.errors import UnsupportedDevice
from hf_kvopt.kernels.cpu.program import can_compile
from hf_kvopt.kernels.devices import check_format_runs
from hf_kvopt.kernels.triton.launch import device_target
from hf_kvopt.quant import FORMATS, Format

_KERNELS = ("store_kv", "paged_decode", "paged_prefill", "flash_prefill", "merge_state")


class Finding(NamedTuple):
    """One line of the report; `state` is ok, no (not available here), off (not asked for) or BAD."""

    what: str
    state: str
    detail: str


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser("python -m hf_kvopt doctor", description=(__doc__ or "").strip())
    parser.add_argument("--full", action="store_true", help="also compile kernels ahead of time (minutes)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run all checks and print them; return 1 if something is broken."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trials = run_trials(device)
    sections = {
        "versions": versions(),
        "device": _device(),
        "proof": [*_interpreter(), *_ahead_of_time(args.full), *_pretended(), *_live(device, trials)],
        "formats": [_format(fmt) for fmt in FORMATS.values()],
        "falls back": _fallbacks(device),
        "trial": [_from_trial(trial) for trial in trials],
    }
    is_bad = any(finding.state == "BAD" for findings in sections.values() for finding in findings)
    if args.json:
        plain = {name: [finding._asdict() for finding in findings] for name, findings in sections.items()}
        print(as_json({"is_healthy": not is_bad, **plain}))
    else:
        parts = [f"{name}\n{table(findings)}" for name, findings in sections.items()]
        parts.append(pairs([("verdict", "something is BAD: see above" if is_bad else "healthy")]))
        print("\n\n".join(parts))
    return int(is_bad)


def versions(package: str = "hf-kvopt") -> list[Finding]:
    """Return installed versions, each compared with the range that the package is tested with."""
    found = [Finding("python", "ok", platform.python_version())]
    try:
        wanted = metadata.requires(package) or []
        found.append(Finding(package, "ok", metadata.version(package)))
    except metadata.PackageNotFoundError:
        return [*found, Finding(package, "off", "not installed as a package: version ranges cannot be checked")]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": "evals"}):
            continue
        if not requirement.name.startswith(package):
            found.append(_version(requirement))
    return found


def _version(requirement: Requirement) -> Finding:
    is_extra = requirement.marker is not None and "extra" in str(requirement.marker)
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        missing = f"missing, wanted {requirement.specifier}: pip install 'hf-kvopt[evals]'"
        return Finding(requirement.name, "off", missing) if is_extra else Finding(requirement.name, "BAD", missing)
    fits = requirement.specifier.contains(version, prereleases=True)
    detail = f"{version} (takes {requirement.specifier})"
    if requirement.name == "transformers":
        tested = f"tested with {compat.OLDEST_TESTED} to {compat.NEWEST_TESTED}"
        detail = f"{version} ({tested}{': this one is newer, compare outputs once' if compat.is_untested() else ''})"
    return Finding(requirement.name, "ok" if fits else "BAD", detail)


def _device() -> list[Finding]:
    threads = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    found = [Finding(f"cpu {platform.machine()}", "ok", threads)]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        try:
            family = device_target(index).family
            detail = f"{card.total_memory / 2**30:.0f} GiB, compute {card.major}.{card.minor}, kernels for {family}"
            found.append(Finding(card.name, "ok", detail))
        except UnsupportedDevice as error:
            found.append(Finding(card.name, "no", str(error)))
    if len(found) == 1:
        found.append(Finding("cuda", "no", "no card, or a build of torch without CUDA: everything runs on the CPU"))
    return found


def _interpreter() -> list[Finding]:
    """Check rung 1: the kernels in the interpreter, on a CPU, end to end."""
    name = "1 interpreter"
    if find_spec("triton") is None:
        return [Finding(name, "no", "Triton is not installed: pip install triton (Linux)")]
    command = [sys.executable, "-m", "hf_kvopt.cli.trial", "paged", "int8"]
    done = _process(command, {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""})
    if done is None or done.returncode:
        return [Finding(name, "BAD", "the kernels fail in the interpreter: " + _last_line(done))]
    trials = [Trial(**fields) for fields in json.loads(done.stdout.splitlines()[-1])]
    is_right = trials[0].result == "equal" and trials[1].result in ("equal", "runs")
    said = "; ".join(f"{trial.cache}: {trial.detail}" for trial in trials)
    return [Finding(name, "ok" if is_right else "BAD", f"a whole generation through the Triton kernels; {said}")]


def _ahead_of_time(is_asked: bool) -> list[Finding]:
    """Check rung 2: machine code compiled for GPUs that are not present."""
    name, command = "2 ahead of time", "python -m evals.kernels"
    if find_spec("evals") is None or find_spec("evals.kernels") is None:
        return [Finding(name, "off", f"the evals are not installed: {command} in a checkout compiles every kernel")]
    if not is_asked:
        return [Finding(name, "off", f"not run: doctor --full compiles the decode kernels, {command} all of them")]
    done = _process([sys.executable, "-m", "evals.kernels", "--card", "sm_90", "--op", "paged_decode"], {})
    is_right = done is not None and done.returncode == 0
    return [Finding(name, "ok" if is_right else "BAD", f"paged_decode for sm_90: {_last_line(done)}")]


def _pretended() -> list[Finding]:
    """Name rung 3: the branches of a GPU on CPU tensors, with what it would wait for and copy counted."""
    command = "TRITON_INTERPRET=1 python -m pytest tests/kernels/triton/test_pretended.py"
    return [Finding("3 pretended GPU", "off", f"not run: {command} in a checkout takes every device branch on a CPU")]


def _live(device: str, trials: Sequence[Trial]) -> list[Finding]:
    """Check rung 4: the trial of this command, if it ran on a GPU."""
    if device != "cuda":
        return [Finding("4 live GPU", "no", "no CUDA device: python -m evals.gpu on one proves and times everything")]
    is_right = any(trial.cache == "paged" and trial.result == "equal" for trial in trials)
    detail = "the trial below ran on the card; python -m evals.gpu checks and times every kernel"
    return [Finding("4 live GPU", "ok" if is_right else "BAD", detail)]


def _format(fmt: Format) -> Finding:
    """Report whether a storage format runs here, and by which path."""
    if not torch.cuda.is_available():
        return Finding(fmt.name, "ok", f"on the CPU, by {_cpu_path()}")
    try:
        check_format_runs(fmt, device_target(0))
    except UnsupportedDevice as error:
        return Finding(fmt.name, "no", str(error))
    if find_spec("triton") is None:
        return Finding(fmt.name, "no", "kernels on CUDA need Triton: pip install triton")
    return Finding(fmt.name, "ok", f"by the kernels {', '.join(_KERNELS)}")


def _fallbacks(device: str) -> list[Finding]:
    found = []
    if device == "cpu":
        found.append(Finding("kernels", "no", f"no card: {_cpu_path()} run in place of the Triton kernels"))
    compiler = shutil.which("g++") or shutil.which("clang++")
    has_compiler = device == "cuda" or compiler is not None
    said = "torch.compile over PagedCache(compileable=True)" + (
        "" if has_compiler else " needs a C++ compiler on a CPU"
    )
    by_itself = "" if device == "cuda" else "; generate() compiles by itself on GPUs alone"
    found.append(Finding("compile", "ok" if has_compiler else "no", said + by_itself))
    found.append(
        Finding("gathering", "ok", "attention written into a model, and operations on keys: a dense copy, said once")
    )
    found.append(Finding("stock layers", "ok", "indexers and recurrent states stay in transformers' own storage"))
    return found


def _cpu_path() -> str:
    return "kernels compiled for this processor" if can_compile() else "torch's operations"


def _from_trial(trial: Trial) -> Finding:
    state = {"equal": "ok", "runs": "ok", "refused": "no"}.get(trial.result, "BAD")
    return Finding(trial.cache, state, f"{trial.result}: {trial.detail}, {trial.seconds:.2f} s")


def _process(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str] | None:
    return run_while_busy(command, env={**os.environ, **environment})


def _last_line(done: subprocess.CompletedProcess[str] | None) -> str:
    if done is None:
        return f"it hung: no work within {IDLE_S:.0f} s"
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return lines[-1][:200] if lines else f"exit status {done.returncode}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
