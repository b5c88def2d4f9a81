"""Training configurations: yaml files and `key=value` changes, read into plain dicts and checked."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from inspect import signature
from typing import Annotated, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ldm.checks import Range, path_fault, shorten
from ldm.input_files import escaped, load_yaml
from ldm.training.run_folder import check_name, flatten
from ldm.util import call_with


def check_values(
    path: str,
    name: str,
    outdir: str,
    seed: Annotated[int, Range(0)],
    stage: Mapping[str, Any],
    data: Mapping[str, Any],
    loop: Mapping[str, Any],
) -> None:
    """Raise ValueError for a configuration, read from `path`, whose parts do not fit; the others are its keys."""
    try:
        check_name(name)
    except ValueError as error:
        raise ValueError(f"configuration {path!r}: {error}") from None
    if fault := path_fault(outdir or "."):
        raise ValueError(f"configuration {path!r}: outdir: {fault}")
    for part, section in (("stage", stage), ("data", data)):
        if "target" not in section or not isinstance(section.get("params", {}), dict):
            raise ValueError(f"configuration {path!r}: {part} must be a mapping with a target and params")


SECTIONS = tuple(signature(check_values).parameters)[1:]


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
        escaped(change)  # ValueError for bytes that are not UTF-8, which no yaml can hold
        if not any([_apply(change, *pair) for pair in zip(configs, given, strict=True)]):
            from ldm.spelling import did_you_mean  # only a mistake needs it

            known = {key for config in configs for key in flatten(OmegaConf.to_container(config))}
            raise ValueError(
                f"{shorten(repr(change))} changes nothing: no given configuration has that key; they have name, "
                f"outdir, seed, stage.*, data.* and loop.*{did_you_mean([change.partition('=')[0]], known)}"
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
    missing, unknown = [k for k in SECTIONS if k not in found], sorted(map(str, found - set(SECTIONS)))
    wrong = [f"{word} {', '.join(keys)}" for word, keys in (("lacks", missing), ("has unknown keys", unknown)) if keys]
    if wrong:
        from ldm.spelling import did_you_mean  # only a mistake needs it

        near = did_you_mean(unknown, SECTIONS)
        raise ValueError(f"configuration {path!r} {' and '.join(wrong)}: the keys are {', '.join(SECTIONS)}{near}")
    return config


def _apply(change: str, config: Any, given: Any) -> bool:
    """Apply `key=value` to a configuration, if it has the key now or as it was given; return whether it has."""
    key, _, value = change.partition("=")
    own: Any = OmegaConf.to_container(config)
    key = key.removeprefix(f"{own['name']}.")
    try:
        if not (_has(config, key) or _has(given, key)):
            return False
        OmegaConf.update(config, key, OmegaConf.from_dotlist([f"x={value}"]).x)
    except (OmegaConfBaseException, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{shorten(repr(change))} cannot be set: {' '.join(str(error).split())}") from None
    return True


def _has(config: Any, key: str) -> bool:
    """Return whether a dotted key exists, or may be added: below a null, or as a parameter, which a stage checks."""
    parent, _, last = key.rpartition(".")
    absent = None if parent == "data.validation" else False
    node = OmegaConf.select(config, parent, default=absent) if parent else config
    free = parent in ("loop", "data") or parent.endswith("params")
    return node is None or OmegaConf.is_dict(node) and (free or last in node)


def _resolve(path: str, config: Any) -> dict[str, Any]:
    """Return a configuration as plain dicts; raise ValueError for missing values and parts of the wrong type."""
    try:
        if missing := sorted(OmegaConf.missing_keys(config)):
            raise ValueError(f"configuration {path!r} needs {', '.join(f'{key}=...' for key in missing)}")
        plain: Any = OmegaConf.to_container(config, resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"configuration {path!r} does not resolve: {error}") from None
    call_with(f"configuration {path!r}", check_values, plain, path=path)
    return plain
