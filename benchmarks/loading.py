"""Compare ways to load a checkpoint: `ldm.load`, and building the model, reading the file, `load_state_dict`.

python -m benchmarks.loading                      # Stable Diffusion 1 at full size, random weights (8.5 GB of disk)
python -m benchmarks.loading --ckpt model.safetensors --repeat 3

Each way runs in a fresh process, with the file in the page cache. Seconds are wall clock and CPU time of loading alone,
without imports. Memory is the process's growth while it loads: its peak, and what is private to it afterwards (not the
pages of a mapped file that nobody changed).
"""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import markdown, run_fresh
from ldm.cli import Parser, int_range
from ldm.program import run

# What a fresh process runs: it prepares, then measures `work()`.
MEASURE = """
import json, time
import torch
from benchmarks.common import process_memory, restart_peak
{prepare}

restart_peak()
before, wall, cpu = process_memory(), time.perf_counter(), time.process_time()
{work}
wall, cpu, after = time.perf_counter() - wall, time.process_time() - cpu, process_memory()
peak, private = after["VmHWM"] - before["VmRSS"], sum(after[k] - before[k] for k in ("Private_Dirty", "Swap"))
print(json.dumps(dict(seconds=wall, cpu_seconds=cpu, peak_GiB=peak / 2**30, private_GiB=private / 2**30)))
"""
OURS = ("import ldm, ldm.loading", "model = ldm.load({path!r}, device='cpu')")
BUILD = "from ldm.latent_diffusion import LatentDiffusion; config = json.load(open({config!r}))"
NAIVE = {
    ".safetensors": (
        BUILD + "; from safetensors.torch import load_file",
        "model = LatentDiffusion(**config); model.load_state_dict(load_file({path!r}), strict=False)",
    ),
    ".ckpt": (
        BUILD,
        "model = LatentDiffusion(**config)\n"
        "state = torch.load({path!r}, map_location='cpu', weights_only=True)['state_dict']\n"
        "model.load_state_dict(state, strict=False)",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--ckpt", type=Path, metavar="FILE", help="(random weights at Stable Diffusion 1's full size)")
    parser.add_argument("--repeat", type=int_range(1), default=3, metavar="N", help="best of N (3)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        files = [args.ckpt] if args.ckpt is not None else make_stable_diffusion(Path(folder))
        compare_loading(files, Path(folder) / "config.json", args.repeat)


def make_stable_diffusion(folder: Path) -> list[Path]:
    """Write Stable Diffusion 1 with random weights as a single file in both formats; return their paths."""
    import torch
    from safetensors.torch import save_file

    from ldm.checkpoint.compvis import single_file
    from ldm.checkpoint.compvis_config import from_compvis
    from ldm.input_files import read_yaml
    from ldm.latent_diffusion import LatentDiffusion

    yaml = Path(__file__).parents[1] / "configs" / "stable-diffusion" / "v1-inference.yaml"
    config = from_compvis(read_yaml(yaml))
    with torch.device("meta"):
        model = LatentDiffusion(**config["params"])
    random = {name: torch.empty(t.shape, dtype=t.dtype).uniform_(-0.05, 0.05) for name, t in model.state_dict().items()}
    state, metadata = single_file(random, config)
    files = [folder / "model.safetensors", folder / "model.ckpt"]
    save_file(state, files[0], metadata)
    torch.save({"state_dict": state, "global_step": 0}, files[1])
    return files


def compare_loading(files: Sequence[Path], config: Path, repeat: int) -> None:
    """Print the table, a row for each file and way, and the weights' size."""
    import ldm

    rows = []
    for path in files:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: the naive way that is compared reads single files")
        model = ldm.load(path, device="cpu")
        config.write_text(json.dumps(model.config))
        weights = sum(p.numel() * p.element_size() for p in model.state_dict().values()) / 2**30
        del model
        for way, (prepare, work) in (("ldm.load", OURS), ("naive", NAIVE.get(path.suffix, NAIVE[".ckpt"]))):
            best = min((measure(prepare, work, path, config) for _ in range(repeat)), key=lambda row: row["seconds"])
            shares = [f"{best[key] / weights:.2f}" for key in ("peak_GiB", "private_GiB")]
            rows.append([path.suffix, way, f"{best['seconds']:.2f}", f"{best['cpu_seconds']:.2f}", *shares])
    print(markdown(["file", "way", "s", "CPU s", "peak / weights", "private / weights"], rows))
    print(f"weights: {weights:.2f} GiB")


def measure(prepare: str, work: str, path: Path, config: Path) -> dict[str, float]:
    """Return what MEASURE prints in a fresh process."""
    os.sync()  # a mapped file that was just written counts as private memory until the disk has it
    prepare, work = (text.format(path=str(path), config=str(config)) for text in (prepare, work))
    return run_fresh(f"loading {path}", "-c", MEASURE.format(prepare=prepare, work=work))


if __name__ == "__main__":
    run(main)
