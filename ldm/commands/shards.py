"""Write a folder of images as tar shards, webdataset's format, to train on very many: see docs/how-to/large_data.md.

ldm shards images/ shards/
ldm shards images/ shards/ --classes --images 5000
"""

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checks import few
from ldm.cli import Parser, int_range

if TYPE_CHECKING:  # it takes seconds, which --help has no use for
    from ldm.data.folder import Folder


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)

    from ldm.checkpoint.atomic import write_text
    from ldm.data.finding import find_images
    from ldm.data.folder import Folder
    from ldm.data.folder_captions import has_captions

    captioned = has_captions(args.input, find_images(args.input))
    reads = ("image", *(["caption"] if captioned else []), *(["label"] if args.classes else []))
    data = Folder(args.input, 1, on_error=args.on_error, reads=reads)
    paths = write_shards(data, args.output, args.images)
    left_out = args.output / "left_out.txt"
    if data.left_out:
        write_text(left_out, "\n".join([*data.left_out, ""]))
    else:
        left_out.unlink(missing_ok=True)  # of an earlier call
    print(f"{args.output}: {len(data)} images in {len(paths)} shards, {sum(p.stat().st_size for p in paths):,} bytes")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("input", type=Path, metavar="DIR", help="a folder of images, with their captions if there are any")
    add("output", type=Path, metavar="OUT", help="the folder of the shards; those of an earlier call are replaced")
    add("--classes", action="store_true", help="each sub-folder of DIR is a class")
    add("--images", type=int_range(1), default=10_000, metavar="N", help="of each shard (10000)")
    what = "whether an image that cannot be used is an error or left out, and listed in OUT/left_out.txt (refuse)"
    add("--on-error", choices=("refuse", "skip"), default="refuse", help=what)
    return parser.parse_args(argv)


def write_shards(data: "Folder", folder: Path, count: int) -> list[Path]:
    """Write a folder's images as they are, `count` to a shard, in their order, and return the paths of the shards.

    Names are numbers, so that no file name becomes another key or suffix. Equal images give equal bytes: no date, user
    or group. Each shard is complete or not there, so that a call that was stopped can be repeated.
    """
    try:
        from webdataset.writer import TarWriter
    except ImportError:
        raise ValueError("webdataset's package writes shards: pip install webdataset") from None

    from ldm.checkpoint.atomic import atomic, write_text
    from ldm.data.finding import MASK
    from ldm.util import progress_bar

    paths = [folder / f"{number:06}.tar" for number in range(-(-len(data) // count))]
    if others := sorted({*folder.glob("*.tar")} - {*paths}):
        raise ValueError(f"{str(folder)!r} holds other shards ({few(others, 3)}): give a new folder")
    options: dict[str, Any] = {"user": "", "group": "", "mode": 0o644, "mtime": 0, "encoder": False}
    for number, path in enumerate(progress_bar(paths, leave=True, desc="writing shards", unit="shard")):
        with atomic(path) as temporary, open(temporary, "wb") as file, closing(TarWriter(file, **options)) as tar:
            for index in range(number * count, min(len(data), (number + 1) * count)):
                image = data.source(index)[0]
                sample = {"__key__": f"{index:08}", image.suffix.lower()[1:]: image.read_bytes()}
                if "caption" in data.reads:
                    sample["txt"] = "\n".join(data.captions[index]).encode()
                if "label" in data.reads:
                    sample["cls"] = str(data.labels[index]).encode()
                if mask := data.mask_source(index):
                    sample[MASK[1:]] = mask[0].read_bytes()
                tar.write(sample)
    if "label" in data.reads:
        write_text(folder / "classes.txt", "\n".join([*data.classes, ""]))
    return paths
