"""Class pictures: what the model itself draws for the class's prompt before it is tuned (Ruiz et al. 2022, sec. 3.3).

They are PNG files named class-KEY-SEED.png, where the key stands for everything that decides them (model, prompt, size,
sampling) but the seed, and each carries its recipe. So a folder can hold those of many models and prompts, and a second
run finds its own; any other picture there is the user's.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ldm.data.folder import find_pictures
from ldm.inference.draw import draw, own_recipe
from ldm.inference.png import read_png_text, save_png
from ldm.inference.recipe import Recipe, plan
from ldm.latent_diffusion import LatentDiffusion

DRAWN = re.compile(r"class-[0-9a-f]{8}-\d{5,}\.png")


def users_pictures(folder: Path) -> list[str]:
    """Names of the pictures below the folder that were not drawn for a class; none if there is no such folder."""
    try:
        paths = find_pictures(folder)
    except FileNotFoundError:
        return []
    return [path.relative_to(folder).as_posix() for path in paths if not DRAWN.fullmatch(path.name)]


def collect(
    model: LatentDiffusion,
    folder: Path,
    prompts: Sequence[str],
    count: int | None,
    usual: int,
    size: int,
    scale: float,
    batch_size: int,
    keep: Sequence[str] | None = None,
    known: Sequence[str] = (),
) -> dict[str, str | None]:
    """`count` pictures of a class in the folder and their captions: those that are not ours first, the rest drawn.

    The prompts share what is drawn evenly. Pictures that are not ours are captioned with the prompt if there is one
    alone; if there are several, they need captions of their own, and have none here.

    count: None takes all that are not ours, or draws the usual number where there are none.
    keep: prompts besides the class's, of which as many pictures are drawn. None takes those `known` of the model where
    all of the class's are drawn; who brings his own has chosen what is kept.
    """
    own = users_pictures(folder)
    if count is None:
        count = len(own) if own else usual
    found = dict.fromkeys(own[:count], prompts[0]) if len(prompts) == 1 else dict.fromkeys(own[:count])
    missing = count - len(own)
    if own and missing > 0:
        print(f"{folder} holds {len(own)} pictures of the class; the model draws {missing} more")
    if keep is None:
        keep = () if own else known
    for asked, number in ((prompts, missing), ([one for one in keep if one not in prompts], count)):
        for i, prompt in enumerate(asked):
            share = len(range(i, number, len(asked)))
            if share:
                names = draw_class_pictures(model, folder, prompt, share, size, scale, batch_size)
                found |= dict.fromkeys(names, prompt)
    return found


def draw_class_pictures(
    model: LatentDiffusion, folder: Path, prompt: str, count: int, size: int, scale: float, batch_size: int
) -> list[str]:
    """Names of `count` pictures of the prompt in the folder, size x size pixels; those that are not there are drawn.

    Picture i has seed i. They are written one by one, whole or not at all, so that an interrupted run goes on.

    scale: of guidance. Raises ValueError for a size that the model cannot make, OSError when a file cannot be written.
    """
    from tqdm import tqdm

    first = own_recipe(model, "" if model.path is None else model.path.stem, scale=scale, height=size, width=size)
    recipes = plan(first, [prompt], count, batch_size)
    key = hashlib.sha256(_whatever_the_batch(recipes[0]).to_text().encode()).hexdigest()[:8]
    names = [f"class-{key}-{recipe.seed:05}.png" for recipe in recipes]
    missing = [i for i, name in enumerate(names) if not _is_there(folder / name, recipes[i])]
    if not missing:
        return names
    folder.mkdir(parents=True, exist_ok=True)
    start = missing[0] - recipes[missing[0]].batch_position  # whole batches, so that the recipes say what was done
    for drawn in tqdm(draw(model, recipes[start:]), total=count - start, desc="class pictures", unit="picture"):
        path = folder / names[start + drawn.place]
        if start + drawn.place in missing:
            save_png(drawn.image, path, drawn.recipe.to_text())
    return names


def _whatever_the_batch(recipe: Recipe) -> Recipe:
    """The recipe without its place in a batch, which moves the last bits of a picture only, and without its seed."""
    return replace(recipe, seed=0, index=0, batch_size=1, batch_position=0, batch_prompts=1, prompt_position=0)


def _is_there(path: Path, recipe: Recipe) -> bool:
    try:
        return _whatever_the_batch(Recipe.from_text(read_png_text(path))) == _whatever_the_batch(recipe)
    except (FileNotFoundError, ValueError):  # none, or damaged: drawn anew
        return False
