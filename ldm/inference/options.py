"""The options that the scripts share, and the model that they describe. It imports nothing heavy, so that `--help` and
mistakes in options are quick.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checks import ONNX_INDEX, SHIPPED_MODELS
from ldm.cli import ALLOW, Parser, device_name, finite_float, int_range
from ldm.settings import FLAG, FLOAT, INTEGERS, INTERVAL, NAMES, SEED, Setting, Settings, help_text, setting_rows

if TYPE_CHECKING:  # they import torch
    from ldm.latent_diffusion import LatentDiffusion

# those that are arguments of `ldm.load`
LOADING = ("config", "vae", "unet", "text_encoder", "ema", "prediction", "vocab", "variant")
NEEDING_TORCH = ("lora", "embedding", "attention", "channels_last", "no_optimize", "compile", "vae_slicing")
NEEDING_TORCH += ("vae_tiling", "offload", "pag", "threshold", "autoguide", "classifier", "init_img", "device")
NEEDING_TORCH += ("precision",)
PRECISIONS = ("full", "bf16", "fp16", "autocast")  # of ldm/inference/precision.py, which imports torch


def image_parser(description: str, prompt: str, outdir: str, classes: bool = False) -> Parser:
    """Return the parser of a script that generates images, with the defaults of --prompt and --outdir.

    A setting left None is the checkpoint's own, or the --from-png image's.

    classes: whether images are asked for by classes instead of by texts.
    """
    parser = Parser(description=description)
    _add_prompts(parser, prompt, classes)
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--n_samples", type=int_range(1), default=1, metavar="N", help="images per prompt in an iteration (1)")
    add("--num_images_per_prompt", dest="n_samples", type=int_range(1), help=argparse.SUPPRESS)
    add("--n_iter", type=int_range(1), default=1, metavar="N", help="iterations, each n_samples more per prompt (1)")
    add("--batch-size", type=int_range(1), metavar="N", help="images at a time (16): only bounds the memory")
    add_settings(group, "seed", "fixed_code", "height", "width")
    add("--C", type=int_range(1), metavar="N", help="latent channels; must agree with the model")
    add("--f", type=int_range(1), metavar="N", help="pixels per latent; must agree with the model")

    group = parser.add_argument_group("sampling (what is not given is the checkpoint's own)")
    add_settings(group, "negative", *(name for name in setting_rows(Settings) if name not in NOT_SAMPLING))
    group.add_argument("--plms", action="store_const", const="plms", dest="sampler", help="the same as --sampler plms")

    group = parser.add_argument_group("more guidance")
    add = group.add_argument
    add_settings(group, "pag", "pag_layers", "threshold")
    add("--autoguide", type=Path, metavar="FILE", help="guide away from this weaker model of the same latents")
    add_settings(group, "autoguide_scale")
    parser.set_defaults(classifier=None, classes=classes, default_prompt=prompt)
    if classes:
        add("--classifier", type=Path, metavar="FILE", help="guide to the classes by this classifier of noisy images")
        add_settings(group, "classifier_scale")

    add_model_options(parser)

    add = parser.add_argument_group("files").add_argument
    add("--outdir", type=Path, default=Path(outdir), metavar="DIR", help=f"({outdir})")
    add("--format", choices=("png", "jpg", "webp"), default="png", help="of the images; jpg loses detail (png)")
    add("--skip_save", action="store_true", help="do not save the single images")
    add("--skip_grid", action="store_true", help="do not save the grid")
    add("--n_rows", type=int_range(0), default=0, metavar="N", help="images in a row of the grid (0: n_samples)")
    text = "repeat each pixel N times in all files (1; grids and strips of small images are enlarged to be seen)"
    grid = "an image for each value, or for each of two --grid's, on a labelled sheet: --grid steps=5,10,20"
    add("--grid", action="append", default=[], metavar="NAME=A,B", help=grid)
    add("--enlarge", type=int_range(1, 64), metavar="N", help=text)
    add("--strip", action="store_true", help="save how each came about: forward process, x_t, predicted x0")
    return parser


def _add_prompts(parser: Parser, prompt: str, classes: bool) -> None:
    """Add the options of what to generate, as of `image_parser`."""
    add = parser.add_mutually_exclusive_group().add_argument
    if classes:
        add(
            "--class",
            nargs="+",
            action="extend",
            dest="prompts",
            metavar="CLASS",
            help="numbers or names of classes to generate (any)",
        )
        text = "JSON: objects to generate and their boxes; several files: an image of each"
        add("--layout", type=Path, nargs="+", action="extend", metavar="FILE", help=text)
    else:
        text = f"text prompt; repeatable ({prompt or 'empty'})"
        add("--prompt", action="append", dest="prompts", metavar="TEXT", help=text)
    add("--from-file", type=Path, metavar="FILE", help="a text file of prompts or classes, one per line")
    add("--from-png", type=Path, metavar="FILE", help="make this image again, changed by the settings that are given")
    if classes:
        text = "the image to follow, whose grey levels or palette numbers are classes"
        parser.add_argument("--map", type=Path, metavar="FILE", help=text)


NOT_SAMPLING = ("fixed_code", "height", "width", "strength")  # settings in other groups of `image_parser`


def add_settings(group: argparse._ArgumentGroup | Parser, *names: str, of: Any = None) -> None:
    """Add the options of settings of `ldm.inference.recipe.Recipe`, or of `of`; what is not given is None."""
    from ldm.inference.recipe import Recipe  # with Pillow, which scripts without these options do without

    rows = setting_rows(Recipe if of is None else of)
    for name in names:
        row = rows[name]
        main, *others = row.flags
        options: dict[str, Any] = {"dest": name, "default": None, "help": help_text(row), **_value(row)}
        group.add_argument(main, **options)
        if others:
            options["help"] = argparse.SUPPRESS
            group.add_argument(*others, **options)


def _value(row: Setting) -> dict[str, Any]:
    """Return how argparse reads a setting's value."""
    if row.type is FLAG:
        return {"action": "store_true"}
    number = finite_float(row.low, row.high, infinite=row.type is INTERVAL)
    read = int_range(int(row.low)) if row.type in INTEGERS else number if row.type in (FLOAT, INTERVAL) else str
    read = _seed if row is SEED else read
    count = {"nargs": 2} if isinstance(row.type.metavar, tuple) else {"nargs": "+"} if row.type is NAMES else {}
    return {"metavar": row.type.metavar, "type": read, **count}


def _seed(text: str) -> int:
    """Read a seed, where -1 is a random one, which is printed."""
    seed = int_range(-1)(text)
    if seed == -1:
        import secrets

        seed = secrets.randbelow(2**32)
        print(f"seed {seed}", file=sys.stderr)
    return seed


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """Return the options that are settings of an image, by a Recipe's names; None where they are not given."""
    from ldm.inference.recipe import Recipe

    given = {name: getattr(args, name, None) for name, row in setting_rows(Recipe).items() if row.flags}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return given | {"precision": args.precision}


def add_init_image_options(parser: Parser, strength: bool = True) -> None:
    """Add the options of the scripts that start from an image. strength: whether it is noised."""
    group = parser.add_argument_group("init image")
    group.add_argument("--init-img", type=Path, metavar="FILE", help="PNG, JPEG, WebP, ..., upright by its EXIF data")
    if strength:
        add_settings(group, "strength")
    group.add_argument("--resize", action="store_true", help="scale its shorter side to that of the model's own size")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add two groups of options: which model, and how it computes. What is not given is None (a flag: False)."""
    group = parser.add_argument_group("model")
    add_checkpoint_options(group)
    add = group.add_argument
    add("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="add this LoRA's change (1); repeatable")
    add("--embedding", action="append", default=[], metavar="FILE[=WORD]", help="learned words; repeatable")

    add = parser.add_argument_group("speed and memory (images stay the same but for rounding)").add_argument
    text = "of UNet and text encoder: float32, bfloat16, float16 (GPU only), or mixed (full)"
    add("--precision", choices=PRECISIONS, help=text)
    add("--attention", choices=("auto", "sdpa", "xformers", "math"), help="its kernel; math: plain, in float32 (auto)")
    add("--channels-last", action="store_true", help="another memory layout, which convolutions may prefer")
    text = "on a CPU: compute by large layers as they are, not with weights that are packed for it, once"
    add("--no-optimize", action="store_true", help=text)
    add(
        "--compile",
        action="store_true",
        help="compile the UNet: a minute or two, a small one's on a CPU once for all; then faster steps",
    )
    add("--vae-slicing", action="store_true", help="encode and decode one image at a time")
    text = "encode and decode images of more than SIDE x SIDE (128) pixels in bands, in less memory, seamlessly"
    add("--vae-tiling", type=int_range(1), nargs="?", const=128, metavar="SIDE", help=text)
    text = "text encoder and first stage compute on the CPU, or wait there and are on the GPU only while used"
    add("--offload", choices=("cpu", "swap"), help=text)


def add_checkpoint_options(group: argparse._ArgumentGroup, *names: str) -> None:
    """Add the options of which checkpoint to load, and how. names: others for --ckpt."""
    group.add_argument(
        "--ckpt",
        *names,
        type=Path,
        metavar="FILE",
        help=f"checkpoint, run, diffusers folder, or a model that ships: {', '.join(SHIPPED_MODELS)} (digits)",
    )
    add_loading_options(group)
    group.add_argument(
        "--device", default="auto", type=device_name, metavar="NAME", help="auto, cpu, cuda, cuda:1, mps (auto)"
    )


def add_loading_options(group: argparse._ArgumentGroup) -> None:
    """Add those of `LOADING`."""
    add = group.add_argument
    add("--config", type=Path, metavar="FILE", help="CompVis's yaml (or ours), in place of what the checkpoint says")
    add("--vae", type=Path, metavar="FILE", help="another first stage than the checkpoint's")
    add("--unet", type=Path, metavar="FILE", help="another UNet than the checkpoint's")
    add("--text-encoder", type=Path, metavar="FILE", help="another text encoder than the checkpoint's")
    add("--ema", action="store_true", help="the averaged weights, where the checkpoint has both")
    add(
        "--prediction",
        choices=("eps", "x0", "v", "flow"),
        help="what the UNet predicts, where the checkpoint does not say",
    )
    add("--vocab", type=Path, metavar="FILE", help="vocab.txt of a text encoder that comes without its words (BERT)")
    add("--allow", **ALLOW)
    add("--variant", metavar="NAME", help="of a diffusers folder's files: fp16, ...")


def loading_arguments(args: argparse.Namespace) -> dict[str, object]:
    """Return the arguments of `ldm.load` that were given, as plain values, which a run's configuration can keep."""
    given = {name: getattr(args, name) for name in LOADING if getattr(args, name) not in (None, False)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}


def load_model(args: argparse.Namespace, gradients: bool = False, batches: int | None = None) -> "LatentDiffusion":
    """Load the model that the options of `add_model_options` describe; print what had to be assumed about it.

    gradients: they are needed, which packed layers (`ldm.optimize`) do not have.
    batches: how many the run has, where its UNet is called once in each of `args.steps` steps: few are not packed for.
    """
    if args.ckpt is not None and (args.ckpt / ONNX_INDEX).is_file():
        from ldm.onnx.model import load_onnx

        return load_onnx(args.ckpt, {name: getattr(args, name, None) for name in (*LOADING, *NEEDING_TORCH)})
    import torch

    import ldm
    from ldm.inference.nan_check import check_images
    from ldm.inference.optimize import gains, optimize
    from ldm.inference.precision import DTYPES, set_precision, weights_wait
    from ldm.models.kernels import set_attention
    from ldm.util import pick_device

    device = pick_device(args.device)
    set_attention("auto" if args.attention is None else args.attention)
    # first onto the CPU, where a mapped file takes no memory: what goes to the device goes there once, in its precision
    model = ldm.load(args.ckpt, device="cpu", dtype=None, **loading_arguments(args))
    precision = "full" if args.precision is None else args.precision
    wait = weights_wait(model, device) and not (args.lora and args.compile)  # what is beside weights is not compiled
    last = torch.get_autocast_dtype(device.type) if precision == "autocast" else DTYPES[precision]
    _change(model, args, None if wait else last)
    for note in model.notes:
        print(note, file=sys.stderr)
    set_precision(model, precision, device, as_stored=True, traced=args.compile)
    if args.channels_last:
        from ldm.inference.compile import channels_last

        channels_last(model)
    if args.vae_tiling is not None or args.vae_slicing:
        from ldm.inference.tiling import slice_vae, tile_vae

        if not any(True for _ in model.first_stage_model.parameters()):
            print("--vae-slicing and --vae-tiling have no effect: the model works in pixels", file=sys.stderr)
        slice_vae(model) if args.vae_tiling is None else tile_vae(model, args.vae_tiling)
    if args.offload is not None and device.type == "cpu":
        print("--offload has no effect: the model is on the CPU", file=sys.stderr)
    if args.offload is None or device.type == "cpu":
        model.to(device)
    else:
        from ldm.inference.offload import offload

        offload(model, args.offload, device)
    if args.compile:
        from ldm.inference.compile import compile_unet

        compile_unet(model)
    plain = wait or args.compile or precision == "autocast"
    fast = device.type == "cpu" and not plain and gains(model, batches, getattr(args, "steps", None))
    if args.no_optimize and not fast:
        print("--no-optimize has no effect: this model is computed plainly as it is", file=sys.stderr)
    elif fast and not (args.no_optimize or gradients):
        model = optimize(model, consume=True)
    check_images(model)
    return model


def _change(model: "LatentDiffusion", args: argparse.Namespace, last: Any) -> None:
    """Add the LoRAs and learned words that are asked for.

    last: the dtype in which weights will be, for LoRAs that are merged; None for weights that stay half precision, in
        which a change would be rounded: they are added beside those.
    """
    if args.lora:
        from ldm.finetune.lora_files import apply_lora, merge_lora, split_strength

        if last is not None:
            model.float()  # changes are not rounded
        for path, strength in map(split_strength, args.lora):
            if last is None:
                apply_lora(model, path, strength)
            else:
                merge_lora(model, path, strength, last)
    if args.embedding:
        from ldm.finetune.embedding_files import split_word
        from ldm.finetune.embeddings import apply_embedding

        for path, word in map(split_word, args.embedding):
            apply_embedding(model, path, word)
