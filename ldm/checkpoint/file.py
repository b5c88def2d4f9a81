"""Our checkpoint file: safetensors with the configuration in the header, so that the file alone rebuilds the model."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpoint.networks import check_targets, shipped
from ldm.checkpoint.tensors import check_finite, read_tensors
from ldm.checks import as_path, check_file, shorten

CONFIG_KEY = "ldm.config"
STEP_KEY = "ldm.step"  # of a run's checkpoints: how many steps they were trained


def load_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read (configuration, tensors) of a checkpoint of ours; the tensors are mapped from the file, not copied.

    path: a file, or the folder of a run, whose newest checkpoint is meant.
    """
    path = checkpoint_at(path)
    state, metadata, _ = read_tensors(path)
    check_finite(f"checkpoint {str(path)!r}", state)
    return read_config(path, metadata), state


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint in a run's folder that was trained longest: its result, or a `model-STEP.safetensors`."""
    kept = [path for path in folder.glob("model-*.safetensors") if re.fullmatch(r"model-\d+", path.stem)]
    newest = max(kept, key=lambda path: int(path.stem[6:]), default=None)
    result = folder / "model.safetensors"
    if newest is None or not result.is_file():
        return result if result.is_file() else newest
    steps = int(read_tensors(result).metadata.get(STEP_KEY, 2**63))  # more than any other, if it does not say
    return result if steps >= int(newest.stem[6:]) else newest


def checkpoint_at(path: str | Path, what: str = "checkpoint") -> Path:
    """Return the path of a checkpoint: of a run's folder the newest one in it, of anything else the path itself."""
    path = shipped(as_path(what, path))
    if not (path / "config.yaml").is_file() or (path / "model_index.json").exists():  # the latter: diffusers'
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise FileNotFoundError(
            f"the run in {str(path)!r} has no checkpoint yet: finish it with --resume, or resume it with "
            "loop.keep_every=N, which keeps one every N steps"
        )
    return newest


def read_config(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the configuration in a header of ours."""
    if CONFIG_KEY not in metadata:
        raise ValueError(f"checkpoint {str(path)!r} carries no {CONFIG_KEY!r} in its header: it was not written by ldm")
    try:
        config = json.loads(metadata[CONFIG_KEY])
        if not isinstance(config, dict) or not isinstance(config.get("params", {}), dict):
            raise ValueError("it is not a mapping")
        if not isinstance(config.get("target"), str | None):
            raise ValueError(f"its target is {shorten(repr(config['target']))}")
        check_targets(config)
        if "target" in config:
            config.setdefault("params", {})
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint {str(path)!r} has a damaged configuration ({error})") from None
    return config


def file_hash(path: Path) -> str:
    """Return the first ten hexadecimal digits of a file's SHA-256, as A1111's users know models.

    Of a folder it is that of the files in it, in the order of their names.
    """
    digest = hashlib.sha256()
    if not path.is_dir():
        check_file(path, "file")
    elif not any((path / index).is_file() for index in ("model_index.json", "config.json")):
        raise ValueError(f"folder {str(path)!r} is not a diffusers folder: it holds no model_index.json")
    for part in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        with open(part, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()[:10]
