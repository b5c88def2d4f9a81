"""What pyproject.toml, environment.yml and .ci/run promise."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHON_FILES = sorted(
    path for folder in ("ldm", "scripts", "tests") for path in (ROOT / folder).rglob("*.py") if path.is_file()
)
# distribution -> module, where they differ
MODULES = {"open_clip_torch": "open_clip", "Pillow": "PIL", "scikit-learn": "sklearn", "PyYAML": "yaml"}


def modules(requirements: list[str]) -> set[str]:
    names = [re.split(r"[<>=!~\[]", requirement)[0] for requirement in requirements]
    return {MODULES.get(name, name) for name in names}


def imported(path: Path) -> set[str]:
    """The packages that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names)


def test_conda_environment_equals_pyproject():
    *_, pip = OmegaConf.to_container(OmegaConf.load(ROOT / "environment.yml"))["dependencies"]
    project = PROJECT["project"]
    assert pip == {"pip": project["dependencies"] + project["optional-dependencies"]["test"]}


def test_distribution_and_version():
    assert PROJECT["project"]["name"] != "ldm"  # another project's on PyPI
    (version,) = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', (ROOT / "ldm" / "__init__.py").read_text(), re.M)
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ldm.__version__"} and version


def test_every_import_is_a_dependency():
    project = PROJECT["project"]
    run, test = modules(project["dependencies"]), modules(project["optional-dependencies"]["test"])
    optional = {m for name in ("xformers", "8bit", "plots") for m in modules(project["optional-dependencies"][name])}
    compared = {ROOT / "scripts/benchmark_dreambooth.py"}  # beside a loop over diffusers' classes: needs the test extra
    code = [path for path in PYTHON_FILES if "tests" not in path.parts]
    by_package = {p for path in code if path not in compared for p in imported(path)} - {"ldm"}
    by_comparison = {p for path in compared for p in imported(path)} - {"ldm"}
    scripts = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    by_tests = {p for path in PYTHON_FILES if "tests" in path.parts for p in imported(path)} - {"ldm", "tomli"}
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")} | {"tests", "conftest", "scripts"}
    assert by_package - run - optional == set()
    assert by_comparison - run - test - scripts == set()
    assert by_tests - run - test - helpers == set()


def test_shipped_files_are_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["ldm"]
    kept = {path for pattern in patterns for path in (ROOT / "ldm").glob(pattern)}
    others = {path for path in (ROOT / "ldm").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others - kept == set()


def test_importing_the_package_is_light():
    code = "import sys, ldm; print('torch' in sys.modules, ldm.__version__ != '')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False True\n"


def test_ci_is_bash_that_parses_and_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("name", ["ldm", "scripts", "tests", "configs", ".ci"])
def test_no_path_of_one_machine(name):
    """Only a path that starts at the root of a home or work folder tells of a machine; this file builds its pattern."""
    pattern = re.compile("(?<![\\w.])/(?:" + "|".join(("home", "Users", "work", "root")) + ")/\\w")
    for path in (ROOT / name).rglob("*"):
        if path.is_file() and path.suffix in ("", ".py", ".yaml", ".yml", ".sh", ".md"):
            assert not pattern.search(path.read_text()), path
