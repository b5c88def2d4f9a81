"""Whether a run can go on from what its folder holds: its settings, its data, and its saved state."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checks import few
from ldm.training.loop_settings import LoopSettings
from ldm.training.run_folder import RunFolder, flatten
from ldm.training.sharding import sharded

# Settings that a resumed run may change: they affect the training that remains, not the past or the data.
FREE = re.compile(
    r"loop\.(steps|batch_size|accumulate|precision|clip|lr_schedule\b.*|log_every|preview_every|save_every|"
    r"keep_every|keep_state|workers|validate_\w+|quality\b.*|quality_every|tensorboard|report_to|ema_device|compile)|"
    r"(loop|stage\.params)\.gradient_checkpointing|stage\.params\.(\w+_)?learning_rate\b.*|stage\.params\.preview.*|(stage|data)\.params\.cache_dir"
)


def is_finished(folder: RunFolder, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Return whether the result has enough steps; name what differs, and raise ValueError for what may not."""
    changed = differences(before, now)
    fixed = [key for key, values in changed.items() if not FREE.fullmatch(key) and not was_moved(*values)]
    if fixed:
        named = ", ".join(fixed[:5]) + (f" and {len(fixed) - 5} more" if len(fixed) > 5 else "")
        raise ValueError(
            f"{str(folder.path)!r} was started with other settings of {named}: resume with those, or "
            "choose another output folder"
        )
    names, steps = ", ".join(changed), now["loop"]["steps"]
    done = folder.result_steps(before["loop"].get("steps", 0))
    if done >= steps:
        note = f"finished, with {done} steps: without more (loop.steps) the new settings of {names} have no effect"
    elif done and not folder.state.exists():
        raise ValueError(
            f"the run in {str(folder.path)!r} is finished, with {done} steps, and its state was not kept "
            f"(loop.keep_state), so it cannot go on to {steps}: train {steps} steps in another output folder"
        )
    else:
        note = f"resumed with other settings of {names} than it was started with"
    if changed and folder.writes:
        print(f"{folder.path}: {note}", file=sys.stderr)
    return done >= steps


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {"a.b.0": (value before, value now)} of two configurations of a run, which may have been moved.

    The place of the run does not count: paths below its folder or its outdir are alike if they are so from there.
    """
    given, inner = [flatten(config) for config in (before, now)], [portable(config) for config in (before, now)]
    keys = sorted((given[0].keys() | given[1].keys()) - {"name", "outdir"})
    pairs = {key: (given[0].get(key), given[1].get(key)) for key in keys}
    return {k: pair for k, pair in pairs.items() if pair[0] != pair[1] and inner[0].get(k) != inner[1].get(k)}


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration, flattened, with paths below its run's folder or outdir relative to that folder."""
    outdir, found = str(config["outdir"]).rstrip("/"), flatten(config)
    places = {f"{outdir}/{config['name']}": ".", outdir: ".."}
    for key, value in found.items():
        for place, short in places.items():
            if isinstance(value, str) and f"{value}/".startswith(f"{place}/"):
                found[key] = short + value.removeprefix(place)
                break
    return found


def was_moved(before: Any, now: Any) -> bool:
    """Return whether two values are paths of one name, of which the first is gone and the second is there."""
    if not isinstance(before, str) or not isinstance(now, str):
        return False
    old, new = Path(before), Path(now)
    return old.name == new.name and len(old.parts) > 1 and not old.exists() and new.exists()


def restore(
    state: dict[str, Any],
    parts: Mapping[str, Any],
    settings: LoopSettings,
    content: Mapping[str, Any],
    folder: RunFolder,
) -> int:
    """Load a saved state into the parts of a run and return its step.

    Randomness and data order are functions of the step. A run that was saved in another precision than the fp16 it is
    resumed in begins with the scaler's initial scale.

    content: of the data set, as `contract.content_of` returns it.
    """
    if "optimizers" in state:  # as it was first saved in version 0.1.0
        state["stage"].pop("batches", None)
        optimizers = {f"optimizer_{k}": saved for k, saved in enumerate(state["optimizers"])}
        state |= {"networks": state["stage"], **optimizers}
    compare_content(state.get("data", content), content, folder)
    try:
        state = sharded(state, parts)
        for key, part in parts.items():
            if key == "order" and key not in state:  # of before it was saved
                part.seek(state["step"] * settings.accumulate)
            elif state.get(key) is not None or key != "scaler":
                part.load_state_dict(state[key])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError):
        raise ValueError(
            f"cannot resume from {str(folder.state)!r}, which another version of ldm saved: resume with that version, "
            "or start again in another output folder"
        ) from None
    step, order = state["step"], parts["order"]
    if step > settings.steps:
        raise ValueError(f"the run in {str(folder.path)!r} has {step} steps already: loop.steps must be at least that")
    if folder.writes and order.past and (before := order.past[-1][0]) != order.global_size:
        print(
            f"note: all processes together took {before} images in a batch, and now take {order.global_size}: the run "
            "goes on at the next image; steps, the learning rate and its schedule are counted as before",
            file=sys.stderr,
        )
    return step


def compare_content(before: Mapping[str, Any], now: Mapping[str, Any], folder: RunFolder) -> None:
    """Print a note if a resumed run has other images than it began with; ValueError for other classes or words."""
    before = {"words": now["words"], **before}  # of before they were remembered
    if before["classes"] != now["classes"]:
        raise ValueError(
            f"{str(folder.path)!r} was started with the classes {few(before['classes'])} and the data has "
            f"{few(now['classes'])} now: resume with those, or choose another output folder"
        )
    if before["words"] != now["words"]:
        raise ValueError(
            f"{str(folder.path)!r} was started with captions of other words, by which its text encoder was built: "
            "resume with those, or choose another output folder"
        )
    if before != now and folder.writes:
        counts = f"{before['images']} when it was started, {now['images']} now"
        print(f"note: {str(folder.path)!r} is resumed with other images: {counts}", file=sys.stderr)
