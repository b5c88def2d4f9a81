"""The pages of docs/reference/ that follow from the code, and what all pages name of it.

`python tests/test_reference_pages.py` writes the pages anew.
"""

import argparse
import dataclasses
import importlib
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin
from unittest.mock import patch

import pytest

import ldm.generation
from ldm.cli import Parser
from ldm.settings import Guidance, Settings, setting_rows
from ldm.training.datasets import DataSettings
from ldm.training.loop_settings import LoopSettings

ROOT = Path(__file__).parents[1]
NOTE = "<!-- from here on written by `python tests/test_reference_pages.py` -->\n"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCS.remove(ROOT / "docs/reference/compvis.md")  # it names what is not here, too
SCRIPTS = (
    "txt2img",
    "img2img",
    "inpaint",
    "edit",
    "interpolate",
    "sample",
    "train",
    "dreambooth",
    "textual_inversion",
    "convert",
    "evaluate",
    "doctor",
    "page",
    "serve",
    "shards",
)
STAGES = """ldm.training.autoencoder.AutoencoderStage ldm.training.decoder.DecoderStage ldm.training.clip.CLIPStage
ldm.training.diffusion.DiffusionStage ldm.training.pixel_diffusion.PixelDiffusionStage
ldm.training.classifier.ClassifierStage ldm.finetune.dreambooth.DreamBoothStage
ldm.finetune.textual_inversion.TextualInversionStage ldm.finetune.distillation.DistillationStage
ldm.optional.noisy_classifier_stage.NoisyClassifierStage
ldm.optional.ddgan_stage.DenoisingGANStage""".split()
DATA = """ldm.data.mnist.MNIST ldm.data.digits.Digits ldm.data.scenes.Scenes ldm.data.folder.Folder
ldm.data.shards.Shards ldm.data.hugging_face.HuggingFace ldm.data.emoji.Emoji
ldm.inference.class_images.SubjectImages"""
PARTS = """ldm.training.objective.Objective ldm.training.denoising.DenoisingStage
ldm.diffusion.loss.loss_weight ldm.diffusion.training_noise.training_noise
ldm.diffusion.schedule.training_timesteps ldm.diffusion.schedule.make_schedule
ldm.training.lr_scheduler.lr_multiplier ldm.finetune.lora.attach ldm.finetune.distillation.Consistency
ldm.latent_diffusion.LatentDiffusion
ldm.pixel_diffusion.PixelDiffusion ldm.models.unet.UNetModel ldm.models.autoencoder.AutoencoderKL
ldm.models.autoencoder.Encoder ldm.models.discriminator.NLayerDiscriminator
ldm.evaluation.quality.Quality""".split()
SECTIONS = {"loop": LoopSettings, "data": DataSettings}
# Parameters that are not keys of a configuration: the stage gives them, or only CompVis's configurations have them.
NOT_KEYS = {
    "SubjectImages": "model size channels reads",
    "Objective": "model",
    "DenoisingStage": "objective",
    "loss_weight": "prediction alphas_cumprod_t",
    "training_noise": "x0 generator",
    "training_timesteps": "batch T generator",
    "lr_multiplier": "step steps",
    "attach": "network",
    "Quality": "model dataset",
    "AutoencoderKL": "lossconfig ckpt_path ignore_keys image_key colorize_nlabels monitor ema_decay learn_logvar",
}


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(line)} |" for line in (titles, *cells)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]])


def join(*parts: str) -> str:
    return "\n" + "\n\n".join(part.strip() for part in parts) + "\n"


# The command line


class _Parsed(Exception):
    pass


@cache
def parser_of(script: str) -> Parser:
    """Return the parser that a script builds."""
    module = importlib.import_module(f"ldm.commands.{script}")
    found = []

    def capture(self: Parser, *args: Any) -> None:
        found.append(self)
        raise _Parsed

    with patch.object(Parser, "parse_args", capture), pytest.raises(_Parsed):
        module.main([])
    return found[0]


def groups_of(parser: argparse.ArgumentParser) -> dict[str, list[tuple[str, str]]]:
    """Return rows (option with its value, help) by the title of their group."""
    groups = {}
    for group in parser._action_groups:
        rows = [
            (_option(action), action.help or "")
            for action in group._group_actions
            if action.help != argparse.SUPPRESS
            and not isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
        ]
        if rows:
            groups[group.title.partition(" (")[0]] = rows
    return groups


def _option(action: argparse.Action) -> str:
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    if not action.option_strings or action.nargs == 0:
        return names
    word = action.metavar or (", ".join(map(str, action.choices)) if action.choices else action.dest.upper())
    return f"{names} {' '.join(word) if isinstance(word, tuple) else word}"


def command_line() -> str:
    """Options that several scripts have are printed once, by their group and the scripts that have them."""
    commands = {}
    for script in SCRIPTS:
        parser = parser_of(script)
        commands[f"{script}.py"] = parser.description, groups_of(parser)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                commands |= {f"{script}.py {name}": ("", groups_of(sub)) for name, sub in action.choices.items()}
    users, shared = defaultdict(list), defaultdict(list)
    for command, (_, groups) in commands.items():
        for title, rows in groups.items():
            for row in rows:
                users[title, row].append(command)
    users = {key: names for key, names in users.items() if len({name.split()[0] for name in names}) > 1}
    for (title, row), names in users.items():
        shared[title, ", ".join(f"`{name}`" for name in names)].append(row)
    parts = []
    for command, (description, groups) in commands.items():
        parts.append(f"{'###' if ' ' in command else '##'} {command}")
        parts += [f"```text\n{description.strip()}\n```"] if description else []
        for title, rows in groups.items():
            own = [row for row in rows if (title, row) not in users]
            parts += [table((title, "meaning"), own)] if own else []
        common = [title for title, rows in groups.items() if any((title, row) in users for row in rows)]
        parts += [f"Shared options: {', '.join(common)}."] if common else []
    parts.append("## Shared options")
    for (title, names), rows in shared.items():
        parts += [f"Of {names}:", table((title, "meaning"), rows)]
    return join(*parts)


# Python


def meanings(of: Callable[..., Any]) -> dict[str, str]:
    """Return the meaning of each parameter: from the part Args of docstrings, a class's parents' too, or comments."""
    found = {}
    for part in reversed(of.__mro__[:-1]) if inspect.isclass(of) else [of]:
        doc = inspect.cleandoc(part.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
        for names, text in re.findall(r"^    ([\w, *]+): (.*(?:\n     +.*)*)", doc, flags=re.M):
            found |= {name.strip(" *"): re.sub(r"\s+", " ", text).rstrip(".") for name in names.split(",")}
        if "__dataclass_fields__" in vars(part):
            fields = re.findall(
                r"((?:^    # .*\n)*)^    (\w+): [^#\n]*(?:# (.*))?$", inspect.getsource(part), flags=re.M
            )
            found |= {name: after or re.sub(r"\s*# ", " ", above).strip() for above, name, after in fields}
    return found


def parameters(of: Callable[..., Any]) -> list[tuple[str, str, str, str]]:
    """Return rows (name, type, default, meaning) of a function's or a class's parameters."""
    meaning, rows = meanings(of), []
    for name, parameter in inspect.signature(of).parameters.items():
        starred = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if not starred and name not in NOT_KEYS.get(of.__name__, "").split():
            default = parameter.default
            if dataclasses.is_dataclass(of) and of.__dataclass_fields__[name].default is dataclasses.MISSING:
                default = getattr(of.__dataclass_fields__[name], "default_factory", None)
                default = parameter.empty if default is dataclasses.MISSING else default()
            default = "required" if default is parameter.empty else f"`{default!r}`"
            rows.append((f"`{name}`", _type(parameter.annotation), default, meaning.get(name, "")))
    return rows


def _type(annotation: Any) -> str:
    args, origin = get_args(annotation), get_origin(annotation)
    if origin is Annotated:
        return f"{args[0].__name__}{args[1]}"  # its range: see ldm/checks.py
    if "Annotated" in str(annotation):
        parts = ["None" if arg is NoneType else _type(arg) for arg in args]
        return " | ".join(parts) if origin in (Union, UnionType) else f"{origin.__name__}[{', '.join(parts)}]"
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"Callable\[.*\]", "function", re.sub(r"(?:\w+\.)+(\w+)", r"\1", text))
    return "" if annotation is inspect.Parameter.empty else text.replace("Mapping[str, Any]", "mapping")


PARAMETER = ("key", "type", "default", "meaning")


def generate() -> str:
    titles = ("setting", "option", "type", "range", "when not given", "meaning")

    def settings(of: type) -> str:
        rows = setting_rows(of).items()
        cells = [(f"`{name}`", f"`{r.flags[0]}`", r.type.name, r.range, r.unset or "off", r.help) for name, r in rows]
        return table(titles, cells)

    arguments = [row for row in parameters(ldm.generation.generate) if row[0] != "`model`"]
    return join(
        *("## Arguments", table(("argument", *PARAMETER[1:]), arguments)),
        *("## Settings", "Keyword arguments, defined in `ldm/settings.py`.", settings(Settings)),
        *(
            "## More guidance",
            "Arguments of `ldm.inference.guiders.make_guide`, for `guide`.",
            settings(Guidance),
        ),
    )


def configs() -> str:
    own = [f"## {part}\n\n{table(PARAMETER, parameters(found))}" for part, found in SECTIONS.items()]
    parts = []
    for title, names in (("Stages", STAGES), ("Data sets", DATA.split()), ("Parts", PARTS)):
        parts.append(f"## {title}")
        for name in names:
            found = resolve_name(name)
            parts += [f"### {found.__name__}", f"`{name}`: {_summary(found)}", table(PARAMETER, parameters(found))]
    text = join(*own, *parts)
    for name in re.findall(r"^### (\w+)", text, flags=re.M):
        text = text.replace(f"`{name}`", f"[`{name}`](#{name.lower()})")
    return text


def _summary(of: Any) -> str:
    return re.sub(r"\s+", " ", inspect.cleandoc(of.__doc__ or "").partition("\n\n")[0])


def test_every_key_has_a_meaning():
    for name in (*STAGES, *DATA.split(), *PARTS):
        found = resolve_name(name)
        assert [row[0] for row in parameters(found) if not row[3]] == [], name


def options(parser: argparse.ArgumentParser) -> set[str]:
    subparsers = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    own = {name.replace("_", "-") for name in parser._option_string_actions}
    return own.union(*(options(part) for action in subparsers for part in action.choices.values()))


OF_OTHERS = {
    "--nproc-per-node",
    "--num-processes",
    "--config-file",
    "--logdir",
}  # torchrun's, accelerate's, tensorboard's
OF_OTHERS |= {
    "--plot",
    "--only",
    "--images",
    "--ddpm",
    "--ddgan",
    "--parts",
    "--samplers",
}  # of benchmarks: test_readme.py parses these


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.name)
def test_options_and_modules_that_a_page_names_exist(page):
    text = page.read_text()
    named = {name.replace("_", "-") for name in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text)}
    assert named <= OF_OTHERS.union(*(options(parser_of(script)) for script in SCRIPTS))
    for name in set(re.findall(r"`(ldm(?:\.\w+)+)`", text)):
        assert resolve_name(name) is not None


PAGES = {"command_line": command_line, "generate": generate, "configs": configs}


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_as_the_code(name):
    text = (ROOT / f"docs/reference/{name}.md").read_text().partition(NOTE)[2]
    assert text == PAGES[name](), "run python tests/test_reference_pages.py"


if __name__ == "__main__":
    for name, write in PAGES.items():
        path = ROOT / f"docs/reference/{name}.md"
        path.write_text(path.read_text().partition(NOTE)[0] + NOTE + write())
