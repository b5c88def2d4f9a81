"""Measure a model on handwritten digits: one JSON on standard output (or --out FILE) and one picture.

python scripts/evaluate.py model --scale 1.5 --steps 20
python scripts/evaluate.py model --wording unseen --out unseen.json
python scripts/evaluate.py model --split heldout --scale 1.25   # to choose scale and steps by
python scripts/evaluate.py autoencoder --ckpt outputs/autoencoder/model.safetensors
python scripts/evaluate.py statistics                           # the real pictures again, after training new networks

`model` draws a picture for the caption of each real one. With MNIST at hand (--data, LDM_DATA or ./data) it also
searches the training pictures for copies, and `autoencoder` measures all test pictures instead of the 1,000 that
ship.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ldm.cli import Parser, real, run, whole

PRETRAINED = Path(__file__).parent.parent / "ldm" / "pretrained"
SHEET_COLUMNS = 12
MEASURED = ("steps", "scale", "sampler", "spacing", "eta", "interval", "rescale")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; those of sampling that are left None are the checkpoint's own."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    model = commands.add_parser("model", help="draw pictures for the captions of real ones, and measure them")
    autoencoder = commands.add_parser("autoencoder", help="measure what a first stage loses")
    statistics = commands.add_parser("statistics", help="measure MNIST's test pictures and write the file that ships")

    for command in (model, autoencoder):
        command.add_argument("--ckpt", type=Path, help="the checkpoint; without it, the model that ships")
        command.add_argument("--dataset", choices=("mnist", "digits"), default="mnist", help="digits: scikit-learn's")
        command.add_argument(
            "--split", choices=("test", "heldout"), default="test", help="heldout: the last training pictures"
        )
        command.add_argument("--n", type=whole(10), help="pictures; without it, all (10,000 of MNIST's test pictures)")
        command.add_argument("--batch-size", type=whole(1), default=100, help="pictures at a time")
        command.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there instead")
        command.add_argument("--picture", type=Path, metavar="FILE", help="where the picture goes (evaluate.png)")
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; measuring is on the CPU")
    for command in (model, autoencoder, statistics):
        command.add_argument("--data", metavar="ROOT", help="folder that holds MNIST/raw (LDM_DATA, else ./data)")
        command.add_argument("--judge", type=Path, default=PRETRAINED / "judge.safetensors", help="classifier")
        command.add_argument(
            "--features", type=Path, default=PRETRAINED / "features.safetensors", help="feature network"
        )
    statistics.add_argument("--out", type=Path, default=PRETRAINED / "statistics.safetensors", help="file to write")

    model.add_argument(
        "--wording", choices=("seen", "unseen"), default="seen", help="captions as in training, or new ones"
    )
    model.add_argument("--seed", type=whole(0), default=0, help="seed of the first picture")
    model.add_argument("--steps", type=whole(1), help="network steps")
    model.add_argument("--scale", type=real(), help="guidance; 1 is none")
    model.add_argument("--sampler", help="an unknown name lists the known ones")
    model.add_argument("--spacing", help="which timesteps: trailing, leading, linspace, quad, compvis ...")
    model.add_argument("--eta", type=real(0), help="share of fresh noise in each step")
    model.add_argument(
        "--interval", type=real(0, infinite=True), nargs=2, metavar=("LOW", "HIGH"), help="guide at these sigmas"
    )
    model.add_argument("--rescale", type=real(0), metavar="PHI", help="guidance rescale, 0 to 1")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    from ldm.evaluation.networks import load_network  # the first to import torch, now that the options are good

    judge, network = load_network(args.judge), load_network(args.features, "features")
    networks = {"judge": (args.judge, judge), "features": (args.features, network)}
    {"model": evaluate_model, "autoencoder": evaluate_autoencoder, "statistics": write_statistics}[args.command](
        args, networks
    )


def evaluate_model(args: argparse.Namespace, networks: dict) -> None:
    """Draw, measure, write."""
    import ldm
    from ldm.evaluation.draw import draw
    from ldm.evaluation.pictures import by_class, side_by_side
    from ldm.evaluation.report import report_model
    from ldm.evaluation.source import find_reference

    check_writable(args)
    model = ldm.load(args.ckpt, device=args.device)
    reference, training = find_reference(args.dataset, args.split, args.data, networks, args.n)
    n = len(reference.labels) if args.n is None else args.n
    frames = "train" if args.wording == "seen" else "unseen"
    captions = reference.captions(n, frames)
    given = {name: getattr(args, name) for name in MEASURED if getattr(args, name) is not None}
    started = time.perf_counter()
    pictures = draw(model, [caption.text for caption in captions], args.seed, args.batch_size, **given)
    drawn = time.perf_counter()
    judge, network = networks["judge"][1], networks["features"][1]
    report = report_model(pictures, captions, frames, reference, judge, network, training)
    settings = {"wording": args.wording, "seed": args.seed, "batch_size": args.batch_size, **model.defaults, **given}
    times = {
        "drawing": drawn - started,
        "measuring": time.perf_counter() - drawn,
        "pictures_per_second": n / (drawn - started),
    }
    shown = by_class(pictures, reference.labels[:n], SHEET_COLUMNS)
    real_shown = by_class(reference.pictures, reference.labels_in_order(), SHEET_COLUMNS)
    write(
        args,
        {**head(args, reference, n), "settings": settings, "seconds": times, **report},
        side_by_side([shown, real_shown]),
    )


def evaluate_autoencoder(args: argparse.Namespace, networks: dict) -> None:
    """Reconstruct, measure, write."""
    from ldm.evaluation.autoencoder import load_autoencoder, reconstruct
    from ldm.evaluation.pictures import by_class, side_by_side
    from ldm.evaluation.report import report_autoencoder
    from ldm.evaluation.source import find_reference

    check_writable(args)
    autoencoder, scale_factor = load_autoencoder(args.ckpt, args.device)
    reference, _ = find_reference(args.dataset, args.split, args.data, networks, args.n)
    pictures, labels = reference.pictures[: args.n], reference.labels_in_order()[: args.n]
    if args.n is not None and args.n > len(pictures):
        raise ValueError(
            f"only {len(pictures)} of MNIST's test pictures ship: use --n {len(pictures)}, or give --data ROOT"
        )
    labels = labels[: len(pictures)]
    result = reconstruct(autoencoder, pictures, args.batch_size, scale_factor)
    report = report_autoencoder(result, pictures, labels, reference, networks["judge"][1], networks["features"][1])
    sheet = side_by_side([by_class(result.pictures, labels, SHEET_COLUMNS), by_class(pictures, labels, SHEET_COLUMNS)])
    write(args, {**head(args, reference, len(pictures)), **report}, sheet)


def write_statistics(args: argparse.Namespace, networks: dict) -> None:
    """Measure MNIST's test pictures and write the file that ships."""
    from ldm.evaluation.networks import fingerprint
    from ldm.evaluation.reference import SIZES, measure_reference, save_reference
    from ldm.evaluation.source import open_data

    used = {name: fingerprint(path) for name, (path, _) in networks.items()}
    judge, network = networks["judge"][1], networks["features"][1]
    reference = measure_reference("mnist test", *open_data("mnist", "test", args.data), judge, network, used, SIZES)
    save_reference(reference, args.out)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes", file=sys.stderr)


def head(args: argparse.Namespace, reference, n: int) -> dict:
    """What was measured with what: figures of different judges or feature networks do not compare."""
    from ldm.evaluation.networks import fingerprint
    from ldm.loading import SHIPPED

    path = SHIPPED if args.ckpt is None else args.ckpt
    return {
        "measured": args.command,
        "checkpoint": {"path": str(path), "sha256": fingerprint(path)},
        "reference": reference.name,
        "networks": reference.networks,
        "n": n,
    }


def picture_path(args: argparse.Namespace) -> Path:
    if args.picture is not None:
        return args.picture
    return Path("evaluate.png") if args.out is None else args.out.with_suffix(".png")


def check_writable(args: argparse.Namespace) -> None:
    """Fail before minutes of drawing, not after them: make the folders, and open what will be written."""
    for path in (args.out, picture_path(args)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()


def write(args: argparse.Namespace, report: dict, sheet) -> None:
    """The JSON to --out or standard output, the picture to its file."""
    text = json.dumps(report, indent=2, ensure_ascii=False)
    sheet.save(picture_path(args), format="PNG")
    if args.out is None:
        print(text)
    else:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(f"picture: {picture_path(args)}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
