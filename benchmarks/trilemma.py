"""Compare generators on the generative learning trilemma (Xiao et al. 2022, figure 1): quality, coverage and speed.

python -m benchmarks.trilemma --ddgan ddgan.safetensors --ddpm ddpm.safetensors --plot trilemma.png

A VAE (the first stage of the model that ships, sampled from a unit normal prior), a denoising diffusion GAN, and a
pixel-space diffusion model by its own ancestral sampler and by DDIM generate digits. Quality is the Fréchet distance
over that between as many real images, coverage the recall, speed the seconds per image.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import Label, add_labels, check_plot, import_pyplot, markdown
from benchmarks.generators import evaluations, measure
from ldm.cli import Parser, int_range
from ldm.diffusion.sampling.noise import SeededNoise
from ldm.evaluation.samples import prompts_for, quantise, sample_images
from ldm.inference.options import PRECISIONS
from ldm.program import run


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--ddgan", type=Path, required=True, metavar="FILE", help="of configs/pixel/ddgan.yaml")
    add("--ddpm", type=Path, required=True, metavar="FILE", help="of configs/pixel/ddpm.yaml, say")
    add("--vae", type=Path, metavar="FILE", help="model whose first stage is sampled (the model that ships)")
    add("--ddim-steps", nargs="*", type=int_range(1), default=[4, 20, 50], metavar="N", help="(4 20 50)")
    add("--n", type=int_range(10), default=1000, metavar="N", help="images of each (1000)")
    add("--batch-size", type=int_range(1), default=100, metavar="N", help="images at a time (100)")
    add("--device", default="auto", help="auto, cpu, cuda, mps; figures are computed on the CPU")
    add("--precision", choices=PRECISIONS, default="full", help="of the networks (full)")
    add("--plot", type=Path, metavar="FILE", help="plot the table (needs matplotlib)")
    args = parser.parse_args(argv)
    check_plot(args.plot)
    rows = compare_generators(args)
    print(trilemma_table(rows))
    if args.plot is not None:
        plot_trilemma(rows, args.plot)


def compare_generators(args: argparse.Namespace) -> list[dict]:
    """Return a row for each generator, printed to standard error as each is done."""
    import ldm
    from ldm.evaluation.datasets import find_reference
    from ldm.evaluation.networks import Measuring
    from ldm.inference.precision import set_precision

    networks = Measuring.load()
    reference, _ = find_reference("mnist", "test", None, networks, args.n)
    captions, rows = reference.captions(args.n, "train"), []
    vae, ddgan, ddpm = loaded = [ldm.load(path, device=args.device) for path in (args.vae, args.ddgan, args.ddpm)]
    for model in loaded:
        set_precision(model, args.precision, model.device)
    models = {"DDGAN": (ddgan, {}), "DDPM": (ddpm, {})}
    models |= {f"DDIM, {steps} steps": (ddpm, {"sampler": "ddim", "steps": steps}) for steps in args.ddim_steps}
    ways = [("VAE", 1, partial(sample_prior, vae, args.n, args.batch_size), None)]
    for name, (model, settings) in models.items():
        prompts, _ = prompts_for(model, captions)
        images = partial(sample_images, model, prompts, 0, args.batch_size, **settings)
        ways.append((name, evaluations(model, **settings), images, reference.labels[: args.n]))
    for name, calls, images, labels in ways:
        rows.append(measure(name, calls, images, reference, networks, labels))
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


@torch.inference_mode()
def sample_prior(model: Any, n: int, batch_size: int, seed: int = 0) -> Tensor:
    """Return uint8 (n, 28, 28) of a model's first stage as a VAE (Kingma & Welling 2014): unit normal latents decoded.

    Its scaled latents have unit variance, so the unit normal is the prior that fits them.
    """
    size = model.latent_size(model.defaults["height"], model.defaults["width"])
    images = []
    for first in range(0, n, batch_size):
        seeds = range(seed + first, seed + min(first + batch_size, n))
        images.append(quantise(model.decode(SeededNoise(seeds, size)().to(model.device)).cpu()))
    return torch.cat(images)


def trilemma_table(rows: Sequence[dict]) -> str:
    """Return Markdown, a row for each generator."""
    titles = ("", "evaluations", "class accuracy", "distance / floor", "recall", "precision", "s an image", "CPU s")
    table = []
    for row in rows:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        figures = [accuracy, f"{row['ratio']:.2f}", f"{row['recall']:.2f}", f"{row['precision']:.2f}"]
        times = [f"{row['seconds']:.2g}", f"{row['cpu_seconds']:.2g}"]
        table.append([row["name"], str(row["evaluations"]), *figures, *times])
    return markdown(titles, table)


def plot_trilemma(rows: Sequence[dict], path: Path) -> None:
    """Plot distance against CPU seconds an image, both logarithmic; larger discs have more recall."""
    figure, axes = import_pyplot().subplots(figsize=(8, 5), layout="constrained")
    labels = []
    for row in rows:
        point, area = (row["cpu_seconds"], row["ratio"]), 40 + 900 * row["recall"]
        axes.scatter(*point, s=area, alpha=0.5)
        labels.append(Label(f"{row['name']}\nrecall {row['recall']:.2f}", point, (area / math.pi) ** 0.5))
    axes.set(xscale="log", yscale="log", xlabel="CPU s an image", ylabel="Fréchet distance / floor")
    for axis, ticks in ((axes.xaxis, (0.001, 0.01, 0.1, 1, 10)), (axes.yaxis, (3, 10, 30, 100))):
        axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.set_xlim(0.001, 10)
    axes.set_ylim(2, 300)
    axes.grid(alpha=0.3)
    add_labels(axes, labels, ((0, 1), (0, -1), (1, 0), (-1, 0)))
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
