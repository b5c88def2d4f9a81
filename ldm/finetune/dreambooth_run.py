"""A DreamBooth run's configuration for the training loop: what was asked, and what the checkpoint's size suggests."""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ldm.checkpoint.file import atomic
from ldm.conditioning.prompt import count_chunks
from ldm.data.buckets import bucket_shapes
from ldm.data.dreambooth import DreamBooth, choices, identifiers, unread
from ldm.data.folder import find_images
from ldm.generation import given
from ldm.latent_diffusion import LatentDiffusion
from ldm.util import read_yaml

SMALL = 50_000_000  # weights of a UNet below which a model is small


class Defaults(NamedTuple):
    """What suits a model of some size."""

    steps: int
    batch_size: int
    learning_rate: float
    lora_learning_rate: float
    lora_text_learning_rate: float  # of adapters in the text encoder
    lr_schedule: Mapping[str, Any]
    train_text: str  # "none", "words" or "all"
    words_learning_rate: float
    text_learning_rate: float
    class_images: int  # of each subject
    class_scale: float  # guidance that they are drawn with
    sample_batch_size: int
    timesteps: Mapping[str, Any]
    shown: int  # images of each prompt in a preview


# Small: measured on the digits model (docs/dreambooth.md). Large: the settings that Stable Diffusion is tuned with.
DEFAULTS = {
    "small": Defaults(
        steps=300,
        batch_size=8,
        learning_rate=6e-4,
        lora_learning_rate=7e-3,
        lora_text_learning_rate=1e-3,  # it changes what every prompt says
        lr_schedule={"name": "linear", "decay": 0.4},  # the last steps at full rate decide by chance what is forgotten
        train_text="words",
        words_learning_rate=1.5e-2,
        text_learning_rate=1e-4,
        class_images=60,
        class_scale=1.0,  # guided ones are less diverse, and the class would become so
        sample_batch_size=25,
        timesteps={"name": "logit_normal", "mean": 1.0},  # a shape is decided at high noise
        shown=8,
    ),
    "large": Defaults(
        steps=800,
        batch_size=1,
        learning_rate=5e-6,
        lora_learning_rate=1e-4,
        lora_text_learning_rate=5e-5,
        lr_schedule={"name": "constant"},
        train_text="none",
        words_learning_rate=1e-3,
        text_learning_rate=2e-6,
        class_images=200,
        class_scale=7.5,
        sample_batch_size=4,
        timesteps={"name": "uniform"},
        shown=4,
    ),
}


def defaults_for(model: LatentDiffusion) -> Defaults:
    """The defaults that suit the model."""
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    return DEFAULTS["small" if weights < SMALL else "large"]


class Subject(NamedTuple):
    """A subject as the options name it; its class, which may have choices, is None where it is not given."""

    instance_dir: Path
    instance_prompt: str
    class_prompt: str | None
    class_dir: Path  # of the class's images


def subjects(args: argparse.Namespace) -> list[Subject]:
    """The subjects: option number i of each kind belongs to subject i.

    Raises ValueError for options that do not match in number, folders within each other, and for a damaged image or
    bad captions, which would otherwise show only when the class images are drawn; FileNotFoundError for a folder
    without images.
    """
    folders, prompts = args.instance_data_dir, args.instance_prompt
    if not folders:
        raise ValueError("give the folder that holds the subject's images with --instance_data_dir DIR")
    found = []
    for name in ("instance_prompt", "class_prompt", "class_data_dir"):
        values = getattr(args, name)
        if len(values) not in ({len(folders)} if name == "instance_prompt" else {0, len(folders)}):
            raise ValueError(
                f"{len(folders)} --instance_data_dir need as many --{name}, got {len(values)}: one for each subject"
            )
    if not args.class_prompt and (args.with_prior_preservation or args.class_data_dir):
        raise ValueError("prior preservation needs --class_prompt: what the subject is one of ('a photo of a dog')")
    classes = args.class_prompt or [None] * len(folders)
    class_folders = args.class_data_dir or [args.output_dir / "class"] * len(folders)
    for row in zip(folders, prompts, classes, class_folders, strict=True):
        subject = Subject(*row)
        check_apart(subject.instance_dir, args.output_dir / "previews")
        check_apart(subject.instance_dir, subject.class_dir)
        if subject.class_prompt is not None:
            check_apart(subject.class_dir, subject.instance_dir)
        DreamBooth([{"instance_dir": subject.instance_dir, "instance_prompt": subject.instance_prompt}], size=1)
        found.append(subject)
    return found


def check_apart(images: Path, other: Path) -> None:
    """ValueError where another folder lies in one of images: what is in it, or will be, would be taken for these."""
    if images.resolve() in other.resolve().parents:
        raise ValueError(f"{other} lies in {images}, whose images are read with those below it: keep them apart")


def training_size(args: argparse.Namespace, model: LatentDiffusion) -> int:
    """Pixels of a side of the squares to train on. ValueError for a size that the model cannot make."""
    size = given(args.resolution, model.defaults["height"])
    model.latent_size(size, size)
    return size


def class_prompts(subject: Subject) -> list[str]:
    """All that the subject's class is; nothing without one."""
    return [] if subject.class_prompt is None else choices(subject.class_prompt)


def notes_on_images(folder: Path) -> list[str]:
    """What a user should know of a subject's images. FileNotFoundError where there are none."""
    paths, notes = find_images(folder), []
    ignored = unread(folder, paths)
    if ignored:
        notes.append(f"{folder}: skipped {', '.join(ignored)} (no images)")
    if len(paths) == 1:
        notes.append(f"{folder} holds a single image: three to five, from several sides, teach more")
    return notes


def notes_on(subject: Subject, model: LatentDiffusion) -> list[str]:
    """What a user should know of a subject before it is learnt."""
    notes = notes_on_images(subject.instance_dir)
    for word in identifiers(subject.instance_prompt, given(subject.class_prompt, "")):
        tokens = len(model.cond_stage_model.tokenizer.encode(word))
        if tokens > 1:
            notes.append(f"the tokenizer splits {word!r} into {tokens} tokens: they are learnt together, which is fine")
    for prompt in [subject.instance_prompt, *class_prompts(subject)]:
        if count_chunks(model.cond_stage_model, [prompt], True)[0] > 1:
            notes.append(f"the prompt {prompt!r} is too long for the text encoder and is cut")
    return notes


def make_config(
    args: argparse.Namespace,
    model: LatentDiffusion,
    found: Sequence[Subject],
    loading: Mapping[str, Any],
    processes: int = 1,
) -> dict[str, Any]:
    """The run's configuration, but for the class images (`add_class_images`).

    loading: arguments of `ldm.load` besides the path. processes: how many train.

    Raises ValueError for settings that do not fit together.
    """
    default, size = defaults_for(model), training_size(args, model)
    batch_size = given(args.train_batch_size, default.batch_size)
    output = args.output_dir.resolve()
    return {
        "name": output.name,
        "outdir": str(output.parent),
        "seed": args.seed,
        "stage": {
            "target": "ldm.finetune.dreambooth.DreamBoothStage",
            "params": stage_params(args, model, found, default, size) | {"loading": dict(loading)},
        },
        "data": {
            "target": "ldm.data.dreambooth.DreamBooth",
            "params": {
                "subjects": [
                    {"instance_dir": str(one.instance_dir.resolve()), "instance_prompt": one.instance_prompt}
                    for one in found
                ],
                "size": size,
                "channels": model.image_channels,
                "crop": args.crop,
                "flip": args.random_flip,
                "seed": args.seed,
                "least": batch_size * processes,
                "buckets": [list(shape) for shape in bucket_shapes(size, model.multiple)] if args.buckets else None,
            },
        },
        "loop": loop_settings(args, default, batch_size),
    }


def add_class_images(
    config: Mapping[str, Any], found: Sequence[Subject], images: Sequence[Mapping[str, str | None]]
) -> None:
    """Put into a run's configuration, for each subject, which files of its class's folder to train on, with their
    captions; there are none without prior preservation."""
    for row, subject, own in zip(config["data"]["params"]["subjects"], found, images, strict=True):
        if own:
            row |= {"class_dir": str(subject.class_dir.resolve()), "class_images": dict(own)}


def what_of_the_text(args: argparse.Namespace, default: Defaults, has_words: bool) -> tuple[str, float | None]:
    """What to train of the text encoder ("none", "words", "all"), and its learning rate, None for nothing."""
    usual = default.train_text
    if usual == "words" and (args.rank is not None or not has_words):
        usual = "none" if args.rank is None else "all"  # adapters: a LoRA file has no place for words' vectors
    text = given(args.train_text, usual)
    if text == "words" and args.rank is not None:
        raise ValueError("a LoRA file cannot hold the vectors of words: use --train_text none or all with --rank")
    rates = {"words": default.words_learning_rate, "all": default.text_learning_rate}
    if args.rank is not None:
        rates["all"] = default.lora_text_learning_rate
    if text == "none" and args.text_encoder_lr is not None:
        raise ValueError("--text_encoder_lr is of no use: choose what to train by --train_text words or all")
    return text, None if text == "none" else given(args.text_encoder_lr, rates[text])


def stage_params(
    args: argparse.Namespace, model: LatentDiffusion, found: Sequence[Subject], default: Defaults, size: int
) -> dict[str, Any]:
    """Of `DreamBoothStage`."""
    if args.learning_rate is None and args.optimizer == "adafactor":
        raise ValueError("adafactor's learning rate is relative to the weights: give one, such as --learning_rate 1e-3")
    words = list(dict.fromkeys(word for one in found for word in identifiers(one.instance_prompt, one.class_prompt)))
    text, text_rate = what_of_the_text(args, default, bool(words))
    prompts = args.validation_prompt or [
        prompt for one in found for prompt in (one.instance_prompt, *class_prompts(one)[:1])
    ]
    lora = None
    if args.rank is not None:
        targets = args.lora_targets or ["attention", *(["text"] if text == "all" else [])]
        lora = {"rank": args.rank, "alpha": args.lora_alpha, "targets": targets, "seed": args.seed}
    rate = default.learning_rate if lora is None else default.lora_learning_rate
    return {
        "ckpt": None if args.ckpt is None else str(args.ckpt.resolve()),
        "resolution": size,
        "learning_rate": given(args.learning_rate, rate),
        "text_learning_rate": text_rate,
        "words": words if text == "words" else None,
        "layers": args.train_layers,
        "lora": lora,
        "lora_file": None if lora is None else str(args.output_dir.resolve() / "lora.safetensors"),
        "lora_format": args.lora_format,
        "prior_weight": args.prior_loss_weight,
        "snr_gamma": args.snr_gamma,
        "noise_offset": args.noise_offset,
        "timesteps": dict(default.timesteps),
        "optimizer": args.optimizer,
        "betas": [args.adam_beta1, args.adam_beta2],
        "weight_decay": args.adam_weight_decay,
        "gradient_checkpointing": args.gradient_checkpointing,
        "cache": args.cache,
        "previews": list(dict.fromkeys(prompts)),
        "preview_columns": given(args.num_validation_images, default.shown),
        "sheet": str(args.output_dir.resolve() / "contact_sheet.png"),
    }


def loop_settings(args: argparse.Namespace, default: Defaults, batch_size: int) -> dict[str, Any]:
    """Of `training.loop.LoopSettings`."""
    steps = given(args.max_train_steps, default.steps)
    schedule = dict(default.lr_schedule) if args.lr_scheduler is None else {"name": args.lr_scheduler}
    return {
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": args.gradient_accumulation_steps,
        "precision": args.mixed_precision,
        "clip": args.max_grad_norm,
        "ema": args.ema_decay if args.use_ema else 0.0,
        "lr_schedule": schedule | {"warmup": args.lr_warmup_steps},
        "log_every": min(50, max(1, steps // 10)),
        "preview_every": args.validation_steps,
        "save_every": args.checkpointing_steps,
        "workers": args.dataloader_num_workers,
        "tensorboard": args.report_to == "tensorboard",
    }


def move_in(source: str, folder: Path) -> None:
    """Make the run that is to go on lie in `folder`: copied there from `source`, unless that is "latest" or the folder.

    A run may have been moved since it was saved: what its configuration says of its own place is set right.
    Raises FileNotFoundError where there is no run, ValueError when both folders hold one.
    """
    origin = folder if source == "latest" else Path(source)
    if not (origin / "config.yaml").is_file():
        raise FileNotFoundError(f"{origin} holds no run to go on with: it has no config.yaml")
    if origin.resolve() != folder.resolve():
        if (folder / "config.yaml").exists():
            raise ValueError(f"{folder} already holds a run: choose another --output_dir to go on from {origin}")
        shutil.copytree(origin, folder, dirs_exist_ok=True)
    path, home = folder / "config.yaml", folder.resolve()
    saved = read_yaml(path)
    before = str(Path(saved["outdir"]) / saved["name"])
    if before != str(home):
        moved = _relocated(saved, before, str(home)) | {"outdir": str(home.parent), "name": home.name}
        with atomic(path) as temporary:
            temporary.write_text(yaml.safe_dump(moved, sort_keys=False), encoding="utf-8")


def _relocated(value: Any, before: str, now: str) -> Any:
    """A configuration with every path below `before` as one below `now`."""
    if isinstance(value, dict):
        return {key: _relocated(entry, before, now) for key, entry in value.items()}
    if isinstance(value, list):
        return [_relocated(entry, before, now) for entry in value]
    if isinstance(value, str) and (value == before or value.startswith(f"{before}/")):
        return now + value.removeprefix(before)
    return value
