"""Seconds a step and peak memory of scripts/dreambooth.py, beside a loop over diffusers' classes.

python -m benchmarks.dreambooth --images photographs --out cost.jsonl    # Stable Diffusion 1 at full size
python -m benchmarks.dreambooth --images photographs --rows lora --ckpt model.safetensors

Every row is a fresh process: --steps optimizer steps on pairs of an image and a class image (the same images
inverted, which cost as much), after one that is not counted. Seconds are the median between two ends of a step, of wall
clock and of the process's CPU time; memory is the process's peak from its start to the last step. Without --ckpt the
model is Stable Diffusion 1 with random weights (13 GB of disk). The peer does what train_dreambooth.py of diffusers
does by default: images and captions encoded at every step, AdamW, gradients kept as zeros, no autocast; LoRA by peft.
Rows that --out has are not measured again. `full` needs 18 GiB of memory at full size.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import add_row, markdown, process_memory, read_rows, run_fresh
from ldm.cli import Parser, int_range
from ldm.program import run

CHECKPOINTING = ["--gradient_checkpointing"]
# name -> options of scripts/dreambooth.py
OURS = {
    "lora": ["--rank", "4", "--learning_rate", "1e-4"],
    "lora, checkpointing": ["--rank", "4", "--learning_rate", "1e-4", *CHECKPOINTING],
    "adafactor": ["--optimizer", "adafactor", "--learning_rate", "1e-3"],
    "adafactor, checkpointing": ["--optimizer", "adafactor", "--learning_rate", "1e-3", *CHECKPOINTING],
    "full, checkpointing": ["--learning_rate", "5e-6", *CHECKPOINTING],
    "full": ["--learning_rate", "5e-6"],
}
PEERS = [name for name in OURS if "adafactor" not in name]  # diffusers' script has no factored optimizer
SUBJECT, CLASS = "a photo of sks dog", "a photo of dog"


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.measure is not None:
        who, name, checkpoint = args.measure
        measure(lambda: {"ldm": ours, "diffusers": peer}[who](name, Path(checkpoint), args), args.steps)
        return
    rows = read_rows(args.out)
    done = {(row["row"], row["who"]) for row in rows}
    with tempfile.TemporaryDirectory(dir=args.out.resolve().parent) as folder:
        checkpoint = prepare(args.ckpt, args.images, Path(folder))
        for name in args.rows:
            for who in ("ldm", "diffusers"):
                if (name, who) not in done and (who == "ldm" or name in PEERS):
                    found = {"row": name, "who": who, "resolution": args.resolution}
                    found |= fresh(who, name, checkpoint, args)
                    add_row(args.out, rows, found)
    print(table(rows))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="three to five photographs")
    add("--ckpt", type=Path, metavar="FILE", help="a model that diffusers can express (random weights, full size)")
    add("--rows", nargs="*", choices=tuple(OURS), default=tuple(OURS), metavar="NAME", help=f"({', '.join(OURS)})")
    add("--resolution", type=int_range(8), default=256, metavar="PIXELS", help="(256)")
    add("--steps", type=int_range(1), default=3, metavar="N", help="steps that are counted (3)")
    add("--out", type=Path, default=Path("dreambooth_cost.jsonl"), metavar="FILE", help="(dreambooth_cost.jsonl)")
    add("--device", default="cpu", help="cpu, or cuda: then memory is the device's (cpu)")
    add("--measure", nargs=3, metavar=("WHO", "ROW", "DIR"), help=argparse.SUPPRESS)  # of the fresh process for a row
    return parser.parse_args(argv)


def prepare(path: Path | None, images: Path, folder: Path) -> Path:
    """Write the same model for both in a folder: model.safetensors, which previews in one step, and diffusers/; beside
    them class/, the images inverted."""
    from PIL import ImageOps

    import ldm
    from ldm.data.finding import find_images
    from ldm.data.image_files import read_image

    (folder / "ours" / "class").mkdir(parents=True)
    for i, image in enumerate(find_images(images)):
        ImageOps.invert(read_image(image, 3)).save(folder / "ours" / "class" / f"{i}.png")

    if path is None:
        from benchmarks.loading import make_stable_diffusion

        path, _ = make_stable_diffusion(folder)
    model = ldm.load(path, device="cpu")
    model.defaults.update(steps=1, scale=1.0)  # previews are not what is measured
    ldm.save(model, folder / "ours" / "model.safetensors")
    ldm.save(model, folder / "ours" / "diffusers", format="diffusers")
    return folder / "ours"


def fresh(who: str, name: str, checkpoint: Path, args: argparse.Namespace) -> dict[str, float]:
    """Return what `measure` prints in a fresh process."""
    argv = ["--images", args.images, "--resolution", args.resolution, "--steps", args.steps]
    argv += ["--device", args.device, "--measure", who, name, checkpoint]
    return run_fresh(f"{name} by {who}", __file__, *argv)


class Enough(BaseException):
    """The steps asked for were made."""


def measure(work: Callable[[], None], steps: int) -> None:
    """Do the work until an optimizer made steps + 1 steps, and print what the last of them cost."""
    import time

    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    ends: list[tuple[float, float]] = []

    def note(*_: Any) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        ends.append((time.perf_counter(), time.process_time()))
        if len(ends) > steps:
            raise Enough

    register_optimizer_step_post_hook(note)
    try:
        work()
    except Enough:
        pass
    wall, cpu = (median(b - a for a, b in zip(times, times[1:], strict=False)) for times in zip(*ends, strict=True))
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else process_memory()["VmHWM"]
    found = {"seconds": wall, "cpu_seconds": cpu, "peak_GiB": peak / 2**30, "threads": torch.get_num_threads()}
    print(json.dumps(found))


def ours(name: str, checkpoint: Path, args: argparse.Namespace) -> None:
    """Run scripts/dreambooth.py itself, as a user does."""
    from ldm.commands.dreambooth import main

    with tempfile.TemporaryDirectory() as out:
        argv = ["--ckpt", checkpoint / "model.safetensors", "--output_dir", Path(out, "run"), "--device", args.device]
        argv += ["--instance_data_dir", args.images, "--instance_prompt", SUBJECT, "--resolution", args.resolution]
        argv += ["--class_data_dir", checkpoint / "class", "--class_prompt", CLASS, "--train_batch_size", 1]
        argv += ["--train_text", "none", "--report_to", "none", "--num_validation_images", 1]
        argv += ["--mixed_precision", "fp32", "--max_train_steps", args.steps + 9, *OURS[name]]
        main([str(option) for option in argv])


def peer(name: str, checkpoint: Path, args: argparse.Namespace) -> None:
    """Run the loop of diffusers' train_dreambooth.py, in its order, over its classes."""
    import torch
    import torch.nn.functional as F
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from ldm.data.folder import Folder

    folder, torch_device = checkpoint / "diffusers", torch.device(args.device)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").to(torch_device).train()
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False).to(torch_device)
    text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False).to(torch_device)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    if name.startswith("lora"):
        from peft import LoraConfig

        unet.requires_grad_(False)
        targets = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
        unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    if "checkpointing" in name:
        unet.enable_gradient_checkpointing()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-6, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    images = Folder(args.images, args.resolution, crop="random", caption="")
    prompts = tokenizer([SUBJECT, CLASS], padding="max_length", truncation=True, return_tensors="pt")
    while True:
        for i in range(len(images)):
            pixels = torch.stack([images[i]["image"]] * 2).to(torch_device)  # instance and class
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            t = torch.randint(0, scheduler.config.num_train_timesteps, (2,), device=torch_device)
            hidden = text(prompts.input_ids.to(torch_device), return_dict=False)[0]
            predicted = unet(scheduler.add_noise(latents, noise, t), t, hidden, return_dict=False)[0]
            (own, prior), (noise_own, noise_prior) = predicted.chunk(2), noise.chunk(2)
            loss = F.mse_loss(own.float(), noise_own.float()) + 1.0 * F.mse_loss(prior.float(), noise_prior.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return Markdown: seconds a step and peak memory of both, and ours over the peer's."""
    found = {(row["row"], row["who"]): row for row in rows}
    sides = ("diffusers", "ours / its")
    titles, lines = ["", "s a step (CPU s): ours", *sides, "peak GiB: ours", *sides], []
    for name in dict.fromkeys(row["row"] for row in rows):
        sides, cells = [found.get((name, who)) for who in ("ldm", "diffusers")], [name]
        for key in ("cpu_seconds", "peak_GiB"):
            cells += ["-" if side is None else f"{side[key]:.2f}" for side in sides]
            cells.append("-" if None in sides else f"{sides[0][key] / sides[1][key]:.2f}")
            if key == "cpu_seconds":
                cells[1:3] = ["-" if s is None else f"{s['seconds']:.2f} ({s[key]:.2f})" for s in sides]
        lines.append(cells)
    return markdown(titles, lines)


if __name__ == "__main__":
    run(main)
