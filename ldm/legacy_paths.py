"""An import finder for the old module names of `ldm.legacy_names`, a table that is imported when one of them is met.

The finder is last in `sys.meta_path`, so that real files win. It makes an old name the same module object as its home:
classes are identical under both names, patches reach the running code, old pickles load. A home is a file. A name that
was a package becomes an empty module, which looks up in `ELSEWHERE` what it exported. Nothing is imported early.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def open_home(home: str) -> ModuleType:
    """Import a home, and let it look up its names in `ELSEWHERE` unless it does so itself."""
    module = import_module(home)
    if home.startswith("ldm."):
        vars(module).setdefault("__getattr__", elsewhere(home))
    return module


def elsewhere(home: str) -> Callable[[str], Any]:
    """Return a module `__getattr__` (PEP 562) for the home's names in `ELSEWHERE`, which `import *` includes."""

    def look_up(name: str) -> Any:
        missing = AttributeError(f"module {home!r} has no attribute {name!r}")
        if name.startswith("__") and name != "__all__":  # the import system asks every module for `__path__`
            raise missing
        from ldm.legacy_names import ABSENT, exports

        if name == "__all__":
            public = (name for name in vars(sys.modules[home]) if not name.startswith("_"))
            return list(dict.fromkeys([*public, *exports(home)]))
        if f"{home}.{name}" in ABSENT:  # no AttributeError, in whose place `from ... import` has its own message
            raise ImportError(ABSENT[f"{home}.{name}"])
        if name not in exports(home):
            raise missing
        place, its_name = exports(home)[name]
        module = import_module(place)
        return getattr(module, its_name) if its_name else module

    return look_up


class _Finder:
    """Finds and loads the names in the table."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith("ldm."):
            return None
        from ldm.legacy_names import ABSENT, OLD_NAMES, PACKAGES

        if name in OLD_NAMES or name in PACKAGES:
            return ModuleSpec(name, self, origin=OLD_NAMES.get(name, "CompVis"), is_package=name in PACKAGES)
        if name in ABSENT:
            raise ModuleNotFoundError(ABSENT[name], name=name)
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        """Make the usual empty module."""

    def exec_module(self, module: ModuleType) -> None:
        from ldm.legacy_names import ABSENT, ELSEWHERE, OLD_NAMES, PACKAGES

        name = module.__name__
        if name not in PACKAGES:
            sys.modules[name] = open_home(OLD_NAMES[name])  # the import system uses this entry
            if any(absent.startswith(f"{name}.") for absent in ABSENT):
                vars(sys.modules[name]).setdefault("__path__", [])  # or it would not ask for modules in this one
        elif name in ELSEWHERE:
            module.__getattr__ = elsewhere(name)


FINDER = _Finder()


def install() -> None:
    """Make the old names importable from now on."""
    if FINDER not in sys.meta_path:
        sys.meta_path.append(FINDER)
