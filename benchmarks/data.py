"""Images decoded a second: how fast one core makes samples of image files, and what worker processes add.

    python -m benchmarks.data

Rates are of CPU time for one core, and of time for worker processes.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.common import markdown
from ldm.cli import Parser, run
from ldm.data.folder import Folder
from ldm.data.image_files import examine_image

# name -> (width, height) of the files, their suffix and the side of the squares to train on
KINDS = {
    "PNG, 64 x 64 to 64": ((64, 64), "png", 64),
    "PNG, 512 x 512 to 512": ((512, 512), "png", 512),
    "JPEG, 512 x 512 to 512": ((512, 512), "jpg", 512),
    "JPEG, 4000 x 3000 to 512": ((4000, 3000), "jpg", 512),
    "JPEG, 4000 x 3000 to 64": ((4000, 3000), "jpg", 64),
}


def write_images(folder: Path, size: tuple[int, int], suffix: str, count: int) -> None:
    """Write smooth images with a little noise, about as large in bytes as photographs."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse) + rng.normal(0, 4, (size[1], size[0], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.{suffix}")


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


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="shortest time of a round")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], help="numbers of worker processes")
    args = parser.parse_args(argv)
    rows = [[name, *measure(*kind, args.seconds, args.workers)] for name, kind in KINDS.items()]
    print(markdown(["files", "decoded whole", "samples", "examined", *(f"{n} workers" for n in args.workers)], rows))


if __name__ == "__main__":
    run(main)
