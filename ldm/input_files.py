"""Configurations that a user writes. It imports nothing heavy."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.checks import check_file, shorten


def folder_that_ships(name: str) -> Path:
    """Return a folder of files that ship: in the package, or beside it in a clone."""
    package = Path(__file__).parent
    return next((path for path in (package / name, package.parent / name) if path.is_dir()), Path(name))


CONFIGS = folder_that_ships("configs")
MAX_YAML = 2**20  # bytes of a configuration file, and values in it
MAX_REFERENCES = 40  # in it: by n of them a text grows at most 3^(n/3) times
REFERENCE = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # the beginning of one, unless it is escaped


def load_yaml(path: str | Path) -> Any:
    """Load a yaml file with OmegaConf, unresolved. FileNotFoundError, or ValueError for a file that is not yaml.

    Outside a clone, `configs/...` is the file of that name that is installed with the package. Values may refer to
    other values, as in ${outdir}, but not to OmegaConf's resolvers, which read the environment (${oc.env:HOME}).
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if Path(path).parts[:1] == ("configs",) and not Path(path).exists():
        path = CONFIGS.joinpath(*Path(path).parts[1:])
    check_file(Path(path), "configuration")
    name = f"configuration {str(path)!r}"
    if Path(path).stat().st_size > MAX_YAML:
        raise ValueError(f"{name} is larger than {MAX_YAML} bytes: it is not a configuration")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if "*" in text and _expanded(yaml.compose(text, Loader=yaml.SafeLoader), {}) > MAX_YAML:
            raise ValueError(f"its aliases make more than {MAX_YAML} values of it")
        config = OmegaConf.load(path)
        texts = [text for text in _texts(OmegaConf.to_container(config, resolve=False)) if REFERENCE.search(text)]
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        raise ValueError(f"{name} is not yaml: {' '.join(str(error).split())}") from None
    for text in texts:
        plain, rest = text, ""
        while rest != plain:  # from the innermost reference outwards
            rest, plain = plain, re.sub(r"\$\{[^${}:]*\}", "_", plain)
        if REFERENCE.search(rest):
            raise ValueError(
                f"{name} has {shorten(repr(text))}: only references to its other values, such as ${{outdir}}, resolve"
            )
    if (count := sum(len(REFERENCE.findall(text)) for text in texts)) > MAX_REFERENCES:
        raise ValueError(f"{name} has {count} references ${{...}} to other values: {MAX_REFERENCES} are the maximum")
    return config


def _expanded(node: Any, sizes: dict[int, int]) -> int:
    """Return how many values a yaml node holds with each alias in it written out; sizes: of nodes, by id."""
    if id(node) not in sizes:
        sizes[id(node)] = 1  # also what a node that holds itself counts within it
        children = node.value if isinstance(getattr(node, "value", None), list) else []
        parts = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
        sizes[id(node)] = 1 + sum(_expanded(part, sizes) for part in parts)
    return sizes[id(node)]


def _texts(value: Any) -> list[str]:
    """Return all texts in a configuration."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for entry in entries for text in _texts(entry)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a yaml file's mapping as plain dicts, resolved. Errors as `load_yaml`, and ValueError for other content."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content: Any = OmegaConf.to_container(load_yaml(path), resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"configuration {str(path)!r} does not resolve: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"configuration {str(path)!r} is not a mapping")
    return content


def escaped(value: Any) -> Any:
    """Return a text, or containers of texts, so that a configuration with it resolves to it: `${` is escaped.

    ValueError for a name of a file that is not UTF-8: yaml has no such texts.
    """
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise ValueError(f"{value!r} is not UTF-8 text, so a run's configuration cannot hold it: rename it first")
    if isinstance(value, Mapping):
        return {key: escaped(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(entry) for entry in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
