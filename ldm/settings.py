"""The settings of sampling. Each is written down here once; `generate`, the command line, the recipes in PNG files and
the reference page follow from this table. It imports no torch.
"""

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ldm.changes import changes_from_text, changes_to_text
from ldm.checks import LARGEST_FLOAT

ALL_SIGMAS = (0.0, math.inf)  # the guidance interval that leaves nothing out
OWN = "the model's own"
# The settings of a model without its own; spacing None is the sampler's, interval None everywhere.
DEFAULTS: dict[str, Any] = {"height": 512, "width": 512, "steps": 50, "scale": 7.5, "sampler": "ddim"}
DEFAULTS |= {"spacing": None, "final_sigma": "zero", "interval": None}


class Type(NamedTuple):
    """A type of settings.

    Args:
        name, metavar: in the docs, and in `--help`.
        words: what a value is, for messages.
        read: a value of Python's, numpy's or torch's, or the text in a PNG, as this type. It raises for anything else.
        write: a value as the text in a PNG.
    """

    name: str
    metavar: str | tuple[str, ...] | None
    words: str
    read: Callable[[Any], Any]
    write: Callable[[Any], str] = str


def _integer(value: Any) -> int:
    number = int(_no_bool(value))
    if number != value and not isinstance(value, str):
        raise ValueError
    return number


def _number(value: Any) -> float:
    number = value if type(value) in (int, float) else float(_no_bool(value))
    if not abs(number) <= LARGEST_FLOAT:
        raise ValueError
    return number


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError
    return value


def _flag(value: Any) -> bool:
    return {"True": True, "1": True, "False": False, "0": False}[str(value).capitalize()]


def _interval(value: Any) -> tuple[float, float]:
    low, high = value.split(" to ") if isinstance(value, str) else value
    return float(low), float(high)


def _pair(value: Any) -> tuple[int, int]:
    first, second = value.split() if isinstance(value, str) else value
    return _integer(first), _integer(second)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return str(value)


def _listed(value: Any) -> str:
    return value if isinstance(value, str) else ",".join(map(str, value))


def _names(value: Any) -> tuple[str, ...]:
    return tuple(value.split()) if isinstance(value, str) else tuple(map(_text, value))


INT, FLOAT = Type("int", "N", "an integer", _integer), Type("float", "X", "a finite number", _number)
STR, LISTED = Type("str", "TEXT", "text", _text), Type("str", "TEXT", "text or a list of numbers", _listed)
FLAG = Type("bool", None, "True or False", _flag)
INTERVAL = Type("two floats", ("LOW", "HIGH"), "two numbers", _interval, lambda value: f"{value[0]} to {value[1]}")
SIZE = Type("two ints", ("HEIGHT", "WIDTH"), "two integers", _pair, lambda value: f"{value[0]} {value[1]}")
PLACE = SIZE._replace(metavar=("TOP", "LEFT"))
INTEGERS = (INT, SIZE, PLACE)
NAMES = Type("names", "NAME", "a list of names", _names, " ".join)
CHANGES = Type("changes", None, "a record of changes", changes_from_text, changes_to_text)


class Setting(NamedTuple):
    """What is known of a setting besides its name and default.

    Args:
        type: see `Type`.
        key: its name in the text of a PNG.
        help: one line.
        flags: its options on the command line, the best first; the others are old names, which `--help` leaves out.
        unset: what is used when it is not given, in words.
        low, high: its range.
        needs: the setting without which it has no effect.
        always: whether the PNG has it with the default value too.
    """

    type: Type
    key: str
    help: str = ""
    flags: tuple[str, ...] = ()
    unset: str = ""
    low: float = -math.inf
    high: float = math.inf
    needs: str = ""
    always: bool = False

    @property
    def range(self) -> str:
        """Return the range in words: "at least 1", "0 to 1", or ""."""
        if self.high < math.inf:
            return f"{self.low:g} to {self.high:g}"
        return f"at least {self.low:g}" if self.low > -math.inf else ""

    def checked(self, name: str, value: Any) -> Any:
        """Return the value as this setting's type, from text too. ValueError by that name if it is none, or too far."""
        try:
            found = self.type.read(value)
        except (TypeError, ValueError, KeyError, OverflowError, RuntimeError):  # torch raises all of them
            raise ValueError(f"{name} {reprlib.repr(value)} is not {self.type.words}") from None
        numbers = found if self.type in (INTERVAL, SIZE, PLACE) else (found,) if self.type in (INT, FLOAT) else ()
        if not all(self.low <= number <= self.high for number in numbers):
            limit = f"from {self.range}" if self.high < math.inf else self.range
            raise ValueError(f"{name} must be {limit}, got {reprlib.repr(value)}")
        if self.type is INTERVAL and found[0] > found[1]:
            raise ValueError(f"{name} ends before it begins: got {found[0]:g} to {found[1]:g}")
        return found


# Of a run of images, not of one: arguments of `generate` beside the settings.
SEED = Setting(INT, "Seed", "seed of the first image; -1 as an option: a random one", ("--seed",), "0", 0, always=True)
BATCH_SIZE = Setting(INT, "Batch size", low=1, always=True)


def setting(default: Any, type: Type, key: str, help: str = "", flags: str = "", *args: Any, **more: Any) -> Any:
    """Declare a dataclass field with that default and a `Setting` of the other arguments."""
    return field(default=default, metadata={"setting": Setting(type, key, help, tuple(flags.split()), *args, **more)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How `generate` samples an image."""

    # fmt: off
    steps: int | None = setting(
        None, INT, "Steps", "number of denoising steps", "--steps --ddim_steps --num_inference_steps", OWN, 1)
    sampler: str | None = setting(
        None, STR, "Sampler", "ddim, ddpm, ... (an unknown name lists them), DPM++ 2M Karras, ..., or auto: ddpm for "
        "all timesteps, else ddim", "--sampler", OWN)
    scale: float | None = setting(
        None, FLOAT, "CFG scale", "guidance scale; 1 turns guidance off and halves the work",
        "--scale --cfg --cfg_scale --guidance_scale", OWN)
    width: int | None = setting(None, INT, "Width", "width in pixels", "--W --width", f"{OWN}, or the init image's", 1)
    height: int | None = setting(
        None, INT, "Height", "height in pixels", "--H --height", f"{OWN}, or the init image's", 1)
    strength: float | None = setting(
        None, FLOAT, "Denoising strength", "share of the denoising steps applied to the init image: 0 keeps it, 1 "
        "keeps almost nothing of it", "--strength", "1 with a mask or an instruction model, else 0.75", 0, 1)
    spacing: str | None = setting(
        None, LISTED, "Spacing", "of the timesteps: trailing, leading, linspace, quad, compvis, karras, exponential, "
        'or noise levels of your own: "999,749,499,249" or "sigmas 14,3.6,1.2"', "--spacing",
        f"{OWN}, or the sampler's")
    final_sigma: str | None = setting(
        None, STR, "Final sigma", "noise level after the last step: zero, or sigma_min, the model's smallest, where "
        "CompVis stops", "--final-sigma", OWN)
    eta: float | None = setting(
        None, FLOAT, "Eta", "share of fresh noise in each step: 0 is DDIM, 1 is DDPM", "--eta --ddim_eta",
        "the sampler's own", 0, 1)
    interval: tuple[float, float] | None = setting(
        None, INTERVAL, "Guidance interval", "guidance only at noise levels sigma from LOW to HIGH", "--interval",
        OWN, 0)
    rescale: float = setting(
        0.0, FLOAT, "Guidance rescale", "guidance rescale (Lin et al. 2024)", "--rescale", "0", 0, 1)
    fixed_code: bool = setting(
        False, FLAG, "Fixed code", "start every image from the first image's noise", "--fixed_code")
    clip_skip: int = setting(
        1, INT, "Clip skip", "which of CLIP's layers to read, counted back from the model's own", "--clip-skip", "1", 1)
    plain: bool = setting(
        False, FLAG, "Plain prompt", "take (brackets) and BREAK in prompts as words, not as syntax", "--plain")
    original_size: tuple[int, int] | None = setting(
        None, SIZE, "Original size", "Stable Diffusion XL: the size in pixels that the image shall look scaled from",
        "--original-size", "the image's", 1, 100_000)
    crop: tuple[int, int] | None = setting(
        None, PLACE, "Crop", "Stable Diffusion XL: the pixels that shall look cut off", "--crop", "0 0", 0, 100_000)
    aesthetic_score: float | None = setting(
        None, FLOAT, "Aesthetic score", "Stable Diffusion XL's refiner: how much people shall like the image, where "
        "the negative prompt has 2.5", "--aesthetic-score", "6", 0, 10)
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance besides the classifier-free one: arguments of `ldm.inference.guiders.make_guide`."""

    # fmt: off
    pag: float = setting(0.0, FLOAT, "PAG scale", "scale of perturbed-attention guidance", "--pag",
        "0, which is off", 0)
    pag_layers: tuple[str, ...] = setting(
        ("middle_block",), NAMES, "PAG layers", "layers whose self-attention is perturbed", "--pag-layers",
        "middle_block", needs="pag")
    threshold: float | None = setting(
        None, FLOAT, "Dynamic threshold", "percentile of dynamic thresholding, as a fraction: 0.995", "--threshold",
        "off", 0, 1)
    autoguide_scale: float = setting(
        2.0, FLOAT, "Autoguidance scale", "scale of autoguidance; 1 is off", "--autoguide-scale", "2",
        needs="autoguide_hash")
    classifier_scale: float = setting(
        1.0, FLOAT, "Classifier scale", "scale of classifier guidance; 0 is off", "--classifier-scale", "1",
        needs="classifier_hash")
    # fmt: on


def setting_rows(of: Any) -> dict[str, Setting]:
    """Return the settings of a dataclass by name."""
    return {f.name: f.metadata["setting"] for f in fields(of) if "setting" in f.metadata}


def from_keywords(given: Mapping[str, Any]) -> Settings:
    """Return settings from keyword arguments, of which None means not given. TypeError for an unknown name."""
    for name in given:
        if name in setting_rows(Guidance):
            raise TypeError(f"{name} is an argument of make_guide: give generate its result as guide=")
    return Settings(**checked(Settings, given))


def checked(of: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings of a dataclass that are not None, each as its type and in its range (else ValueError).

    ValueError for one without the one that it needs, too; TypeError for an unknown name.
    """
    rows = setting_rows(of)
    for name in given:
        if name not in rows:
            from ldm.spelling import nearest_name  # only a mistake needs it

            flags = ((flag, key) for key, row in rows.items() for flag in (*row.flags, key))  # diffusers' names, too
            names = {flag.lstrip("-").replace("-", "_"): key for flag, key in flags} | {"negative_prompt": "negative"}
            hint = "" if (near := nearest_name(name, names)) is None else f"; did you mean {names[near]}?"
            raise TypeError(f"unknown setting {name!r}{hint}; the settings are {', '.join(rows)}")
        if given[name] is not None and (need := rows[name].needs) in rows and not given.get(need):
            raise ValueError(f"{name} has no effect without {need}")
    return {name: rows[name].checked(name, value) for name, value in given.items() if value is not None}


def of_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's own settings, checked: `DEFAULTS` with those `given` that are not None in their place."""
    if unknown := sorted(set(given) - set(DEFAULTS)):
        raise ValueError(f"defaults has unknown settings {unknown}: a model's own settings are {list(DEFAULTS)}")
    return DEFAULTS | checked(Settings, given)


def check_size(width: int, height: int, own_width: int, own_height: int) -> None:
    """Raise ValueError for images that are absurdly larger than a model's own: their work grows with the 4th power."""
    most = 64 * max(own_width, own_height)
    if max(width, height) > most:
        raise ValueError(f"{width} x {height} pixels are far too many for this model: a side has at most {most:,}")


def listed(name: str, values: Any) -> Sequence[Any]:
    """Return the values as a list, or another sequence. ValueError for one value alone."""
    if isinstance(values, Sequence) and not isinstance(values, str | bytes):
        return values
    try:
        if isinstance(values, str | bytes | Mapping):
            raise TypeError
        return list(values)
    except TypeError:
        raise ValueError(f"{name} must be a list of {name}, not {reprlib.repr(values)}") from None


def documented(function: Callable[..., Any]) -> Callable[..., Any]:
    """Write the settings' names and meanings into the docstring of a function with `**settings`."""
    lines = "".join(f"\n            {name}: {row.help}{_unset(row)}." for name, row in setting_rows(Settings).items())
    if function.__doc__ is not None:  # python -OO
        function.__doc__ = function.__doc__.replace("**settings: `ldm.settings.Settings`.", "**settings:" + lines)
    return function


def help_text(row: Setting) -> str:
    """Return the help of a setting's option."""
    return row.help + ("" if row.unset.startswith(OWN) else _unset(row))


def _unset(row: Setting) -> str:
    return f" ({row.unset})" if row.unset else ""
