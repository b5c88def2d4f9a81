"""Whether a run can go on from what its folder holds: its settings, its data, and its saved state."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint.atomic import write_text
from ldm.checkpoint.file import STEP_KEY
from ldm.checkpoint.tensors import read_tensors
from ldm.checks import few
from ldm.input_files import read_yaml
from ldm.training.loop_settings import LoopSettings
from ldm.training.run_folder import SNAPSHOTS, RunFolder, flatten

# Settings that a resumed run may change: they affect the training that remains, not the past or the data.
FREE = re.compile(
    r"loop\.(steps|batch_size|accumulate|precision|clip|lr_schedule\b.*|log_every|preview_every|save_every|"
    r"keep_every|keep_state|workers|validate_\w+|quality\b.*|quality_every|tensorboard|report_to|ema_device|compile)|"
    r"(loop|stage\.params)\.gradient_checkpointing|stage\.params\.(\w+_)?learning_rate\b.*|stage\.params\.preview.*|(stage|data)\.params\.cache_dir"
)


def is_finished(folder: RunFolder, now: dict[str, Any], resume: bool) -> bool:
    """Return whether the result has enough steps; name what differs, and raise ValueError for what may not."""
    before = saved_config(folder, now, resume)
    changed = differences(before, now)
    fixed = [key for key, values in changed.items() if not FREE.fullmatch(key) and not was_moved(*values)]
    if fixed:
        named = ", ".join(fixed[:5]) + (f" and {len(fixed) - 5} more" if len(fixed) > 5 else "")
        raise ValueError(
            f"{str(folder.path)!r} was started with other settings of {named}: resume with those, or "
            "choose another output folder"
        )
    names, steps = ", ".join(changed), now["loop"]["steps"]
    done = result_steps(folder, before["loop"].get("steps", 0))
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


def saved_config(folder: RunFolder, config: dict[str, Any], resume: bool) -> dict[str, Any]:
    """Return the configuration that what is saved comes from; ValueError without `resume`."""
    saved = folder.path / "config.yaml"
    if not resume:
        raise ValueError(
            f"{str(folder.path)!r} already holds a run: continue it with --resume, or choose another output folder"
        )
    if not saved.exists():
        return config
    try:
        before = read_yaml(saved)
        if not isinstance(before.get("loop"), dict) or not {"name", "outdir"} <= before.keys():
            raise ValueError("it is not the configuration of a run")
        return before
    except ValueError as error:
        raise ValueError(
            f"{str(saved)!r} is damaged ({str(error)[:200]}): delete it, and the run is resumed with the settings "
            "that are given now"
        ) from None


def built_on(folder: RunFolder) -> dict[str, str]:
    """Return the hashes of the files that a saved state is built on, by their settings, as it says."""
    try:  # without reading the tensors
        return torch.load(folder.state, map_location="cpu", weights_only=True, mmap=True)["built_on"]
    except Exception:  # nothing is saved, or by an earlier version, or it is damaged, which `load_state` says
        return {}


def result_steps(folder: RunFolder, configured: int) -> int:
    """Return how many steps the result was trained for, or 0. configured: of a result that does not say."""
    if not folder.model.exists():
        return 0
    return int(read_tensors(folder.model).metadata.get(STEP_KEY, 0 if folder.state.exists() else configured))


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


def load_state(folder: RunFolder) -> dict[str, Any] | None:
    """Return the saved state, or None, and cut the metrics back to it; no pickled code is run."""
    state = None
    if folder.state.exists():
        try:
            state = torch.load(folder.state, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not isinstance(state.get("step"), int):
                raise ValueError(f"it holds a {type(state).__name__}, not the state of a run")
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"cannot resume from {str(folder.state)!r}: the file is damaged ({reason}); to start anew, choose "
                "another output folder or delete that file"
            ) from None
    if folder.writes:
        cut_metrics(folder.metrics, step := 0 if state is None else state["step"])
        for path in (folder.path / SNAPSHOTS).glob("[0-9]*.safetensors"):  # of a run that was killed, as well
            if int(path.stem) > step:
                path.unlink()
    return state


def cut_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, and an incomplete one of a run that was killed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            kept += [line] if line.endswith("}\n") and json.loads(line)["step"] <= step else []
        except (ValueError, KeyError, TypeError, RecursionError):  # damaged
            pass
    write_text(path, "".join(kept))


def load_saved(
    parts: Mapping[str, Any],
    settings: LoopSettings,
    content: Mapping[str, Any],
    folder: RunFolder,
) -> int:
    """Load the state that is saved into the parts of a run and return its step, 0 without one.

    Randomness and data order are functions of the step. A run that was saved in another precision than the fp16 it is
    resumed in begins with the scaler's initial scale.

    content: of the data set, as `contract.content_of` returns it.
    """
    state = load_state(folder)
    if state is None:
        return 0
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


def like(value: Any, live: Tensor) -> Any:
    """Return a complete tensor sharded as a live one is; others as they are."""
    if not hasattr(live, "full_tensor") or not isinstance(value, Tensor) or value.shape != live.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(live, DTensor)
    return distribute_tensor(value.to(live.device), live.device_mesh, live.placements)


def sharded(state: dict[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a saved state with its tensors sharded as those of the run's parts are."""
    live = {"networks": parts["networks"].state_dict(), "ema": parts["ema"].shadow}
    state |= {"networks": {k: like(v, live["networks"][k]) for k, v in state["networks"].items()}}
    state["ema"] |= {"shadow": {k: like(v, live["ema"][k]) for k, v in state["ema"]["shadow"].items()}}
    for key in (key for key in parts if key.startswith("optimizer_")):
        weights = [p for group in parts[key].param_groups for p in group["params"]]
        for number, entries in state[key]["state"].items():
            state[key]["state"][number] = {name: like(v, weights[number]) for name, v in entries.items()}
    return state
