"""X/Y grids: one prompt and seed under several values of one or two settings, on a labelled sheet."""

import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.inference.recipe import Recipe
from ldm.settings import STR, Guidance, Setting, listed, setting_rows
from ldm.spelling import did_you_mean

if TYPE_CHECKING:  # they import torch
    from PIL import Image

    from ldm.latent_diffusion import LatentDiffusion

_ROWS = {name: row for name, row in setting_rows(Recipe).items() if row.flags}
# The name of a setting, or of one of its options, -> the setting's; and words of the prompt.
_NAMES = {"prompt": "prompt"}
_NAMES |= {flag.lstrip("-").replace("-", "_"): name for name, row in _ROWS.items() for flag in (name, *row.flags)}


class Axis(NamedTuple):
    """A setting and its values in the columns, or in the rows, of a grid."""

    name: str
    values: Sequence[Any]

    def label(self, value: Any) -> str:
        if self.name == "prompt":
            return value
        text = str(value).removesuffix(".0") if isinstance(value, float) else _ROWS[self.name].type.write(value)
        return f"{self.name.replace('_', ' ')} {text}"


class Cell(NamedTuple):
    """A place of a grid: the labels of its column and its row, and what its image is made of."""

    column: str
    row: str
    prompt: str
    settings: dict[str, Any]  # of a `Recipe`


def axis(name: str, values: Sequence[Any], without: Collection[str] = ()) -> Axis:
    """Return the axis of a setting, its values checked; ValueError for an unknown one, or a value that it cannot have.

    Args:
        name: a setting of an image or an option of it, or `prompt`: words, of which the first are in the prompt, and
            are replaced by each.
        without: settings that it cannot be.
    """
    names = {name: own for name, own in _NAMES.items() if own not in without}
    own = names.get(str(name).lstrip("-").replace("-", "_"))
    if own is None:
        known = ", ".join(dict.fromkeys(names.values()))
        raise ValueError(f"a grid over {name!r} is not possible: the settings are {known}{did_you_mean([name], names)}")
    row = _ROWS.get(own, Setting(STR, "Prompt"))
    found = [row.checked(own, value) for value in listed(own, values)]
    if not found or len(set(found)) < len(found):
        raise ValueError(f"a grid over {name} needs one or several different values, got {reprlib.repr(found)}")
    return Axis(own, found)


def read_axis(text: str) -> Axis:
    """Read an axis as `--grid` has it: "steps=5,10,20"; values that contain commas are separated by |."""
    name, _, values = text.partition("=")
    parts = [part.strip() for part in values.split("|" if "|" in values else ",")]
    if not values:
        raise ValueError(f"--grid {text!r} needs a setting and its values: --grid steps=5,10,20")
    return axis(name, parts)


def grid_cells(prompts: Sequence[str], axes: Sequence[Axis]) -> list[Cell]:
    """Return the cells row by row: the first axis makes the columns; the second one, or the prompts, make the rows."""
    if not axes:
        raise ValueError("a grid needs one or two settings, and their values")
    if len(axes) > 2 or (len(axes) == 2 and len(prompts) > 1):
        found = f"{len(axes)} settings and {len(prompts)} prompts" if len(prompts) > 1 else f"{len(axes)} settings"
        raise ValueError(f"a grid has columns and rows, not {found}: give two settings, or one and several prompts")
    if len({one.name for one in axes}) < len(axes):
        raise ValueError(f"a grid needs two different settings, not {axes[0].name} twice")
    first, cells = axes[0], []
    rows = [(axes[1], value) for value in axes[1].values] if len(axes) == 2 else [(None, prompt) for prompt in prompts]
    for other, value in rows:
        for column in first.values:
            chosen = {first.name: column} | ({} if other is None else {other.name: value})
            prompt = prompts[0] if other is not None else value
            for one in axes:
                if one.name == "prompt":
                    prompt = _replaced(prompt, one.values[0], chosen.pop("prompt"))
            label = other.label(value) if other is not None else value if len(prompts) > 1 else ""
            cells.append(Cell(first.label(column), label, prompt, chosen))
    return cells


def _replaced(prompt: str, old: str, new: str) -> str:
    pattern = rf"(?<!\w){re.escape(old)}(?!\w)"
    if not isinstance(prompt, str) or not re.search(pattern, prompt) or (prompt and not old):
        raise ValueError(f"the prompt {prompt!r} does not contain {old!r}, the first of the words to replace it by")
    return re.sub(pattern, lambda _: new, prompt)


def labelled_grid(cells: Sequence[Cell], images: "Sequence[Image.Image]") -> "Image.Image":
    """Return the images of the cells on one sheet with the labels of their columns and rows."""
    from ldm.labels import Row, labelled_rows

    columns = len(dict.fromkeys(cell.column for cell in cells))
    rows = [
        Row(cells[first].row, images[first : first + columns], [cell.column for cell in cells[first : first + columns]])
        for first in range(0, len(cells), columns)
    ]
    return labelled_rows(rows, side=128)


def xy_grid(model: "LatentDiffusion", prompt: str, axes: Mapping[str, Sequence[Any]], **settings: Any) -> "Image.Image":
    """Generate an image for each combination of the settings' values, on one labelled sheet.

        ldm.xy_grid(model, "a handwritten digit five", {"steps": [5, 10], "scale": [1, 2, 4]}, seed=3).save("grid.png")

    Args:
        axes: one or two settings of `generate`, or `seed`, `negative` or `prompt` (words, of which the first are in the
            prompt, and are replaced by each), with their values: those of the columns, and of the rows.
        settings: of `generate`, for all images.

    Raises:
        ValueError: for a setting that is unknown, a value that it cannot have, or words that the prompt does not have.
    """
    if not isinstance(axes, Mapping):
        raise ValueError(f"axes must be a mapping of settings to their values, got {reprlib.repr(axes)}")
    chosen = [axis(name, values, without=setting_rows(Guidance)) for name, values in axes.items()]
    if twice := [one.name for one in chosen if one.name in settings]:
        raise ValueError(f"{twice[0]} has no effect beside a grid over it")
    cells = grid_cells([prompt], chosen)
    return labelled_grid(cells, [model.generate([cell.prompt], **settings | cell.settings)[0] for cell in cells])
