"""Seeded mutations of bytes and of nested values, and a guard that records what a reader must never do."""

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXTREMES = (b"\0" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\0\1\0\0\0", b"${x}", b'"', b"{", b"\n")
HOSTILE = (
    *(None, True, False, -1, 0, 1, 10**6, 2**63, 10**30, 0.5, float("nan"), float("inf"), -float("inf"), 1e300),
    *("", "x", "x" * 5000, "../../x", "/etc/passwd", "${oc.env:HOME}", "${name}", "???", "\0", "\ud800", "true"),
    *([], {}, [[]], [1, 2], {"a": 1}, ["x"] * 1000, {"target": "os.system", "params": {"command": "touch hit"}}),
    *("os.system", "torch.hub.load", "ldm.compvis.encoders.FrozenCLIPTextEmbedder", "ldm.loading.load"),
    *({"target": "ldm.compvis.encoders.FrozenClipImageEmbedder"}, {"target": "ldm.data.folder.Folder"}),
)


def mutate_bytes(data: bytes, chance: random.Random, first: int | None = None) -> bytes:
    """Return a damaged copy; first: how many bytes at the beginning the damage prefers (a header's)."""
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        size = len(made) if first is None or chance.random() < 0.2 else min(first, len(made))
        at, length = chance.randrange(size + 1), chance.choice((1, 2, 8, 64))
        kind = chance.randrange(6)
        if kind == 0:
            del made[at : at + length]
        elif kind == 1:
            made[at:at] = made[at : at + length]
        elif kind == 2:
            made[at : at + 8] = chance.choice(EXTREMES)
        elif kind == 3 and chance.random() < 0.3:
            del made[at:]
        elif at < len(made):
            made[at] ^= 1 << chance.randrange(8)
    return bytes(made)


def mutate_value(value: Any, chance: random.Random) -> Any:
    """Return a copy of nested dicts and lists in which some entries are replaced, left out, renamed or repeated."""
    made = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 2))):
        holder, key = chance.choice(list(_places(made)))
        kind = chance.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(key)[:-1] + "z"] = holder.pop(key)
        elif kind == 2:
            holder[key] = [holder[key]]
        elif kind == 3 and chance.random() < 0.2:
            for _ in range(100):
                holder[key] = [holder[key]]
        else:
            holder[key] = copy.deepcopy(chance.choice(HOSTILE))
        if not made:
            return made
    return made


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield value, key
        yield from _places(entry)


FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.remove",
    "os.rename",
    "subprocess",
    "socket.connect",
)
_record: list[str] | None = None


def _hook(event: str, args: tuple) -> None:
    if _record is not None and event.startswith(FORBIDDEN):
        _record.append(f"{event} {args}"[:200])


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Fail if anything in the block starts a process or connects."""
    global _record
    if not hasattr(sys, "_ldm_fuzz_hook"):  # a hook stays as long as the process
        sys.addaudithook(_hook)
        sys._ldm_fuzz_hook = True
    _record = []
    try:
        yield
        assert _record == [], _record
    finally:
        _record = None
