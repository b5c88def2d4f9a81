"""Generate images with models that are conditioned on classes, layouts or maps, or on nothing.

ldm sample --ckpt runs/pixel/ddpm/model.safetensors --class 5 --n_samples 8
ldm sample --ckpt runs/pixel/ddpm/model.safetensors --class 0 1 2 3 4 5 6 7 8 9 --n_samples 8 --scale 2
ldm sample --ckpt runs/pixel/simple_unet/model.safetensors --n_samples 16 --strip
ldm sample --ckpt runs/pixel/ddpm/model.safetensors --class 5 --sampler ddim --steps 50
ldm sample --ckpt runs/family/layout/model.safetensors --layout layout.json --n_samples 8
ldm sample --ckpt runs/family/map/model.safetensors --map map.png --n_samples 8

A layout is a list of objects and their boxes, left, top, right and bottom in pixels:
[{"class": "five", "box": [4, 10, 20, 30]}, {"class": "two", "box": [40, 30, 52, 48]}]. A map has the size of the image
to generate; its classes are numbered as in the data that the model was trained on.

Without --class, a class-conditional model generates images of any class. Images are seeded and numbered as by
txt2img. Files: OUTDIR/samples/00000.png, OUTDIR/grid-0000.png.
"""

from collections.abc import Sequence

from ldm.inference.condition_image import ConditionImage
from ldm.inference.input_lines import read_layout
from ldm.inference.options import image_parser
from ldm.inference.run import generate_files


def main(argv: Sequence[str] | None = None) -> None:
    args = image_parser(__doc__, "", "outputs/sample-samples", classes=True).parse_args(argv)
    if args.layout is not None:
        args.prompts = [read_layout(path) for path in args.layout]
    generate_files(args, None if args.map is None else ConditionImage.of(args.map, "map"))
