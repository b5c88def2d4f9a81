"""Images decoded a second: how fast one core makes samples of image files, and what worker processes add; and the
cache of latents: how fast it is built, beside the encoder alone, and read.

    python -m benchmarks.data
    python -m benchmarks.data --parts waits      # what a network waits for JPEGs of 12 megapixels

Rates are of CPU time for one core, and of time for worker processes.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.common import markdown
from ldm.cli import Parser
from ldm.data.folder import Folder
from ldm.data.image_files import examine_image
from ldm.program import run
from ldm.training.cache import cached_latents
from ldm.training.config import read_configs
from ldm.training.latents import encode_batch, encoding_size
from ldm.training.loader import training_batches
from ldm.training.metrics import Waits
from ldm.training.order import EpochBatches
from ldm.util import instantiate_from_config

# name -> (width, height) of the files, their suffix and the side of the squares to train on
KINDS = {
    "PNG, 64 x 64 to 64": ((64, 64), "png", 64),
    "PNG, 512 x 512 to 512": ((512, 512), "png", 512),
    "JPEG, 512 x 512 to 512": ((512, 512), "jpg", 512),
    "JPEG, 4000 x 3000 to 512": ((4000, 3000), "jpg", 512),
    "JPEG, 4000 x 3000 to 64": ((4000, 3000), "jpg", 64),
}

# encoder, at 64 x 64 pixels -> images to measure it with
ENCODERS = {"folder/autoencoder": 512, "autoencoder/kl-f4": 16}


PARTS = ["files", "waits", "cache"]
LARGE = (4000, 3000), 40  # files to wait for: size, number


def write_images(folder: Path, size: tuple[int, int], suffix: str, count: int) -> None:
    """Write smooth images with a little noise, about as large in bytes as photographs."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 4, (size[1], size[0], 3))
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.{suffix}")


def rate(
    work: Callable[[], object], count: int, seconds: float, clock: Callable[[], float] = time.process_time
) -> float:
    """Return how many of `count` items a second `work()` does, by the best of three rounds of at least `seconds`."""
    best = 0.0
    for _ in range(3):
        start, done = clock(), 0
        while clock() - start < seconds:
            work()
            done += count
        best = max(best, done / (clock() - start))
    return best


def measure(size: tuple[int, int], suffix: str, side: int, seconds: float, workers: list[int]) -> list[str]:
    """Return the row of a kind of files: rates of reading whole, sampling, examining, and sampling by workers."""
    with TemporaryDirectory() as temporary:
        folder, count = Path(temporary), 4 if size[0] > 1000 else 16
        write_images(folder, size, suffix, count)
        data = Folder(folder, side, reads=("image",))
        works = [
            lambda: [data.read(path) for path in data.paths],
            lambda: data.__getitems__(range(count)),
            lambda: [examine_image(path) for path in data.paths],
        ]
        found = [rate(work, count, seconds) for work in works]
        for number in workers:
            order = [[i % count for i in range(k, k + 8)] for k in range(0, max(32, int(seconds * found[1])), 8)]
            loader = DataLoader(data, batch_sampler=order, num_workers=number)
            found.append(rate(partial(list, loader), 8 * len(order), seconds, time.perf_counter))
        return [f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in found]


def measure_waits(size: tuple[int, int], count: int, seconds: float, workers: Sequence[int]) -> list[list[str]]:
    """Return, for two paces of a network, the share of the time that it waits, without and with worker processes.

    The network is elsewhere, as on a GPU, and this process sleeps: its pace is how long it takes over a batch, in units
    of how long reading one takes here and now, with a core as busy as it is.
    """
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(folder, size, "jpg", count)
        data = Folder(folder, 64, reads=("image",))
        paces, batch = (0.7, 2.0), 8 / rate(lambda: data.__getitems__(range(8)), 8, seconds, time.perf_counter)
        return [[f"{pace:g}", *(f"{wait(data, pace * batch, n):.0%}" for n in (0, *workers))] for pace in paces]


def wait(data: Folder, seconds: float, workers: int, batches: int = 20) -> float:
    """Return the share of the time that a network waits for batches of 8, which takes so many seconds over each."""
    read = Waits(training_batches(data, EpochBatches(len(data), 8, 0), workers))
    for number, _ in zip(range(batches + 4), read, strict=False):
        if number == 3:  # until then, processes start
            read.share()
        time.sleep(seconds)
    return read.share()


def measure_cache(name: str, count: int, rounds: int) -> list[str]:
    """Return the row of an encoder, with random weights: medians of rounds in which all are measured in turn.

    A cache is built from files: they are read, hashed and decoded, in the same process.
    """
    (config,) = read_configs([f"configs/{name}.yaml"], ["data.params.root=DIR", "data.params.size=64"])
    parts = {key: config["stage"]["params"][key] for key in ("embed_dim", "ddconfig")}
    first = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": parts}
    network = instantiate_from_config(first).eval().requires_grad_(False)
    model = SimpleNamespace(first_stage_model=network, config={"first_stage_config": first})
    with TemporaryDirectory() as temporary:
        folder, rows = Path(temporary), []
        write_images(folder, (64, 64), "png", count)
        data = Folder(folder, 64, reads=("image",))
        batches = torch.stack([data[i]["image"] for i in range(count)]).split(encoding_size(data))
        for number in range(rounds + 1):  # the first warms up
            times = [time.process_time()]
            for batch in batches:
                encode_batch(network, batch)
            times.append(time.process_time())
            columns = cached_latents(str(folder / str(number)), model, data, 0)
            times.append(time.process_time())
            for i in range(count):
                _ = [column[i] for column in columns]
            times.append(time.process_time())
            alone, built, read = np.diff(times)
            rows.append((count / alone, count / built, alone / built, count / read))
        alone, built, ratio, read = map(median, zip(*rows[1:], strict=True))
        return [name, f"{alone:.3g}", f"{built:.3g}", f"{ratio:.0%}", f"{read:,.0f}"]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="shortest time of a round")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of worker processes")
    parser.add_argument("--rounds", type=int, default=5, help="of measuring the cache")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure: all")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if "files" in args.parts:
        rows = [[name, *measure(*kind, args.seconds, args.workers)] for name, kind in KINDS.items()]
        titles = ["files", "decoded whole", "samples", "examined", *(f"{n} workers" for n in args.workers)]
        print(markdown(titles, rows))
    if "waits" in args.parts:
        rows = measure_waits(*LARGE, args.seconds, args.workers)
        print("\n" + markdown(["step / reading", "no workers", *(f"{n} workers" for n in args.workers)], rows))
    if "cache" in args.parts:
        rows = [measure_cache(*encoder, args.rounds) for encoder in ENCODERS.items()]
        print("\n" + markdown(["encoder", "alone", "cache built", "ratio", "cache read"], rows))


if __name__ == "__main__":
    run(main)
