"""The settings of Prompt-to-Prompt and of inversion, each once: for Python, the command line and PNGs. It
imports no torch."""

from dataclasses import dataclass

from ldm.settings import FLOAT, INT, INTERVAL, NAMES, setting


@dataclass(frozen=True, kw_only=True)
class Editing:
    """What the edited image takes over from the first one: arguments of `prompt_to_prompt`.

    Intervals are shares of the time, from 0 at the first step to 1 after the last; of the steps, where these are evenly
    spaced in time.
    """

    # fmt: off
    cross_steps: tuple[float, float] = setting(
        (0.0, 0.8), INTERVAL, "Cross steps", "share of the steps in which words have the attention that they have in "
        "the first image", "--cross-steps --cross_replace_steps", "0 0.8", 0, 1)
    self_steps: tuple[float, float] = setting(
        (0.0, 0.4), INTERVAL, "Self steps", "share of the steps in which small layers have the first image's attention "
        "to itself", "--self-steps --self_replace_steps", "0 0.4", 0, 1)
    pooled_steps: tuple[float, float] = setting(
        (0.0, 0.1), INTERVAL, "Pooled steps", "share of the steps in which the UNet has the pooled text of --prompt, "
        "if it takes that beside the words", "--pooled-steps", "0 0.1", 0, 1)
    blend: tuple[str, ...] = setting(
        (), NAMES, "Blend", "words of either prompt: where nothing attends to them the first image stays", "--blend")
    threshold: float = setting(
        0.3, FLOAT, "Blend threshold", "attention to those words from which on a place changes, of the highest one",
        "--blend-threshold", "0.3", 0, 1, "blend")
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class Inverting:
    """How an image is inverted: arguments of `invert_images` and `null_text`."""

    # fmt: off
    corrections: int = setting(
        1, INT, "Corrections", "in each step of the inversion predict the noise so many times again, at its upper end",
        "--corrections", "1", 0)
    null_steps: int = setting(
        10, INT, "Null steps", "steps of the optimizer in each denoising step", "--null-steps", "10", 1)
    # fmt: on
