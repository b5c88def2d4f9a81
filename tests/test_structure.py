"""The house's floors: what may import what, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top; each part uses only parts on floors below its own.
FLOORS = (
    ("compvis", "inference", "evaluation"),
    ("finetune", "optional"),
    ("training",),
    ("loading",),
    ("pixel_diffusion",),
    ("latent_diffusion",),
    ("generation",),
    ("init_image",),
    ("conditioning",),
    ("checkpoint", "data"),
    ("diffusion", "models"),
    ("util", "images", "cli", "batching", "settings"),
    ("legacy_paths", "changes"),
)
FLOOR = {part: i for i, parts in enumerate(FLOORS) for part in parts}
FILES = sorted((ROOT / "ldm").rglob("*.py"))


def part_of(module: str) -> str | None:
    """ "training" for ldm.training.loop; None for what is not ours and for the package itself."""
    names = module.split(".")
    return names[1] if names[0] == "ldm" and len(names) > 1 else None


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_downwards(path):
    own = path.relative_to(ROOT / "ldm").with_suffix("").parts[0]
    if own == "__init__":
        return
    for module in imports(path):
        used = part_of(module)
        if used is not None and used != own:
            assert FLOOR[used] > FLOOR[own], f"{own} may not use {module}"
    assert own in FLOOR, f"{own} is on no floor"


def test_files_are_short():
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_importing_the_package_imports_nothing():
    code = (
        "import sys, ldm; print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'numpy', 'PIL', 'einops'}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"
