"""What pyproject.toml, environment.yml and .ci/run promise."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import peers
from omegaconf import OmegaConf
from packaging.requirements import Requirement  # pytest depends on it
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest depends on it there

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHON_FILES = sorted(
    path
    for folder in ("ldm", "scripts", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path.is_file()
)
# distribution -> module, where they differ
MODULES = {
    "open_clip_torch": "open_clip",
    "Pillow": "PIL",
    "scikit-learn": "sklearn",
    "PyYAML": "yaml",
    "resvg-py": "resvg_py",
}


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


def pins(name: str, python: str) -> dict[str, Version]:
    """What a constraints file asks for on a version of Python, by normalised name."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    found = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate(environment)]
    assert all(str(r.specifier).startswith("==") for r in found)
    assert len({canonicalize_name(r.name) for r in found}) == len(found)  # one version each
    return {canonicalize_name(r.name): Version(str(r.specifier)[2:]) for r in found}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_are_what_the_project_asks_for(python):
    """One tested version of every dependency, and the lower bounds themselves in the oldest environment."""
    project = PROJECT["project"]
    newest, oldest = pins("constraints.txt", python), pins("constraints-oldest.txt", python)
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"]["test"]):
        name, bounds = canonicalize_name(requirement.name), requirement.specifier
        (lower,) = (Version(bound.version) for bound in bounds if bound.operator == ">=")
        assert newest[name] in bounds and oldest[name] == lower, requirement
    extras = project["optional-dependencies"]
    for requirement in map(Requirement, extras["onnx"] + extras["browser"] + extras["serve"]):  # not among the oldest
        assert newest[canonicalize_name(requirement.name)] in requirement.specifier
    platforms = ("nvidia", "cuda", "triton")  # torch pins what its build for a platform needs
    assert not [name for name in newest.keys() | oldest.keys() if name.startswith(platforms)]


def test_every_installation_uses_the_constraints():
    *_, pip = OmegaConf.to_container(OmegaConf.load(ROOT / "environment.yml"))["dependencies"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[test]"]}
    commands = re.findall(r"pip install .*?(?= && )", (ROOT / "README.md").read_text())
    assert commands == ["pip install -c constraints.txt -e .", 'pip install -c constraints.txt -e ".[test]"']
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"pip install .*", script) == [
        'pip install --quiet --disable-pip-version-check -c "$3" -e ".[$4]" </dev/null'
    ]
    assert re.findall(r"^install (\w+) .* (\S+) (\S+)$", script, re.M) == [
        ("newest", "constraints.txt", "test,onnx,serve,browser"),
        ("oldest", "constraints-oldest.txt", "test"),
    ]


def test_peers_that_refuse_each_other_are_skipped_with_the_reason():
    with pytest.raises(pytest.skip.Exception, match=r"numpy \S+ and torch \S+ do not work together: torch 1 is"):
        with peers("numpy", "torch"):
            raise ImportError("torch 1 is too old")
    for error in (
        ValueError("torch: wrong shape"),
        ImportError("no name x"),
        ModuleNotFoundError("torch", name="torch"),
    ):
        with pytest.raises(type(error)), peers("numpy", "torch"):
            raise error


def test_distribution_and_version():
    assert PROJECT["project"]["name"] != "ldm"  # another project's on PyPI
    (version,) = re.findall(r'^__version__ = "(\d+\.\d+\.\d+)"$', (ROOT / "ldm" / "__init__.py").read_text(), re.M)
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ldm.__version__"} and version


def unpack_wheel(kind: str, clone: Path, site: Path) -> None:
    """Build a wheel of the package in `clone`, and unpack it in `site`."""
    pytest.importorskip("setuptools")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    build = f"from setuptools import build_meta; build_meta.{kind}({str(site)!r})"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True, cwd=clone)
    (wheel,) = site.glob("*.whl")
    shutil.unpack_archive(wheel, site, "zip")


@pytest.fixture(scope="module")
def editable(tmp_path_factory) -> Path:
    """What an editable installation of a small clone puts into site-packages; the clone has scripts, too."""
    clone, site = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("site")
    for name in ("configs", "web"):
        (clone / name).mkdir()
    for name, code in (("ldm/__init__", '__version__ = "0.1.0"'), ("ldm/part", ""), ("scripts/txt2img", "")):
        (clone / name).parent.mkdir(exist_ok=True)
        (clone / f"{name}.py").write_text(code)
    unpack_wheel("build_editable", clone, site)
    return site


@pytest.mark.parametrize(
    ("here", "found"), [("notes.txt", "clone"), ("ldm/notes.txt", "clone"), ("ldm/__init__.py", "here")]
)
def test_an_editable_installation_has_ldm_alone(editable, tmp_path, here, found):
    """A folder without `__init__.py` in the working directory does not win, another package does; no `scripts`."""
    folder = tmp_path / "here"
    (folder / here).parent.mkdir(parents=True, exist_ok=True)
    (folder / here).touch()
    code = f"import site, sys; sys.path.insert(0, {str(folder)!r}); site.addsitedir({str(editable)!r})"
    code += "; import ldm; print(ldm.__file__); import importlib.util as u; print(u.find_spec('scripts'))"
    code += "; print(u.find_spec('ldm.part') is not None)"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    file, scripts, part = run.stdout.splitlines()
    assert found in Path(file).parts[-3] and scripts == "None" and part == str(found == "clone")


def test_an_installation_has_the_commands_and_the_configurations(warm_python, tmp_path):
    """Without the clone, `ldm train configs/...` finds the yaml that is installed with it; so is the page."""
    clone, site = tmp_path / "clone", tmp_path / "site"
    for name in ("ldm", "configs", "web"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    unpack_wheel("build_wheel", clone, site)
    installed = {str(path.relative_to(site / "ldm")) for path in (site / "ldm" / "configs").rglob("*.yaml")}
    assert installed == {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert sorted(p.name for p in (site / "ldm/web").iterdir()) == sorted(p.name for p in (ROOT / "web").iterdir())
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "ldm = ldm.__main__:main" in entry_points.read_text()
    options = ["loop.steps=1", "loop.batch_size=8", "data.params.first=8", "outdir=runs", "--device", "cpu"]
    code = f"import runpy, sys; sys.path.insert(0, {str(site)!r}); runpy.run_module('ldm', run_name='__main__')"
    run = warm_python(code, "train", "configs/sklearn/autoencoder.yaml", *options, cwd=tmp_path)
    assert run.returncode == 0 and (tmp_path / "runs/autoencoder/model.safetensors").is_file(), run.stderr


def test_every_import_is_a_dependency():
    project = PROJECT["project"]
    run, test = modules(project["dependencies"]), modules(project["optional-dependencies"]["test"])
    extras = project["optional-dependencies"]
    optional = {module for name in extras.keys() - {"test"} for module in modules(extras[name])}
    compared = {ROOT / "benchmarks/dreambooth.py"}  # beside a loop over diffusers' classes: needs the test extra
    code = [path for path in PYTHON_FILES if "tests" not in path.parts]
    by_package = {p for path in code if path not in compared for p in imported(path)} - {"ldm", "benchmarks"}
    by_comparison = {p for path in compared for p in imported(path)} - {"ldm", "benchmarks", "scripts"}
    by_tests = {p for path in PYTHON_FILES if "tests" in path.parts for p in imported(path)}
    by_tests -= {"ldm", "tomli", "tomllib", "packaging"}
    helpers = {path.stem for path in (ROOT / "tests").glob("*.py")}
    helpers |= {"tests", "conftest", "fuzz", "scripts", "benchmarks"}
    assert by_package - run - optional == set()
    assert run - by_package == {"tensorboard"}  # by accelerate's tracker; what tests alone import is in their extra
    assert by_comparison - run - test == set()
    skipped = {module for name in ("browser", "serve") for module in modules(extras[name])}  # without their extra
    assert by_tests - run - test - skipped - helpers == set()


def test_shipped_files_are_package_data():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["ldm"]
    kept = {path for pattern in patterns for path in (ROOT / "ldm").glob(pattern)}
    others = {path for path in (ROOT / "ldm").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others - kept == set()


@pytest.mark.smoke
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
