"""Editing by attention, without training: `attention_maps`, `overlay`, and Prompt-to-Prompt, `prompt_to_prompt`; for
given images by inversion: `invert_images`, and null-text optimisation, `null_text` and `null_text_guidance`."""

from importlib import import_module
from typing import Any

_HOMES = {"attention_maps": "maps", "overlay": "maps", "prompt_to_prompt": "prompts"}
_HOMES |= dict.fromkeys(("invert_images", "null_text", "null_text_guidance"), "inversion")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `ldm.editing.settings` imports no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ldm.editing' has no attribute {name!r}")
    return getattr(import_module(f"ldm.editing.{_HOMES[name]}"), name)
