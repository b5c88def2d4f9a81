"""Measure and compare: ways of loading, samplers, and kinds of generators.

python scripts/benchmark.py load                      # Stable Diffusion 1 at full size, random weights (8.5 GB of disk)
python scripts/benchmark.py load --ckpt model.safetensors --repeat 3
python scripts/benchmark.py samplers --out samplers.jsonl --plot samplers.png --precision autocast
python scripts/benchmark.py objectives --out objectives.jsonl
python scripts/benchmark.py trilemma --ddgan ddgan.safetensors --ddpm ddpm.safetensors --plot trilemma.png

`samplers` draws the captions of held-out MNIST images (--data or LDM_DATA) with every sampler at several numbers of
steps, everything else being the model's own, and measures prompt accuracy, the Fréchet distance over the floor of as
many real images, and recall. It goes on where an interrupted run stopped: what --out has is not drawn again.

`trilemma` draws digits with a VAE (the first stage of the model that ships, sampled from a unit normal prior), a
denoising diffusion GAN, and a pixel-space diffusion model by its own ancestral sampler and by DDIM, and measures the
Fréchet distance over the floor, recall, and seconds an image: three axes, of which each kind leaves one.

`objectives` trains a small network (configs/pixel/objectives.yaml, MNIST) under each schedule, prediction, loss weight
... for the same number of steps, and measures the digits that each draws. It goes on in the same way.

`load` compares, each in a fresh process, ways to get a model from a file into memory: ours, and the naive one (build
the model, read the file, load_state_dict). Seconds are wall clock and CPU time of the loading alone, imports left out,
with the file in the page cache; memory is the process's, less what it had before: its peak, and what is private to it
afterwards (what a mapped file brought in and nobody changed is not).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from ldm.cli import Parser, check_writable, int_range, run
from ldm.inference.options import PRECISIONS, add_model_options, load_model

ALIASES = ("euler", "euler_a")  # ddim and ddpm under their other names
OBJECTIVES = Path(__file__).parents[1] / "configs" / "pixel" / "objectives.yaml"
# What a fresh process runs: it prepares, then measures `work()`.
MEASURE = """
import json, resource, sys, time
import torch
{prepare}

def memory():
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    with open("/proc/self/smaps_rollup") as file:
        next(file)
        maps = dict(line.split(":", 1) for line in file)
    kib = lambda text: int(text.split()[0]) / 2**20
    return kib(fields["VmHWM"]), kib(maps["Private_Dirty"]) + kib(maps["Swap"]), kib(fields["VmRSS"])

def reset_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")

reset_peak()
_, private, resident = memory()
wall, cpu = time.perf_counter(), time.process_time()
{work}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak, after, _ = memory()
print(json.dumps({{"seconds": wall, "cpu_seconds": cpu, "peak_GiB": peak - resident, "private_GiB": after - private}}))
"""
OURS = ("import ldm, ldm.loading", "model = ldm.load({path!r}, device='cpu')")
BUILD = "from ldm.latent_diffusion import LatentDiffusion; config = json.load(open({config!r}))"
NAIVE = {
    ".safetensors": (
        BUILD + "; from safetensors.torch import load_file",
        "model = LatentDiffusion(**config); model.load_state_dict(load_file({path!r}), strict=False)",
    ),
    ".ckpt": (
        BUILD,
        "model = LatentDiffusion(**config)\n"
        "state = torch.load({path!r}, map_location='cpu', weights_only=True)['state_dict']\n"
        "model.load_state_dict(state, strict=False)",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("load", help="time and memory of loading a checkpoint")
    command.add_argument("--ckpt", type=Path, metavar="FILE", help="(random weights at Stable Diffusion 1's full size)")
    command.add_argument("--repeat", type=int_range(1), default=3, metavar="N", help="best of N (3)")
    command = commands.add_parser("samplers", help="quality of every sampler at several numbers of steps")
    add_model_options(command)
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines; those there are kept")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw the table as an image (matplotlib)")
    command.add_argument("--samplers", nargs="*", metavar="NAME", help="(all, aliases left out)")
    command.add_argument(
        "--steps", nargs="*", type=int_range(1), default=[5, 10, 20, 50], metavar="N", help="(5 10 20 50)"
    )
    command.add_argument("--n", type=int_range(1), default=2000, metavar="N", help="images of each (2000)")
    command.add_argument("--batch-size", type=int_range(1), default=100, metavar="N", help="images at a time (100)")
    command.add_argument("--data", metavar="DIR", help="folder of MNIST (LDM_DATA, or ./data)")
    command = commands.add_parser("trilemma", help="quality, coverage and speed of a VAE, DDGAN, DDPM and DDIM")
    command.add_argument("--ddgan", type=Path, required=True, metavar="FILE", help="of configs/pixel/ddgan.yaml")
    command.add_argument("--ddpm", type=Path, required=True, metavar="FILE", help="of configs/pixel/ddpm.yaml, say")
    command.add_argument("--vae", type=Path, metavar="FILE", help="whose first stage is taken (the model that ships)")
    command.add_argument(
        "--ddim-steps", nargs="*", type=int_range(1), default=[4, 20, 50], metavar="N", help="(4 20 50)"
    )
    command.add_argument("--n", type=int_range(10), default=1000, metavar="N", help="images of each (1000)")
    command.add_argument("--batch-size", type=int_range(1), default=100, metavar="N", help="images at a time (100)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps; measuring is on the CPU")
    command.add_argument("--precision", choices=PRECISIONS, default="full", help="of the networks (full)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="also draw the table as an image (matplotlib)")
    command = commands.add_parser("objectives", help="schedules, predictions, weights ...: a small network under each")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines; those there are kept")
    command.add_argument("--names", nargs="*", metavar="NAME", help="(all; an unknown one lists them)")
    command.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the configuration")
    command.add_argument("--n", type=int_range(10), default=1000, metavar="N", help="images of each (1000)")
    command.add_argument("--batch-size", type=int_range(1), default=100, metavar="N", help="images at a time (100)")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, mps; measuring is on the CPU")
    args = parser.parse_args(argv)
    if getattr(args, "plot", None) is not None:  # now, not after minutes of drawing
        import_pyplot()
        check_writable(args.plot)
    if args.command == "objectives":
        from ldm.evaluation.objectives import compare, table

        print(table(compare(OBJECTIVES, args.out, args.names, args.set, args.n, args.batch_size, args.device)))
        return
    if args.command == "trilemma":
        rows = compare_generators(args)
        print(trilemma_table(rows))
        if args.plot is not None:
            plot_trilemma(rows, args.plot)
        return
    if args.command == "samplers":
        rows = compare_samplers(args)
        print(sampler_table(rows))
        if args.plot is not None:
            plot_samplers(rows, args.plot)
        return
    with tempfile.TemporaryDirectory() as folder:
        files = [args.ckpt] if args.ckpt is not None else make_stable_diffusion(Path(folder))
        compare_loading(files, Path(folder) / "config.json", args.repeat)


def make_stable_diffusion(folder: Path) -> list[Path]:
    """Stable Diffusion 1 with random weights, as a single file in both formats."""
    import torch
    from safetensors.torch import save_file

    from ldm.checkpoint.compvis import single_file
    from ldm.checkpoint.compvis_config import from_compvis
    from ldm.latent_diffusion import LatentDiffusion
    from ldm.util import read_yaml

    yaml = Path(__file__).parents[1] / "configs" / "stable-diffusion" / "v1-inference.yaml"
    config = from_compvis(read_yaml(yaml))
    with torch.device("meta"):
        model = LatentDiffusion(**config["params"])
    random = {name: torch.empty(t.shape, dtype=t.dtype).uniform_(-0.05, 0.05) for name, t in model.state_dict().items()}
    state, metadata = single_file(random, config)
    files = [folder / "model.safetensors", folder / "model.ckpt"]
    save_file(state, files[0], metadata)
    torch.save({"state_dict": state, "global_step": 0}, files[1])
    return files


def compare_loading(files: Sequence[Path], config: Path, repeat: int) -> None:
    """Print the table, one row for each file and way, the weights' size first."""
    import ldm

    rows = []
    for path in files:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: the naive way that is compared reads single files")
        model = ldm.load(path, device="cpu")
        config.write_text(json.dumps(model.config))
        weights = sum(p.numel() * p.element_size() for p in model.state_dict().values()) / 2**30
        del model
        for way, (prepare, work) in (("ldm.load", OURS), ("naive", NAIVE.get(path.suffix, NAIVE[".ckpt"]))):
            best = min((measure(prepare, work, path, config) for _ in range(repeat)), key=lambda row: row["seconds"])
            rows.append({"file": path.suffix, "way": way, "weights_GiB": weights, **best})
    print("| file | way | s | CPU s | peak / weights | private / weights |\n|---|---|---|---|---|---|")
    for row in rows:
        shares = [f"{row[key] / row['weights_GiB']:.2f}" for key in ("peak_GiB", "private_GiB")]
        cells = [row["file"], row["way"], f"{row['seconds']:.2f}", f"{row['cpu_seconds']:.2f}", *shares]
        print(f"| {' | '.join(cells)} |")
    print(f"weights: {rows[0]['weights_GiB']:.2f} GiB")


def measure(prepare: str, work: str, path: Path, config: Path) -> dict[str, float]:
    """What MEASURE prints, of a fresh process."""
    parts = (text.format(path=str(path), config=str(config)) for text in (prepare, work))
    code = MEASURE.format(**dict(zip(("prepare", "work"), parts, strict=True)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"loading {path} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare_samplers(args: argparse.Namespace) -> list[dict]:
    """Measure what the output file does not have yet, adding a line to it each time; all its rows."""
    from ldm.diffusion.sampling import SAMPLERS, get_sampler
    from ldm.evaluation.datasets import find_reference
    from ldm.evaluation.draw import draw
    from ldm.evaluation.networks import FEATURES, JUDGE, Measuring
    from ldm.evaluation.report import report_model
    from ldm.evaluation.trilemma import evaluations

    with open(args.out, "a"):  # tried now, not after minutes of drawing
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    if any(row["n"] != args.n for row in rows):
        raise ValueError(f"{args.out} has rows of {rows[0]['n']} images each: name another --out, or the same --n")
    done = {(row["sampler"], row["steps"]) for row in rows}
    names = [name for name in SAMPLERS if name not in ALIASES] if args.samplers is None else args.samplers
    wanted = [(steps, name) for steps in args.steps for name in names if (name, steps) not in done]
    for _, name in wanted:
        get_sampler(name)  # an unknown name is told before anything is drawn
    model, networks = load_model(args), Measuring.load(JUDGE, FEATURES)
    reference, _ = find_reference("mnist", "heldout", args.data, networks, args.n)
    captions = reference.captions(args.n, "train")
    for steps, name in wanted:
        print(f"{name}, {steps} steps", file=sys.stderr)
        start = time.perf_counter()
        images = draw(model, [c.text for c in captions], 0, args.batch_size, sampler=name, steps=steps)
        seconds = time.perf_counter() - start
        report = report_model(images, captions, "train", reference, networks, None)
        found = {
            "sampler": name,
            "steps": steps,
            "evaluations": evaluations(model, sampler=name, steps=steps),
            "accuracy": report["prompt_accuracy"]["accuracy"],
            "ratio": report["frechet"]["ratio"],
            "recall": report["precision_recall"]["recall"],
            "diversity": report["diversity"]["ratio"],
            "n": args.n,
            "seconds": seconds,
        }
        rows.append(found)
        with open(args.out, "a") as file:
            file.write(json.dumps(found) + "\n")
    return rows


def sampler_table(rows: Sequence[dict]) -> str:
    """Markdown: a row for each sampler, a column for each number of steps: accuracy, distance / floor, recall."""
    steps = sorted({row["steps"] for row in rows})
    cells = {(r["sampler"], r["steps"]): f"{r['accuracy']:.1%}, {r['ratio']:.2f}, {r['recall']:.2f}" for r in rows}
    lines = ["| sampler | " + " | ".join(f"{s} steps" for s in steps) + " |", "|---" * (len(steps) + 1) + "|"]
    for name in dict.fromkeys(row["sampler"] for row in rows):
        lines.append(f"| `{name}` | " + " | ".join(cells.get((name, s), "-") for s in steps) + " |")
    return "\n".join(lines)


def plot_samplers(rows: Sequence[dict], path: Path) -> None:
    """Distance over the floor against network evaluations, a line for each sampler; both axes logarithmic."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for i, name in enumerate(dict.fromkeys(row["sampler"] for row in rows)):
        own = sorted((row["evaluations"], row["ratio"]) for row in rows if row["sampler"] == name)
        axes.plot(*zip(*own, strict=True), "o-" if i < 10 else "s--", label=name, markersize=4, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Fréchet distance / floor")
    for axis, ticks in ((axes.xaxis, (5, 10, 20, 50, 100)), (axes.yaxis, (0.8, 1, 1.5, 2, 3))):
        axis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
        axis.set_ticks([], minor=True)
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


def import_pyplot() -> ModuleType:
    """ValueError where matplotlib is not installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    return pyplot


def compare_generators(args: argparse.Namespace) -> list[dict]:
    """A row for each generator; a line on standard error as each is done."""
    import ldm
    from ldm.evaluation import trilemma
    from ldm.evaluation.datasets import find_reference
    from ldm.evaluation.networks import FEATURES, JUDGE, Measuring
    from ldm.inference.precision import set_precision

    networks = Measuring.load(JUDGE, FEATURES)
    reference, _ = find_reference("mnist", "test", None, networks, args.n)
    captions, rows = reference.captions(args.n, "train"), []
    vae, ddgan, ddpm = models = [ldm.load(path, device=args.device) for path in (args.vae, args.ddgan, args.ddpm)]
    for model in models:
        set_precision(model, args.precision, model.device)
    asked = {"DDGAN": (ddgan, {}), "DDPM": (ddpm, {})}
    asked |= {f"DDIM, {steps} steps": (ddpm, {"sampler": "ddim", "steps": steps}) for steps in args.ddim_steps}
    ways = [("VAE", 1, partial(trilemma.draw_prior, vae, args.n, args.batch_size), None)]
    for name, (model, settings) in asked.items():
        draw = partial(trilemma.draw_asked, model, captions, args.batch_size, **settings)
        ways.append((name, trilemma.evaluations(model, **settings), draw, reference.labels[: args.n]))
    for name, calls, draw, labels in ways:
        rows.append(trilemma.measure(name, calls, draw, reference, networks, labels))
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def trilemma_table(rows: Sequence[dict]) -> str:
    """Markdown, a row for each generator."""
    titles = ("", "evaluations", "class accuracy", "distance / floor", "recall", "precision", "s an image", "CPU s")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        accuracy = "-" if row["accuracy"] is None else f"{row['accuracy']:.1%}"
        figures = [accuracy, f"{row['ratio']:.2f}", f"{row['recall']:.2f}", f"{row['precision']:.2f}"]
        times = [f"{row['seconds']:.2g}", f"{row['cpu_seconds']:.2g}"]
        lines.append(f"| {' | '.join([row['name'], str(row['evaluations']), *figures, *times])} |")
    return "\n".join(lines)


def plot_trilemma(rows: Sequence[dict], path: Path) -> None:
    """Distance against CPU seconds an image, both logarithmic; larger discs recall more."""
    figure, axes = import_pyplot().subplots(figsize=(8, 5), layout="constrained")
    for row in rows:
        axes.scatter(row["cpu_seconds"], row["ratio"], s=40 + 900 * row["recall"], alpha=0.5)
        label = f"{row['name']}\nrecall {row['recall']:.2f}"
        axes.annotate(label, (row["cpu_seconds"], row["ratio"]), ha="center", va="center", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="CPU seconds an image", ylabel="Fréchet distance / floor")
    axes.margins(0.15)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run(main)
