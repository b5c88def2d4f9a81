"""txt2img: counts, seeds, numbers, what each PNG says, making it again; every mistake is one sentence."""

import copy
import re

import numpy as np
import pytest
import torch
from conftest import TINY, refused
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from script_runs import check_reproduced, load_script, names, pixels, recipe, runner, samples

import ldm
from ldm.inference.again import read_image_text
from ldm.inference.generate import generate_again
from ldm.inference.recipe import save_image
from ldm.labels import GAP, LINE
from ldm.latent_diffusion import LatentDiffusion
from ldm.saving import save

txt2img = load_script("txt2img")


@pytest.fixture
def generate(tiny_checkpoint, tmp_path):
    return runner(txt2img, tiny_checkpoint, tmp_path)


@pytest.mark.smoke
def test_one_image_and_its_grid_from_the_checkpoints_own_settings(generate, tiny_model):
    out = generate(steps=None)
    assert names(out) == ["grid-0000.png", "samples"] and names(out / "samples") == ["00000.png"]
    own, made = tiny_model.defaults, recipe(out / "samples" / "00000.png")
    assert (made.prompt, made.negative, made.seed, made.index) == ("a handwritten digit five", "", 0, 0)
    assert (made.height, made.width) == (own["height"], own["width"])
    assert (made.steps, made.scale, made.sampler) == (own["steps"], own["scale"], own["sampler"])
    assert pixels(out / "samples" / "00000.png").shape[:2] == (own["height"], own["width"])
    assert len(made.model_hash) == 10 and int(made.model_hash, 16) >= 0


def test_the_image_is_that_of_the_library(generate, tiny_checkpoint):
    out = generate("--prompt", "a seven", "--negative-prompt", "bold", "--scale", 2, "--seed", 5)
    (image,) = ldm.load(tiny_checkpoint, device="cpu").generate(
        ["a seven"], negative="bold", steps=3, scale=2.0, seed=5
    )
    assert np.array_equal(pixels(samples(out)[0]), np.asarray(image))


def test_sampling_as_latent_diffusions_paper_shows_it(generate):
    """DDIM, eta 1, scale 10 (Rombach et al. 2022, figure 5, with 200 steps): with eta 1 it is the ancestral chain."""
    options = ("--scale", 10, "--sampler")
    ddim = generate(*options, "ddim", "--eta", 1, steps=50, out="ddim")
    ancestral, plain = (generate(*options, name, steps=50, out=name) for name in ("ddpm", "euler"))
    ddim, ancestral, plain = (pixels(samples(out)[0]).astype(int) for out in (ddim, ancestral, plain))
    assert np.abs(ddim - ancestral).max() <= 1 < np.abs(ddim - plain).max()


def test_counts_seeds_and_numbers_go_on_across_samples_iterations_and_runs(generate):
    out = generate("--n_samples", 2, "--n_iter", 2, "--seed", 7, "--batch-size", 3)
    assert [(r.seed, r.index) for r in map(recipe, samples(out))] == [(7, 0), (8, 1), (9, 2), (10, 3)]
    assert len({pixels(path).tobytes() for path in samples(out)}) == 4
    generate("--n_samples", 2)
    assert names(out / "samples") == [f"{i:05}.png" for i in range(6)]
    assert names(out) == ["grid-0000.png", "grid-0001.png", "samples"]


def test_batch_size_only_bounds_the_memory(generate, tiny_model, monkeypatch):
    sizes = []
    decode = ldm.LatentDiffusion.decode
    monkeypatch.setattr(ldm.LatentDiffusion, "decode", lambda self, z: sizes.append(len(z)) or decode(self, z))
    whole, parts = generate("--n_samples", 5, out="whole"), generate("--n_samples", 5, "--batch-size", 2, out="parts")
    assert sizes == [5, 2, 2, 1]
    for one, other in zip(samples(whole), samples(parts), strict=True):
        # float32 sums in another order: at most one level where a value falls on the edge between two
        assert np.abs(pixels(one).astype(int) - pixels(other)).max() <= 1


def test_an_image_of_a_run_can_be_generated_alone(generate):
    run, alone = generate("--n_samples", 3, "--seed", 4, out="run"), generate("--seed", 6, out="alone")
    assert np.abs(pixels(samples(run)[2]).astype(int) - pixels(samples(alone)[0])).max() <= 1


def test_prompt_file(generate, tmp_path):
    (tmp_path / "prompts.txt").write_text("a one\n\n  a two  \n\n")
    out = generate("--from_file", tmp_path / "prompts.txt", "--n_samples", 2)
    made = [recipe(path) for path in samples(out)]
    assert [r.prompt for r in made] == ["a one", "a one", "a two", "a two"]
    assert [r.seed for r in made] == [0, 1, 2, 3]
    assert read_image_text(out / "grid-0000.png").endswith("Grid: 2x2")


def test_grid_columns(generate):
    out = generate("--n_samples", 4, "--n_rows", 3)
    assert read_image_text(out / "grid-0000.png").endswith("Grid: 3x2")
    width, height = Image.open(out / "grid-0000.png").size
    assert width > height


def test_small_grids_are_enlarged_and_samples_are_not(generate):
    out = generate("--n_samples", 2)
    assert Image.open(out / "grid-0000.png").size == (2 * 8 * 32 + 2, 8 * 32)
    assert Image.open(samples(out)[0]).size == (32, 32)
    twice = generate("--n_samples", 2, "--enlarge", 2, out="twice")
    assert Image.open(twice / "grid-0000.png").size == (2 * 2 * 32 + 2, 2 * 32)
    assert np.array_equal(pixels(samples(twice)[1])[::2, ::2], pixels(samples(out)[1]))
    assert recipe(samples(twice)[1]) == recipe(samples(out)[1])  # which is made again at 32 x 32


def test_settings_of_guidance_without_guidance_are_named(generate, capsys):
    generate("--scale", 1, "--negative-prompt", "two", "--rescale", 0.5)
    said = capsys.readouterr().err
    assert all(f"{option} has no effect at guidance scale 1" in said for option in ("--negative-prompt", "--rescale"))
    generate("--scale", 2, "--negative-prompt", "two", "--rescale", 0.5, out="guided")
    assert "no effect" not in capsys.readouterr().err


def test_skipping(generate):
    assert names(generate("--skip-save", out="grid")) == ["grid-0000.png"]
    assert names(generate("--skip_grid", out="samples")) == ["samples"]
    refused("--skip_save and --skip_grid together save nothing", generate, "--skip_save", "--skip_grid")
    refused("--n_rows would have no effect: no grid", generate, "--n_samples", 2, "--n_rows", 1, "--skip_grid")


@pytest.mark.parametrize("eta", [0, 1])
def test_fixed_code_starts_all_images_from_the_first_ones_noise(generate, tmp_path, eta):
    (tmp_path / "prompts.txt").write_text("a one\na two\na one\n")
    out = generate(
        "--from-file", tmp_path / "prompts.txt", "--fixed-code", "--eta", eta, "--batch-size", 2, "--seed", 3
    )
    first, second, third = map(pixels, samples(out))
    assert not np.array_equal(first, second)
    # without fresh noise, the same prompt from the same start is the same image, in another batch too
    assert (np.abs(first.astype(int) - third).max() <= 1) == (eta == 0)


VARIETY = {
    "plain": [],
    "batch": ["--n_samples", 5, "--batch-size", 3, "--seed", 11],
    "ddpm": ["--n_samples", 2, "--sampler", "ddpm", "--rescale", 0.7, "--interval", 0.1, 3],
    "fixed": ["--n_samples", 5, "--batch-size", 2, "--fixed_code", "--eta", 0.5, "--seed", 2],
    "prompt": ["--prompt", ' "Steps: 5", ö 五 🎨\n\nend ', "--negative-prompt", "a: b, c\nd", "--scale", 3.3],
    "plms": ["--plms", "--spacing", "linspace"],
    "compvis": ["--spacing", "compvis", "--ddim_steps", 5, "--ddim_eta", 0.25, "--precision", "autocast"],
}


@pytest.mark.parametrize("options", VARIETY.values(), ids=VARIETY)
def test_every_image_can_be_made_again_to_the_byte(generate, options):
    steps = None if "--ddim_steps" in options else 3
    check_reproduced(generate, samples(generate(*options, steps=steps)), "--skip_grid")


LENGTHS = {
    "plain": ([], [2, 3, 1, 3, 1]),
    "fixed": (["--fixed_code"], [2, 3, 1, 3, 1]),
    "longer negative": (["--negative-prompt", "a bold handwritten one"], [3, 3, 3, 1]),
    "no guidance": (["--negative-prompt", "a bold handwritten one", "--scale", 1], [2, 3, 1, 3, 1]),
}


@pytest.mark.parametrize(("options", "sizes"), LENGTHS.values(), ids=LENGTHS)
def test_prompts_of_several_lengths_can_be_made_again_in_batches_of_the_same_shape(
    generate, tiny_checkpoint, tmp_path, monkeypatch, options, sizes
):
    """Of 1, 2, 2, 1, 1 chunks: the tiny model's hold 14 tokens, mostly letters, and the last prompt is full."""
    decode, decoded = ldm.LatentDiffusion.decode, []
    monkeypatch.setattr(ldm.LatentDiffusion, "decode", lambda self, z: decoded.append(len(z)) or decode(self, z))
    prompts = ["(a one:1.3)", "a bold handwritten two", "three BREAK [four] five", "a seven", "1234567 one four"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    out = generate("--from-file", tmp_path / "prompts.txt", "--n_samples", 2, "--batch-size", 3, *options)
    assert decoded == sizes
    made = [recipe(path) for path in samples(out)]
    assert [r.batch_size for r in made] == [size for size in sizes for _ in range(size)]
    model = ldm.load(tiny_checkpoint, device="cpu")
    for path, one in zip(samples(out), made, strict=True):
        decoded.clear()
        ((_, again, _),) = generate_again(model, one)
        assert np.array_equal(np.asarray(again), pixels(path)) and set(decoded) == {one.batch_size}
    (again,) = samples(generate("--from-png", path, out="again", steps=None))
    assert np.array_equal(pixels(again), pixels(path))


def test_prompts_taken_literally(generate, tmp_path):
    weighted, literal = (
        generate("--prompt", "(a one:1.4)", out="weighted"),
        generate("--prompt", "(a one:1.4)", "--plain"),
    )
    assert not np.array_equal(pixels(samples(weighted)[0]), pixels(samples(literal)[0]))
    assert recipe(samples(literal)[0]).plain and "Plain prompt: True" in read_image_text(samples(literal)[0])
    (again,) = samples(generate("--from-png", samples(literal)[0], out="again", steps=None))
    assert np.array_equal(pixels(samples(literal)[0]), pixels(again))


@pytest.mark.parametrize("options", [[], ["--fixed_code"]], ids=["plain", "fixed"])
def test_every_image_of_many_prompts_can_be_made_again_to_the_byte(generate, tmp_path, options):
    (tmp_path / "prompts.txt").write_text("a one\na two\na three\na one\n")
    out = generate("--from-file", tmp_path / "prompts.txt", "--n_samples", 2, "--batch-size", 5, *options)
    check_reproduced(generate, samples(out))


def test_an_image_made_again_with_a_change(generate):
    out = generate("--n_samples", 2, "--sampler", "ddpm", "--prompt", "a one")
    again = generate("--from-png", samples(out)[1], "--scale", 4, "--sampler", "ddim", out="changed", steps=None)
    made = recipe(samples(again)[0])
    assert (made.prompt, made.seed, made.scale, made.sampler, made.eta, made.steps) == ("a one", 1, 4.0, "ddim", 0.0, 3)


def test_what_each_png_says(generate):
    out = generate("--prompt", "a one", "--negative-prompt", "bold", "--scale", 2.5, "--seed", 9, "--n_samples", 2)
    prompt, negative, settings = read_image_text(samples(out)[1]).split("\n")
    assert (prompt, negative) == ("a one", "Negative prompt: bold")
    pairs = dict(pair.split(": ") for pair in settings.split(", "))
    assert pairs["Seed"] == "10" and pairs["Index"] == "1" and pairs["CFG scale"] == "2.5" and pairs["Steps"] == "3"
    assert pairs["Sampler"] == "ddim" and pairs["Eta"] == "0.0" and pairs["Version"] == f"ldm {ldm.__version__}"
    assert {"Size", "Model hash", "Model", "Spacing"} <= pairs.keys()


def test_another_format(generate):
    png, webp = (samples(generate("--format", name, out=name)) for name in ("png", "webp"))
    assert webp[0].suffix == ".webp" and np.array_equal(pixels(webp[0])[..., 0], pixels(png[0]))
    (again,) = samples(generate("--from-png", webp[0], out="again", steps=None))
    assert np.array_equal(pixels(again), pixels(png[0])) and read_image_text(webp[0]) == read_image_text(png[0])


def test_strip(generate, tiny_model):
    out = generate("--strip", "--n_samples", 3, "--batch-size", 2, "--enlarge", 3, steps=4)
    assert names(out) == ["grid-0000.png", "samples", "strip-0000.png", "strip-0001.png", "strip-0002.png"]
    side = 3 * tiny_model.defaults["width"]
    for i, sample in enumerate(samples(out)):
        strip = pixels(out / f"strip-{i:04}.png")[..., 0]
        final = pixels(sample).astype(int)
        assert final.shape == (side, side)
        tops = [2 * LINE, 5 * LINE + side + GAP, 7 * LINE + 2 * (side + GAP)]  # under 1 + 1, 1 + 2, 1 + 1 lines
        shown = [[strip[y : y + side, x : x + side] for x in (GAP, GAP + 3 * (side + GAP))] for y in tops]
        # noising begins with the image; drawing ends in it: x_t at sigma 0, and below the x0 predicted last
        for same in (shown[0][0], shown[1][1], shown[2][1]):
            assert np.abs(same - final).max() <= 1
        for noised in (shown[0][1], shown[1][0]):
            assert np.abs(noised - final).max() > 1
        assert read_image_text(out / f"strip-{i:04}.png") == read_image_text(sample)


def test_each_prompt_is_one(generate):
    out = generate("--prompt", "a one", "--prompt", "--x")
    assert [recipe(path).prompt for path in samples(out)] == ["a one", "--x"]


def test_a_random_seed_is_printed(generate, capsys):
    out = generate("--seed", -1, "--n_samples", 2)
    said = capsys.readouterr().err.split("\n")[0]
    first, second = (recipe(path).seed for path in samples(out))
    assert said == f"seed {first}" and second == first + 1


def test_a_learned_word_in_no_prompt_is_said(generate, tmp_path, capsys):
    save_file({"<x>": torch.zeros(1, 32)}, tmp_path / "x.safetensors")
    save_file({"(y)": torch.zeros(1, 32)}, tmp_path / "y.safetensors")
    words = ["--embedding", str(tmp_path / "x.safetensors"), "--embedding", str(tmp_path / "y.safetensors")]
    for prompt, unused in (("(y) five", ["'<x>'", "'(y)'"]), ("<x> \\(y\\)", []), ("<x>", ["'(y)'"])):
        generate(*words, "--prompt", prompt, "--skip_grid", out=f"{len(prompt)}")
        assert re.findall("no prompt contains the learned word (.*), so", capsys.readouterr().err) == unused
    generate(*words, "--prompt", "<x>", "--negative-prompt", "\\(y\\)", out="negative")
    assert "learned word" not in capsys.readouterr().err.replace("learned words of", "")


def test_a_prompt_that_nobody_gave_is_said(generate, capsys):
    generate()
    assert "the prompt is 'a handwritten digit five'" in capsys.readouterr().err
    generate("--prompt", "a one", out="other")
    assert capsys.readouterr().err == ""


def test_sizes_that_the_unet_lacks_are_cut_from_larger_images(generate, tiny_model):
    assert (tiny_model.downsampling, tiny_model.multiple) == (4, 8)
    cut, whole = (samples(generate("--W", 36, "--H", height, out=str(height)))[0] for height in (28, 32))
    assert pixels(cut).shape[:2] == (28, 36) and np.array_equal(pixels(cut), pixels(whole)[:28])
    (again,) = samples(generate("--from-png", cut, out="again", steps=None))
    assert np.array_equal(pixels(again), pixels(cut))


@pytest.mark.parametrize(
    ("name", "sampler", "spacing"),
    [("DPM++ 2M Karras", "dpmpp_2m", "karras"), ("Euler a", "euler_a", "trailing"), ("DDIM", "ddim", "trailing")],
)
def test_samplers_by_the_web_uis_names(generate, name, sampler, spacing):
    named, plain = generate("--sampler", name, out="a"), generate("--sampler", sampler, "--spacing", spacing, out="b")
    assert read_image_text(samples(named)[0]) == read_image_text(samples(plain)[0])
    assert np.array_equal(pixels(samples(named)[0]), pixels(samples(plain)[0]))
    assert recipe(samples(generate("--sampler", name, "--spacing", "quad", out="c"))[0]).spacing == "quad"


def test_an_image_of_the_web_ui_is_made(generate, tmp_path):
    text = "a one\nSteps: 3, Sampler: DPM++ 2M, Schedule type: {}, CFG scale: 2, Seed: 1, Size: 32x32, Version: v1.9.0"
    for schedule in ("Karras", "Automatic", "Beta"):
        save_image(Image.new("L", (32, 32)), tmp_path / f"{schedule}.png", text.format(schedule))
    for schedule in ("Karras", "Automatic"):
        (made,) = samples(generate("--from-png", tmp_path / f"{schedule}.png", out=schedule, steps=None))
        assert (recipe(made).sampler, recipe(made).spacing) == ("dpmpp_2m", "karras")
    refused("unknown spacing 'Beta'", generate, "--from-png", tmp_path / "Beta.png", steps=None)
    generate("--from-png", tmp_path / "Beta.png", "--spacing", "karras", out="given", steps=None)


def test_batches_that_no_machine_could_make(generate, tmp_path):
    made = recipe(samples(generate())[0]).changed(batch_size=10**9)
    save_image(Image.new("L", (32, 32)), tmp_path / "many.png", made.to_text())
    refused("1,000,000,000 at a time, take at least", generate, "--from-png", tmp_path / "many.png", steps=None)


MISTAKES = {
    "more than memory": (["--n_samples", "1000000000"], "1,000,000,000 images of 32 x 32 pixels.*GB of memory"),
    "far too high": (["--H", "1000000"], "32 x 1000000 pixels are far too many .* at most 2,048"),
    "a long prompt": (["--prompt", "a" * 1_048_577], "a prompt has 1,048,577 characters"),
    "sampler": (["--sampler", "eular"], "unknown sampler 'eular'.*ddim"),
    "plms": (["--plms", "--eta", "0.5"], "adds no noise"),
    "spacing": (["--spacing", "curly"], "spacing.*curly"),
    "steps": (["--steps", "100000"], "100000"),
    "height": (["--H", "33"], "height 33"),
    "width": (["--W", "7"], "width 7"),
    "channels": (["--C", "77"], "--C 77 does not fit this model"),
    "factor": (["--f", "77"], "--f 77 does not fit this model"),
    "clip skip": (["--clip-skip", "9"], "clip_skip 9 does not exist"),
    "device": (["--device", "gpu"], "device 'gpu' is not available"),
    "checkpoint": (["--ckpt", "missing.safetensors"], "missing.safetensors"),
    "negative prompt": (["--prompt", "a\nNegative prompt: b"], "give that as the negative prompt"),
    "two ways": (["--from-png", "x.png", "--n_samples", "2"], "leave out --n_samples"),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_found_before_anything_is_generated(generate, tmp_path, options, message):
    refused(message, generate, *options, error=(ValueError, OSError))
    assert not list(tmp_path.glob("out/**/*.png"))


def test_a_yaml_in_place_of_what_the_checkpoint_says(generate, tmp_path, tiny_model):
    path = tmp_path / "model.yaml"
    config = {"model": {"target": "ldm.latent_diffusion.LatentDiffusion", "params": tiny_model.config}}
    OmegaConf.save(config, path)
    generated = samples(generate("--config", path, "--C", tiny_model.channels, "--f", tiny_model.downsampling))
    assert len(generated) == 1 and "Changes: config" in Image.open(generated[0]).text["parameters"]
    refused("made with config .* in the model, which now has nothing", generate, "--from-png", generated[0])
    for content in ("a: [", "just text", "other: 1", "model: 3", "${nothing"):
        path.write_text(content)
        refused("configuration", generate, "--config", path)
    refused("missing.yaml", generate, "--config", tmp_path / "missing.yaml", error=OSError)


def test_a_yaml_describes_a_checkpoint_that_does_not_describe_itself(generate, tmp_path, tiny_model):
    save_file(tiny_model.state_dict(), tmp_path / "bare.safetensors")
    config = {"model": {"target": "ldm.latent_diffusion.LatentDiffusion", "params": tiny_model.config}}
    OmegaConf.save(config, tmp_path / "model.yaml")
    out = generate("--ckpt", tmp_path / "bare.safetensors", "--config", tmp_path / "model.yaml", out="bare")
    assert np.array_equal(pixels(samples(out)[0]), pixels(samples(generate())[0]))


OPTION_MISTAKES = {
    "unknown": (["--stepz", "3"], "unknown option --stepz; did you mean --steps?"),
    "no images": (["--n_samples", "0"], "0 is out of range"),
    "no batch": (["--batch-size", "0"], "0 is out of range"),
    "precision": (["--precision", "double"], "choose from"),
    "prompt and file": (["--prompt", "a", "--from-file", "b"], "not allowed with"),
}


@pytest.mark.parametrize(("options", "message"), OPTION_MISTAKES.values(), ids=OPTION_MISTAKES)
def test_mistakes_in_options(options, message, capsys):
    with pytest.raises(SystemExit) as end:
        txt2img.main(options)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.count("\n") == 1


def test_a_file_in_the_way_is_found_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.load", None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write into the output folder"):
        txt2img.main(["--outdir", str(tmp_path / "file" / "out")])


def test_prompt_files_that_hold_nothing(tmp_path):
    options = ["--from-file", str(tmp_path / "prompts.txt"), "--outdir", str(tmp_path / "out")]
    refused("prompts.txt", txt2img.main, options, error=OSError)
    for content in (b"", b"\n\n", b"\xff\xfe"):
        (tmp_path / "prompts.txt").write_bytes(content)
        refused("prompts.txt", txt2img.main, options)
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_are_none(generate, tmp_path, tiny_checkpoint):
    path = tmp_path / "broken.safetensors"
    refused("broken.safetensors", generate, "--ckpt", path, error=OSError)
    for content in (b"", b"text", tiny_checkpoint.read_bytes()[:-100]):
        path.write_bytes(content)
        refused("broken.safetensors", generate, "--ckpt", path)


def test_images_that_cannot_be_made_again(generate, tmp_path):
    out = generate()
    Image.new("L", (32, 32)).save(tmp_path / "plain.png")
    refused("plain.png carries no text", generate, "--from-png", tmp_path / "plain.png")
    refused("grid-0000.png cannot be made again: it is a grid", generate, "--from-png", out / "grid-0000.png")
    with pytest.raises(OSError):
        generate("--from-png", tmp_path / "missing.png")


def test_an_image_of_another_model(generate, tmp_path, tiny_model):
    (path,) = samples(generate())
    other = copy.deepcopy(tiny_model)
    next(other.parameters()).data += 0.1
    ldm.save(other, tmp_path / "other.safetensors")
    refused("made by the model .* --ckpt", generate, "--from-png", path, "--ckpt", tmp_path / "other.safetensors")


def test_what_was_generated_before_an_interruption_is_there(generate, tmp_path, monkeypatch):
    decode, calls = ldm.LatentDiffusion.decode, []

    def interrupted(self, z):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decode(self, z)

    monkeypatch.setattr(ldm.LatentDiffusion, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate("--n_samples", 6, "--batch-size", 2)
    assert names(tmp_path / "out" / "samples") == [f"{i:05}.png" for i in range(4)]


def test_guidance_is_part_of_the_recipe(generate):
    """`--from-png X` alone makes the image again, and `--from-png X --pag 2` changes the scale alone."""
    options = ["--pag", 3, "--pag-layers", "output_blocks", "--threshold", 0.9]
    (first,), (plain,) = samples(generate(*options, out="guided")), samples(generate())
    assert not np.array_equal(pixels(first), pixels(plain))
    assert "PAG scale: 3.0, PAG layers: output_blocks, Dynamic threshold: 0.9" in read_image_text(first)
    assert "PAG" not in read_image_text(plain)
    (again,) = samples(generate("--from-png", first, out="again", steps=None))
    assert np.array_equal(pixels(again), pixels(first)) and recipe(again) == recipe(first)
    (weaker,) = samples(generate("--from-png", first, "--pag", 2, out="weaker", steps=None))
    (direct,) = samples(generate("--pag", 2, *options[2:], out="direct"))
    assert np.array_equal(pixels(weaker), pixels(direct)) and not np.array_equal(pixels(weaker), pixels(first))
    (off,) = samples(generate("--from-png", plain, "--pag", 3, *options[2:], out="on", steps=None))
    assert np.array_equal(pixels(off), pixels(first))  # what an image was made without can be added
    refused("--pag-layers has no effect without --pag", generate, "--pag-layers", "output_blocks")


def test_a_weaker_model_is_part_of_the_recipe(generate, tmp_path, tiny_model):
    weak = copy.deepcopy(tiny_model)
    for p in weak.model.parameters():
        p.data += 0.1 * p.std(correction=0)
    ldm.save(weak, tmp_path / "weak.safetensors")
    file = ["--autoguide", tmp_path / "weak.safetensors"]
    (first,), (plain,) = samples(generate(*file, "--autoguide-scale", 3, out="guided")), samples(generate())
    (again,) = samples(generate("--from-png", first, *file, out="again", steps=None))
    assert np.array_equal(pixels(again), pixels(first)) and not np.array_equal(pixels(first), pixels(plain))
    (other,) = samples(generate("--from-png", first, *file, "--autoguide-scale", 2, out="other", steps=None))
    assert recipe(other).autoguide_scale == 2 and not np.array_equal(pixels(other), pixels(first))
    (one,) = samples(generate(*file, "--autoguide-scale", 1, out="one"))
    (same,) = samples(generate("--from-png", one, out="same", steps=None))  # which needs no file
    assert np.array_equal(pixels(same), pixels(one)) and read_image_text(same) == read_image_text(one)
    (off,) = samples(generate("--from-png", first, "--autoguide-scale", 1, out="off", steps=None))
    assert np.array_equal(pixels(off), pixels(plain))
    ldm.save(tiny_model, tmp_path / "weak.safetensors", torch.float16)
    for again in (file, []):
        refused("with a file of hash .* for --autoguide: give that file again", generate, "--from-png", first, *again)
    refused("--autoguide-scale has no effect without --autoguide", generate, "--autoguide-scale", 3)


def test_recipes_of_the_version_that_kept_guidance_among_the_changes(generate, tmp_path):
    (plain,) = samples(generate())
    text = read_image_text(plain).replace(", Model: ", ", Changes: pag 3 output_blocks; threshold 0.9, Model: ")
    save_image(Image.open(plain), tmp_path / "old.png", text)
    (again,) = samples(generate("--from-png", tmp_path / "old.png", out="again", steps=None))
    (now,) = samples(generate("--pag", 3, "--pag-layers", "output_blocks", "--threshold", 0.9, out="now"))
    assert np.array_equal(pixels(again), pixels(now)) and recipe(again) == recipe(now)


def test_an_unconditional_model(tmp_path):
    alone = {**TINY, "unet_config": {**TINY["unet_config"], "params": {**TINY["unet_config"]["params"]}}}
    for name in ("num_classes", "adm_in_channels", "context_dim", "use_spatial_transformer"):
        alone["unet_config"]["params"].pop(name)
    model = LatentDiffusion(**{**alone, "cond_stage_config": None})
    save(model, tmp_path / "alone.safetensors")
    run = runner(txt2img, tmp_path / "alone.safetensors", tmp_path)
    refused("this model is unconditional and takes no prompt", run, "--prompt", "a five", "--scale", 1)
    (tmp_path / "prompts").write_text("a five")
    refused("this model is unconditional and takes no prompt", run, "--from-file", tmp_path / "prompts", "--scale", 1)
    assert recipe(run("--scale", 1) / "samples" / "00000.png").prompt == ""
