"""What a release puts on the hub: a folder for `custom_generate` and one for the package `kernels`, made from here."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci/release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(code: str, folder: Path, cwd: Path, path: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", f"FOLDER = {str(folder)!r}\n{code}"]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_custom_generate_takes_the_folder(release: ModuleType, tmp_path: Path) -> None:
    release.write_generate(tmp_path / "generate")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    run(release.PROBE + release.CHECKS["generate"], tmp_path / "generate", tmp_path, path)
    twice = release.PROBE + (
        "import hf_kvopt\nhf_kvopt.enable(model)\n"
        "try:\n    model.generate(ids, **settings, custom_generate=FOLDER, trust_remote_code=True)\n"
        "except ValueError as error:\n    assert 'enabled already' in str(error)\nelse:\n    raise AssertionError\n"
    )
    run(twice, tmp_path / "generate", tmp_path, path)


def test_the_kernel_loads_without_the_package(release: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("kernels", reason="pip install 'hf-kvopt[neighbours]'")
    release.write_kernel(tmp_path / "kernel")
    elsewhere = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and Path(part) != ROOT]
    code = f"import sys\nsys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]\n"
    run(code + release.PROBE + release.CHECKS["kernel"], tmp_path / "kernel", tmp_path, os.pathsep.join(elsewhere))
    beside = (
        "import hf_kvopt\nfrom pathlib import Path\nfrom kernels import get_local_kernel\n"
        "try:\n    get_local_kernel(Path(FOLDER), trust_remote_code=True)\n"
        "except ImportError as error:\n    assert 'imported already' in str(error)\nelse:\n    raise AssertionError\n"
    )
    run(beside, tmp_path / "kernel", tmp_path, os.pathsep.join([str(ROOT), *elsewhere]))


def test_imports_become_relative_and_nothing_else_changes(release: ModuleType) -> None:
    source = (
        'from hf_kvopt import compat\nfrom hf_kvopt.pool.cuts import a\nimport torch\nx = "from hf_kvopt import y"\n'
    )
    want = 'from .. import compat\nfrom ..pool.cuts import a\nimport torch\nx = "from hf_kvopt import y"\n'
    assert release.relative(source, 2) == want
    with pytest.raises(ValueError, match="import names from modules instead"):
        release.relative("import hf_kvopt.plan\n", 1)
