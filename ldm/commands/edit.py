"""Edit images by their prompts: replace, add, strengthen, weaken or silence words; show what each word attends to.

ldm edit --prompt "a thin digit seven" --to "a bold digit seven"
ldm edit --prompt "a bold digit seven" --reweight "bold=2"
ldm edit --prompt "a bold digit seven" --silence bold
ldm edit --prompt "a bold digit seven" --show-attention

Prompt-to-Prompt (Hertz et al. 2022): an image of --prompt and its edited version are generated together from one seed,
and the second takes over attention of the first one. It needs no training and takes any model of texts. Files:
OUTDIR/samples, each image before its edited version; OUTDIR/grid-0000.png, the images above their edited versions; with
--show-attention OUTDIR/attention-0000.png, where each word of a prompt is attended to (red: most).
"""

import argparse
import json
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.cli import Parser, int_range
from ldm.editing.settings import Editing
from ldm.inference.options import add_model_options, add_settings, load_model, settings_of
from ldm.inference.recipe import plan
from ldm.inference.run import OutputFolder, check_memory
from ldm.settings import checked, setting_rows

SAMPLING = "negative steps sampler scale spacing final_sigma eta interval rescale clip_skip plain".split()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("edit")
    add = group.add_argument
    add("--prompt", default="a thin digit seven", metavar="TEXT", help="of the first image (a thin digit seven)")
    add("--to", metavar="TEXT", help="the edited prompt: words replace those in their places, or are added (--prompt)")
    add("--reweight", action="append", default=[], metavar="WORD=X", help="the edited image has X times a word of it")
    add("--silence", action="append", default=[], metavar="WORD", help="nothing attends to this word of it; repeatable")
    add_settings(group, *setting_rows(Editing), of=Editing)
    add("--show-attention", action="store_true", help="save what each word is attended to by")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--n_samples", type=int_range(1), default=1, metavar="N", help="pairs of images, all at once (1)"
    )
    add_settings(group, "seed", "height", "width")
    add_settings(parser.add_argument_group("sampling (what is not given is the checkpoint's own)"), *SAMPLING)
    add_model_options(parser)
    add = parser.add_argument_group("files").add_argument
    add("--outdir", type=Path, default=Path("outputs/edit-samples"), metavar="DIR", help="(outputs/edit-samples)")
    add("--enlarge", type=int_range(1, 64), metavar="N", help="repeat each pixel N times in all files (1)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    weights = dict(map(read_weight, args.reweight))
    if len(weights) < len(args.reweight) or set(weights) & set(args.silence):
        raise ValueError("a word needs one --reweight or --silence: of several one alone would have an effect")
    edits = args.to is not None or bool(weights or args.silence)
    given = {name: getattr(args, name) for name in setting_rows(Editing) if getattr(args, name) is not None}
    if not edits and not args.show_attention:
        raise ValueError("nothing to edit: give --to, --reweight or --silence, or --show-attention")
    if args.to == args.prompt and not (weights or args.silence):
        raise ValueError(f"--to is --prompt, {args.to!r}, so nothing is edited: give --to other words than those")
    if not edits and given:
        raise ValueError(f"{', '.join(given)} would have no effect: give --to, --reweight or --silence, too")
    if args.compile:
        raise ValueError("--compile would have no effect: attention that is seen or edited is not compiled")
    own = Editing(**checked(Editing, given))
    if not own.blend and "threshold" in given:
        raise ValueError("--blend-threshold has no effect without --blend")
    output = OutputFolder(args.outdir, enlarge=args.enlarge)

    model: Any = load_model(args)
    from ldm.editing import attention_maps, prompt_to_prompt
    from ldm.inference.generate import default_recipe, generate_run, progress

    first, n = default_recipe(model, model.path.stem, **settings_of(args)), args.n_samples
    prompts = [args.prompt, *([args.prompt if args.to is None else args.to] if edits else [])]
    check_memory(first, n * len(prompts), n * len(prompts))
    recipes = plan(first, prompts, n, n * len(prompts))  # one batch, of pairs with the same seeds
    recipes = [replace(recipe, seed=first.seed + i % n, index=i % n) for i, recipe in enumerate(recipes)]
    with ExitStack() as hooks, progress(recipes) as callback:
        if args.show_attention:
            texts = [recipe.prompt for recipe in recipes]
            maps = hooks.enter_context(attention_maps(model, texts, plain=first.plain))
        if edits:
            options = {"weights": weights, "silence": args.silence, "pairs": n, "plain": first.plain}
            hooks.enter_context(prompt_to_prompt(model, *prompts, **options, **given))
        images = [made.image for made in generate_run(model, recipes, callback)]
    how = [*(f"--reweight={text}" for text in args.reweight), *(f"--silence={text}" for text in args.silence)]
    how += [f"{row.flags[0]}={row.type.write(getattr(own, name))}" for name, row in setting_rows(Editing).items()]
    texts = [recipe.to_text() for recipe in recipes]
    texts[n:] = [f"{text}, Edit of: {json.dumps(shlex.join([args.prompt, *how]))}" for text in texts[n:]]
    order = [i + k for i in range(n) for k in range(0, len(images), n)]  # each image before its edited version
    saved = [output.save_sample(images[i], texts[i]) for i in order]
    saved.append(output.save_grid(images, n, texts[0]))
    if args.show_attention:
        saved.append(output.save_strip(maps.sheet(images, args.enlarge), texts[0], "attention-"))
    for path in saved:
        print(path)


def read_weight(text: str) -> tuple[str, float]:
    """Read WORD=X. ValueError for anything else."""
    word, equals, number = text.rpartition("=")
    try:
        return word, float(number if word else "")
    except ValueError:
        raise ValueError(f"--reweight takes WORD=X, with a number X, got {text!r}") from None
