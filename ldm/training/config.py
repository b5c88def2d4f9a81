"""Training configurations: yaml files and `key=value` changes, read into plain dicts and checked."""

from collections.abc import Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.util import load_yaml

SECTIONS = ("name", "outdir", "seed", "stage", "data", "loop")


def read_configs(paths: Sequence[str], changes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return a resolved configuration for each file.

    Args:
        changes: `key=value`, applied to every configuration that has the key, or `NAME.key=value`, to that one only.
            A key that no configuration has is an error, and so is a value that stays `???`.
    """
    if not paths:
        raise ValueError(
            "no configuration is given: name at least one yaml file, such as configs/digits/autoencoder.yaml"
        )
    configs, used = [_read(path) for path in paths], set()
    for config in configs:
        for change in changes:
            key, _, value = change.partition("=")
            own = key.removeprefix(config.name + ".")
            if _has(config, own):
                try:
                    OmegaConf.update(config, own, OmegaConf.from_dotlist([f"x={value}"]).x)
                except (OmegaConfBaseException, yaml.YAMLError) as error:
                    raise ValueError(f"{change!r} cannot be set: {' '.join(str(error).split())}") from None
                used.add(change)
    for change in changes:
        if change not in used:
            raise ValueError(
                f"{change!r} changes nothing: no given configuration has that key; they have name, outdir, seed, "
                "stage.*, data.* and loop.*"
            )
    try:
        for path, config in zip(paths, configs, strict=True):
            if missing := sorted(OmegaConf.missing_keys(config)):
                raise ValueError(f"configuration {path!r} needs {', '.join(f'{key}=...' for key in missing)}")
        plain = [OmegaConf.to_container(config, resolve=True) for config in configs]
    except OmegaConfBaseException as error:
        raise ValueError(f"a configuration does not resolve: {error}") from None
    for path, config in zip(paths, plain, strict=True):
        _check_values(path, config)
    return plain


def _read(path: str) -> Any:
    config = load_yaml(path)
    found = set(config) if OmegaConf.is_dict(config) else set()
    missing, unknown = [k for k in SECTIONS if k not in found], sorted(found - set(SECTIONS))
    if missing or unknown:
        raise ValueError(
            f"configuration {path!r} lacks {missing} and has unknown keys {unknown}: the keys are {SECTIONS}"
        )
    if not isinstance(config.name, str):
        raise ValueError(f"configuration {path!r}: the name {config.name!r} must be a word")
    return config


def _check_values(path: str, config: dict[str, Any]) -> None:
    """Raise ValueError for parts of the wrong type."""
    for part in ("stage", "data"):
        value = config[part]
        if not isinstance(value, dict) or "target" not in value or not isinstance(value.get("params", {}), dict):
            raise ValueError(f"configuration {path!r}: {part} must be a mapping with a target and params")
    if not isinstance(config["loop"], dict):
        raise ValueError(f"configuration {path!r}: loop must be a mapping with settings")
    if not isinstance(config["seed"], int) or config["seed"] < 0:
        raise ValueError(f"configuration {path!r}: seed {config['seed']!r} must be an integer of at least 0")


def _has(config: Any, key: str) -> bool:
    """Return whether a dotted key exists; parameters that the yaml leaves out count, since a stage checks its own."""
    parent, _, last = key.rpartition(".")
    if parent == "loop" or parent.endswith("params"):
        return OmegaConf.is_dict(OmegaConf.select(config, parent))
    node = OmegaConf.select(config, parent) if parent else config
    return OmegaConf.is_dict(node) and last in node
