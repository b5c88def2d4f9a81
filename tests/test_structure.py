"""The house's floors: what may import what, how long files and functions may be, and one definition of each name."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top; each part imports only parts on lower floors. So nothing imports compvis, scripts or benchmarks.
FLOORS = (
    ("scripts", "benchmarks"),
    ("__main__",),
    ("compvis", "commands"),
    ("evaluation",),
    ("inference",),
    ("finetune", "editing", "optional"),
    ("training",),
    ("saving",),
    ("loading",),
    ("pixel_diffusion", "onnx"),
    ("latent_diffusion",),
    ("generation",),
    ("init_image",),
    ("conditioning", "data"),
    ("checkpoint",),
    ("diffusion", "models"),
    ("interpolation", "labels"),
    ("util", "images", "cli", "program", "batching", "settings", "input_files", "model_names"),
    ("legacy_paths", "changes", "checks", "spelling", "arrays"),
    ("legacy_names",),
)
FLOOR = {part: i for i, parts in enumerate(FLOORS) for part in parts}
FILES = sorted(path for folder in ("ldm", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
LONG_FUNCTIONS = {"ldm/generation.py:generate"}
# CompVis's code has these names for classes of its own.
COMPVIS_NAMES = {"LatentDiffusion", "DiffusionWrapper", "ClassEmbedder", "SpatialRescaler", "IdentityFirstStage"}
COMPVIS_NAMES |= {"PersonalizedBase", "Encoder", "Downsample", "Upsample"}


def test_the_design_page_shows_the_floors():
    page = (ROOT / "docs/explanation/design.md").read_text()
    there = {path.stem for folder in (ROOT, ROOT / "ldm") for path in folder.iterdir()}
    shown = [tuple(re.findall(r"`(\w+)`", row)) for row in re.findall(r"^\| \d+ \| (.*) \|$", page, flags=re.M)]
    assert shown == [tuple(part for part in parts if part in there) for parts in FLOORS]


def part_of(module: str) -> str | None:
    """Return "training" for ldm.training.loop; None for other packages and for `ldm` itself."""
    names = module.split(".")
    return names[1] if names[0] == "ldm" and len(names) > 1 else names[0] if names[0] in FLOOR else None


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"ldm.{alias.name}" for alias in node.names} if node.module == "ldm" else {node.module}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_downwards(path):
    own = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if own == "__init__":
        return
    assert own in FLOOR, f"{own} is on no floor"
    for used in map(part_of, imports(path)):
        if used in FLOOR and used != own:
            assert FLOOR[used] > FLOOR[own], f"{own} may not use {used}"


def test_files_and_functions_are_short():
    files = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    functions = {
        f"{path.relative_to(ROOT)}:{node.name}": length
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (length := node.end_lineno - node.lineno + 1) > 60
    }
    functions = {name: n for name, n in functions.items() if name not in LONG_FUNCTIONS}
    assert not files and not functions


def test_public_names_are_defined_once():
    homes = defaultdict(set)
    for path, tree in TREES.items():
        for node in tree.body if path.parts[-2] not in ("scripts", "benchmarks", "commands") else ():
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            for target in (part for whole in targets for part in getattr(whole, "elts", [whole])):
                name = getattr(target, "id", getattr(target, "name", "_"))
                if not name.startswith("_"):
                    homes[name].add(str(path.relative_to(ROOT)))
    twice = {name: sorted(files) for name, files in homes.items() if len(files) > 1}
    assert {name: files for name, files in twice.items() if name not in COMPVIS_NAMES} == {}
    assert COMPVIS_NAMES <= twice.keys(), "these are defined once: take them off the list"


def test_one_function_opens_image_files():
    """Pillow starts Ghostscript for PostScript, whatever a file's name: `open_pillow` allows the formats."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "open" and getattr(node.value, "id", "") in ("Image", "PIL")
    ]
    assert len(calls) == 1 and calls[0].startswith("ldm/data/image_formats.py")
    for path, tree in TREES.items():  # nor by another way
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
                assert "open" not in [alias.name for alias in node.names], path


# What these modules do not import, one after the other: the command line is quick, and no library is imported early.
NOT_IMPORTED = {
    "ldm": "torch numpy PIL einops",
    "ldm.checks": "torch numpy PIL difflib",
    "ldm.settings": "torch numpy PIL difflib",
    "ldm.cli": "torch numpy PIL difflib",
    "ldm.program": "torch numpy PIL difflib",
    "ldm.inference.options": "torch numpy",
}
NOT_IMPORTED_AFTER_TORCH = {
    "ldm.data.digits": "sklearn torchvision",
    "ldm.conditioning.bert": "transformers open_clip huggingface_hub tokenizers torchvision",
    "ldm.conditioning.public_clip": "transformers open_clip huggingface_hub tokenizers torchvision",
}


def import_all(modules: dict[str, str]) -> str:
    """Code that imports the modules and prints a line for each, with what it should not have imported."""
    code = "import sys, importlib\n"
    for module, heavy in modules.items():
        code += f"importlib.import_module('{module}')\n"
        code += f"print('{module}', *sorted(set('{heavy}'.split()) & set(sys.modules)))\n"
    return code


def test_importing_is_light(warm_python):
    command = [sys.executable, "-c", import_all(NOT_IMPORTED)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.splitlines() == list(NOT_IMPORTED)
    assert warm_python(import_all(NOT_IMPORTED_AFTER_TORCH)).stdout.splitlines() == list(NOT_IMPORTED_AFTER_TORCH)
