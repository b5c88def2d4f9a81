"""What tests of the sampling scripts share: running a script in this process or as a program, and looking at files."""

import importlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from warm_python import WarmPython

from ldm.inference.again import read_image_text, recipe_from_text
from ldm.inference.recipe import Recipe

ROOT = Path(__file__).parents[1]


def script_path(name: str) -> Path:
    return ROOT / "scripts" / f"{name}.py"


def load_script(name: str) -> ModuleType:
    return importlib.import_module(f"ldm.commands.{name}")


def runner(script: ModuleType, checkpoint: Path, folder: Path) -> Callable[..., Path]:
    """`generate("--n_samples", 2)` runs the script on the checkpoint, 3 steps, and gives the output folder."""

    def run(*options: object, out: str = "out", steps: int | None = 3) -> Path:
        fixed = ["--ckpt", checkpoint, "--device", "cpu", "--outdir", folder / out]
        fixed += [] if steps is None else ["--steps", steps]
        script.main([str(option) for option in [*fixed, *options]])
        return folder / out

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def recipe(path: Path) -> Recipe:
    return recipe_from_text(read_image_text(path))


def samples(folder: Path) -> list[Path]:
    return sorted((folder / "samples").iterdir())


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def check_reproduced(generate: Callable[..., Path], paths: list[Path], *options: object) -> None:
    """Each PNG makes its image again by --from-png and these options, to the byte, with the same recipe."""
    for path in paths:
        (again,) = samples(generate("--from-png", path, *options, out=f"again-{path.stem}", steps=None))
        assert np.array_equal(pixels(again), pixels(path))
        assert read_image_text(again) == read_image_text(path)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    path.parent.mkdir(exist_ok=True)
    image.save(path, **options)
    return path


def run_program(python: WarmPython, name: str, *options: object, before: str = "") -> subprocess.CompletedProcess:
    """Run a script as a program, after the code `before`."""
    code = f"{before}\nimport runpy; runpy.run_path({str(script_path(name))!r}, run_name='__main__')"
    return python(code, *options)
