"""Build what a release publishes from this one source, and check each in an environment of its own.

    dist/hf_kvopt-X.whl, dist/hf_kvopt-X.tar.gz    the package index
    dist/generate/      a model repository: model.generate(..., custom_generate="hf-kvopt/generate")
    dist/kernel/        a kernel repository: kernels.get_kernel("hf-kvopt/hf-kvopt"), with relative imports

python .ci/release.py           builds; needs the package `build`
python .ci/release.py --check   builds, and generates with each in a fresh virtual environment
"""

import argparse
import ast
import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "hf_kvopt"
LEFT_OUT = ("cli", "__main__.py", "batch.py")  # commands have no place in a kernel
GENERATE = '''"""generate() with the caches of hf_kvopt.

model.generate(**inputs, custom_generate="hf-kvopt/generate", trust_remote_code=True, kvopt={"cache": "int8"})

`kvopt` holds the options of `hf_kvopt.enable`; without it the cache is paged. The model is as before after the call.
"""

import hf_kvopt


def generate(model, kvopt=None, **arguments):
    """Enable the caches for this call, and generate."""
    if hf_kvopt.enabled(model) is not None:
        raise ValueError("the model is enabled already: got custom_generate too; drop it, or hf_kvopt.disable(model)")
    hf_kvopt.enable(model, **{"cache": "paged", **(kvopt or {})})
    try:
        return model.generate(**arguments)
    finally:
        hf_kvopt.disable(model)
'''
GUARD = f'''import sys as _sys

if "{PACKAGE}" in _sys.modules:
    raise ImportError("{PACKAGE} is imported already: got its kernel too; use the installed package, or this one alone")
'''
PROBE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.25)).eval()
ids = torch.arange(5, 30)[None]
settings = dict(attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, pad_token_id=0)
want = model.generate(ids, **settings).tolist()
"""
CHECKS = {
    "package": """
import hf_kvopt
hf_kvopt.enable(model, prefix_sharing=True, draft="prompt_lookup")
got = [model.generate(ids, **settings).tolist() for _ in range(2)]
assert got == [want, want], got
""",
    "generate": """
for options in ({}, {"kvopt": {"draft": "prompt_lookup"}}):
    got = model.generate(ids, **settings, custom_generate=FOLDER, trust_remote_code=True, **options).tolist()
    assert got == want, got
assert model.config._attn_implementation != "hf_kvopt"
""",
    "kernel": """
import sys
from pathlib import Path
from kernels import get_local_kernel
kernel = get_local_kernel(Path(FOLDER), trust_remote_code=True)
assert "hf_kvopt" not in sys.modules
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
mask = ALL_MASK_ATTENTION_FUNCTIONS["hf_kvopt"]
assert mask.__module__.startswith(kernel.__name__), mask.__module__
kernel.enable(model, prefix_sharing=True, draft="prompt_lookup")
assert model.config._attn_implementation == "hf_kvopt"
got = [model.generate(ids, **settings).tolist() for _ in range(2)]
assert got == [want, want], got
assert kernel.prefix_store(model).stats().hits == 1
""",
}


def version() -> str:
    """Return the version of the package."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def write_generate(folder: Path) -> None:
    """Write a folder that `custom_generate` takes."""
    inner = folder / "custom_generate"
    inner.mkdir(parents=True)
    (inner / "generate.py").write_text(GENERATE)
    (inner / "requirements.txt").write_text(f"hf-kvopt=={version()}\n")
    shutil.copy(ROOT / "LICENSE", folder)
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\ntags: [custom_generate]\n---\n{_docstring()}\n"
    )


def write_kernel(folder: Path) -> None:
    """Write a folder that `get_local_kernel` takes: this package, each import of itself as a relative one."""
    target = folder / "build" / "torch-universal"
    shutil.copytree(ROOT / PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    for name in LEFT_OUT:
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in target.rglob("*.py"):
        module = path.relative_to(target).with_suffix("").parts
        path.write_text(relative(path.read_text(), len(module)))
    front = target / "__init__.py"
    front.write_text(_behind_docstring(front.read_text(), GUARD))
    number = int(version().split(".")[0])
    about = {
        "id": PACKAGE + "_kernel",
        "name": "hf-kvopt",
        "version": number,
        "license": "Apache-2.0",
        "python-depends": [],
    }
    (target / "metadata.json").write_text(json.dumps({**about, "backend": {"type": "cpu"}}, indent=2) + "\n")
    shutil.copy(ROOT / "LICENSE", folder)


def relative(source: str, depth: int) -> str:
    """Return the source of a module with its imports of the package as relative ones.

    Args:
        source: the text of a module.
        depth: folders between the module's file and the top, its own file counted: 1 for modules of the top.
    """
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            raise ValueError(f"line {node.lineno}: got `import {PACKAGE}...`; import names from modules instead")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            rest = (node.module or "")[len(PACKAGE) :]
            line = lines[node.lineno - 1]
            lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from {'.' * depth}{rest.lstrip('.')} ", 1)
    return "".join(lines)


def _behind_docstring(source: str, text: str) -> str:
    end = ast.parse(source).body[0].end_lineno or 0
    lines = source.splitlines(keepends=True)
    return "".join([*lines[:end], "\n", text, *lines[end:]])


def _docstring() -> str:
    return str(ast.get_docstring(ast.parse(GENERATE)))


def build(out: Path) -> None:
    """Build all four."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)], check=True)
    write_generate(out / "generate")
    write_kernel(out / "kernel")


def check(out: Path) -> None:
    """Generate with each in an environment of its own."""
    wheel, source = next(out.glob("*.whl")), next(out.glob("*.tar.gz"))
    for name, needs, folder in (
        ("package", [str(wheel)], None),
        ("package", [str(source)], None),
        ("generate", [str(wheel)], out / "generate"),
        ("kernel", ["transformers", "accelerate", "psutil", "rich", "llvmlite", "kernels"], out / "kernel"),
    ):
        with tempfile.TemporaryDirectory() as scratch:
            venv.create(scratch, with_pip=True)
            python = f"{scratch}/bin/python"
            subprocess.run([python, "-m", "pip", "install", "-q", "torch", *needs], check=True)
            code = f"FOLDER = {str(folder and folder.resolve())!r}\n{PROBE}{CHECKS[name]}"
            subprocess.run([python, "-c", code], check=True, cwd=scratch)
            print(f"{name} of {Path(needs[0]).name if folder is None else folder.name}: equal tokens")


def main() -> None:
    """Build, and check where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--check", action="store_true", help="generate with each in a fresh virtual environment")
    args = parser.parse_args()
    build(args.out)
    if args.check:
        check(args.out)


if __name__ == "__main__":
    main()
