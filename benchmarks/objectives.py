"""Train one small network under each schedule, prediction, loss weight ..., and measure the digits that it generates.

python -m benchmarks.objectives --out objectives.jsonl

The network is configs/pixel/objectives.yaml's, on MNIST. Rows that --out has already are kept.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ldm
from benchmarks.common import add_row, markdown, read_rows
from benchmarks.generators import evaluations, measure
from ldm.cli import Parser, int_range
from ldm.evaluation.datasets import find_reference
from ldm.evaluation.networks import Measuring
from ldm.evaluation.samples import sample_images
from ldm.program import run
from ldm.training.config import read_configs
from ldm.training.loop import train

CONFIG = Path(__file__).parents[1] / "configs" / "pixel" / "objectives.yaml"
STEPS = 50  # of sampling
WEIGHT, NOISE = "stage.params.weight.name", "stage.params.noise"
MODEL = "stage.params.model.params"
UNET = f"{MODEL}.unet_config.params"


class Change(NamedTuple):
    """What it changes in configs/pixel/objectives.yaml, and by which samplers its images are generated."""

    changes: Sequence[str] = ()
    samplers: Sequence[str] = ("ddim",)


OBJECTIVES = {  # each is one change from the first, or two
    "v, cosine": Change(samplers=("ddim", "ddpm")),
    "eps, cosine": Change([f"{MODEL}.prediction=eps"]),
    "x0, cosine": Change([f"{MODEL}.prediction=x0"]),
    "flow, flow": Change([f"{MODEL}.prediction=flow", f"{MODEL}.schedule.name=flow"]),  # two: flow matching's
    "v, linear": Change([f"{MODEL}.schedule.name=linear"]),
    "v, scaled_linear": Change([f"{MODEL}.schedule.name=scaled_linear"]),
    "v, sigmoid_alphabar": Change([f"{MODEL}.schedule.name=sigmoid_alphabar"]),
    "v, sigmoid_beta": Change([f"{MODEL}.schedule.name=sigmoid_beta"]),
    "v, weight min_snr": Change([f"{WEIGHT}=min_snr"]),
    "v, weight snr": Change([f"{WEIGHT}=snr"]),
    "v, weight truncated_snr": Change([f"{WEIGHT}=truncated_snr"]),
    "learned variance": Change([f"{MODEL}.learned_variance=true", f"{UNET}.out_channels=2"], ("ddim", "ddpm")),
    "self-conditioning": Change([f"{MODEL}.self_condition=true", f"{UNET}.in_channels=2"]),
    "linear attention": Change([f"{UNET}.attention_type=linear", f"{UNET}.attention_memory=4"]),
    "immiscible noise": Change([f"{NOISE}.immiscible=true"]),
    "offset noise": Change([f"{NOISE}.offset=0.1"]),
    "eps, linear": Change([f"{MODEL}.prediction=eps", f"{MODEL}.schedule.name=linear"]),  # two: Ho et al. 2020's
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="JSON lines; rows that are there are kept")
    add("--names", nargs="*", metavar="NAME", help="(all; an unknown one lists them)")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the configuration")
    add("--n", type=int_range(10), default=1000, metavar="N", help="images of each (1000)")
    add("--batch-size", type=int_range(1), default=100, metavar="N", help="images at a time (100)")
    add("--device", default="auto", help="auto, cpu, cuda, mps; figures are computed on the CPU")
    print(table(compare_objectives(parser.parse_args(argv))))


def compare_objectives(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train and measure what --out does not have yet, adding a row to it each time; return all its rows.

    Each model goes to a folder of its name under the configuration's outdir; one that is there is taken as it is.
    """
    names = list(OBJECTIVES) if args.names is None else args.names
    unknown = [name for name in names if name not in OBJECTIVES]
    if unknown:
        raise ValueError(f"unknown objective {unknown[0]!r}; choose from {'; '.join(OBJECTIVES)}")
    configs, rows = {name: _configuration(name, args.set) for name in names}, read_rows(args.out)
    for name in names:
        expected = (args.n, configs[name]["loop"]["steps"])
        if any((row["n"], row["training_steps"]) != expected for row in rows):
            raise ValueError(
                f"{args.out} has rows of other numbers of images or steps than {expected}: name another --out"
            )
    networks = Measuring.load()
    reference, _ = find_reference("mnist", "test", None, networks, args.n)
    labels = reference.labels[: args.n]
    done = {(row["objective"], row["sampler"]) for row in rows}
    for name in names:
        wanted = [sampler for sampler in OBJECTIVES[name].samplers if (name, sampler) not in done]
        if not wanted:
            continue
        fresh = not (Path(configs[name]["outdir"]) / configs[name]["name"]).exists()
        print(name, file=sys.stderr)
        started = time.process_time()
        model = ldm.load(train(configs[name], resume=True, device=args.device), device=args.device)
        trained = time.process_time() - started if fresh else None  # not known of a resumed run
        for sampler in wanted:
            settings = {"sampler": sampler, "steps": STEPS}
            generate = partial(sample_images, model, labels.tolist(), 0, args.batch_size, **settings)
            found = measure(name, evaluations(model, **settings), generate, reference, networks, labels)
            row = {
                "objective": name,
                "sampler": sampler,
                **{key: found[key] for key in ("accuracy", "ratio", "recall", "n")},
                "training_steps": configs[name]["loop"]["steps"],
                "training_cpu_seconds": trained,
                "cpu_seconds_a_image": found["cpu_seconds"],
            }
            add_row(args.out, rows, row)
    return rows


def _configuration(name: str, changes: Sequence[str]) -> dict[str, Any]:
    slug = name.replace(", ", "-").replace(" ", "-")
    (config,) = read_configs([str(CONFIG)], [*OBJECTIVES[name].changes, f"name={slug}", *changes])
    return config


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown, a row for each, in the order of OBJECTIVES."""
    order, lines = list(OBJECTIVES), []
    for row in sorted(rows, key=lambda row: order.index(row["objective"])):
        trained = "-" if row["training_cpu_seconds"] is None else f"{row['training_cpu_seconds']:.0f}"
        figures = [f"{row['accuracy']:.1%}", f"{row['ratio']:.1f}", f"{row['recall']:.2f}", trained]
        lines.append([row["objective"], row["sampler"], *figures])
    return markdown(["objective", "sampler", "accuracy", "distance / floor", "recall", "training, CPU s"], lines)


if __name__ == "__main__":
    run(main)
