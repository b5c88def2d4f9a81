"""Compare training loops: ours, that of diffusers' train_text_to_image.py, and the bare steps of a network.

python -m benchmarks.training                        # about 13 minutes of CPU time, by an estimate
python -m benchmarks.training --networks 10M --precisions fp32

Each network is trained by all loops in one process, which take turns after every step, so that what else runs on the
machine slows them alike. Seconds are CPU time, on one thread; a figure is the median over rounds of some steps, each
with one line of metrics. Memory is the peak of a fresh process that trains by one loop alone, after its first step.

  ours       ldm.training.loop.train: latents and text from a cache on disk (digits: latents from memory, captions
             encoded when they are new, which is before the rounds), noise, EMA, clipping, fused AdamW, metrics
  diffusers  the script's inner loop, written from it: UNet2DConditionModel of the same weights' shapes, EMAModel
             (--use_ema), AdamW, clipping, accelerate, a value for its tracker in each step. The script encodes images
             and text in each step; here, both come from memory.
  by hand    what ours computes, and nothing else: bare, a new time and noise in each step, the gradients' norm by
             torch's clip_grad_norm_ and an EMA by torch's _foreach_lerp_
  bare       forward, backward and optimizer step of our network, on tensors in memory: always the same noise
"""

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import ldm
from benchmarks.common import markdown, process_memory, restart_peak, run_fresh
from ldm.checkpoint.diffusers_writer import write_unet
from ldm.checkpoint.writing import save_file
from ldm.cli import Parser, int_range
from ldm.data.digits import Digits
from ldm.diffusion.schedule import q_sample
from ldm.loading import SHIPPED
from ldm.models.unet import UNetModel
from ldm.program import run
from ldm.training.latents import encode_texts
from ldm.training.loop import train
from ldm.training.optimizers import make_optimizer

RATE, BETAS = 1e-4, (0.9, 0.999)
SCHEDULE = {"name": "scaled_linear", "start": 0.00085, "end": 0.012, "T": 1000}  # Stable Diffusion's


class Network(NamedTuple):
    """What is trained, on how many images a step, and how many steps are a round."""

    unet: dict[str, Any] | None  # None: the digits model's own
    size: int  # of the images, four times that of the latents
    batch_size: int
    steps: int
    warm: int = 3  # steps before the first round


def stable_diffusion(width: int, mult: Sequence[int]) -> dict[str, Any]:
    """Return UNetModel's arguments for a smaller network of Stable Diffusion 1's kind."""
    own = {"image_size": None, "in_channels": 4, "out_channels": 4, "model_channels": width, "channel_mult": [*mult]}
    own |= {
        "num_res_blocks": 2,
        "attention_resolutions": [2**i for i in range(len(mult))],
        "num_heads": 4,
        "use_spatial_transformer": True,
    }
    return own | {"transformer_depth": 1, "context_dim": 128, "legacy": False}


NETWORKS = {
    "tiny": Network({**stable_diffusion(32, [1, 2]), "num_res_blocks": 1}, 32, 4, 2),
    "digits": Network(None, 32, 128, 10, warm=32),  # three epochs, until all captions have come
    "10M": Network(stable_diffusion(64, [1, 2, 2]), 64, 8, 10),
    "100M": Network(stable_diffusion(160, [1, 2, 3]), 64, 16, 3),
}


class Done(Exception):
    """Ends a training after the last step that is measured, before it writes anything."""


class Noise(Dataset):
    """Random grey images of a size, each with a caption."""

    def __init__(self, size: int) -> None:
        self.images = torch.rand(256, 1, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def without_image(self, index: int) -> dict[str, Any]:
        return {"caption": f"a photo of number {index}"}

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], **self.without_image(index)}


class Watched(Dataset):
    """A data set that calls `begin`, once it is set, before each batch is read; the same captions in each epoch."""

    begin: Callable[[], None] | None = None

    def __init__(self, network: str) -> None:
        own = NETWORKS[network]
        self.dataset: Any = Digits() if own.unet is None else Noise(own.size)
        self.batch_size, self.read = own.batch_size, 0

    def set_epoch(self, epoch: int) -> None:
        """Keep the captions, which repeat in a long run: its embeddings of nearly all are soon in memory."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["dataset"], name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]

    def without_image(self, index: int) -> dict[str, Any]:
        if self.read % self.batch_size == 0 and Watched.begin is not None:
            Watched.begin()
        self.read += 1
        return self.dataset.without_image(index)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    names = [name for name in NETWORKS if name != "tiny"]
    add = parser.add_argument
    add("--networks", nargs="+", choices=list(NETWORKS), default=names, metavar="NAME", help=f"({' '.join(names)})")
    add("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"], help="(both)")
    add("--rounds", type=int_range(1), default=3, metavar="N", help="(3)")
    args = parser.parse_args(argv)
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise ValueError("this compares with diffusers, which is not installed: pip install diffusers") from None
    torch.set_num_threads(1)
    rows = []
    for name in args.networks:
        for precision in args.precisions:
            with tempfile.TemporaryDirectory() as folder:
                rows += (found := compare(name, precision, args.rounds, folder))
            print(json.dumps(found), file=sys.stderr)  # should a later one be interrupted
    titles = [
        "network",
        "precision",
        "loop",
        "CPU s / step",
        "samples / CPU s",
        "over bare",
        "over by hand",
        "peak memory, MiB",
    ]
    print(markdown(titles, rows))


def compare(name: str, precision: str, rounds: int, folder: str) -> list[list[str]]:
    """Return the table's rows of one network in one precision."""
    network, config = NETWORKS[name], config_of(name, precision, folder)
    others = {"by hand": bare_steps(name, precision, complete=True), "bare": bare_steps(name, precision)}
    if network.unet is not None:  # pooled text beside the tokens is nothing that their network takes
        others["diffusers"] = diffusers_steps(name, precision, folder)
    found = measure(config, others, network.warm + rounds * network.steps)
    rows = []
    for loop, seconds in found.items():
        second = statistics.median(in_rounds(seconds, network))
        over = [f"{over_other(seconds, found[other], network):+.1%}" for other in ("bare", "by hand")]
        peak = f"{peak_memory(loop, name, precision, folder) / 2**20:.0f}" if loop in ("ours", "diffusers") else "-"
        rows.append([name, precision, loop, f"{second:.4f}", f"{network.batch_size / second:.2f}", *over, peak])
    return rows


def in_rounds(seconds: Sequence[float], network: Network) -> list[float]:
    """Return the mean seconds of a step in each round."""
    n = network.steps
    return [sum(seconds[i : i + n]) / n for i in range(network.warm, len(seconds), n)]


def over_other(seconds: Sequence[float], other: Sequence[float], network: Network) -> float:
    """Return the median over rounds of how much longer the steps of one loop take than those of another."""
    pairs = zip(in_rounds(seconds, network), in_rounds(other, network), strict=True)
    return statistics.median(a / b for a, b in pairs) - 1


def measure(config: dict[str, Any], others: Mapping[str, Iterator[Any]], steps: int) -> dict[str, list[float]]:
    """Return the CPU seconds of each step of our loop and of others, which take turns."""
    found: dict[str, list[float]] = {loop: [] for loop in ("ours", *others)}
    since = None

    def begin() -> None:
        nonlocal since
        if since is not None:
            found["ours"].append(time.process_time() - since)
        for loop, other in others.items():
            started = time.process_time()
            next(other)
            if since is not None:  # the first one prepares
                found[loop].append(time.process_time() - started)
        if len(found["ours"]) == steps:
            raise Done
        since = time.process_time()

    Watched.begin = begin
    try:
        train(config, device="cpu")
    except Done:
        pass
    finally:
        Watched.begin = None
    return found


def peak_memory(loop: str, name: str, precision: str, folder: str) -> float:
    """Return the peak in bytes of a fresh process that trains by "ours" or "diffusers" alone."""
    code = f"from benchmarks.training import print_peak; print_peak{(loop, name, precision, folder)!r}"
    return run_fresh(f"{loop} {name}", "-c", code)["peak"]


def print_peak(loop: str, name: str, precision: str, folder: str) -> None:
    """Train for some steps, and print this process's peak memory after the first one."""
    torch.set_num_threads(1)
    count = itertools.count()

    def reset() -> Iterator[None]:
        for step in count:
            if step == 1:
                restart_peak()
            yield

    if loop == "ours":
        measure(config_of(name, precision, folder), {"reset": reset()}, 5)
    else:
        for _ in zip(range(5), reset(), diffusers_steps(name, precision, folder), strict=False):
            pass
    print(json.dumps({"peak": process_memory()["VmHWM"]}))


def config_of(name: str, precision: str, folder: str) -> dict[str, Any]:
    """Return the configuration of a run in a new folder within this one, and write the checkpoints that it names."""
    network, shipped = NETWORKS[name], ldm.load(SHIPPED, device="cpu")
    for part, changes in (("first_stage", {}), ("cond_stage", {"pooled": network.unet is None})):
        own = shipped.config[f"{part}_config"]
        own = {**own, "params": own["params"] | changes}
        save_file(Path(folder, f"{part}.safetensors"), getattr(shipped, f"{part}_model").state_dict(), own)
    unet = shipped.config["unet_config"]["params"] if network.unet is None else network.unet
    stage = {
        "unet_config": {"target": "ldm.models.unet.UNetModel", "params": unet},
        "first_stage": f"{folder}/first_stage.safetensors",
        "cond_stage": f"{folder}/cond_stage.safetensors",
        **{"learning_rate": RATE, "betas": BETAS, "schedule": SCHEDULE, "prediction": "eps"},
        **{"cache_dir": None if network.unet is None else f"{folder}/cache"},  # as configs/digits/diffusion.yaml has it
        **{"defaults": {"height": network.size, "width": network.size}},
    }
    # never reached: `measure` ends the run
    loop = {"steps": 10**6, "preview_every": 10**6, "save_every": 10**6, "log_every": network.steps}
    loop |= {"batch_size": network.batch_size, "precision": precision}
    return {
        **{"name": "run", "outdir": tempfile.mkdtemp(dir=folder), "seed": 0, "loop": loop},
        "stage": {"target": "ldm.training.diffusion.DiffusionStage", "params": stage},
        "data": {"target": f"{Watched.__module__}.Watched", "params": {"network": name}},
    }


def bare_steps(name: str, precision: str, complete: bool = False) -> Iterator[None]:
    """Train our network on tensors in memory, a step at a time; complete: with noise, clipping and EMA."""
    network, model = NETWORKS[name], ldm.load(SHIPPED, device="cpu")
    unet = UNetModel(**(model.config["unet_config"]["params"] if network.unet is None else network.unet)).train()
    unet.to(memory_format=torch.channels_last)  # as the stage trains it
    optimizer = make_optimizer(unet.parameters(), lr=RATE, betas=BETAS)
    shape, texts = (network.batch_size, 4, network.size // 4, network.size // 4), [""] * network.batch_size
    with torch.no_grad():
        cond = encode_texts(model.cond_stage_model, texts)
    cond = {"context": cond["c_crossattn"]} | ({"y": cond["c_adm"]} if network.unet is None else {})
    weights = [p.detach() for p in unet.parameters()]
    average = [p.clone() for p in weights if complete]
    z, noise, t = torch.randn(shape), torch.randn(shape), torch.randint(1000, shape[:1])
    x, schedule = z, model.schedule
    while True:
        if complete:
            noise, t = torch.randn(shape), torch.randint(schedule.T, shape[:1])
            x = q_sample(z, t, noise, schedule)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = unet(x, t, **cond)
        F.mse_loss(output.float(), noise).backward()
        if complete:
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if complete:
            torch._foreach_lerp_(average, weights, 0.001)
        yield


def their_loss(unet: nn.Module, scheduler: Any, latents: Tensor, text: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Return the loss of diffusers' train_text_to_image.py, for prediction epsilon."""
    output = unet(scheduler.add_noise(latents, noise, t), t, text, return_dict=False)[0]
    return F.mse_loss(output.float(), noise.float(), reduction="mean")


def diffusers_steps(name: str, precision: str, folder: str) -> Iterator[None]:
    """Train diffusers' network as its script does, a step at a time."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel
    from tqdm.auto import tqdm

    network = NETWORKS[name]
    mixed = {"fp32": "no"}.get(precision, precision)
    accelerator = Accelerator(mixed_precision=mixed, cpu=True, log_with="tensorboard", project_dir=f"{folder}/theirs")
    unet: Any = UNet2DConditionModel(**write_unet(network.unet, network.size // 4)).train()
    average = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    optimizer: Any = torch.optim.AdamW(unet.parameters(), lr=RATE, betas=BETAS, weight_decay=1e-2, eps=1e-8)
    rates = get_scheduler("constant", optimizer=optimizer)
    loader: Any = DataLoader(_in_memory(network.size // 4), shuffle=True, batch_size=network.batch_size)
    unet, optimizer, loader, rates = accelerator.prepare(unet, optimizer, loader, rates)
    accelerator.init_trackers("theirs")
    bar, step = tqdm(total=10**6, desc="Steps"), 0
    while True:
        for mean, std, text in loader:
            with accelerator.accumulate(unet):
                latents = mean + std * torch.randn_like(mean)
                noise = torch.randn_like(latents)
                t = torch.randint(0, scheduler.config.num_train_timesteps, (len(latents),)).long()
                loss = their_loss(unet, scheduler, latents, text, t, noise)
                shown = accelerator.gather(loss.repeat(network.batch_size)).mean().item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                rates.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                average.step(unet.parameters())
                bar.update(1)
                step += 1
                accelerator.log({"train_loss": shown}, step=step)
            bar.set_postfix(step_loss=loss.detach().item(), lr=rates.get_last_lr()[0])
            yield


def _in_memory(size: int) -> Dataset:
    """Return latents' mean and deviation, and text embeddings, of 256 images: what caches would hold."""
    shape = (256, 4, size, size)
    return torch.utils.data.TensorDataset(torch.randn(shape), torch.full(shape, 0.1), torch.randn(256, 24, 128))


if __name__ == "__main__":
    run(main)
