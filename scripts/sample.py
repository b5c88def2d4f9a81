"""Draw with models that know no text: of classes, or of nothing.

python scripts/sample.py --ckpt runs/pixel/ddpm/model.safetensors --class 5 --n_samples 8
python scripts/sample.py --ckpt runs/pixel/ddpm/model.safetensors --class 0 1 2 3 4 5 6 7 8 9 --n_samples 8 --scale 2
python scripts/sample.py --ckpt runs/pixel/simple_unet/model.safetensors --n_samples 16 --strip
python scripts/sample.py --ckpt runs/pixel/ddpm/model.safetensors --class 5 --sampler ddim --steps 50

Without --class, a model of classes draws of any. Images are seeded and numbered as in txt2img.py. Files:
OUTDIR/samples/00000.png, OUTDIR/grid-0000.png.
"""

import argparse
from collections.abc import Sequence

from ldm.cli import run
from ldm.inference.drawing import draw_run, drawing_parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    return drawing_parser(__doc__, "", "outputs/sample-samples", classes=True).parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    draw_run(parse(argv))


if __name__ == "__main__":
    run(main, fast_exit=True)
