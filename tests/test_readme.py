"""The README's commands and those of docs/: every script and config exists and its options parse; files and settings
that are named exist."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from ldm.cli import Parser
from ldm.finetune.embedding_files import LearnedWord, write_words
from ldm.loading import SHIPPED
from ldm.training.config import read_configs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}


def commands(page: str) -> list[list[str]]:
    """The words of each command in a page's bash blocks; `&&` separates commands, a backslash joins lines. `ldm train`
    is scripts/train.py.

    Left out are those with an ellipsis or a shell's variables.
    """
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").split("\n")
    programs = (re.sub(r"^ldm (\w+)", r"python scripts/\1.py", line) for line in lines if "$" not in line)
    parts = [shlex.split(part, comments=True) for line in programs for part in line.split(" && ")]
    return [words for words in parts if words and "..." not in words]


SCRIPTS = {
    f"{name}: {' '.join(words)}": words
    for name, page in PAGES.items()
    for words in commands(page)
    if any(word.startswith(("scripts/", "benchmarks.")) for word in words)
}


class Parsed(Exception):
    """Raised in place of what a script does after parsing."""


def load_script(name: str):
    if name.startswith("scripts/"):
        assert (ROOT / name).is_file()
        return importlib.import_module(f"ldm.commands.{Path(name).stem}")
    return importlib.import_module(name)


@pytest.mark.parametrize("words", SCRIPTS.values(), ids=SCRIPTS)
def test_script_exists_and_its_options_parse(words, monkeypatch):
    at = next(i for i, word in enumerate(words) if word.startswith(("scripts/", "benchmarks.")))
    parse = Parser.parse_args

    def parse_and_stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    script = load_script(words[at])
    monkeypatch.setattr(Parser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        script.main(words[at + 1 :])
    for word in words[at + 1 :]:
        assert not word.startswith("configs/") or (ROOT / word).is_file(), f"{word} does not exist"
    if words[at] == "scripts/train.py":
        if configs := [str(ROOT / word) for word in words if word.startswith("configs/")]:
            read_configs(configs, [word for word in words if "=" in word])  # raises where there is no such setting


def test_the_two_promised_commands():
    first, second = re.findall(r"^```bash\n(python3 -m venv .venv && .*)\n```$", README, re.M)
    assert first.endswith('scripts/txt2img.py --prompt "a handwritten digit five"')
    assert second.endswith(".venv/bin/python -m pytest")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    for name in set(re.findall(r"`((?:ldm|configs|docs|scripts|benchmarks|tests)/[\w/.-]+\.\w+)", PAGES[page])):
        assert (ROOT / name).is_file(), name


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_pages_images_and_headings_that_a_page_links_to_exist(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[page], flags=re.S)
    for name, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.is_file(), name
        assert not anchor or anchor in anchors(path.read_text()), f"{name}#{anchor}"


def test_every_image_is_shown():
    shown = {name for page in PAGES.values() for name in re.findall(r"images/([\w.-]+)\)", page)}
    assert shown == {path.name for path in (ROOT / "docs/images").iterdir()}


# The block of compvis.md, which wants a Stable Diffusion, is what test_compvis_code.py does with a small one.
WITH_PYTHON = [page for page, text in PAGES.items() if "```python" in text and page != "docs/reference/compvis.md"]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Its blocks, one after the other, as one program in a folder with the files that pages name."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(SHIPPED, "model.safetensors")
    shutil.copy(SHIPPED, "weak.safetensors")
    write_words(Path("learned_embeds.safetensors"), LearnedWord("<mine>", torch.ones(2, 128), 1), "diffusers")
    names = {}
    exec("\n".join(re.findall(r"^```python\n(.*?)^```$", PAGES[page], re.M | re.S)), names)
    assert all(image.size == (32, 32) for image in names.get("images", []))
    if "pixels" in names:  # `generate` written out
        assert [names["image"]] == names["model"].generate(["a bold three"], scale=2.0, interval=(0, 1e9))
