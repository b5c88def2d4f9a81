"""The reading path: the files that train the digits model and sample from it, complete, short, and listed in `ldm`."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ldm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ldm"
# In the order to read them, as in ldm/__init__.py: the file that a row there names, and the others that it counts.
PATH = {
    "diffusion/schedule.py": "",
    "diffusion/denoiser.py": "",
    "diffusion/guidance.py": "",
    "diffusion/sampling/": "__init__ first_order second_order multistep stochastic noise",
    "latent_diffusion.py": "",
    "generation.py": "",
    "models/unet.py": "",
    "models/blocks.py": "levels",
    "models/attention.py": "",
    "models/autoencoder.py": "distributions",
    "models/clip.py": "",
    "conditioning/text.py": "tokenizer",
    "diffusion/loss.py": "training_noise",
    "training/stage.py": "objective",
    "training/autoencoder.py": "",
    "training/clip.py": "",
    "training/diffusion.py": "denoising latents",
    "training/loop.py": "ema lr_scheduler order",
    "data/captions.py": "captioned",
    "data/mnist.py": "digits measure",
    "loading.py": "checkpoint/file checkpoint/writing",
}
# Imported too, but not needed to understand the method.
SUPPORT = {
    "__init__ */__init__ legacy_paths legacy_names": "names: what the package exports, and CompVis's module names",
    "cli util images labels batching checks input_files arrays": "helpers: errors, files, images, batches",
    "settings changes": "the tables of sampling settings and of changes to a model, for recipes",
    "training/config training/loop_settings training/contract training/rehearsal": "configuration files, checks",
    "training/datasets": "what a configuration trains and is measured on",
    "training/frozen": "the networks that only the last stage uses",
    "commands/train": "the command line, which the notebook and research code do not need",
    "training/processes training/share training/sharding": "many processes",
    "training/run_folder training/metrics": "the run folder, what is logged",
    "training/shapes": "images of several shapes",
    "training/loader": "processes that load data",
    "training/conditions": "the condition of a sample, its dropout",
    "training/optimizers": "the optimizer",
    "data/part": "the first images of a data set",
    "checkpoint/networks checkpoint/tensors checkpoint/atomic": "tensors in files, complete files",
    "conditioning/prompt": "long prompts",
    "models/kernels": "implementations of attention to choose from",
}
MAX_LINES, MAX_ALL_LINES = 6050, 9540


def files_of(row: str) -> list[str]:
    own = [] if row.endswith("/") else [row]
    return own + [f"{row.rpartition('/')[0]}/{name}.py".lstrip("/") for name in PATH[row].split()]


def lines(files: list[str]) -> int:
    return sum(len((PACKAGE / file).read_text().splitlines()) for file in files)


PATH_FILES = [file for row in PATH for file in files_of(row)]


def is_support(file: str) -> bool:
    patterns = " ".join(SUPPORT).split()
    return file not in PATH_FILES and any(Path(file).match(f"{pattern}.py") for pattern in patterns)


def imported_by(file: str) -> set[str]:
    """Return the files of this package that importing one imports; an import within a function is for later."""
    found = set()
    for node in ast.iter_child_nodes(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "ldm":
            module = Path(*node.module.split(".")[1:])
            names = [module, *(module / alias.name for alias in node.names)]
            found |= {f"{name}{suffix}" for name in names for suffix in (".py", "/__init__.py")}
    return {name for name in found if (PACKAGE / name).is_file()}


def test_the_path_is_complete():
    """What its files import is on it or named as support, and all that is named is there."""
    assert all((PACKAGE / file).is_file() for file in PATH_FILES)
    used = {(file, name) for file in PATH_FILES for name in imported_by(file) if name not in PATH_FILES}
    assert not {(file, name) for file, name in used if not is_support(name)}


def test_the_path_is_short_and_its_line_counts_are_current():
    total = lines(PATH_FILES)
    assert total <= MAX_LINES
    rows = dict(re.findall(r"^    (\S+)  +(\d+)  \S", ldm.__doc__, flags=re.M))
    assert list(rows) == list(PATH)
    for row, count in rows.items():
        assert int(count) == pytest.approx(lines(files_of(row)), rel=0.1), row
    readme = (ROOT / "README.md").read_text()
    named = re.search(r"reading path\D+([\d,]+) lines in (\d+) files", readme)
    assert int(named[1].replace(",", "")) == pytest.approx(total, rel=0.1) and int(named[2]) == len(PATH_FILES)
    named, folder = [], ""
    for cell, count in re.findall(r"^\| (.*?) \| ([\d,]+) \|", readme.partition("## Read it")[2], flags=re.M):
        rows = []
        for name in re.findall(r"`([^`]+)`", cell):  # one without a folder is in that of the name before
            rows.append(name.removeprefix("ldm/") if name.startswith("ldm/") else folder + name)
            folder = re.sub(r"[^/]+/?$", "", rows[-1])
        assert int(count.replace(",", "")) == pytest.approx(sum(lines(files_of(row)) for row in rows), rel=0.1), cell
        named += rows
    assert sorted(named) == sorted(PATH)


@pytest.mark.full
def test_training_and_sampling_the_digits_imports_the_path_and_its_support_only(tmp_path):
    code = f"""
import json, sys
from ldm.commands.train import main
main([*{sorted(str(p) for p in (ROOT / "configs" / "sklearn").glob("*.yaml"))}, "outdir={tmp_path}", "loop.steps=1",
      "loop.batch_size=8", "loop.save_every=1", "loop.preview_every=1", "--device", "cpu"])
import ldm, ldm.data.mnist
ldm.load("{tmp_path}/diffusion/model.safetensors").generate(["five"], steps=2)
files = [getattr(m, "__file__", None) for name, m in sys.modules.items() if name.split(".")[0] == "ldm"]
print(json.dumps([file for file in files if file]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    found = {str(Path(file).relative_to(PACKAGE)) for file in json.loads(run.stdout.splitlines()[-1])}
    assert set(PATH_FILES) <= found
    assert {file for file in found if not is_support(file)} == set(PATH_FILES)
    assert lines(sorted(found)) <= MAX_ALL_LINES
