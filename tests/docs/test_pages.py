"""What the pages show is so: their Python runs, their commands, options, files and links exist."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import hf_kvopt
from hf_kvopt.__main__ import COMMANDS
from hf_kvopt.quant import KV_FORMATS
from tests.docs.pages import PAGES, ROOT, as_run, blocks

GITHUB = re.compile(r"https://github\.com/hf-kvopt/hf-kvopt/(?:blob|tree)/main/([\w./-]*)")
COMMAND = re.compile(r"python -m ([\w.]+)([^\n`#]*)")
# Folders of the repository; paths of the package are checked once it has the rooms that the pages name.
HAS_ROOMS = (ROOT / "hf_kvopt/kernels/triton").is_dir()
FOLDERS = ("evals", "examples", "tests", "docs", *(["hf_kvopt"] if HAS_ROOMS else []))

PROJECT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
texts = {page: (ROOT / page).read_text("utf8") for page in (*PAGES, *PROJECT)}
everywhere = pytest.mark.parametrize("page", texts)


def python_of(page: str) -> list[Any]:
    return [block for block in blocks(texts[page]) if block.kind == "python" and block.reason is None]


@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page)])
def test_the_python_of_a_page_runs_from_top_to_bottom(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    scope: dict[str, Any] = {"__name__": page}
    for block in python_of(page):
        # Lines of a traceback are those of the page.
        exec(compile("\n" * (block.line - 1) + as_run(block.text), PAGES[page], "exec"), scope)


def test_blocks_are_found_with_their_lines_and_reasons() -> None:
    text = "a\n```python\nx = 1\n```\n\n<!-- not run: needs two GPUs -->\n```python\ny = 2\n```\n"
    first, second = blocks(text)
    assert (first.kind, first.text, first.line, first.reason) == ("python", "x = 1\n", 3, None)
    assert (second.text, second.reason) == ("y = 2\n", "needs two GPUs")


def test_code_takes_this_transformers_name_of_the_cache_and_leaves_enable_alone() -> None:
    code = as_run('enable(model, cache="int8")\ngenerate(cache=cache)\nenable(model, cache=None)')
    assert f"generate({hf_kvopt.CACHE_KEYWORD}=cache)" in code
    assert 'cache="int8"' in code
    assert "cache=None" in code


@pytest.mark.parametrize("page", [page for page in texts if page != "README.md"])
def test_code_is_in_a_language_that_is_named_and_narrow_enough_to_be_read(page: str) -> None:
    for block in blocks(texts[page]):
        assert block.kind in ("python", "sh", "text"), f"{page}:{block.line}"
        wide = [line for line in block.text.splitlines() if len(line) > 90]
        assert not wide, f"{page}:{block.line}"


@everywhere
def test_commands_and_their_options_exist(page: str) -> None:
    for module, rest in COMMAND.findall(texts[page].replace("\\\n", " ")):
        name, options = module, re.findall(r"(?<!\S)--[a-z][\w-]*", rest)
        if module == "hf_kvopt":
            command = rest.split()[0]
            name = COMMANDS[command][0]
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{page}: {module}{rest}"
        if name == "pytest":
            continue
        source = "".join(path.read_text("utf8") for path in _sources(spec.origin))
        missing = [option for option in options if f'"{option}"' not in source]
        assert not missing, f"{page}: {module} has no {missing}"


def _sources(origin: str | None) -> list[Path]:
    """The files that may add options to a command: its own package, and what commands share."""
    assert origin is not None
    path = Path(origin)
    own = [path] if path.name != "__init__.py" else sorted(path.parent.glob("*.py"))
    return [*own, *(ROOT / "evals/_common").glob("*.py"), ROOT / "hf_kvopt/cli/screen.py"]


@everywhere
def test_files_that_are_named_exist(page: str) -> None:
    text = texts[page]
    named = set(GITHUB.findall(text))
    named |= {found for found in re.findall(r"`([\w-]+/[\w./-]*)`", text) if found.split("/")[0] in FOLDERS}
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


@everywhere
def test_links_lead_to_files(page: str) -> None:
    """MkDocs checks the links between pages; on GitHub the README's must be right as well."""
    folder = (ROOT / page).parent
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", texts[page])
    assert not [target for target in targets if not (folder / target).exists()]


def test_every_public_name_is_in_the_reference() -> None:
    shown = re.findall(r"^::: ([\w.]+)$", texts["docs/api.md"], re.M)
    names = {name.rpartition(".")[2] for name in shown if not name.startswith("hf_kvopt.plan.")}
    of_plan = {name.rpartition(".")[2] for name in shown if name.startswith("hf_kvopt.plan.")}
    assert names | {"plan"} == set(hf_kvopt.__all__)
    assert of_plan == set(hf_kvopt.plan.__all__)


def test_the_table_of_formats_names_each_of_them() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", texts["docs/guides/quantized-caches.md"], re.M)
    assert sorted(rows) == sorted(name for name in KV_FORMATS if name != "native")


def test_the_version_is_the_same_everywhere() -> None:
    version = hf_kvopt.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text("utf8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text("utf8")
    assert f"\n## {version} (" in texts["CHANGELOG.md"]
