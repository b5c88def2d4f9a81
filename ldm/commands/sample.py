"""Generate images with class-conditional or unconditional models.

ldm sample --ckpt runs/pixel/ddpm/model.safetensors --class 5 --n_samples 8
ldm sample --ckpt runs/pixel/ddpm/model.safetensors --class 0 1 2 3 4 5 6 7 8 9 --n_samples 8 --scale 2
ldm sample --ckpt runs/pixel/simple_unet/model.safetensors --n_samples 16 --strip
ldm sample --ckpt runs/pixel/ddpm/model.safetensors --class 5 --sampler ddim --steps 50

Without --class, a class-conditional model generates images of any class. Images are seeded and numbered as by
txt2img. Files: OUTDIR/samples/00000.png, OUTDIR/grid-0000.png.
"""

from collections.abc import Sequence

from ldm.inference.options import image_parser
from ldm.inference.run import generate_files


def main(argv: Sequence[str] | None = None) -> None:
    parser = image_parser(__doc__, "", "outputs/sample-samples", classes=True)
    generate_files(parser.parse_args(argv))
