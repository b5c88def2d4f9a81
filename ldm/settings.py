"""The settings of sampling. Each is written down here once; `generate`, the command line, the recipes in PNG files and
the reference page follow from this table. It imports no torch.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from operator import index
from typing import Any, NamedTuple

from ldm.changes import changes_from_text, changes_to_text

ALL_SIGMAS = (0.0, math.inf)  # the guidance interval that leaves nothing out
OWN = "the model's own"


def _interval(text: str) -> tuple[float, float]:
    low, high = text.split(" to ")
    return float(low), float(high)


class Type(NamedTuple):
    """A type of settings: its name in the docs and in `--help`, and a value from and to the text in a PNG."""

    name: str
    metavar: str | tuple[str, ...] | None
    read: Callable[[str], Any]
    write: Callable[[Any], str] = str


INT, FLOAT, STR = Type("int", "N", int), Type("float", "X", float), Type("str", "TEXT", str)
FLAG = Type("bool", None, "True".__eq__)
INTERVAL = Type("two floats", ("LOW", "HIGH"), _interval, lambda value: f"{value[0]} to {value[1]}")
NAMES = Type("names", "NAME", lambda text: tuple(text.split()), " ".join)
CHANGES = Type("changes", None, changes_from_text, changes_to_text)


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


def setting(default: Any, type: Type, key: str, help: str = "", flags: str = "", *args: Any, **more: Any) -> Any:
    """Declare a dataclass field with that default and a `Setting` of the other arguments."""
    return field(default=default, metadata={"setting": Setting(type, key, help, tuple(flags.split()), *args, **more)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How `generate` samples an image."""

    # fmt: off
    steps: int | None = setting(None, INT, "Steps", "number of denoising steps", "--steps --ddim_steps", OWN, 1)
    sampler: str | None = setting(
        None, STR, "Sampler", "ddim, ddpm, ... (an unknown name lists them), or auto: ddpm for all timesteps, else "
        "ddim", "--sampler", OWN)
    scale: float | None = setting(
        None, FLOAT, "CFG scale", "guidance scale; 1 turns guidance off and halves the work", "--scale", OWN)
    width: int | None = setting(None, INT, "Width", "width in pixels", "--W", f"{OWN}, or the init image's", 1)
    height: int | None = setting(None, INT, "Height", "height in pixels", "--H", f"{OWN}, or the init image's", 1)
    strength: float | None = setting(
        None, FLOAT, "Denoising strength", "share of the denoising steps applied to the init image: 0 keeps it, 1 "
        "keeps almost nothing of it", "--strength", "1 with a mask or an instruction model, else 0.75", 0, 1)
    spacing: str | None = setting(
        None, STR, "Spacing", "of the timesteps: trailing, leading, linspace, quad, compvis, karras, exponential, or "
        'noise levels of your own: "999,749,499,249" or "sigmas 14,3.6,1.2"', "--spacing",
        f"{OWN}, or the sampler's")
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
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance besides the classifier-free one: arguments of `ldm.inference.guiders.make_guide`."""

    # fmt: off
    pag: float = setting(0.0, FLOAT, "PAG scale", "scale of perturbed-attention guidance", "--pag", "0, which is off")
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
    known = setting_rows(Settings)
    for name in given:
        if name in setting_rows(Guidance):
            raise TypeError(f"{name} is an argument of make_guide: give generate its result as guide=")
        if name not in known:
            from ldm.spelling import nearest_name  # only a mistake needs it

            near = nearest_name(name, known)
            hint = f"the settings are {', '.join(known)}" if near is None else f"did you mean {near!r}?"
            raise TypeError(f"unknown setting {name!r}; {hint}")
        if given[name] is not None and not _is_number(given[name], known[name].type):
            kind = "an integer" if known[name].type is INT else "a finite number"
            raise ValueError(f"{name} {given[name]!r} is not {kind}")
    return Settings(**{name: value for name, value in given.items() if value is not None})


def _is_number(value: Any, type: Type) -> bool:
    try:
        return type not in (INT, FLOAT) or math.isfinite(index(value) if type is INT else value)
    except TypeError:
        return False


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
