"""CONTRIBUTING.md's words: names of the code, options, messages and pages have none that it rejects."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("ldm", "scripts", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

# Parts of names: what stands between underscores, or between capitals.
NAMES = set("picture pictures draw draws drawn drawing told tell teller hears whole leftover".split())
# "spatial.Picture" is a name in checkpoints of version 0.1, PictureNoise in its README; Pillow has ImageDraw.
ALLOWED_NAMES = {"Picture", "PictureNoise", "ImageDraw"}
PHRASES = re.compile(
    r"\b(told|tells? (?:of|it|them|the model|the network)|teller|say(?:s|ing)? nothing|hears|left over|leaves over"
    r"|dealt|deals out|pictures?|draw(?:s|n|ing)?|(?:is|are) no (?!longer\b|more\b)\w+|at the (?:most|least)\b)",
    re.I,
)
# Captions that data sets and prompts are made of: their wording is data.
CAPTIONS = re.compile(r"(?:a|one|the|my)(?: \w+)? (?:picture|drawing) (?:of|in)|in the style of|draw \{n\}")
CAPTION_FILES = {"captions.py", "unseen_frames.py", "emoji_captions.py"}
# "There is no mask" is English; so is drawing from a distribution, or with a pen.
ALLOWED_PHRASES = re.compile(
    r"(there|that|it) (?:is|are) no|(?:is|are) no (?:different|other|larger|smaller|better|worse|shorter|GPU)"
    r"|drawn? (?:from|with a pen)|ImageDraw",
    re.I,
)


def parts(name: str) -> set[str]:
    return {part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def names(path: Path) -> set[str]:
    """Public names that a module defines: functions, classes, their arguments and attributes."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.arg):
            found.add(node.arg)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if not name.startswith("_")} - ALLOWED_NAMES


def strings(path: Path) -> str:
    """A module's texts: docstrings, messages, help (not single words: keys, old options); and its comments."""
    source = path.read_text()
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    comments = re.findall(r"(?:^|\s)# (.*)$", source, re.M)
    return "\n".join([text for text in texts if isinstance(text, str) and " " in text] + comments)


def rejected(text: str) -> list[str]:
    text = re.sub(r"`[^`\n]*`|\s+", lambda m: " " if m[0].isspace() else "``", text)  # code in prose, lines
    lines = [text[max(0, m.start() - 30) : m.end() + 30] for m in PHRASES.finditer(text)]
    return [line for line in lines if not (ALLOWED_PHRASES.search(line) or CAPTIONS.search(line))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_and_messages_of_a_module(path):
    assert not {name for name in names(path) if parts(name) & NAMES}
    assert not parts(path.stem) & NAMES
    if path.name not in CAPTION_FILES:
        assert rejected(strings(path)) == []


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_of_a_page(path):
    text = re.sub(r"^\|.*\bnot\b.*\|$(?:\n\|.*\|$)*", "", path.read_text(), flags=re.M)  # the glossary's own table
    assert rejected(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)) == []
    assert not parts(path.stem) & NAMES
