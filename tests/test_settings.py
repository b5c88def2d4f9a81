"""Settings: written down once, and the command line, `generate`, recipes and docs agree with that."""

from dataclasses import fields
from pathlib import Path

import pytest
from conftest import refused

from ldm.generation import generate
from ldm.inference.options import add_init_image_options, image_parser
from ldm.inference.recipe import Recipe
from ldm.settings import Guidance, Settings, from_keywords, setting_rows

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", [*setting_rows(Settings), *setting_rows(Guidance)])
def test_a_setting_is_everywhere(name):
    row, parser = (setting_rows(Settings) | setting_rows(Guidance))[name], image_parser("", "", "out", classes=True)
    add_init_image_options(parser)
    (main, *_) = [action for action in parser._actions if action.dest == name]
    assert main.option_strings == [row.flags[0]] and row.help in main.help and main.default is None
    assert name in {f.name for f in fields(Recipe)} and (
        row.key in ("Width", "Height") or setting_rows(Recipe)[name].key
    )
    assert f"| `{name}` | `{row.flags[0]}` |" in (ROOT / "docs/reference/generate.md").read_text()
    assert name in setting_rows(Guidance) or f"{name}: {row.help}" in generate.__doc__


def test_other_names_of_an_option_are_not_in_the_help():
    text = image_parser("", "", "out").format_help()
    assert "--steps" in text and "--ddim_steps" not in text
    assert image_parser("", "", "out").parse_args(["--ddim_steps", "7", "--ddim-eta", "0.5"]).steps == 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"step": 5}, "unknown setting 'step'; did you mean 'steps'"),
        ({"cfg": 5}, "unknown setting 'cfg'; the settings are steps, sampler"),
        ({"pag": 2}, "pag is an argument of make_guide: give generate its result as guide="),
    ],
)
def test_a_typo_is_named(tiny_model, given, message):
    refused(message, tiny_model.generate, ["5"], **given, error=TypeError)


@pytest.mark.parametrize("given", [{"scale": float("nan")}, {"scale": "2"}, {"steps": 2.5}, {"eta": float("inf")}])
def test_what_is_not_a_number_is_refused(tiny_model, given):
    with pytest.raises(ValueError, match=" is not an? (integer|finite number)"):
        tiny_model.generate(["5"], **given)


def test_none_is_not_given():
    assert from_keywords({"rescale": None, "steps": 3}) == Settings(steps=3)
