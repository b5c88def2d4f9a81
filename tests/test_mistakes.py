"""docs/explanation/common_mistakes.md: every entry is there, and the tests that it names exist."""

import ast
import re
from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/explanation/common_mistakes.md").read_text()


def test_all_are_there():
    assert sorted(int(number) for number in re.findall(r"^\*\*E(\d+)\. ", PAGE, re.M)) == list(range(1, 22))


def test_the_tests_named_exist():
    named = re.findall(r"`tests/(\w+\.py)::(\w+)`", PAGE)
    assert len(named) > 20
    for file, name in named:
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (file, name)


def test_no_configuration_trains_on_test_images():
    """E6; where a data set has splits, the name is spelled out or left at its default, train."""
    configs = [OmegaConf.load(path) for path in (ROOT / "configs").rglob("*.yaml")]
    stages = [config for config in configs if "stage" in config]
    assert len(stages) > 10
    for config in stages:
        assert config.data.get("params", {}).get("split", "train") == "train"
