"""The commands of `scripts/evaluate.py`, each of its parsed options; most return a report and a sheet of images."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import ldm
from ldm.checkpoint.file import checkpoint_at, load_file
from ldm.checkpoint.writing import save_file
from ldm.data.captions import NUMBER_WORDS
from ldm.data.emoji import Emoji
from ldm.data.folder import Folder
from ldm.data.scenes import CANVAS
from ldm.evaluation import subjects
from ldm.evaluation.autoencoder import load_autoencoder, reconstruct
from ldm.evaluation.datasets import HELD_OUT, find_reference, open_data
from ldm.evaluation.dreambooth import Detector, SubjectPrompts, compare, measure_subject, read_folder
from ldm.evaluation.emoji import make_groups, process_seconds, report_emoji, report_first_stage
from ldm.evaluation.emoji_judge import load_judge
from ldm.evaluation.likelihood import check_variance, measure_bits
from ldm.evaluation.networks import JUDGE, PRETRAINED, Measuring, classify, features_of, fingerprint, load_image_network
from ldm.evaluation.own_data import Halves, prompts_of, read_for, report_agreement, report_images, report_reconstruction
from ldm.evaluation.reference import SIZES, load_reference, measure_reference, save_reference
from ldm.evaluation.report import report_autoencoder, report_model
from ldm.evaluation.samples import image_sheet, images_by_class, prompts_for, sample_images
from ldm.evaluation.scenes import measure_scenes
from ldm.finetune.embedding_files import split_word
from ldm.finetune.embeddings import apply_embedding
from ldm.images import image_grid, to_pil
from ldm.inference.guiders import make_guide
from ldm.inference.options import load_model, settings_of
from ldm.inference.run import note_unused_words, unknown_prompts
from ldm.labels import labelled_rows
from ldm.loading import SHIPPED
from ldm.models.classifier import INNER, PADDING, inner
from ldm.settings import Guidance
from ldm.training.conditions import read_by

Result = tuple[dict[str, Any] | None, Image.Image | None]


def evaluate_model(args: argparse.Namespace) -> Result:
    """Generate and measure: the report, and a sheet of generated images beside real ones."""
    if args.dataset not in HELD_OUT:
        return _evaluate_on_folder(args)
    networks, model = Measuring.load(args.judge, args.features), load_model(args)
    check_digits(model, networks.size)
    if args.clip is not None:
        raise ValueError("--clip would have no effect on digits, whose captions the judge checks")
    reference, training = find_reference(args.dataset, args.split, args.data, networks, args.n)
    n = len(reference.labels) if args.n is None else args.n
    frames = "train" if args.wording == "seen" else "unseen"
    prompts, captions = prompts_for(model, reference.captions(n, frames), args.classifier is not None)
    given = _given(args)
    guide, settings = _guide(model, args, given)
    if args.embedding:
        note_unused_words(model, prompts)
    started = time.perf_counter()
    images = sample_images(model, prompts, args.seed, args.batch_size, networks.size, **guide, **given)
    generated = time.perf_counter() - started
    report = report_model(images, captions, frames, reference, networks, training)
    measured = time.perf_counter() - started - generated
    labels = reference.labels[:n] if report["prompt_accuracy"] else classify(networks.judge, images)
    sheet = [images_by_class(images, labels), images_by_class(reference.images, reference.image_labels)]
    report = {
        **_head(args, reference=reference.name, networks=reference.networks, n=n),
        "settings": {
            **{"wording": args.wording, "seed": args.seed, "batch_size": args.batch_size},
            **model.defaults,
            **given,
            **settings,
        },
        "seconds": {"generating": generated, "measuring": measured, "images_per_second": n / generated},
        **report,
    }
    return report, image_sheet(sheet)


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of sampling that were given, but the seed, which each batch has its own of."""
    settings = settings_of(args).items()
    return {name: value for name, value in settings if value is not None and name not in ("seed", "precision")}


def _guide(model: Any, args: argparse.Namespace, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return `generate`'s guide and its settings for the report, taking its scale out of the others."""
    scale = given.pop("classifier_scale", None)
    if args.classifier is None:
        if scale is not None:
            raise ValueError(f"--classifier-scale {scale:g} would have no effect: it is for --classifier")
        return {}, {}
    scale = Guidance.classifier_scale if scale is None else scale
    settings = {"classifier": fingerprint(args.classifier), "classifier_scale": scale}
    return {"guide": make_guide(model, classifier=args.classifier, classifier_scale=scale)}, settings


def evaluate_scenes(args: argparse.Namespace) -> Result:
    """Generate scenes for captions of seen and of held-out combinations: the report, and a sheet of each kind."""
    model, given = load_model(args), _given(args)
    size = model.image_channels, model.defaults["height"], model.defaults["width"]
    if size != (3, CANVAS, CANVAS) or model.null != "":
        raise ValueError(f"the model is not one of scenes: those are texts to colour images of {CANVAS} x {CANVAS}")
    judge = load_image_network(JUDGE if args.judge is None else args.judge)

    def generate(captions: list[str]) -> torch.Tensor:
        if args.embedding:
            note_unused_words(model, captions)
        return sample_images(model, captions, args.seed, args.batch_size, None, **given)

    report, rows = measure_scenes(generate, args.n, args.data, judge)
    settings = {"seed": args.seed, "batch_size": args.batch_size, **model.defaults, **given}
    return {**_head(args, n=args.n), "settings": settings, **report}, labelled_rows(rows, side=128)


def evaluate_autoencoder(args: argparse.Namespace) -> Result:
    """Reconstruct and measure: the report, and a sheet of reconstructions beside the real images."""
    networks = Measuring.load(args.judge, args.features)
    autoencoder, scale_factor = load_autoencoder(args.ckpt, args.device)
    if args.dataset not in HELD_OUT:
        check_folder_options(args)
        side = getattr(getattr(autoencoder, "encoder", None), "resolution", 64)
        images = Halves(Path(args.dataset), (side, side), autoencoder.image_channels, "").images[: args.n]
        report, made = report_reconstruction(autoencoder, images, args.batch_size)
        return {**_head(args, dataset=args.dataset, n=len(images)), **report}, _pairs(made, images)
    check_digits(autoencoder, networks.size)
    reference, _ = find_reference(args.dataset, args.split, args.data, networks, args.n)
    images, labels = reference.images[: args.n], reference.image_labels[: args.n]
    n = len(images)
    if args.n is not None and args.n > n:
        raise ValueError(f"only {n} of MNIST's test images ship: use --n {n}, or give --data ROOT")
    result = reconstruct(autoencoder, images, args.batch_size, scale_factor)
    report = report_autoencoder(result, images, labels, reference, networks)
    head = _head(args, reference=reference.name, networks=reference.networks, n=n)
    return {**head, **report}, image_sheet([images_by_class(some, labels) for some in (result.images, images)])


def check_digits(model: Any, size: int) -> None:
    """Raise ValueError for a model, or first stage, that cannot be one of digits, by channels, size or vocabulary."""
    wrong, own = None, getattr(model, "defaults", {})
    if getattr(model, "image_channels", 1) != 1:
        wrong = "has colours"
    elif any(own.get(side, size) not in (size, size + 2 * PADDING) for side in ("height", "width")):
        wrong = f"makes {own['width']} x {own['height']} pixels"
    elif unknown_prompts(getattr(getattr(model, "cond_stage_model", None), "tokenizer", None), NUMBER_WORDS):
        wrong = f"was not trained on the words of digits ({', '.join(NUMBER_WORDS)})"
    if wrong is not None:
        raise ValueError(f"the model {wrong}, so it is not one of digits: give your images as --dataset DIR")


def check_folder_options(args: argparse.Namespace) -> None:
    """Raise ValueError for what is not a folder, and for options that have no effect on one."""
    if not Path(args.dataset).is_dir():
        raise ValueError(f"--dataset {args.dataset!r} is neither mnist, digits nor a folder")
    fixed = {"split": "test", "wording": "seen", "data": None, "judge": None, "features": None, "classifier": None}
    for name, default in fixed.items():
        if getattr(args, name, default) != default:
            raise ValueError(f"--{name} is for digits and would have no effect on a folder of images")


def _evaluate_on_folder(args: argparse.Namespace) -> Result:
    """Generate for the captions of half of a folder's images, and measure."""
    check_folder_options(args)
    model = load_model(args)
    size = model.defaults["width"], model.defaults["height"]
    halves = Halves(Path(args.dataset), size, model.image_channels, read_for(model))
    n = len(halves.images) if args.n is None else args.n
    if n > len(halves.images):
        raise ValueError(f"{n} images are more than half of {args.dataset}: use --n {len(halves.images)} or less")
    given = _given(args)
    prompts = prompts_of(model, halves, n)
    if args.embedding:
        note_unused_words(model, prompts)
    if args.clip is not None and read_for(model) != "caption":
        raise ValueError("--clip compares images with captions, which this model does not take")
    encoder = None if args.clip is None else load_image_network(args.clip)
    images = sample_images(model, prompts, args.seed, args.batch_size, None, **given)
    settings = {"seed": args.seed, "batch_size": args.batch_size, **model.defaults, **given}
    report = {**_head(args, dataset=args.dataset, n=n), "settings": settings, **report_images(images, halves)}
    if encoder is not None:
        report["clip"] = report_agreement(model, encoder, images, halves)
    return report, _pairs(images, halves.images)


def _pairs(images: torch.Tensor, real: torch.Tensor) -> Image.Image:
    """Return a sheet of up to 60 of both, uint8 (n, c, h, w), beside each other."""
    return image_grid([image_grid(to_pil(some[:60]), 6) for some in (images, real[: len(images)])], 2, 12)


def evaluate_bits(args: argparse.Namespace) -> Result:
    """Measure the variational bound of the first test images, or of the first images of a folder."""
    model = ldm.load(args.ckpt, device=args.device)
    check_variance(model, args.variance)
    side, name = model.defaults["height"], f"{args.dataset} test"
    if args.dataset in HELD_OUT:
        check_digits(model, min(side, INNER))
        data: Any = open_data(args.dataset, "test", args.data, min(side, INNER))[0]  # padded, or pooled if smaller
    else:
        check_folder_options(args)
        name, shape = args.dataset, (model.defaults["width"], side)
        reads = ["image", *read_by(model)]
        data = Folder(name, side, model.image_channels, caption="", buckets=[shape], reads=reads)
        classes = model.cond_stage_model
        if "label" in reads and len(data.classes) > (count := classes.null or classes.n_classes):
            raise ValueError(f"{name} has {len(data.classes)} classes, its sub-folders, and the model {count}")
    bits = measure_bits(model, data, args.n, args.batch_size, args.seed, args.variance)
    return {**_head(args, dataset=name, n=args.n), **bits}, None


def evaluate_emoji(args: argparse.Namespace) -> Result:
    """Generate for captions of emoji, and measure; a sheet of images for held-out captions beside the real ones."""
    model = load_model(args)
    side, size = model.defaults["height"], {model.defaults["height"], model.defaults["width"]}
    if model.image_channels != 3 or len(size) > 1 or side % 16 or not hasattr(model.cond_stage_model, "tokenizer"):
        raise ValueError("the model is not one of emoji, which makes square images in colour, of captions: give --ckpt")

    def read(split: Any, copies: int = 1) -> Emoji:
        cache = str(args.cache)
        return Emoji(args.data, split, side, copies=copies, toned_copies=copies, cache_dir=cache)

    training, held_out = read("train"), read("held_out")
    judge = load_judge(read("train", copies=2), args.cache, args.epochs)
    groups, given = make_groups(training, held_out, args.n), _given(args)
    made, started = {}, time.perf_counter()
    for name, group in groups.items():
        print(f"captions: {name}", file=sys.stderr)
        made[name] = sample_images(model, group.captions, args.seed, args.batch_size, None, **given)
    report: dict[str, Any] = {
        **_head(args),
        "settings": {"seed": args.seed, "batch_size": args.batch_size, **model.defaults, **given},
        "seconds": {"generating": time.perf_counter() - started},
        **report_emoji(judge, made, groups, training, held_out),
    }
    if any(True for _ in model.first_stage_model.parameters()):
        report["autoencoder"] = report_first_stage(model.first_stage_model, groups["held_out"].real, args.batch_size)
    report["process"] = process_seconds(Path(report["checkpoint"]["path"]), groups["held_out"].captions[0])
    return report, _pairs(made["held_out"], groups["held_out"].real)


def evaluate_dreambooth(args: argparse.Namespace) -> Result:
    """Measure the models before and after, and without prior preservation; a sheet of each one's images."""
    networks = Measuring.load(args.judge, args.features)
    real, others = read_folder(args.subject / "heldout"), args.subject / "others"
    if len(real) < 2:
        raise ValueError(f"{args.subject / 'heldout'} has one image: give at least 2")
    other = read_folder(others) if others.is_dir() else load_reference().images
    detector = Detector(features_of(networks.features, real), features_of(networks.features, other))
    prompts = SubjectPrompts(args.instance_prompt, args.class_prompt, args.digit)
    figures, rows = {}, []
    for name, path in (("before", args.before), ("after", args.ckpt), ("without_prior", args.without)):
        if name != "without_prior" or path is not None:
            model = ldm.load(path, device=args.device)
            embeddings = args.embedding if name == "after" else []
            for file, word in map(split_word, embeddings):
                apply_embedding(model, file, word)
            if embeddings:
                note_unused_words(model, [args.instance_prompt, args.class_prompt])
            figures[name], shown = measure_subject(model, prompts, detector, networks, args.n, args.batch_size)
            rows.append(shown)
    report = {
        **_head(args, networks=networks.fingerprints, n=args.n),
        "detector": detector.errors(),
        **compare(figures["before"], figures["after"], figures.get("without_prior")),
        **figures,
    }
    return report, image_sheet(rows)


def write_subjects(args: argparse.Namespace) -> Result:
    """Write images of the subjects that DreamBooth is shown on: to learn from, held out, and of other things."""
    networks = Measuring.load(args.judge, args.features)
    digits = inner(open_data("mnist", "test", args.data)[0].images[: subjects.DIGITS, 0])
    for name, parts in (("one", subjects.printed_ones(args.data, networks)), ("star", subjects.stars(digits))):
        subjects.write_images(parts, args.outdir / name)
        counts = ", ".join(f"{len(images)} {part}" for part, images in parts.items())
        print(f"{args.outdir / name}: {counts}", file=sys.stderr)
    return None, None


def write_statistics(args: argparse.Namespace) -> Result:
    """Save newly trained networks in half precision, measure MNIST's test images with them, and write what ships."""
    folder, paths = PRETRAINED if args.outdir is None else args.outdir, {}
    for name in ("judge", "features"):
        given: Path | None = getattr(args, name)
        if given is not None:
            config, state = load_file(given)
            paths[name] = folder / f"{name}.safetensors"
            save_file(paths[name], state, config, torch.float16)
    networks = Measuring.load(**paths)
    real, training = open_data("mnist", "test", args.data, networks.size)
    path = folder / "statistics.safetensors"
    save_reference(measure_reference("mnist test", real, training, networks, SIZES), path)
    print(f"{path}: {path.stat().st_size:,} bytes", file=sys.stderr)
    return None, None


def _head(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """Return what was measured with what: figures of different judges or feature networks do not compare."""
    path = SHIPPED if args.ckpt is None else checkpoint_at(args.ckpt)
    return {"measured": args.command, "checkpoint": {"path": str(path), "sha256": fingerprint(path)}, **more}


COMMANDS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "model": evaluate_model,
    "scenes": evaluate_scenes,
    "autoencoder": evaluate_autoencoder,
    "emoji": evaluate_emoji,
    "bits": evaluate_bits,
    "statistics": write_statistics,
    "subjects": write_subjects,
    "dreambooth": evaluate_dreambooth,
}
