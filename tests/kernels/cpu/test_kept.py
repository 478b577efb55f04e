"""Machine code on disk: taken by later processes, never when anything that it depends on differs, and never torn."""

import subprocess
import sys

import pytest

from hf_kvopt.kernels.cpu import kept, program

if not program.can_compile():
    pytest.skip("no compiled kernels on this machine", allow_module_level=True)

from hf_kvopt.kernels.cpu.jit import machine
from hf_kvopt.kernels.cpu.jit.spec import StoreSpec

SPEC = StoreSpec(
    dim=64, source="float32", code="int8", rotates=False, is_centred=False, lanes=program.lanes(),
)  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_KVOPT_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def compiles(monkeypatch):
    """Names of what was really compiled."""
    calls = []
    original = machine.machine_code
    monkeypatch.setattr(machine, "machine_code", lambda *args: calls.append(1) or original(*args))
    return calls


def test_a_kernel_is_compiled_once_for_all_processes(home, compiles):
    program.compiled("store", SPEC)
    program.compiled("store", SPEC)
    assert (len(compiles), len(list((home / "kernels").iterdir()))) == (1, 1)


@pytest.mark.parametrize("what", ["spec", "compiler", "sources"])
def test_what_the_code_depends_on_names_its_file(home, compiles, monkeypatch, what):
    program.compiled("store", SPEC)
    spec = SPEC
    if what == "spec":
        spec = SPEC._replace(dim=32)
    elif what == "compiler":
        monkeypatch.setattr(machine, "compiler_here", lambda: "another")
    else:
        monkeypatch.setattr(kept, "_sources", lambda: "others")
    program.compiled("store", spec)
    assert (len(compiles), len(list((home / "kernels").iterdir()))) == (2, 2)


@pytest.mark.parametrize("keep", [0, 20, 100, -1])
def test_a_torn_file_is_ignored_and_written_anew(home, compiles, caplog, keep):
    program.compiled("store", SPEC)
    (file,) = (home / "kernels").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:keep])
    with caplog.at_level("WARNING"):
        program.compiled("store", SPEC)
    assert "differs from its SHA-256" in caplog.text
    assert (len(compiles), file.read_bytes()) == (2, whole)


def test_a_home_that_cannot_be_written_costs_a_compile_and_nothing_else(tmp_path, compiles, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_KVOPT_HOME", str(tmp_path / "file"))
    program.compiled("store", SPEC)
    monkeypatch.setattr(kept, "home_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    program.compiled("store", SPEC)
    assert len(compiles) == 2


def test_the_newest_files_stay(home, monkeypatch):
    monkeypatch.setattr(kept, "_MOST_FILES", 2)
    for dim in (16, 32, 64):
        program.compiled("store", SPEC._replace(dim=dim))
    names = {file.name for file in (home / "kernels").iterdir()}
    assert names == {
        kept.path_of(f"store {SPEC._replace(dim=dim)} {machine.compiler_here()}").name for dim in (32, 64)
    }  # fmt: skip


@pytest.mark.slow
def test_kept_code_computes_what_fresh_code_does(home):
    code = (
        "import torch, logging, sys\n"
        "logging.basicConfig(stream=sys.stderr)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "import hf_kvopt\n"
        "torch.manual_seed(0)\n"
        "model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2,"
        " num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=97)).eval()\n"
        "hf_kvopt.enable(model, cache='int4')\n"
        "print(model.generate(torch.arange(1, 81)[None], max_new_tokens=70, do_sample=False).tolist())\n"
    )
    command = [sys.executable, "-c", code]
    fresh, later = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert fresh == later
    assert list((home / "kernels").glob("*.o"))
