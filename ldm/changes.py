"""What differs in a model from the file that it was loaded from, as its images' recipes name it. Imports no torch."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import Any, NamedTuple


class Change(NamedTuple):
    """One change: another part, a setting, a LoRA, learned words."""

    kind: str  # "lora", "words"; "vae", "unet", "text_encoder", "config", "vocab"; or the name of a setting
    name: str = ""  # of the file or the words, or a setting's value
    hash: str = ""  # `file_hash` of the file
    strength: float | None = None  # of a LoRA

    def current(self) -> "Change | None":
        """Return the change as it now is, or None if it was undone. (LoRAs that are not merged may be changed.)"""
        return self

    def __str__(self) -> str:
        """Return its text in a recipe, such as `lora bold 0123456789 at 0.5`."""
        short = "" if self.strength is None else f"{self.strength:g}"
        strength = short and f"at {short if float(short) == self.strength else repr(self.strength)}"
        return " ".join(filter(None, (self.kind, self.name.replace("; ", ";"), self.hash, strength)))


_TEXT = re.compile(r"(\w+)(?: (.*?))??(?: ([0-9a-f]{10}))?(?: at (\S+))?", re.DOTALL)


def changes_to_text(changes: Iterable[Change]) -> str:
    return "; ".join(map(str, changes))


def changes_from_text(text: str) -> tuple[Change, ...]:
    """Read what `changes_to_text` wrote; ValueError for any other text."""
    found = []
    for part in re.split(r"; (?=\w+ )", text):
        match = _TEXT.fullmatch(part)
        if match is None:
            raise ValueError(f"{part!r} is not a change of a model")
        kind, name, digits, strength = match.groups()
        found.append(Change(kind, name or "", digits or "", None if strength is None else float(strength)))
    return tuple(found)


def same_changes(first: Iterable[Change], second: Iterable[Change]) -> bool:
    """Return whether both make the same model, whatever their order (they commute) and the names of LoRA files."""

    def key(change: Change) -> tuple:
        name = "" if change.kind == "lora" else change.name
        return change.kind, name, change.hash, change.strength and f"{change.strength:g}"

    return Counter(map(key, first)) == Counter(map(key, second))


def settings_of_model(model: Any) -> dict[str, Any]:
    """Return what decides a model's images beside its networks and defaults: schedule, prediction, scale factor ..."""
    return {n: deepcopy(v) for n, v in model.config.items() if not n.endswith("_config") and n != "defaults"}


def changes_of(model: Any) -> tuple[Change, ...]:
    """Return what differs in a model from its file: what was recorded, and settings set on the object since."""
    recorded = [change for entry in model.changes if (change := entry.current()) is not None]
    before, now = model.loaded_settings, settings_of_model(model)
    changed = () if before is None else (name for name in now if now[name] != before[name])
    return (*recorded, *(Change(name, _value(now[name])) for name in changed))


def _value(value: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
