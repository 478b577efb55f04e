"""The arrows of the import graph, parsed: what may know of what.

prefix       -> cache                            cache     -> pool, quant, config
attention    -> pool.handle, pool.lazy, kernels  pool      -> kernels, quant, eviction.policy
speculation  -> attention, cache, prefix         plan      -> quant, config, what caches refuse
overrides, enable, cli: the front doors, which see everything
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import hf_kvopt

ROOT = Path(__file__).parents[1]
PACKAGE = "hf_kvopt"
# What each room may import of the others; errors are everybody's.
ALLOWED = {
    "prefix": ("prefix", "cache", "pool", "quant", "config", "compat"),
    "cache": ("cache", "pool", "eviction.policy", "quant", "config", "compat"),
    "attention": (
        "attention",
        "eviction.policy",
        "pool.handle",
        "pool.headwise",
        "pool.lazy",
        "pool.packed",
        "kernels",
        "compat",
    ),
    "batching": (
        "batching",
        "speculation",
        "attention",
        "prefix",
        "cache",
        "pool",
        "quant",
        "config",
        "overrides.attention",
        "ranks",
        "compat",
    ),
    "offline": ("offline", "batching", "files"),
    "pool": ("pool", "eviction.policy", "kernels", "quant"),
    "eviction": ("eviction", "config"),
    "kernels": ("kernels", "quant", "files"),
    "quant": ("quant",),
    "speculation": (
        "speculation",
        "attention",
        "cache",
        "prefix",
        "kernels.cpu.draft",
        "ranks",
        "config",
        "packaged",
        "files",
        "compat",
    ),
    "plan": ("plan", "quant", "config", "compat", "prefix.identity"),
    "presets": ("plan",),
    "compat": ("compat",),
    "ranks": ("compat",),
    "config": (),
    "errors": (),
    "files": (),
    "packaged": ("files",),
    "calibration": (
        "calibration",
        "cache",
        "eviction",
        "plan",
        "quant",
        "packaged",
        "files",
        "prefix.identity",
        "overrides.attention",
        "compat",
    ),
}
# Only these speak to transformers; the rest is torch alone.
WITH_TRANSFORMERS = (
    "cache", "prefix", "attention", "batching", "offline", "speculation", "enable", "overrides", "plan", "presets",
    "cli", "compat", "packaged", "calibration", "ranks", "__main__",
)  # fmt: skip
# Rungs 2 and 4 of the proof compile and time the kernels, which are no public names.
KERNEL_PROOFS = ("evals/gpu/", "evals/kernels.py", "evals/speed/shared.py")
PROVEN = ("hf_kvopt.kernels", "hf_kvopt.quant", "triton")
PUBLIC = {*hf_kvopt.__all__, "__version__"}


class Import(NamedTuple):
    """One imported module, and where."""

    importer: str  # module that imports
    imported: str  # module, or name in a module
    line: int
    for_types: bool  # under TYPE_CHECKING
    in_function: bool


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[Import]:
    yield from _walk(ast.parse(path.read_text()), module_name(path), False, False)


def _walk(node: ast.AST, importer: str, for_types: bool, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        flags = for_types, in_function
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(importer, alias.name, child.lineno, *flags)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            for alias in child.names:
                yield Import(importer, f"{base}.{alias.name}", child.lineno, *flags)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            yield from _walk(child, importer, True, in_function)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, importer, for_types, in_function or is_function)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


MODULES = {module_name(path): path for path in sources(PACKAGE)}
IMPORTS = [found for path in MODULES.values() for found in imports_of(path)]


def target(name: str) -> str | None:
    """The module of this package that an imported name lies in."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def inside(found: Import) -> str | None:
    return target(found.imported) if found.imported.split(".")[0] == PACKAGE else None


@pytest.mark.parametrize("name", ALLOWED)
def test_a_room_imports_only_what_lies_below_it(name):
    wrong = []
    for found in IMPORTS:
        below = inside(found)
        if room(found.importer) != name or below is None or room(below) == "errors":
            continue
        allowed = [f"{PACKAGE}.{part}" for part in ALLOWED[name]]
        if not any(below == part or below.startswith(part + ".") for part in allowed):
            wrong.append(f"{found.importer}:{found.line} imports {found.imported}")
    assert not wrong


def test_every_room_has_its_rule():
    free = {"", "enable", "overrides", "cli", "batch", "__main__"}  # the front doors see everything
    assert {room(module) for module in MODULES} <= set(ALLOWED) | free


def test_cache_and_attention_never_import_each_other():
    pairs = {(room(found.importer), room(inside(found) or "")) for found in IMPORTS}
    assert ("cache", "attention") not in pairs
    assert ("attention", "cache") not in pairs


def test_no_module_imports_itself_in_a_circle():
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for found in IMPORTS:
        below = inside(found)
        # An __init__ that hands names on counts as what it hands on, which is there as well.
        if below is not None and below != found.importer and not found.for_types:
            graph[found.importer].add(below)
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above[above.index(module) :], module))
        if module not in done:
            for below in graph[module]:
                visit(below, (*above, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_triton_is_imported_under_kernels_alone():
    here = [(found.importer, room(found.importer)) for found in IMPORTS if found.imported.split(".")[0] == "triton"]
    assert here, "this test looks for what is not there"
    assert {name for _, name in here} == {"kernels"}


def test_transformers_is_imported_by_the_rooms_that_border_on_it_alone():
    here = {room(found.importer) for found in IMPORTS if found.imported.split(".")[0] == "transformers"}
    assert here <= set(WITH_TRANSFORMERS)


# Private or renamed between versions.
TRANSFORMERS_NAMES = (
    "_prepare_cache_for_generation", "_prefill", "expand_kv", "_mask_length", "_pad_token_tensor", "_is_user_defined",
    "_supports_default_dynamic_cache", "_can_set_attn_implementation", "past_key_values", "cache_params",
    "get_layer_types_and_kwargs", "DYNAMIC_LAYER_TYPE_MAPPING", "masking_utils", "ALL_ATTENTION_FUNCTIONS",
    "ALL_MASK_ATTENTION_FUNCTIONS", "modeling_utils",
)  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS_NAMES)
def test_names_that_depend_on_the_version_stand_in_compat_alone(name):
    wrong = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            said = {getattr(node, field, None) for field in ("attr", "id", "arg", "value", "name")}
            if not module.startswith(f"{PACKAGE}.compat") and name in said:
                wrong.append(f"{module}:{node.lineno}")
    assert not wrong


def test_imports_are_absolute_and_stand_at_the_top():
    wrong = [found for found in IMPORTS if found.imported.startswith(".") or found.in_function]
    assert not wrong


def used_of_package(path: Path) -> set[str]:
    """Names that are read as `hf_kvopt.<name>`."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == PACKAGE}


@pytest.mark.parametrize("folder", ["evals", "examples"])
def test_evals_and_examples_use_public_names_alone(folder):
    paths = sources(folder)
    wrong = []
    for path in paths:
        is_proof = path.relative_to(ROOT).as_posix().startswith(KERNEL_PROOFS)
        for found in imports_of(path):
            first, _, rest = found.imported.partition(".")
            is_public = first != PACKAGE or not rest or rest in hf_kvopt.__all__
            is_proven = is_proof and found.imported.startswith(PROVEN)
            # The allocator itself is what this one drives: no public name is so small.
            is_proven |= path.parent.name == "fragmentation" and found.imported.startswith(
                ("hf_kvopt.pool.", "hf_kvopt.prefix.index.")
            )
            if not is_proven and (not is_public or first == "triton" or found.imported.startswith(".")):
                wrong.append(f"{found.importer}:{found.line} imports {found.imported}")
        wrong += [f"{path.name} uses {PACKAGE}.{name}" for name in used_of_package(path) if name not in PUBLIC]
    assert paths
    assert not wrong


def test_a_package_only_hands_names_on():
    for path in sources(PACKAGE):
        if path.name != "__init__.py":
            continue
        body = ast.parse(path.read_text()).body
        defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.For | ast.While)]
        assert not defined, path


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_says_what_it_is_for_and_fits_on_a_few_screens(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 300
