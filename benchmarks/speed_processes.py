"""Whole processes whose speed is compared: imports, cold starts, loading, and an image, with ours and diffusers."""

import os
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

WIDTH = 160  # of the UNet that is loaded, half of Stable Diffusion 1's, whose other parts are as they are: 420M weights
STEPS, SIDE = 10, 256  # of the image that a whole process makes with it
IMPORTS = {
    "torch alone": ["-c", "import torch"],
    "plain": ["-c", "import ldm.inference.generate, ldm.loading"],
    "diffusers": ["-c", "from diffusers import StableDiffusionPipeline"],
}
COLD = {"torch alone": IMPORTS["torch alone"], "plain": ["-m", "ldm", "txt2img", "--outdir", "{out}"]}
HELP = {"plain": ["-m", "ldm", "txt2img", "--help"]}
OURS = "-m ldm txt2img --device cpu --prompt cat --scale 7.5 --outdir {out} --ckpt {model}".split()
OURS += ["--steps", f"{STEPS}", "--H", f"{SIDE}", "--W", f"{SIDE}"]
PIPELINE = "from diffusers import StableDiffusionPipeline as P", "pipeline = P.from_pretrained({path!r})"
THEIRS = f"""
{PIPELINE[0]}
pipeline = P.from_pretrained("{{model}}")
pipeline("cat", num_inference_steps={STEPS}, height={SIDE}, width={SIDE}).images[0].save("{{out}}/theirs.png")
"""
COMPLETE = {"plain": [*OURS, "--no-optimize"], "optimized": OURS, "diffusers": ["-c", THEIRS]}


class Process(NamedTuple):
    """The CPU seconds of a process in each round; by how much memory grew at most, and what of that is private: GiB."""

    seconds: list[float]
    memory: tuple[float, float] | None = None


def take_turns(forms: dict[str, list[str]], rounds: int, **paths: Path) -> dict[str, Process]:
    """Return what Python takes with each form's arguments, in which {name} stands for a path."""
    there = {name: argv for name, argv in forms.items() if name != "diffusers" or find_spec("diffusers")}
    found: dict[str, Process] = {name: Process([]) for name in there}
    for _ in range(rounds):
        for name, argv in there.items():
            found[name].seconds.append(cpu_seconds(*(word.format(**paths) for word in argv)))
    return found


def cpu_seconds(*argv: str) -> float:
    """Return the CPU seconds of Python with these arguments. ValueError, with its own, if it fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise ValueError(f"{argv[1][:40]} ended with {done.returncode}: {done.stderr.strip()[-300:] or 'killed?'}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def starts(rounds: int) -> dict[str, dict[str, Process]]:
    """Return what imports and starts take, of ours with the model that ships."""
    with TemporaryDirectory() as out:
        kinds = {"imports": IMPORTS, "txt2img --help": HELP, "txt2img, digits, cold": COLD}
        return {name: take_turns(forms, rounds, out=Path(out)) for name, forms in kinds.items()}


def with_a_large_model(rounds: int) -> dict[str, dict[str, Process]]:
    """Return what loading a folder of diffusers takes, and making an image with it from nothing."""
    from benchmarks import loading

    with TemporaryDirectory() as out:
        model = Path(out, "model")
        write_model(model)
        forms = {"plain": loading.OURS} | ({"diffusers": PIPELINE} if find_spec("diffusers") else {})
        loads: dict[str, Process] = {}
        for name, (prepare, work) in forms.items():
            found = [loading.measure(prepare, work, model, model) for _ in range(rounds)]
            memory = max(run["peak_GiB"] for run in found), max(run["private_GiB"] for run in found)
            loads[name] = Process([run["cpu_seconds"] for run in found], memory)
        return {"load": loads, "txt2img, cold": take_turns(COMPLETE, rounds, out=Path(out), model=model)}


def write_model(folder: Path) -> None:
    """Write a folder of diffusers with random weights. ValueError where diffusers is not installed."""
    import torch

    import ldm
    from benchmarks.speed_networks import STABLE_DIFFUSION, fill
    from ldm.checkpoint.compvis_config import from_compvis
    from ldm.input_files import read_yaml
    from ldm.latent_diffusion import LatentDiffusion

    params = from_compvis(read_yaml(STABLE_DIFFUSION))["params"]
    params["unet_config"]["params"]["model_channels"] = WIDTH
    with torch.device("meta"):
        model = LatentDiffusion(**params).eval()
    fill(model)
    ldm.save(model, folder, format="diffusers")
