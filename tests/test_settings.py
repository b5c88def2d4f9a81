"""Settings: written down once, and the command line, `generate`, recipes and docs agree with that."""

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, refused

from ldm.checkpoint.writing import save_file
from ldm.generation import generate
from ldm.inference.guiders import make_guide
from ldm.inference.options import add_init_image_options, image_parser
from ldm.inference.recipe import Recipe
from ldm.latent_diffusion import LatentDiffusion
from ldm.loading import load
from ldm.settings import (
    BATCH_SIZE,
    DEFAULTS,
    FLAG,
    FLOAT,
    INT,
    INTERVAL,
    LISTED,
    NAMES,
    PLACE,
    SEED,
    SIZE,
    STR,
    Guidance,
    Settings,
    from_keywords,
    setting_rows,
)

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
        ({"step": 5}, "unknown setting 'step'; did you mean steps[?]; the settings are steps, sampler"),
        ({"num_inference_steps": 5}, "'num_inference_steps'; did you mean steps[?]; the settings are steps, sampler"),
        ({"guidance_scale": 5}, "unknown setting 'guidance_scale'; did you mean scale[?]"),
        ({"cfg": 5}, "unknown setting 'cfg'; did you mean scale[?]"),
        ({"H": 64}, "unknown setting 'H'; did you mean height[?]"),
        ({"negative_prompt": ""}, "unknown setting 'negative_prompt'; did you mean negative[?]"),
        ({"guide_scale_of": 5}, "unknown setting 'guide_scale_of'; the settings are steps, sampler"),
        ({"pag": 2}, "pag is an argument of make_guide: give generate its result as guide="),
    ],
)
def test_a_typo_is_named(tiny_model, given, message):
    refused(message, tiny_model.generate, ["5"], **given, error=TypeError)


ROWS = setting_rows(Settings) | setting_rows(Guidance) | {"seed": SEED, "batch_size": BATCH_SIZE}
# By type: values and what they mean; values without a meaning.
PLAIN = {
    INT: [("3", 3), (3.0, 3), (np.int64(3), 3), (np.float32(3), 3), (torch.tensor(3), 3)],
    FLOAT: [("1", 1.0), (np.float32(0.5), 0.5), (np.int64(1), 1.0), (torch.tensor(0.5), 0.5), (1, 1)],
    STR: [("a", "a"), (np.str_("a"), "a")],
    LISTED: [("karras", "karras"), ([9, 4.5], "9,4.5"), (np.array([9, 4]), "9,4"), ("sigmas 3 1", "sigmas 3 1")],
    FLAG: [(True, True), ("false", False), (np.bool_(True), True), (0, False)],
    **dict.fromkeys((SIZE, PLACE), [([64, 48], (64, 48)), (np.array([8, 9]), (8, 9)), ("64 48", (64, 48))]),
    INTERVAL: [([0, 2], (0.0, 2.0)), (np.array([0.5, np.inf]), (0.5, math.inf)), ("0.5 to 2", (0.5, 2.0))],
    NAMES: [("a b", ("a", "b")), (["a", "b"], ("a", "b"))],
}
MEANINGLESS = {
    INT: [2.5, "3.5", "three", True, [3], math.nan, math.inf, torch.arange(2), object(), b"3"],
    FLOAT: ["much", True, [1.0], math.nan, "inf", torch.ones(2), object()],
    STR: [3, b"a", ["a"], object()],
    LISTED: [3, object()],
    FLAG: ["no", 7, [True], 0.5, object()],
    **dict.fromkeys((SIZE, PLACE), [3, (1,), (1, 2, 3), "64 x 48", (8.5, 9), ("a", "b"), (True, 9), object()]),
    INTERVAL: [3, (1,), (1, 2, 3), "0 2", ("a", "b"), object()],
    NAMES: [3, [3], object()],
}


@pytest.mark.parametrize("name", ROWS)
def test_values_with_a_plain_meaning_are_taken_and_others_refused_by_name(name):
    row = ROWS[name]
    for given, meant in PLAIN[row.type]:
        found = row.checked(name, given)
        assert found == meant and type(found) is type(meant)
        assert row.checked(name, row.type.write(found)) == found  # as a PNG has it
    for given in MEANINGLESS[row.type]:
        refused(f"^{name} .* is not {row.type.words}$", row.checked, name, given)
    pairs = row.type in (INTERVAL, SIZE, PLACE)
    if row.low > -math.inf:
        low = (row.low - 1, 9) if pairs else row.low - 1
        refused(f"^{name} must be (at least|from) {row.low}.*, got ", row.checked, name, low)
    if row.high < math.inf:
        refused(
            f"^{name} must be from .* to {row.high}, got ",
            row.checked,
            name,
            (9, row.high + 1) if pairs else row.high + 1,
        )


@pytest.mark.parametrize(
    "seeds", [{"seed": None}, {"seed": "0"}, {"seeds": np.arange(2)}, {"seeds": torch.arange(2)}, {"seeds": ["0", 1.0]}]
)
def test_generate_takes_them_too(tiny_model, seeds):
    given = {"steps": "2", "width": 32.0, "batch_size": np.int64(1)}
    expected = tiny_model.generate(["5", "6"], steps=2, batch_size=1)
    assert tiny_model.generate((prompt for prompt in "56"), **seeds, **given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 5}, "seeds must be a list of seeds, not 5"),
        ({"seeds": [0, 0.5]}, "seed 0.5 is not an integer"),
        ({"prompts": None}, "prompts must be a list of prompts, not None"),
        ({"prompts": {"a": 1}}, "prompts must be a list of prompts, not {'a': 1}"),
        ({"prompts": ["5", 6]}, "prompt 6 is not text"),
        ({"negative": 6}, "prompt 6 is not text"),
        ({"image": Path("5.png")}, "images are PIL images, as PIL.Image.open reads them, got PosixPath"),
        ({"image": np.zeros((32, 32))}, "images are PIL images, as PIL.Image.open reads them, got ndarray"),
        ({"guide": 3}, "guide must be a function, got 3"),
        ({"callback": "print"}, "callback must be a function, got 'print'"),
    ],
)
def test_other_arguments_of_generate_are_refused_by_name(tiny_model, given, message):
    refused(message, tiny_model.generate, **{"prompts": ["5", "6"], "steps": 1} | given)


@pytest.mark.parametrize("own", [{"height": 16, "width": 16.0}, {"scale": None, "width": 16, "height": "16"}])
def test_a_models_own_settings_are_completed(model, own):
    model.defaults = own
    assert model.generate(["5"], steps=2)[0].size == (16, 16)
    assert LatentDiffusion(**TINY | {"defaults": own}).defaults == DEFAULTS | {"height": 16, "width": 16}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"steps": "ten"}, "steps 'ten' is not an integer"),
        ({"height": 0}, "height must be at least 1, got 0"),
        ({"interval": 3}, "interval 3 is not two numbers"),
        ({"interval": (5, 1)}, "interval ends before it begins: got 5 to 1"),
        ({"eta": 1}, r"unknown settings \['eta'\]"),
    ],
)
def test_a_models_own_settings_are_checked(model, tmp_path, own, message):
    model.defaults |= own  # a dict, which anyone may change
    refused(message, model.generate, ["5"])
    save_file(tmp_path / "a.safetensors", model.state_dict(), {"target": model.target, "params": model.config})
    refused(f"a.safetensors' has a configuration that cannot be built: .*{message}", load, tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", [name for name in ROWS if ROWS[name].type in (INT, FLOAT) and ROWS[name].flags])
def test_options_have_the_range_of_their_setting(name, capsys):
    row, parser = ROWS[name], image_parser("", "", "out", classes=True)
    add_init_image_options(parser)
    low = -1 if name == "seed" else row.low  # a random one
    for value, words in ((low - 1, f"at least {low:g}"), (row.high + 1, f"at most {row.high:g}"), ("nan", "not a")):
        if value not in (-math.inf, math.inf):
            with pytest.raises(SystemExit):
                parser.parse_args([row.flags[0], str(value)])
            assert words in capsys.readouterr().err


def test_guidance_towards_what_is_perturbed_is_refused():
    refused("pag must be at least 0, got -1", make_guide, None, pag=-1)


def test_none_is_not_given():
    assert from_keywords({"rescale": None, "steps": 3}) == Settings(steps=3)
