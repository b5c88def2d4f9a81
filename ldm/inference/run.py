"""A run of a sampling script, from parsed options to files. It imports torch only when the options are known good."""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin

from ldm.cli import check_folder
from ldm.inference.options import load_model, settings_of
from ldm.inference.recipe import Recipe, plan, save_image
from ldm.settings import Guidance, setting_rows

if TYPE_CHECKING:  # they import torch
    from ldm.diffusion.guidance import Guide
    from ldm.inference.init_image import InitImage
    from ldm.inference.xy_grid import Cell
    from ldm.latent_diffusion import LatentDiffusion

BATCH = 16  # images at a time


def generate_files(args: argparse.Namespace, init: "InitImage | None" = None) -> None:
    """Generate and save what the options ask for, from the init image if there is one.

    Whatever is wrong with options, input files or the output folder is found before torch is imported.
    """
    if args.from_png is not None and args.n_samples * args.n_iter != 1:
        raise ValueError("--from-png makes one image: leave out --n_samples and --n_iter")
    if args.skip_save and args.skip_grid and not args.strip:
        raise ValueError("--skip_save and --skip_grid together save nothing: leave one of them out")
    if args.n_rows > 0 and (args.skip_grid or args.from_png is not None):
        raise ValueError("--n_rows would have no effect: no grid of several images is made")
    prompts = chosen_prompts(args)
    if args.classifier is not None and args.from_png is None and not any(prompts):
        raise ValueError("--classifier needs a class to guide towards: give --class")
    made = None
    if args.from_png is not None:
        from ldm.inference.again import check_init_image, read_recipe

        made = read_recipe(args.from_png)
        check_init_image(made, init, args.from_png)
        args.precision = made.precision if args.precision is None else args.precision
        prompts = [made.prompt]
    cells = chosen_cells(args, prompts)
    check_format(args.format, prompts, init)
    output = OutputFolder(args.outdir, f".{args.format}", args.enlarge)

    model = load_checked(args, len(cells or prompts))
    from ldm.inference.generate import generate_again, generate_run, progress, steps_of

    runs = plan_runs(model, args, prompts, cells, made, init)
    firsts = [recipes[0] for recipes in runs]
    first, guides = firsts[0], build_guides(model, args, firsts)
    recorder, shown, saved = None, [], []
    if args.strip and steps_of(first) > 0:
        from ldm.inference.strip import StripRecorder

        recorder = StripRecorder(model, steps_of(first))
    with progress([recipe for recipes in runs for recipe in recipes], recorder) as callback:
        for recipes, guide in zip(runs, guides, strict=True):
            start = None if init is None else init.resized(recipes[0].width, recipes[0].height)
            if made is None:
                images = generate_run(model, recipes, callback, start, guide)
            else:
                images = generate_again(model, recipes[0], callback, start, guide)
            for recipe, image, index in images:  # each is saved as soon as it is there
                if not args.skip_save:
                    saved.append(output.save_sample(image, recipe.to_text()))
                if recorder is not None:
                    saved.append(output.save_strip(recorder.strip(index, args.enlarge), recipe.to_text()))
                if not args.skip_grid:
                    shown.append(image)
    if cells:
        from ldm.inference.xy_grid import labelled_grid

        saved.append(output.save_sheet(labelled_grid(cells, shown), f"{len(shown)} labelled", first.to_text()))
    elif shown:
        columns = args.n_rows if args.n_rows > 0 else args.n_samples
        saved.append(output.save_grid(shown, columns, first.to_text()))
    for path in saved:
        print(path)


def chosen_prompts(args: argparse.Namespace) -> list[str]:
    """Return the prompts that the options give, or the default one. ValueError for one that a PNG cannot hold."""
    prompts = [args.default_prompt] if args.prompts is None else args.prompts
    if args.from_file is not None:
        from ldm.inference.input_lines import read_lines

        prompts = read_lines(args.from_file, "prompt")
    longest = max(map(len, prompts))
    if longest > PngImagePlugin.MAX_TEXT_CHUNK:
        raise ValueError(f"a prompt has {longest:,} characters: readers of PNGs take {PngImagePlugin.MAX_TEXT_CHUNK:,}")
    return prompts


def chosen_cells(args: argparse.Namespace, prompts: Sequence[str]) -> "list[Cell]":
    """Return the cells of the grid that --grid asks for. ValueError for options that it leaves without effect."""
    if not args.grid:
        return []
    from ldm.inference.xy_grid import grid_cells, read_axis

    if args.n_samples * args.n_iter != 1:
        raise ValueError("--grid makes one image of each cell: leave out --n_samples and --n_iter")
    if args.skip_grid or args.strip or args.n_rows or args.enlarge:
        raise ValueError("--grid saves a labelled sheet: leave out --skip_grid, --strip, --n_rows and --enlarge")
    axes = list(map(read_axis, args.grid))
    for own in axes:
        if getattr(args, own.name, None) is not None:
            raise ValueError(f"{setting_rows(Recipe)[own.name].flags[0]} has no effect beside a --grid over it")
    return grid_cells(prompts, axes)


def check_format(name: str, prompts: Sequence[str], init: "InitImage | None") -> None:
    """Raise ValueError for what JPEG cannot hold: transparency, and texts of more than 65,533 bytes with the recipe."""
    if name == "jpg" and init is not None and init.mask is not None and init.image.mode == "RGBA":
        raise ValueError("the init image is transparent, and JPEG has no transparency: use --format png or webp")
    if name == "jpg" and max(map(len, prompts)) > 30_000:
        raise ValueError("a JPEG holds no prompt of more than 30,000 characters: use --format png or webp")


def load_checked(args: argparse.Namespace, prompts: int = 1) -> "LatentDiffusion":
    """Load the model that the options name. ValueError if CompVis's --C or --f do not agree with it."""
    size = BATCH if args.batch_size is None else args.batch_size
    model = load_model(args, batches=-(-prompts * args.n_samples * args.n_iter // size))
    for option, asked, own in (("--C", args.C, model.channels), ("--f", args.f, model.downsampling)):
        if asked not in (None, own):
            raise ValueError(f"{option} {asked} does not fit this model, whose own is {own}: leave it out")
    return model


def plan_runs(
    model: "LatentDiffusion",
    args: argparse.Namespace,
    prompts: list[str],
    cells: "Sequence[Cell]",
    made: Recipe | None,
    init: "InitImage | None",
) -> list[list[Recipe]]:
    """Return the recipes of each run: of each cell, or of all prompts together."""
    prompts = [cell.prompt for cell in cells] or prompts
    if made is None:
        prompts = usable_prompts(model, prompts, args)
    options, parts = [args], [prompts]
    if cells:
        options, parts = cell_options(args, cells), [[prompt] for prompt in prompts]
    hashes = {}
    if args.autoguide is not None or args.classifier is not None or made is not None:
        from ldm.inference.guiders import guide_hashes

        hashes = guide_hashes(args, made)
    runs = [plan_recipes(model, own, part, made, init, hashes) for own, part in zip(options, parts, strict=True)]
    firsts = [recipes[0] for recipes in runs]
    note_unused(options, firsts)
    if args.embedding and made is None:
        note_unused_words(model, prompts, firsts)
    if cells:
        from ldm.inference.generate import check_recipes

        check_recipes(model, firsts)  # before the first image is made
    return runs


def cell_options(args: argparse.Namespace, cells: "Sequence[Cell]") -> list[argparse.Namespace]:
    """Return the options of each cell, without those that need a setting which other cells have, and this one lacks."""
    options = [argparse.Namespace(**vars(args) | cell.settings) for cell in cells]
    for name, row in setting_rows(Recipe).items():
        if row.needs in cells[0].settings and any(getattr(own, row.needs) for own in options):
            for own in options:
                setattr(own, name, getattr(own, name) if getattr(own, row.needs) else None)
    return options


def plan_recipes(
    model: "LatentDiffusion",
    args: argparse.Namespace,
    prompts: list[str],
    made: Recipe | None,
    init: "InitImage | None",
    hashes: Mapping[str, str],
) -> list[Recipe]:
    """Return the recipes of a run, or that of one image again with the settings that are given, and these hashes."""
    from ldm.inference.generate import change_recipe, chunks, default_recipe

    settings = {**settings_of(args), **hashes}
    if init is None and settings["strength"] is not None:
        raise ValueError("strength has no effect without an init image, which the commands img2img and inpaint take")
    if init is not None:
        settings |= init.settings(args, model, made)
    if made is not None:
        recipe = change_recipe(made, model, batch_size=args.batch_size, prompt=prompts[0], **settings)
        check_memory(recipe, 1, recipe.batch_size)
        return [recipe]
    first = default_recipe(model, model.path.stem, **settings)
    batch_size = BATCH if args.batch_size is None else args.batch_size
    count = len(prompts) * args.n_samples * args.n_iter
    check_memory(first, count, count if first.fixed_code else min(batch_size, count), not args.skip_grid)
    return plan(first, prompts, args.n_samples * args.n_iter, batch_size, chunks(model, first, prompts))


def note_unused_words(model: "LatentDiffusion", prompts: Sequence[str], recipes: Sequence[Recipe] = ()) -> None:
    """Print which of the model's learned words no prompt has, nor a recipe's negative prompt that has an effect."""
    from ldm.conditioning.words import unused_words

    texts = [*prompts, *(recipe.negative for recipe in recipes if recipe.scale != 1)]
    plain = bool(recipes) and all(recipe.plain for recipe in recipes)
    for word in unused_words(model.cond_stage_model.tokenizer, texts, plain):
        print(f"note: no prompt contains the learned word {word!r}, so it has no effect", file=sys.stderr)


def check_memory(recipe: Recipe, count: int, at_once: int, grid: bool = True) -> None:
    """Raise ValueError for more images, or more at a time, than this machine's memory could ever hold.

    Of each image that is its recipe, 2 kB, and its three bytes a pixel on the grid, twice; of each one computed at the
    same time the state of its random numbers, 5 kB, and 16 features a pixel, fewer than any first stage has.
    """
    pixels = recipe.width * recipe.height
    needed = count * (2_000 + (6 * pixels if grid else 0)) + at_once * (5_000 + 64 * pixels)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 1 << 40
    if needed > pages:
        raise ValueError(
            f"{count:,} images of {recipe.width} x {recipe.height} pixels, {at_once:,} at a time, take at least "
            f"{needed / 1e9:,.0f} GB of memory, and this machine has {pages / 1e9:,.0f}"
        )


def note_unused(options: Sequence[argparse.Namespace], recipes: Sequence[Recipe]) -> None:
    """Print which settings have no effect: of guidance where its scale is 1, in any run; strength in one step."""
    for strength in sorted({recipe.strength for recipe in recipes if recipe.steps == 1 and recipe.strength}):
        if strength < 1:
            what = f"1 step is all of the steps at strength {strength:g}, too"
            print(f"note: {what}, so almost nothing of the init image is kept: give more --steps", file=sys.stderr)
    guided = (args.autoguide is not None or args.classifier is not None for args in options)
    if not any(guided) and all(recipe.scale == 1 and recipe.pag == 0 for recipe in recipes):
        for name in ("negative", "interval", "rescale"):
            if any(getattr(args, name) not in (None, "", 0) for args in options):
                option = setting_rows(Recipe)[name].flags[0]
                print(f"{option} has no effect at guidance scale 1", file=sys.stderr)


def usable_prompts(model: "LatentDiffusion", prompts: list[str], args: argparse.Namespace) -> list[str]:
    """Return the prompts, or empty ones for an unconditional model. ValueError for what the model does not take."""
    option = "layout" if getattr(args, "layout", None) else "class"
    needs = f"--{option} needs a {option}-conditional model"
    if args.classes and any(prompts) and hasattr(model.cond_stage_model, "tokenizer"):
        raise ValueError(f"{needs}: this one takes texts, so use the command txt2img")
    if hasattr(model.cond_stage_model, "n_classes") or getattr(model.cond_stage_model, "reads", "") == "boxes":
        model.condition(prompts)  # refuses what is not a class or layout of it, before any image is made
    if model.cond_stage_model is not None or args.classifier is not None or not any(prompts):
        for prompt in unknown_prompts(model.tokenizer, prompts)[:5]:
            print(f"note: the model was trained on none of the words of {prompt!r}", file=sys.stderr)
        if any(prompts) and args.ckpt is not None and args.prompts is None and args.from_file is None:
            print(f"no --prompt is given: the prompt is {prompts[0]!r}", file=sys.stderr)
        return prompts
    if args.classes:
        raise ValueError(f"{needs}, or --classifier: this one is unconditional")
    if args.prompts is not None or args.from_file is not None:
        raise ValueError("this model is unconditional and takes no prompt: leave it out, or use the command sample")
    return [""] * len(prompts)


def unknown_prompts(tokenizer: object, prompts: Sequence[str]) -> list[str]:
    """Return the prompts none of whose words was in the captions, by a vocabulary that was reduced to what they need.

    It splits a word of theirs into as few tokens as CLIP's does, and most others into more.
    """
    from ldm.conditioning.tokenizer import NUM_CLIP_MERGES, Tokenizer

    if not isinstance(tokenizer, Tokenizer) or not 100 < len(tokenizer.merges) < NUM_CLIP_MERGES:
        return []  # it has all words, or none

    full = cache(lambda: Tokenizer(cleaning=tokenizer.cleaning))  # made only for a word of several tokens

    def is_known(word: str) -> bool:
        tokens = tokenizer.encode(word)
        learned = max(tokens, default=0) > tokenizer.eos
        return learned or len(tokens) <= 1 or len(tokens) == len(full().encode(word))

    unknown = []
    for prompt in dict.fromkeys(prompts):
        words = re.findall(r"<\S+>|\w+", prompt)
        words = [word for word in words if len(word) > 2] or words  # a, of, in are in every vocabulary
        if words and not any(map(is_known, sorted(words, key=len))):
            unknown.append(prompt)
    return unknown


def build_guides(model: "LatentDiffusion", args: argparse.Namespace, recipes: Sequence[Recipe]) -> "list[Guide | None]":
    """Build each recipe's guidance besides the classifier-free one, with files loaded once; None where it has none."""
    if args.autoguide is None and args.classifier is None and all(r.pag == 0 and r.threshold is None for r in recipes):
        return [None] * len(recipes)
    from ldm.inference.guiders import load_classifier, load_weak, make_guide

    files: dict[str, Any] = {
        "weak": None if args.autoguide is None else load_weak(args.autoguide, model),
        "classifier": None if args.classifier is None else load_classifier(args.classifier, model),
    }
    off = {f"{name}_scale" for name in ("autoguide", "classifier") if getattr(args, name) is None}
    rows = {name: row.needs or name for name, row in setting_rows(Guidance).items() if name not in off}

    def given(recipe: Recipe) -> dict[str, Any]:
        return {name: getattr(recipe, name) for name, needed in rows.items() if not recipe.is_default(needed)}

    return [make_guide(model, **files, **given(recipe)) for recipe in recipes]


class OutputFolder:
    """A folder for images: samples/00000.png, grid-0000.png, strip-0000.png, ..., numbered on from those there.

    It is tried for writing before any work is done, and made with the first image. Each method returns the path that
    it wrote. All images are enlarged by `enlarge`; by None only those of small grids and strips.
    """

    def __init__(self, path: Path, suffix: str = ".png", enlarge: int | None = None) -> None:
        self.path, self.suffix, self.enlarge = path, suffix, enlarge
        self.next: dict[str, int] = {}  # prefix -> next number
        for folder in (path, path / "samples"):
            check_folder(folder)

    def save_sample(self, image: Image.Image, text: str) -> Path:
        if self.enlarge is not None:
            from ldm.images import enlarge

            image = enlarge(image, self.enlarge)
        return self._save(image, text, self.path / "samples", "", 5)

    def save_grid(self, images: Sequence[Image.Image], columns: int, text: str) -> Path:
        """Save the grid with the text of its first image and its own size."""
        from ldm.images import image_grid  # here, because it imports torch

        columns = min(columns, len(images))
        rows = -(-len(images) // columns)
        return self.save_sheet(image_grid(images, columns, factor=self.enlarge), f"{columns}x{rows}", text)

    def save_sheet(self, image: Image.Image, size: str, text: str) -> Path:
        return self._save(image, f"{text}, Grid: {size}", self.path, "grid-", 4)

    def save_strip(self, image: Image.Image, text: str, prefix: str = "strip-") -> Path:
        return self._save(image, text, self.path, prefix, 4)

    def save_animation(self, images: Sequence[Image.Image], text: str, per_second: float) -> Path:
        """Save the images and the way back as a GIF without end, enlarged as grids are."""
        from ldm.images import image_grid

        frames = [image_grid([image], 1, factor=self.enlarge) for image in (*images, *images[-2:0:-1])]
        more = {"append_images": frames[1:], "duration": round(1000 / per_second)}
        return self._save(frames[0], text, self.path, "animation-", 4, ".gif", **more)

    def _save(
        self, image: Image.Image, text: str, folder: Path, prefix: str, digits: int, suffix: str = "", **more: object
    ) -> Path:
        """Save under the next free number: one more than the highest there, so that a gap is never filled."""
        number = self.next[prefix] if prefix in self.next else _next_number(folder, prefix)
        while True:
            path = folder / f"{prefix}{number:0{digits}}{suffix or self.suffix}"
            self.next[prefix] = number = number + 1
            with suppress(FileExistsError):  # another run may write here too
                save_image(image, path, text, new=True, **more)
                return path


def _next_number(folder: Path, prefix: str) -> int:
    """Return one more than the highest number among the folder's images `PREFIXnnn.*`, 0 if there is none."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.(png|jpg|webp|gif)")
    matches = (pattern.fullmatch(entry.name) for entry in (folder.iterdir() if folder.exists() else ()))
    return max((int(match[1]) for match in matches if match), default=-1) + 1
