"""Command lines over a yaml: tables of flags (diffusers' names) that set its keys, and runs to resume in a new place.

Imports nothing heavy, so that `--help` is quick.
"""

import argparse
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli import finite_float, int_range

if TYPE_CHECKING:  # it imports torch
    from ldm.latent_diffusion import LatentDiffusion

SMALL = 50_000_000  # weights of a UNet below which a model is small
KEYS = ("seed", "stage.", "data.", "loop.")  # how the names of a configuration's keys begin
MIXED_PRECISIONS = {"auto": "auto", "fp32": "fp32", "no": "fp32", "bf16": "bf16", "fp16": "fp16"}  # diffusers: "no"


class Choose(argparse.Action):
    """Store the value that a mapping of choices has for the word given."""

    choices: Any

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, self.choices[values])


def const(value: Any) -> dict[str, Any]:
    """Settings of a flag without a value, which stores this one."""
    return {"action": "store_const", "const": value}


def choose(choices: Iterable[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a flag that takes one of these words, and stores it or what the mapping has for it."""
    return {"action": Choose, "choices": choices if isinstance(choices, Mapping) else {word: word for word in choices}}


def number(kind: Any, metavar: str = "N") -> dict[str, Any]:
    """Settings of a flag that takes a number."""
    return {"type": kind, "metavar": metavar}


def many(kind: Any, metavar: str) -> dict[str, Any]:
    """Settings of a flag that may be given several times."""
    return {"action": "append", "type": kind, "metavar": metavar}


def min_snr(text: str) -> dict[str, Any]:
    """An option type: a gamma, as the weighting that it stands for."""
    return {"name": "min_snr", "gamma": finite_float(0)(text)}


# names, the key that they set, how they are parsed, help: what both scripts have
TRAINING = [
    ("--max_train_steps", "loop.steps", number(int_range(1)), "optimizer steps"),
    ("--lr_scheduler", "loop.lr_schedule", choose({name: {"name": name} for name in ("constant", "linear", "cosine")}),
     "how the learning rates fall, from the start on"),
    ("--lr_warmup_steps", "loop.lr_schedule.warmup", number(int_range(0)), "(0)"),
    ("--seed", "seed", number(int_range(0)), "of the training (0)"),
    ("--resolution", "stage.params.resolution", number(int_range(1), "PIXELS"),
     "side of the squares to train on (the model's own)"),
]  # fmt: skip
OBJECTIVE = [
    ("--error", "stage.params.error", choose(("l2", "l1")), "of the network's prediction: squared, or absolute (l2)"),
    ("--snr_gamma", "stage.params.weight", number(min_snr, "GAMMA"),
     "weigh each image's loss by min-SNR; the paper takes 5"),
    ("--noise_offset", "stage.params.noise.offset", number(finite_float(0), "X"),
     "noise that is the same all over a channel (0)"),
    ("--offset_noise", "stage.params.noise.offset", const(0.1), "the same as --noise_offset 0.1"),
]  # fmt: skip
MEMORY = [
    ("--gradient_accumulation_steps", "loop.accumulate", number(int_range(1)), "batches to an optimizer step (1)"),
    ("--gradient_checkpointing", "loop.gradient_checkpointing", const(True), "less memory, a third more work"),
    ("--mixed_precision", "loop.precision", choose(MIXED_PRECISIONS), "auto: bf16 where it is fast (auto)"),
]
OUTPUT = [
    ("--output_dir", "output_dir", {"type": Path, "metavar": "DIR"}, "(outputs/, the script's name)"),
    ("--checkpointing_steps", "loop.save_every", number(int_range(1)), "steps between saved states (500)"),
    ("--keep_every --save_every_n_steps", "loop.keep_every", number(int_range(1)),
     "steps between checkpoints that are kept as model-STEP.safetensors (none)"),
    ("--discard_state", "loop.keep_state", const(False),
     "remove resume.pt at the end: a finished run cannot go on with more steps then"),
    ("--validation_steps", "loop.preview_every", number(int_range(1)), "steps between previews (100)"),
    ("--report_to", "loop.report_to", choose(("tensorboard", "wandb", "none")),
     "besides metrics.jsonl; wandb where it is installed (tensorboard)"),
    ("--resume_from_checkpoint --resume", "resume", {"nargs": "?", "const": "latest", "metavar": "DIR"},
     "resume the run in OUTPUT_DIR (latest; where there is none it starts), or a copy of the run in another folder"),
]  # fmt: skip


def add_flags(
    parser: argparse.ArgumentParser, tables: Mapping[str, Iterable[tuple[str, str, dict, str]]], **defaults: Any
) -> None:
    """Add groups of flags; of those that are not given only the ones with `defaults` are in what is parsed."""
    for title, rows in tables.items():
        group = parser.add_argument_group(title)
        for names, key, settings, text in rows:
            options: dict[str, Any] = {"dest": key, "help": text, "default": argparse.SUPPRESS, **settings}
            group.add_argument(*names.split(), **options)
    parser.set_defaults(resume=None, **defaults)


def check_effects(given: Mapping[str, Any], tables: Mapping[str, Iterable[tuple]], rules: Iterable[tuple]) -> None:
    """Raise ValueError for a flag that would have no effect beside the others.

    Args:
        given: the values of the flags that were given, by their keys.
        rules: (keys, condition, why): flags with these keys have an effect where `condition(given)` is true. A value
            that asks for nothing (0, or an empty text) needs no effect.
    """
    names = {key: flags.split()[0] for rows in tables.values() for flags, key, *_ in reversed(list(rows))}
    for keys, condition, why in rules:
        useless = [names[key] for key in keys if given.get(key) not in (None, 0, [""])]
        if useless and not condition(given):
            raise ValueError(f"{', '.join(useless)} would have no effect: {why}")


def begin(
    name: str, args: argparse.Namespace, loading: Mapping[str, Any]
) -> tuple[dict[str, Any], "LatentDiffusion", bool]:
    """Load the model and return the run's configuration, the model, and whether this is the main process.

    The configuration is NAME.yaml, or NAME_large.yaml for a large model, with what the flags set.

    loading: arguments of `ldm.load` besides the path.
    """
    from omegaconf import OmegaConf

    import ldm
    from ldm.input_files import CONFIGS, escaped, load_yaml
    from ldm.training.processes import processes

    these = processes(args.device)
    if args.resume is not None and these.is_main_process:
        move_in(args.resume, args.output_dir)
    these.wait_for_everyone()
    model = ldm.load(args.ckpt, device="cpu", dtype=None, **loading)  # in the file's dtypes, which the result keeps
    small = sum(parameter.numel() for parameter in model.model.parameters()) < SMALL
    config = load_yaml(CONFIGS / "finetune" / f"{name}{'' if small else '_large'}.yaml")
    output = args.output_dir.resolve()
    keys = {key: value for key, value in vars(args).items() if key.startswith(KEYS)}
    keys |= {"name": output.name, "outdir": str(output.parent), "stage.params.loading": loading}
    keys["stage.params.ckpt"] = None if args.ckpt is None else str(model.path.resolve())
    if "loop.steps" in keys:
        keys["loop.log_every"] = min(50, max(1, keys["loop.steps"] // 10))
    for key in sorted(keys):  # a mapping before what is in it
        OmegaConf.update(config, key, escaped(keys[key]), merge=False, force_add=True)
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return plain, model, these.is_main_process


def move_in(source: str, folder: Path) -> None:
    """Copy the run that is to go on from `source` into `folder`, unless that is "latest" or the folder itself."""
    origin = folder if source == "latest" else Path(source)
    if origin.resolve() == folder.resolve():
        if not (folder / "config.yaml").is_file():
            print(f"{folder} holds no run to resume: it starts anew", file=sys.stderr)
        return
    if not (origin / "config.yaml").is_file():
        raise FileNotFoundError(f"{origin} holds no run to resume: it has no config.yaml")
    if (folder / "config.yaml").exists():
        raise ValueError(f"{folder} already holds a run: choose another --output_dir to go on from {origin}")
    shutil.copytree(origin, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*.tmp", ".lock"))
