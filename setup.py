"""How an editable installation finds `ldm`, and `configs/` and `web/` as parts of it; the rest is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

MODULE = "__editable___ldm"
FINDER = '''"""Finds the package ldm in a clone: written by its setup.py."""

import sys
from importlib.machinery import PathFinder


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "ldm":
            found = PathFinder.find_spec(name)
            regular = found is not None and found.origin is not None  # it has an __init__.py
            return found if regular else PathFinder.find_spec(name, [{root!r}])


sys.meta_path.insert(0, Finder)
'''


class OnePackage:
    """Makes `ldm` importable from the clone, and nothing else of it.

    setuptools has two ways, and each lacks something. The clone's folder in a .pth file makes `scripts`, `tests` and
    `benchmarks` importable everywhere. A finder that comes last loses to a folder named ldm without __init__.py in the
    working directory, such as a clone of CompVis's repository has. This finder comes first, and gives way to regular
    packages only.
    """

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __call__(self, wheel, files, mapping):
        """Add the finder, and a .pth file that imports it, to the wheel."""
        wheel.writestr(f"{MODULE}.py", FINDER.format(root=str(Path(__file__).resolve().parent)))
        wheel.writestr(f"{MODULE}.pth", f"import {MODULE}\n")


class EditableWheel(editable_wheel):
    def _select_strategy(self, name, tag, build_lib):
        return OnePackage()


if __name__ == "__main__":
    setup(
        cmdclass={"editable_wheel": EditableWheel},
        packages=[*find_packages(include=["ldm*"]), "ldm.configs", "ldm.web"],
        package_dir={"": ".", "ldm.configs": "configs", "ldm.web": "web"},  # in an installation that is not editable
    )
