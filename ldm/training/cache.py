"""A cache on disk of what frozen networks make of images and captions, which runs share, also at the same time.

DIR/KIND-NETWORK/SHARD.safetensors, with NETWORK the hash of a network's weights and configuration and of the arithmetic
that it ran in, and SHARD that of the keys of its entries. An entry's key is the hash of what it was made of. Shards are
complete or not there; who makes one holds a lock, so that processes, of one run or of several, each make their part,
and one that was killed is known.
"""

import hashlib
import json
import sys
import time
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from ldm.batching import distinct_prompts
from ldm.checkpoint.atomic import claim, sweep
from ldm.checkpoint.tensors import State, read_tensors
from ldm.checkpoint.writing import save_file
from ldm.latent_diffusion import Conditioning, LatentDiffusion
from ldm.training.latents import encode_batch, encode_texts, encoding_size
from ldm.training.loader import loader_of
from ldm.training.shapes import in_groups
from ldm.util import progress_bar

SHARD = 1024  # entries
VERSION = "1"  # to be raised where the same key and network lead to other entries
KEY = "S16"  # 128 bits of SHA-256

Batches = Iterable[list[int]]


class Rows(NamedTuple):
    """Where a shard's tensor of a name lies in its file: a row for each entry."""

    start: int
    dtype: torch.dtype
    shape: torch.Size  # of a row
    checksums: np.ndarray


class Cache:
    """The entries that one network made: tensors by name, with a checksum for each.

    Entries are read, not mapped, so that what was read before takes no memory of the process.

    Args:
        folder: of all caches; made if missing.
        kind: begins the name of this one's folder.
        network: that made the entries. config: of it.
    """

    def __init__(self, folder: str | Path, kind: str, network: nn.Module, config: Mapping[str, Any]) -> None:
        self.folder = Path(folder) / f"{kind}-{_fingerprint(network, config)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        sweep(self.folder)
        self._read_keys()

    def _read_keys(self) -> None:
        """Read all of the shards but the entries; a file that is not a complete one is named, and takes no part."""
        self.paths, self.rows, keys = [], [], [np.empty(0, KEY)]
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                self.rows.append(_rows(path, state := self._open(path)))
                keys.append(_keys_in(state))
                self.paths.append(path)
            except ValueError as error:
                print(f"note: not used: {error}", file=sys.stderr)
        self.starts = np.cumsum([len(part) for part in keys]).tolist()  # of each shard's entries among all
        unsorted = np.concatenate(keys)
        self.order = np.argsort(unsorted, kind="stable")
        self.sorted = unsorted[self.order]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the places of entries, int64 (n,), -1 for those that are missing."""
        if not len(self.sorted):
            return np.full(len(keys), -1)
        at = np.searchsorted(self.sorted, keys).clip(max=len(self.sorted) - 1)
        return np.where(self.sorted[at] == keys, self.order[at], -1)

    def read(self, place: int, name: str) -> Tensor:
        """Return a tensor of an entry. ValueError if it is not as it was written.

        Its checksum is computed each time: that takes 1.5 us for the 4 kB of a 64-pixel image, and reading them 10 us.
        """
        number = bisect_right(self.starts, place) - 1
        path, row, found = self.paths[number], place - self.starts[number], self.rows[number][name]
        content = bytearray(found.shape.numel() * found.dtype.itemsize)
        with open(path, "rb", buffering=0) as file:
            file.seek(found.start + row * len(content))
            file.readinto(content)
        if zlib.crc32(content) != found.checksums[row]:
            raise ValueError(f"{str(path)!r} is damaged, by its checksums: delete it, and it is made anew")
        return torch.frombuffer(content, dtype=found.dtype).reshape(found.shape)

    def build(
        self,
        keys: np.ndarray,
        groups: Sequence[Any] | None,
        size: int,
        load: Callable[[Batches], Iterable[Any]],
        make: Callable[[Any], State],
        label: str,
    ) -> np.ndarray:
        """Make the entries that are missing and return the places of all of them (n,).

        Args:
            keys: (n,), which may hold one several times. groups: as in `EpochBatches`.
            size: of batches.
            load: batches of indices -> what `make` takes of each, in that order.
            make: -> tensors (b, ...) by name.
        """
        first = np.sort(np.unique(keys, return_index=True)[1])
        missing = first[self.find(keys[first]) < 0].tolist()
        shards, unit = in_groups(missing, groups, SHARD), label.split()[-1]
        with progress_bar(total=len(missing), desc=label, unit=unit) as bar:
            while shards:
                if not self._make(keys, shards, size, load, make, bar):
                    time.sleep(0.2)  # others make the remaining ones
                shards = [indices for indices in shards if not self._is_whole(self._path(keys[indices]))]
                bar.update(len(missing) - sum(map(len, shards)) - bar.n)
        self._read_keys()
        places = self.find(keys)
        if places.min(initial=0) < 0:
            raise ValueError(f"shards of {str(self.folder)!r} were deleted or damaged while it was read: start again")
        return places

    def _make(self, keys: np.ndarray, shards: list[list[int]], size: int, load: Any, make: Any, bar: tqdm) -> bool:
        """Make the shards that no other process makes; return whether there were any."""
        claims, parts, made = deque(), [], False

        def batches() -> Iterator[list[int]]:
            for indices in shards:
                path = self._path(keys[indices])
                lock = claim(path.with_name(f".{path.stem}.claim.0.tmp"))
                if lock is not None and self._is_whole(path):  # another process was quicker
                    _release(lock)
                elif lock is not None:
                    claims.append((indices, path, lock))
                    yield from in_groups(indices, None, size)

        try:
            for batch in load(batches()):
                parts.append(make(batch))
                made, (indices, path, lock) = True, claims[0]
                bar.update(len(next(iter(parts[-1].values()))))
                if len(parts) * size >= len(indices):
                    self._save(path, keys[indices], parts)
                    _release(lock)
                    parts.clear()
                    claims.popleft()
        finally:
            for _, _, lock in claims:
                _release(lock)
        return made

    def _save(self, path: Path, keys: np.ndarray, parts: Sequence[State]) -> None:
        entries = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        sums = {f"{k}.crc32": torch.tensor([zlib.crc32(_bytes(row)) for row in rows]) for k, rows in entries.items()}
        own = {"keys": torch.from_numpy(keys.view(np.uint8).reshape(-1, 16))}
        save_file(path, entries | sums | own, metadata={"ldm.cache": self.folder.name})
        if not self._is_whole(path):  # otherwise it is made again for ever
            raise ValueError(f"{str(path)!r} was written, and cannot be read: name another cache_dir")

    def _path(self, keys: np.ndarray) -> Path:
        return self.folder / f"{hashlib.sha256(keys.tobytes()).hexdigest()[:32]}.safetensors"

    def _open(self, path: Path) -> State:
        """Map a shard. ValueError unless it is a complete one of this cache."""
        state, metadata, _ = read_tensors(path)
        keys = state.get("keys", torch.empty(0))
        good = keys.dtype == torch.uint8 and keys.ndim == 2
        good = good and all(tensor.shape[:1] == keys.shape[:1] for tensor in state.values())
        if not good or metadata.get("ldm.cache") != self.folder.name or self._path(_keys_in(state)) != path:
            raise ValueError(f"{str(path)!r} is damaged, or not a shard of this cache")
        return state

    def _is_whole(self, path: Path) -> bool:
        try:
            return bool(self._open(path))
        except (OSError, ValueError):
            return False


class Column:
    """One tensor of each of a data set's entries."""

    def __init__(self, cache: Cache, places: np.ndarray, name: str) -> None:
        self.cache, self.places, self.name = cache, places, name

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        return self.cache.read(int(self.places[index]), self.name)


def cached_latents(folder: str, model: LatentDiffusion, dataset: Any, workers: int) -> tuple[Column, Column]:
    """Do what `encode_dataset` does, on disk: only images that the cache lacks are encoded."""
    first_stage, keys = model.first_stage_model, _content_keys(dataset, workers)
    cache = Cache(folder, "latents", first_stage, model.config["first_stage_config"])

    def make(batch: Mapping[str, Any]) -> State:
        return dict(zip(("mean", "std"), encode_batch(first_stage, batch["image"]), strict=True))

    def load(batches: Batches) -> Iterable[Any]:
        return loader_of(dataset, workers, batch_sampler=batches)

    groups = getattr(dataset, "groups", None)
    places = cache.build(keys, groups, encoding_size(dataset), load, make, "encoding images")
    return Column(cache, places, "mean"), Column(cache, places, "std")


class CachedTexts:
    """A text encoder that takes the embeddings of a data set's captions from a cache.

    Captions that were not known before training, as of tags in changing order, are encoded as without a cache.
    """

    def __init__(self, folder: str, model: LatentDiffusion, dataset: Any) -> None:
        self.encoder = encoder = model.cond_stage_model
        self.cache = cache = Cache(folder, "texts", encoder, model.config["cond_stage_config"])
        known = list(dict.fromkeys(["", *captions_of(dataset)]))

        def load(batches: Batches) -> Iterable[list[str]]:
            return ([known[i] for i in indices] for indices in batches)

        def make(texts: list[str]) -> State:
            return {name: value.cpu() for name, value in encode_texts(encoder, texts).items()}

        cache.build(_text_keys(known), None, 64, load, make, "encoding captions")

    def __call__(self, captions: Sequence[str]) -> Conditioning:
        device = next(self.encoder.parameters()).device
        distinct, which = distinct_prompts(captions)
        places = self.cache.find(_text_keys(distinct)).tolist()
        absent = [text for text, place in zip(distinct, places, strict=True) if place < 0]
        made = encode_texts(self.encoder, absent) if absent else {}
        cond = {}
        for name in self.cache.rows[0]:
            others = iter(made.get(name, ()))
            rows = [next(others).cpu() if place < 0 else self.cache.read(place, name) for place in places]
            cond[name] = torch.stack(rows)[which].to(device)
        return cond


def captions_of(dataset: Any) -> list[str]:
    """Return the distinct captions of a data set, as far as they are known before training."""
    texts = [*dataset.texts()] if hasattr(dataset, "texts") else []
    if hasattr(dataset, "caption_of"):
        texts += [dataset.caption_of(i).text for i in range(len(dataset))]
    elif not texts:
        texts = [dataset[i]["caption"] for i in range(len(dataset))]
    return list(dict.fromkeys(texts))


class _Keys(Dataset):
    """The keys of a data set's images: the hashes of what its method `content` returns, or else of the pixels."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> bytes:
        if hasattr(self.dataset, "content"):
            return _hash(self.dataset.content(index))
        image = self.dataset[index]["image"].contiguous()
        return _hash(f"{image.dtype} {tuple(image.shape)}".encode() + image.numpy().tobytes())


def _release(lock: BinaryIO) -> None:
    Path(lock.name).unlink(missing_ok=True)
    lock.close()


def _content_keys(dataset: Any, workers: int) -> np.ndarray:
    loader = loader_of(_Keys(dataset), workers, batch_size=64, collate_fn=b"".join)
    return np.frombuffer(b"".join(progress_bar(loader, desc="reading images", unit="batch")), KEY)


def _text_keys(texts: Sequence[str]) -> np.ndarray:
    return np.frombuffer(b"".join(_hash(text.encode("utf-8", "surrogatepass")) for text in texts), KEY)


def _keys_in(state: State) -> np.ndarray:
    return np.frombuffer(state["keys"].numpy().tobytes(), KEY)


def _rows(path: Path, state: State) -> dict[str, Rows]:
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    sums = {name: state[f"{name}.crc32"].numpy().astype(np.uint32) for name in state if f"{name}.crc32" in state}
    starts = {name: 8 + size + header[name]["data_offsets"][0] for name in sums}
    return {name: Rows(starts[name], state[name].dtype, torch.Size(state[name].shape[1:]), sums[name]) for name in sums}


def _hash(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:16]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _fingerprint(network: nn.Module, config: Mapping[str, Any]) -> str:
    """Return a hash of a network's weights, its configuration, and what else changes its results by more than rounding.

    CPUs and GPUs differ so: cuDNN multiplies float32 as TF32, with 10 bits of mantissa. GPUs among themselves, CPUs and
    numbers of threads differ in rounding.
    """
    state = network.state_dict()
    kind = next(iter(state.values())).device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    arithmetic = [kind, cast, torch.get_float32_matmul_precision()]
    digest = hashlib.sha256(json.dumps([VERSION, arithmetic, config], sort_keys=True, default=str).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()[:32]
