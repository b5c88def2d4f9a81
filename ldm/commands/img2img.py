"""Generate images from an init image, guided by text.

ldm img2img --init-img five.png --prompt "a bold handwritten digit five"
ldm img2img --init-img photo.jpg --resize --prompt "an oil painting" --strength 0.5 --n_samples 4
ldm img2img --from-png outputs/img2img-samples/samples/00003.png --init-img photo.jpg
ldm img2img --upscale --init-img small.png --ckpt runs/family/upscale/model.safetensors

--strength is the share of the denoising steps that are taken, from the image noised to the first of their noise
levels: 0 gives it back through the first stage, 1 keeps almost nothing of it. It is rounded down to whole steps, at
least 1: 0.75 of 50 are 37.

The result has the image's own size. Where the model needs another (Stable Diffusion: multiples of 64), the image is
padded at the right and the bottom and the result cut back; an image far larger or smaller than the model's size is
refused. --resize brings it to the model's size; --W and --H to one of your own: it is scaled to fill that, and the
rest is cut off evenly; one of them alone keeps the proportions. Transparent parts count as white.

--upscale takes the image as what a super-resolution model is conditioned on: the result is larger by the model's
factor, and has neither prompt nor strength.

Each prompt gets n_samples x n_iter images, seeded and numbered as by txt2img. Files: OUTDIR/samples/00000.png,
OUTDIR/grid-0000.png.
"""

import argparse
from collections.abc import Sequence

from ldm.inference.condition_image import ConditionImage
from ldm.inference.init_image import InitImage
from ldm.inference.options import add_init_image_options, image_parser
from ldm.inference.run import generate_files


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = image_parser(__doc__, "", "outputs/img2img-samples")
    add_init_image_options(parser)
    parser.add_argument("--upscale", action="store_true", help="enlarge the image by a super-resolution model")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.init_img is None:
        raise ValueError("img2img needs an init image: give --init-img FILE")
    read = ConditionImage.of(args.init_img, "image") if args.upscale else InitImage.read(args.init_img)
    generate_files(args, read)
