"""The cache on disk: equal to encoding in training, resumable after a kill, shared, and verified when it is read."""

import copy
import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, refused
from PIL import Image
from safetensors.torch import load_file
from tiny_stages import config_of, write_inputs, write_rows

from ldm.checkpoint.writing import save_file
from ldm.data import finding
from ldm.data.digits import Digits
from ldm.data.folder import Folder
from ldm.data.part import first_images
from ldm.latent_diffusion import LatentDiffusion
from ldm.training import cache, frozen
from ldm.training.cache import CachedTexts, cached_latents, captions_of
from ldm.training.latents import encode_dataset, encode_texts
from ldm.training.loop import train
from ldm.training.share import BatchShare
from ldm.util import instantiate_from_config

ROOT = Path(__file__).parents[1]
COUNT = 60  # images: seven shards of 8 and one of 4


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(cache, "SHARD", 8)


@pytest.fixture(scope="module")
def digits():
    return Digits(first=COUNT)


@pytest.fixture
def encoded(monkeypatch):
    """How many images were encoded for caches, a number for each batch."""
    counts, own = [], cache.encode_batch
    monkeypatch.setattr(cache, "encode_batch", lambda net, x: (counts.append(len(x)), own(net, x))[1])
    return counts


def latents(model: LatentDiffusion, folder: Path, dataset, workers: int = 0) -> torch.Tensor:
    """(2, n, z, h, w): the mean and deviation of each image, from a cache."""
    columns = cached_latents(folder, model, dataset, workers)
    return torch.stack([torch.stack([*column]) for column in columns])


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def write_noise(folder: Path, count: int = 6, height: int = 16) -> Path:
    """Images of `height` and more pixels, each of another width, with captions."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (height, height + i % 9), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i % 20}")
    return folder


@pytest.fixture
def in_memory(tiny_model, digits):
    return torch.stack([*encode_dataset(tiny_model.first_stage_model, digits, BatchShare())])


def test_an_image_is_encoded_once_and_equals_memory_to_the_bit(tiny_model, digits, in_memory, tmp_path, encoded):
    part = first_images(digits, 21)  # the rest is then encoded in batches of other images
    assert torch.equal(latents(tiny_model, tmp_path, part), in_memory[:, :21])
    assert torch.equal(latents(tiny_model, tmp_path, digits, workers=2), in_memory)
    assert torch.equal(latents(tiny_model, tmp_path, digits), in_memory)
    assert sum(encoded) == COUNT and [path.suffix for path in tmp_path.glob("*/*")] == [".safetensors"] * 8
    other = copy.deepcopy(tiny_model)
    other.first_stage_model.quant_conv.bias.data += 1
    assert not torch.equal(latents(other, tmp_path, digits), in_memory) and sum(encoded) == 2 * COUNT


@pytest.mark.parametrize("damage", ["truncated", "empty", "of a key", "foreign", "moved"])
def test_a_shard_that_is_not_whole_is_made_anew(tiny_model, digits, in_memory, tmp_path, encoded, damage, capsys):
    latents(tiny_model, tmp_path, digits)
    path = shards(tmp_path)[3]
    content = bytearray(path.read_bytes())
    if damage == "of a key":
        place = 8 + int.from_bytes(content[:8], "little")
        keys = load_file(path)["keys"].numpy().tobytes()
        content[content.index(keys, place)] ^= 1
    other = {"truncated": content[:-1], "empty": b"", "of a key": content, "foreign": b"text", "moved": content}[damage]
    target = path.with_name(f"{'0' * 32}.safetensors") if damage == "moved" else path
    target.write_bytes(other)
    if damage == "moved":
        path.unlink()
    assert torch.equal(latents(tiny_model, tmp_path, digits), in_memory)
    assert sum(encoded) in (COUNT + 8, COUNT + 4)
    assert str(target) in capsys.readouterr().err


def test_a_flipped_bit_of_an_entry_is_found(tiny_model, digits, tmp_path):
    latents(tiny_model, tmp_path, digits)
    path = shards(tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[content.index(load_file(path)["mean"].numpy().tobytes()) + 1] ^= 1
    path.write_bytes(content)
    refused(f"{path.name}' is damaged, by its checksums: delete it", latents, tiny_model, tmp_path, digits)
    path.unlink()
    latents(tiny_model, tmp_path, digits)


def test_a_shard_that_cannot_be_read_once_it_is_written_ends_the_build(tiny_model, digits, tmp_path, monkeypatch):
    own = cache.save_file
    monkeypatch.setattr(cache, "save_file", lambda path, *rest, **kw: (own(path, *rest, **kw), os.truncate(path, 99)))
    refused("was written, and cannot be read: name another", latents, tiny_model, tmp_path, digits)
    assert not [*tmp_path.rglob("*.tmp")]


def test_entries_of_another_arithmetic_are_others(tiny_model, digits, in_memory, tmp_path, encoded):
    some = first_images(digits, 16)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert not torch.equal(latents(tiny_model, tmp_path, some), in_memory[:, :16])
    torch.set_float32_matmul_precision("medium")  # of products, in bfloat16 where that is quicker
    try:
        latents(tiny_model, tmp_path, some)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(latents(tiny_model, tmp_path, some), in_memory[:, :16])
    assert sum(encoded) == 4 * 16 and len([*tmp_path.iterdir()]) == 4


def slowly(model: LatentDiffusion, folder: Path, dataset, seconds: float) -> None:
    """Build a cache in a process of its own, which was forked from this one, with so long a pause in each batch."""
    own = cache.encode_batch
    cache.encode_batch = lambda net, x: (time.sleep(seconds), Path(f"{folder}.{os.getpid()}").touch(), own(net, x))[2]
    torch.set_num_threads(1)
    latents(model, folder, dataset)


def start(*args) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=slowly, args=args)
    process.start()
    return process


def test_a_killed_build_keeps_its_shards(tiny_model, digits, in_memory, tmp_path, encoded):
    process = start(tiny_model, tmp_path / "cache", digits, 0.1)
    while len(shards(tmp_path)) < 3:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    kept = len(shards(tmp_path))
    assert 3 <= kept < 8
    assert torch.equal(latents(tiny_model, tmp_path / "cache", digits), in_memory)
    assert sum(encoded) == COUNT - 8 * kept
    assert len([*(tmp_path / "cache").rglob("*")]) == 9  # neither temporary files nor locks remain


def test_processes_that_build_at_once_share_the_work(tiny_model, digits, in_memory, tmp_path, encoded):
    processes = [start(tiny_model, tmp_path / "cache", digits, 0.05) for _ in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0 and (tmp_path / f"cache.{process.pid}").exists()  # each encoded some
    assert len(shards(tmp_path)) == 8
    assert torch.equal(latents(tiny_model, tmp_path / "cache", digits), in_memory) and not encoded


def test_the_key_of_a_file_follows_from_its_bytes_and_the_settings(tmp_path, tiny_model, encoded):
    write_inputs(tmp_path)
    settings = {"root": tmp_path / "instance", "size": 32, "channels": 1, "caption": ""}
    for changed, count in [({}, 3), ({"caption": "five"}, 0), ({"seed": 1}, 0), ({"buckets": [[32, 32]]}, 0)]:
        latents(tiny_model, tmp_path / "cache", Folder(**settings | changed))
        assert sum(encoded) == count, changed
        encoded.clear()
    images = Folder(**settings | {"size": 64})
    assert latents(tiny_model, tmp_path / "cache", images).shape[-1] == 16 and sum(encoded) == 3
    mixed = Folder(**settings | {"buckets": [[32, 32], [40, 32]]})
    columns = cached_latents(tmp_path / "cache", tiny_model, mixed, 0)
    assert {tuple(mean.shape) for mean in columns[0]} == {(4, 8, 10)}


def test_what_is_known_of_files_is_not_found_out_again(tmp_path, tiny_model, encoded, monkeypatch, capsys):
    names, own = [], finding.examine_image
    monkeypatch.setattr(finding, "examine_image", lambda source, name: (names.append(Path(name).name), own(source))[1])
    root = write_noise(tmp_path / "images")
    (root / "broken.png").write_bytes(b"none")
    settings = {"root": root, "size": 16, "channels": 1, "caption": "", "on_error": "skip"}
    paths, memory = sorted(root.glob("?.png")), tmp_path / "cache" / "images.sqlite"

    def decoded(count: int = 6) -> str:
        """The images that a new process decodes, beside the broken one."""
        names.clear()
        finding._HERE.execute("DELETE FROM images")
        data = Folder(**settings, cache_dir=str(tmp_path / "cache"))
        found, fresh = [*names], Folder(**settings)
        assert data.paths == fresh.paths and data.shapes == fresh.shapes and len(data) == count
        assert [*map(data.content, range(count))] == [*map(fresh.content, range(count))]
        found.remove("broken.png")
        return " ".join(sorted(name.removesuffix(".png") for name in found))

    assert decoded() == "0 1 2 3 4 5" and decoded() == ""
    paths[1].write_bytes(paths[2].read_bytes())  # of other size
    os.utime(paths[3], ns=(0, 0))
    paths[4].rename(root / "7.png")
    assert decoded() == "1 3 7" and decoded() == ""
    with closing(sqlite3.connect(memory)) as table, table:
        table.execute("UPDATE images SET width = 7 WHERE CAST(name AS TEXT) LIKE '%1.png:0'")
    assert decoded() == "1" and decoded() == ""
    content = memory.read_bytes()
    for damaged in (b"", b"text" * 2000, content[: len(content) // 2], content[:5000] + bytes(9) + content[5009:]):
        memory.write_bytes(damaged)
        assert decoded() in ("0 1 2 3 5 7", "") and decoded() == ""
    paths[5].unlink()
    assert decoded(5) == ""
    data = Folder(**settings, cache_dir=str(tmp_path / "cache"))
    monkeypatch.setattr(Path, "read_bytes", None)  # the keys of latents follow without reading
    assert len(cache._content_keys(data, 0)) == 5
    capsys.readouterr()


@pytest.mark.parametrize("kind", ["shards", "rows"])
def test_other_data_sets_find_the_entries_of_a_folder(tmp_path, tiny_model, encoded, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    if kind == "rows":
        write_rows(tmp_path)
    expected = latents(tiny_model, "cache", Folder("instance", 32, 1, caption=""))
    names, own = [], finding.examine_image
    monkeypatch.setattr(finding, "examine_image", lambda *source: (names.append(source[1]), own(*source))[1])
    for count in (3, 0):
        finding._HERE.execute("DELETE FROM images")
        data = instantiate_from_config(config_of(kind)["data"], cache_dir="cache")
        assert torch.equal(latents(tiny_model, "cache", data), expected[:, : len(data)])
        assert len(names) == count and sum(encoded) == 3
        names.clear()


def test_texts_are_as_without_a_cache(tiny_model, digits, tmp_path, monkeypatch):
    encoder, known = tiny_model.cond_stage_model, ["", *captions_of(digits)]
    cached = CachedTexts(tmp_path, tiny_model, digits)
    calls = []
    monkeypatch.setattr(cache, "encode_texts", lambda net, texts: (calls.append(texts), encode_texts(net, texts))[1])
    for captions in (["", known[5], "", known[9]], ["of no image", known[7], "of none", known[7], ""]):
        expected, found = encode_texts(encoder, captions), cached(captions)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        torch.testing.assert_close(found, encoder(captions))
    assert calls == [["of no image", "of none"]]  # the others were read


@pytest.mark.parametrize("cast", [False, True])
def test_recent_texts_are_encoded_once(tiny_model, monkeypatch, cast):
    encoder, calls = tiny_model.cond_stage_model, []
    recent = frozen.RecentTexts(lambda texts: (calls.append(texts), encode_texts(encoder, texts))[1])
    size = sum(value[0].nbytes for value in encode_texts(encoder, [""]).values())
    monkeypatch.setattr(frozen, "TEXT_BYTES", 3 * size)
    for captions in (["a", "b", "a"], ["c", "a"], ["d", "a", "b"], ["c"]):
        recent(captions)  # as outside of autocast, in validation: not what is found within
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            expected, found = encode_texts(encoder, captions), recent(captions)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert [value.dtype for value in found.values()] == [value.dtype for value in expected.values()]
        assert len(recent.kept) <= 3
    if not cast:
        assert calls == [["a", "b"], ["c"], ["d"], ["c"]]  # c, the least recent, had to go when d came


@pytest.mark.parametrize("data", ["diffusion", "folder"])
def test_training_is_the_same_to_the_bit(tmp_path, monkeypatch, data):
    """Without a cache, from memory, and from disk: built, found, and built in part by others."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    write_noise(tmp_path / "images", 40, 32)
    given = {
        "none": {"cache_latents": False},
        "texts": {"cache_latents": False, "cache_dir": "texts"},
        "memory": {"cache_latents": True},
        "disk": {"cache_latents": True, "cache_dir": "cache"},
        "again": {"cache_latents": True, "cache_dir": "cache"},
    }
    results = {}
    for name, settings in given.items():
        config = config_of(data)
        config["stage"]["params"] |= settings
        config["data"]["params"] |= {"first": 40} if data == "diffusion" else {"root": "images"}
        # without a cache the bits of an image depend on the others of its batch, unless it has a multiple of 16
        config["loop"] |= {"steps": 3, "batch_size": 16, "precision": "fp32", "workers": int(name == "again")}
        config["loop"] |= {"preview_every": 3, "save_every": 3}
        results[name] = load_file(train(config | {"outdir": f"run {name}"}, device="cpu"))
    for name, state in results.items():
        different = [key for key, value in state.items() if not torch.equal(value, results["none"][key])]
        assert not different, (name, different[:3])
    assert shards(tmp_path / "cache") and all("texts-" in str(path) for path in shards(tmp_path / "texts"))


def test_a_file_is_not_a_folder_of_caches(tmp_path, tiny_parts):
    from test_stages import diffusion

    (tmp_path / "file").touch()
    refused("cache_dir .* is a file: name a folder", diffusion, tiny_parts, cache_dir=str(tmp_path / "file"))


MANY = """
import json, os, sys, time
from pathlib import Path
import torch
from PIL import Image
from benchmarks.common import process_memory
from ldm.training import loop

torch.set_num_threads(1)
count, config, points = int(sys.argv[1]), json.loads(sys.argv[2]), []

def note(what):
    memory = {name: size // 2**20 for name, size in process_memory().items()}
    points.append((what, time.process_time(), memory))
    print(*points[-1], file=sys.stderr, flush=True)

def noted(owner, name):
    own = getattr(owner, name)
    def call(*args, **options):
        found = own(*args, **options)
        note(name)
        return found
    setattr(owner, name, call)

for i in range(count):
    path = Path("images", f"{i // 1000:03}", f"{i:06}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    row = bytes((j + i) % 256 for j in range(192))
    Image.frombytes("RGB", (64, 64), i.to_bytes(3, "little") + (row * 64)[3:]).save(path, compress_level=1)
    path.with_suffix(".txt").write_text(f"a gradient number {i}")
note("written")
noted(loop, "build_datasets")
noted(loop, "EpochBatches")  # after the cache is built
noted(loop.Stage, "turn")
loop.train(config, device="cpu")
print(json.dumps(points))
"""


@pytest.mark.full
def test_training_on_many_images_takes_little_memory(tmp_path):
    """100,000 of 64 px, with the UNet of configs/folder and an autoencoder of little work with its latents' size."""
    write_inputs(tmp_path)
    config = yaml.safe_load((ROOT / "configs" / "folder" / "diffusion.yaml").read_text())
    first = copy.deepcopy(TINY["first_stage_config"])
    first["params"]["ddconfig"] |= {"ch": 4, "ch_mult": [1, 1, 1], "norm_groups": 4, "resolution": 64}
    first["params"]["ddconfig"] |= {"in_channels": 3, "out_ch": 3, "attn_resolutions": [], "attn_type": "none"}
    network = instantiate_from_config(first)
    save_file(tmp_path / "coarse", network.state_dict(), first)
    config["stage"]["params"] |= {"first_stage": "coarse", "cond_stage": "cond_stage", "cache_dir": "cache"}
    config["stage"]["params"]["defaults"] = {"height": 64, "width": 64, "steps": 2, "scale": 3.0}
    config["stage"]["params"]["unet_config"]["params"] |= {"context_dim": 32, "adm_in_channels": 24}
    config["data"]["params"]["root"] = "images"
    config["outdir"], config["loop"] = "out", {"steps": 8, "batch_size": 8, "report_to": "none", "precision": "fp32"}
    command = [sys.executable, "-c", MANY, "100000", json.dumps(config)]
    paths = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=paths, check=True)
    points = [memory for _, _, memory in json.loads(done.stdout.splitlines()[-1])]  # in MiB
    # the peak of resident memory, mapped files included: below 1 GB
    assert max(memory["VmHWM"] for memory in points) < 1e9 / 2**20
    assert max(memory["RssAnon"] for memory in points) < 800  # without them, at each point
    assert sum(len(cache._keys_in(load_file(path))) for path in shards(tmp_path / "cache")) == 200_001  # all distinct
