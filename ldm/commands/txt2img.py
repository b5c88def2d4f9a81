"""Generate images from text.

ldm txt2img --prompt "a handwritten digit five"
ldm txt2img --prompt "a bold seven leaning right" --n_samples 8 --steps 20 --scale 2 --seed 1
ldm txt2img --from-file prompts.txt --n_samples 4 --n_iter 2 --outdir outputs/mine
ldm txt2img --from-png outputs/mine/samples/00003.png

Each prompt gets n_samples x n_iter images. Image k of the whole run, counted over all images of the first prompt,
then of the next, has seed `--seed` + k. Files: OUTDIR/samples/00000.png, OUTDIR/grid-0000.png, numbered on from those
that are there.
"""

from collections.abc import Sequence

from ldm.inference.options import image_parser
from ldm.inference.run import generate_files


def main(argv: Sequence[str] | None = None) -> None:
    parser = image_parser(__doc__, "a handwritten digit five", "outputs/txt2img-samples")
    generate_files(parser.parse_args(argv))
