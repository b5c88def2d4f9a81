"""Training configurations: yaml files and `key=value` changes, read into plain dicts and checked."""

from collections.abc import Sequence
from copy import deepcopy
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
    given = [_read(path) for path in paths]
    configs = deepcopy(given)
    for change in changes:
        if not any([_apply(change, *pair) for pair in zip(configs, given, strict=True)]):
            raise ValueError(
                f"{change!r} changes nothing: no given configuration has that key; they have name, outdir, seed, "
                "stage.*, data.* and loop.*"
            )
    resolved = [_resolve(path, config) for path, config in zip(paths, configs, strict=True)]
    folders = [(config["outdir"], config["name"]) for config in resolved]
    for outdir, name in folders:
        if folders.count((outdir, name)) > 1:
            raise ValueError(f"two configurations have the name {name!r} in the folder {outdir!r}: change one of them")
    return resolved


def _read(path: str) -> Any:
    config = load_yaml(path)
    found = set(config) if OmegaConf.is_dict(config) else set()
    missing, unknown = [k for k in SECTIONS if k not in found], sorted(found - set(SECTIONS))
    wrong = [f"{word} {', '.join(keys)}" for word, keys in (("lacks", missing), ("has unknown keys", unknown)) if keys]
    if wrong:
        raise ValueError(f"configuration {path!r} {' and '.join(wrong)}: the keys are {', '.join(SECTIONS)}")
    if not isinstance(config.name, str):
        raise ValueError(f"configuration {path!r}: the name {config.name!r} must be a word")
    return config


def _apply(change: str, config: Any, given: Any) -> bool:
    """Apply `key=value` to a configuration, if it has the key now or as it was given; return whether it has."""
    key, _, value = change.partition("=")
    key = key.removeprefix(config.name + ".")
    try:
        if not (_has(config, key) or _has(given, key)):
            return False
        OmegaConf.update(config, key, OmegaConf.from_dotlist([f"x={value}"]).x)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"{change!r} cannot be set: {' '.join(str(error).split())}") from None
    return True


def _has(config: Any, key: str) -> bool:
    """Return whether a dotted key exists, or may be added: below a null, or as a parameter, which a stage checks."""
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(config, parent, default=False) if parent else config
    return node is None or OmegaConf.is_dict(node) and (parent == "loop" or parent.endswith("params") or last in node)


def _resolve(path: str, config: Any) -> dict[str, Any]:
    """Return a configuration as plain dicts; raise ValueError for missing values and parts of the wrong type."""
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ValueError(f"configuration {path!r} needs {', '.join(f'{key}=...' for key in missing)}")
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"configuration {path!r} does not resolve: {error}") from None
    for part in ("stage", "data"):
        value = plain[part]
        if not isinstance(value, dict) or "target" not in value or not isinstance(value.get("params", {}), dict):
            raise ValueError(f"configuration {path!r}: {part} must be a mapping with a target and params")
    if not isinstance(plain["loop"], dict):
        raise ValueError(f"configuration {path!r}: loop must be a mapping with settings")
    if not isinstance(plain["seed"], int) or plain["seed"] < 0:
        raise ValueError(f"configuration {path!r}: seed {plain['seed']!r} must be an integer of at least 0")
    return plain
