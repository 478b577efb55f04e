"""The one step that pyproject.toml cannot say: a wheel carries the folder `evals` inside of the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithEvals(build_py):
    """Copy `evals` to `hf_kvopt/_evals/evals` of a build, where `python -m hf_kvopt eval` looks for it."""

    def run(self) -> None:
        """Build the package, then copy what git keeps of the evals but their results."""
        super().run()
        if not self.editable_mode:
            target, left_out = Path(self.build_lib, "hf_kvopt/_evals/evals"), ("__pycache__", "results")
            shutil.copytree("evals", target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out))


setup(cmdclass={"build_py": BuildWithEvals})
