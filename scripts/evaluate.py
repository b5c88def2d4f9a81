"""Measure a model on handwritten digits: one JSON on standard output (or --out FILE) and one picture.

python scripts/evaluate.py model --scale 1.5 --steps 20
python scripts/evaluate.py model --wording unseen --out unseen.json
python scripts/evaluate.py model --split heldout --scale 1.25   # to choose scale and steps by
python scripts/evaluate.py autoencoder --ckpt outputs/autoencoder/model.safetensors
python scripts/evaluate.py bits --ckpt runs/pixel/ddpm/model.safetensors --n 100
python scripts/evaluate.py statistics --judge FILE --features FILE    # newly trained ones become those that ship
python scripts/evaluate.py subjects --outdir subjects    # pictures to try DreamBooth on: one/train, star/heldout ...
python scripts/evaluate.py dreambooth --ckpt outputs/one/model.safetensors --subject subjects/one \\
    --instance-prompt "a sks one" --class-prompt "a handwritten digit one" --digit 1

`model` draws a picture for the caption of each real one, or for its class, as the model takes it; one that takes
nothing draws as many. With MNIST at hand (--data, LDM_DATA or ./data) it also searches the training pictures for
copies, and `autoencoder` measures all test pictures instead of the 1,000 that ship.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import Parser, check_writable, int_range, run
from ldm.inference.options import add_model_options, add_settings, load_model

if TYPE_CHECKING:
    from PIL.Image import Image

    from ldm.evaluation.networks import Measuring
    from ldm.evaluation.reference import Reference

SHEET_COLUMNS = 12
PICTURE = Path("outputs/evaluate.png")
MEASURED = ("steps", "scale", "sampler", "spacing", "eta", "interval", "rescale")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; those of sampling that are left None are the checkpoint's own."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    model = commands.add_parser("model", help="draw pictures for the captions of real ones, and measure them")
    autoencoder = commands.add_parser("autoencoder", help="measure what a first stage loses")
    statistics = commands.add_parser("statistics", help="measure MNIST's test pictures: what ldm/pretrained holds")

    bits = commands.add_parser("bits", help="bits per dimension of test pictures under a diffusion model of pixels")
    add_bits(bits)
    subjects = commands.add_parser("subjects", help="write pictures of subjects: MNIST's printed ones, drawn stars")
    dreambooth = commands.add_parser("dreambooth", help="measure what a model learnt of a subject, and what it forgot")
    add_dreambooth(dreambooth)

    autoencoder.add_argument("--ckpt", type=Path, help="the checkpoint; without it, the model that ships")
    autoencoder.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; measuring is on the CPU")
    for command in (model, autoencoder):
        command.add_argument("--dataset", choices=("mnist", "digits"), default="mnist", help="digits: scikit-learn's")
        command.add_argument(
            "--split", choices=("test", "heldout"), default="test", help="heldout: the last training pictures"
        )
        command.add_argument(
            "--n", type=int_range(10), help="pictures; without it, all (10,000 of MNIST's test pictures)"
        )
        command.add_argument("--batch-size", type=int_range(1), default=100, help="pictures at a time")
    for command in (model, autoencoder, dreambooth):
        command.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there instead")
        command.add_argument(
            "--picture", type=Path, metavar="FILE", help=f"where the picture goes ({PICTURE}, or beside --out)"
        )
    for command in (model, autoencoder, statistics, subjects, dreambooth):
        command.add_argument("--data", metavar="ROOT", help="folder that holds MNIST/raw (LDM_DATA, else ./data)")
        command.add_argument("--judge", type=Path, metavar="FILE", help="classifier; without it, the one that ships")
        command.add_argument("--features", type=Path, metavar="FILE", help="feature network; without it, as it ships")
    subjects.add_argument("--outdir", type=Path, default=Path("subjects"), help="where they go (subjects)")
    statistics.add_argument("--outdir", type=Path, help="where the files go (ldm/pretrained)")

    model.add_argument(
        "--wording", choices=("seen", "unseen"), default="seen", help="captions as in training, or new ones"
    )
    model.add_argument("--seed", type=int_range(0), default=0, help="seed of the first picture")
    add_settings(model, *MEASURED)
    add_model_options(model)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.command == "statistics":
        write_statistics(args)
        return
    if args.command == "bits":
        evaluate_bits(args)
        return
    if args.command == "subjects":
        write_subjects(args)
        return
    if args.out is not None and args.out == image_path(args):
        raise ValueError(f"--out {args.out} is where the picture would go: name the JSON's file .json, or --picture")
    for path in (args.out, image_path(args)):
        check_writable(path)  # now, not after minutes of drawing
    from ldm.evaluation.networks import FEATURES, JUDGE, Measuring  # the first to import torch: the options are good
    from ldm.evaluation.report import without_nan

    judge = JUDGE if args.judge is None else args.judge
    features = FEATURES if args.features is None else args.features
    networks = Measuring.load(judge, features)
    evaluate = {"model": evaluate_model, "autoencoder": evaluate_autoencoder, "dreambooth": evaluate_dreambooth}
    report, sheet = evaluate[args.command](args, networks)
    sheet.save(image_path(args), format="PNG")
    write_report(without_nan(report), args.out)
    print(f"picture: {image_path(args)}", file=sys.stderr)


def evaluate_model(args: argparse.Namespace, networks: "Measuring") -> "tuple[dict, Image]":
    """Draw and measure: the report, and a sheet of drawn pictures beside real ones."""
    from ldm.evaluation.datasets import find_reference
    from ldm.evaluation.networks import classify
    from ldm.evaluation.report import report_model
    from ldm.evaluation.samples import ask, by_class, draw, side_by_side

    model = load_model(args)
    reference, training = find_reference(args.dataset, args.split, args.data, networks, args.n)
    n = len(reference.labels) if args.n is None else args.n
    frames = "train" if args.wording == "seen" else "unseen"
    prompts, captions = ask(model, reference.captions(n, frames))
    given = {name: getattr(args, name) for name in MEASURED if getattr(args, name) is not None}
    started = time.perf_counter()
    pictures = draw(model, prompts, args.seed, args.batch_size, networks.size, **given)
    drawn = time.perf_counter()
    report = report_model(pictures, captions, frames, reference, networks, training)
    rate = n / (drawn - started)
    times = {"drawing": drawn - started, "measuring": time.perf_counter() - drawn, "images_per_second": rate}
    settings = {"wording": args.wording, "seed": args.seed, "batch_size": args.batch_size, **model.defaults, **given}
    labels = reference.labels[:n] if report["prompt_accuracy"] else classify(networks.judge, pictures)
    shown = by_class(pictures, labels, SHEET_COLUMNS)
    real_shown = by_class(reference.pictures, reference.image_labels, SHEET_COLUMNS)
    report = {**head(args, reference, n), "settings": settings, "seconds": times, **report}
    return report, side_by_side([shown, real_shown])


def evaluate_autoencoder(args: argparse.Namespace, networks: "Measuring") -> "tuple[dict, Image]":
    """Reconstruct and measure: the report, and a sheet of reconstructions beside their originals."""
    from ldm.evaluation.autoencoder import load_autoencoder, reconstruct
    from ldm.evaluation.datasets import find_reference
    from ldm.evaluation.report import report_autoencoder
    from ldm.evaluation.samples import by_class, side_by_side

    autoencoder, scale_factor = load_autoencoder(args.ckpt, args.device)
    reference, _ = find_reference(args.dataset, args.split, args.data, networks, args.n)
    pictures, labels = reference.pictures[: args.n], reference.image_labels[: args.n]
    n = len(pictures)
    if args.n is not None and args.n > n:
        raise ValueError(f"only {n} of MNIST's test pictures ship: use --n {n}, or give --data ROOT")
    result = reconstruct(autoencoder, pictures, args.batch_size, scale_factor)
    report = report_autoencoder(result, pictures, labels, reference, networks)
    sheet = side_by_side([by_class(result.pictures, labels, SHEET_COLUMNS), by_class(pictures, labels, SHEET_COLUMNS)])
    return {**head(args, reference, n), **report}, sheet


def add_bits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, metavar="FILE", help="the model")
    add("--variance", metavar="NAME", help="of each step: learned, small or large (the first of these that it has)")
    add("--dataset", choices=("mnist", "digits"), default="mnist", help="digits: scikit-learn's")
    add("--data", metavar="ROOT", help="folder that holds MNIST/raw (LDM_DATA, else ./data)")
    add("--n", type=int_range(2), default=100, help="pictures (100)")
    add("--batch-size", type=int_range(1), default=100, help="pictures at a time (100)")
    add("--seed", type=int_range(0), default=0, help="of the noise")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--out", type=Path, metavar="FILE", help="write the JSON there instead")


def evaluate_bits(args: argparse.Namespace) -> None:
    """Print the variational bound of the first test pictures, or write it to --out."""
    check_writable(args.out)
    import ldm
    from ldm.evaluation.datasets import open_data
    from ldm.evaluation.likelihood import check_variance, measure_bits
    from ldm.evaluation.networks import fingerprint
    from ldm.models.classifier import INNER

    model = ldm.load(args.ckpt, device=args.device)
    check_variance(model, args.variance)
    side = model.defaults["height"]
    data, _ = open_data(args.dataset, "test", args.data, min(side, INNER))  # padded, or pooled to what is smaller
    report = {
        "measured": "bits",
        "checkpoint": {"path": str(args.ckpt), "sha256": fingerprint(args.ckpt)},
        "dataset": f"{args.dataset} test",
        "n": args.n,
        **measure_bits(model, data, args.n, args.batch_size, args.seed, args.variance),
    }
    write_report(report, args.out)


def add_dreambooth(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, metavar="FILE", help="the tuned model")
    add("--before", type=Path, metavar="FILE", help="the model that it was (the digits model that ships)")
    add("--without", type=Path, metavar="FILE", help="what the same command gives with --prior_loss_weight 0")
    add(
        "--subject",
        type=Path,
        required=True,
        metavar="DIR",
        help="its pictures: heldout/ of the subject, not trained on; others/ of anything else (real digits that ship)",
    )
    add("--instance-prompt", required=True, metavar="TEXT", help="as in training")
    add("--class-prompt", required=True, metavar="TEXT", help="as in training")
    add("--digit", type=int_range(0, 9), help="which digit the class is; without it, of none")
    add("--n", type=int_range(10), default=200, help="pictures of each kind (200)")
    add("--batch-size", type=int_range(1), default=100, help="pictures at a time (100)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps; measuring is on the CPU")


def evaluate_dreambooth(args: argparse.Namespace, networks: "Measuring") -> "tuple[dict, Image]":
    """Measure the models before and after, and without prior preservation; a sheet of each one's pictures."""
    import ldm
    from ldm.evaluation.dreambooth import Asked, Detector, compare, measure, read_folder
    from ldm.evaluation.networks import features_of, fingerprint
    from ldm.evaluation.reference import load_reference
    from ldm.evaluation.samples import side_by_side

    real = read_folder(args.subject / "heldout")
    others = args.subject / "others"
    other = read_folder(others) if others.is_dir() else load_reference().pictures
    subject = features_of(networks.features, real)
    detector = Detector(subject, features_of(networks.features, other))
    asked = Asked(args.instance_prompt, args.class_prompt, args.digit)
    figures, rows = {}, []
    for name, path in (("before", args.before), ("after", args.ckpt), ("without_prior", args.without)):
        if name != "without_prior" or path is not None:
            model = ldm.load(path, device=args.device)
            figures[name], shown = measure(model, asked, subject, detector, networks, args.n, args.batch_size)
            rows.append(shown)
    report = {
        "measured": "dreambooth",
        "checkpoint": {"path": str(args.ckpt), "sha256": fingerprint(args.ckpt)},
        "networks": networks.fingerprints,
        "n": args.n,
        "detector": detector.errors(),
        **compare(figures["before"], figures["after"], figures.get("without_prior")),
        **figures,
    }
    return report, side_by_side(rows)


def write_subjects(args: argparse.Namespace) -> None:
    """Pictures of the subjects that DreamBooth is shown on: to learn from, held out, and of other things."""
    from ldm.evaluation.datasets import open_data
    from ldm.evaluation.networks import FEATURES, JUDGE, Measuring
    from ldm.evaluation.subjects import DIGITS, printed_ones, stars, write_images
    from ldm.models.classifier import inner

    networks = Measuring.load(
        JUDGE if args.judge is None else args.judge, FEATURES if args.features is None else args.features
    )
    digits = inner(open_data("mnist", "test", args.data)[0].images[:DIGITS, 0])
    for name, parts in (("one", printed_ones(args.data, networks)), ("star", stars(digits))):
        write_images(parts, args.outdir / name)
        counts = ", ".join(f"{len(pictures)} {part}" for part, pictures in parts.items())
        print(f"{args.outdir / name}: {counts}", file=sys.stderr)


def write_statistics(args: argparse.Namespace) -> None:
    """Take trained networks in half precision, measure MNIST's test pictures with them, write what ships."""
    import torch

    from ldm.checkpoint.file import load_file, save_file
    from ldm.evaluation.datasets import open_data
    from ldm.evaluation.networks import FEATURES, JUDGE, PRETRAINED, Measuring
    from ldm.evaluation.reference import SIZES, measure_reference, save_reference

    folder = PRETRAINED if args.outdir is None else args.outdir
    paths = {"judge": JUDGE, "features": FEATURES}
    for name, given in (("judge", args.judge), ("features", args.features)):
        if given is not None:
            config, state = load_file(given)
            paths[name] = folder / f"{name}.safetensors"
            save_file(paths[name], state, config, torch.float16)
    networks = Measuring.load(**paths)
    real, training = open_data("mnist", "test", args.data, networks.size)
    path = folder / "statistics.safetensors"
    save_reference(measure_reference("mnist test", real, training, networks, SIZES), path)
    print(f"{path}: {path.stat().st_size:,} bytes", file=sys.stderr)


def head(args: argparse.Namespace, reference: "Reference", n: int) -> dict:
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


def write_report(report: dict, out: Path | None) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n", encoding="utf-8")


def image_path(args: argparse.Namespace) -> Path:
    if args.picture is not None:
        return args.picture
    return PICTURE if args.out is None else args.out.with_suffix(".png")


if __name__ == "__main__":
    run(main)
