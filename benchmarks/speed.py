"""Measure what a call of a network costs: ours as it is loaded, its fast form (`ldm.optimize`), and diffusers'.

python -m benchmarks.speed --quick              # the digits UNet, batch 1 and 16: a minute
python -m benchmarks.speed                      # all cases of CASES
python -m benchmarks.speed --case sd_unet --precision bf16

All of a case share their weights and their process, and take turns. Times are CPU time on one thread, medians over the
rounds, with the spread beside them, of four and more rounds without the smallest and the largest. Stable Diffusion's
networks have random weights; its UNet takes 8 GB of memory.
"""

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ldm
from benchmarks.common import markdown
from ldm.checkpoint.compvis_config import from_compvis
from ldm.checkpoint.diffusers_config import unet_levels
from ldm.checkpoint.diffusers_names import unet_to_diffusers, vae_to_diffusers
from ldm.checkpoint.diffusers_writer import write_unet, write_vae
from ldm.cli import Parser, int_range
from ldm.inference.optimize import optimize
from ldm.input_files import read_yaml
from ldm.latent_diffusion import LatentDiffusion
from ldm.program import run

STABLE_DIFFUSION = Path(__file__).parents[1] / "configs" / "stable-diffusion" / "v1-inference.yaml"


class Case(NamedTuple):
    """A network at a batch and a size of its latents."""

    name: str
    part: str  # of a model: "unet" or "decoder"
    batch: int
    side: int
    model: str  # "digits", which ships, or "sd"
    calls: int = 1  # timed together


CASES = [Case("digits_unet", "unet", b, 8, "digits", max(1, 16 // b)) for b in (1, 2, 16, 64)]
CASES += [Case("sd_vae", "decoder", 1, 32, "sd"), Case("sd_unet", "unet", 2, 32, "sd")]
BEYOND = (
    "num_classes",
    "adm_in_channels",
    "use_scale_shift_norm",
)  # of the digits, which Stable Diffusion lacks
QUICK = [case for case in CASES if case.name == "digits_unet" and case.batch in (1, 16)]


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="the digits alone, at batch 1 and 16")
    add("--case", action="append", choices=sorted({case.name for case in CASES}), help="only this one; repeatable")
    add("--precision", choices=("full", "bf16"), default="full", help="of the UNets (full)")
    add("--rounds", type=int_range(1), default=5, metavar="N", help="(5)")
    args = parser.parse_args(argv)
    if args.quick and args.case:
        raise ValueError("--quick and --case choose the cases: give one of them")
    cases = QUICK if args.quick else [case for case in CASES if not args.case or case.name in args.case]
    torch.set_num_threads(1)
    rows: list[list[str]] = []
    for case in cases:
        rows += rows_of(case, measure(case, args.precision, args.rounds))
        gc.collect()
    print(markdown(["network", "batch", "latents", "form", "ms", "spread", "x", "off by"], rows))


class Found(NamedTuple):
    """The seconds of a form's calls in each round, and its relative difference from the plain form."""

    seconds: list[float]
    error: float


def rows_of(case: Case, found: dict[str, Found]) -> list[list[str]]:
    """Return a table's rows, one for each form, with how many of its calls take the time of diffusers', or of plain."""
    base, rows = median(found["diffusers" if "diffusers" in found else "plain"].seconds), []
    for name, (seconds, error) in found.items():
        ordered, middle = sorted(seconds), median(seconds)
        inner = ordered[1:-1] if len(ordered) > 3 else ordered
        cells = [
            f"{1e3 * middle:.2f}",
            f"{(inner[-1] - inner[0]) / middle:.0%}",
            f"{base / middle:.2f}",
            f"{error:.0e}",
        ]
        rows.append([case.name, f"{case.batch}", f"{case.side} x {case.side}", name, *cells])
    return rows


@torch.inference_mode()
def measure(case: Case, precision: str = "full", rounds: int = 5) -> dict[str, Found]:
    """Return what each form of the case's network takes."""
    model = ldm.load(device="cpu") if case.model == "digits" else stable_diffusion(case.part)
    if precision == "bf16":
        model.model.bfloat16()
    forms, inputs = forms_of(case, model), inputs_of(case, model)
    results = {name: form(**inputs).float() for name, form in forms.items()}  # which warms them up
    errors = {name: float((y - results["plain"]).norm() / results["plain"].norm()) for name, y in results.items()}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = process_time()
            for _ in range(case.calls):
                form(**inputs)
            seconds[name].append((process_time() - start) / case.calls)
    return {name: Found(seconds[name], errors[name]) for name in forms}


def forms_of(case: Case, model: LatentDiffusion) -> dict[str, Callable[..., Tensor]]:
    """Return the forms of a case's network, over the same weights."""
    ours = {"plain": model, "optimized": optimize(model)}
    if case.part == "decoder":
        forms: dict[str, Any] = {name: m.decode for name, m in ours.items()}
    else:
        forms = {name: lambda x, t, cond, m=m: m.apply_model(x, t, cond) for name, m in ours.items()}
    try:
        return forms | {"diffusers": their_form(case, model)}
    except ImportError:
        return forms


def stable_diffusion(part: str) -> LatentDiffusion:
    """Return Stable Diffusion 1 with random weights, without its text encoder, and with a part alone that is real."""
    params = from_compvis(read_yaml(STABLE_DIFFUSION))["params"]
    with torch.device("meta"):
        model = LatentDiffusion(**params | {"cond_stage_config": None}).eval().requires_grad_(False)
    network = model.model if part == "unet" else model.first_stage_model
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tensor = torch.zeros(parameter.shape) if name == "bias" else torch.ones(parameter.shape)
                tensor = tensor.uniform_(-0.035, 0.035) if parameter.ndim > 1 else tensor
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    if part == "decoder":  # what says that the model is on a CPU
        model.model.diffusion_model = nn.Linear(1, 1)
    return model


def their_form(case: Case, model: LatentDiffusion) -> Callable[..., Tensor]:
    """Return diffusers' network with the same weights. ImportError where diffusers is not installed."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    if case.part == "decoder":
        params = model.first_stage_config["params"]
        config, own = write_vae(params, model.scale_factor, 8 * case.side), params["ddconfig"]
        state = vae_to_diffusers(model.first_stage_model.state_dict(), len(own["ch_mult"]), own["num_res_blocks"])
        network = filled(AutoencoderKL, config, state)
        return lambda latents: network.decode(latents / model.scale_factor).sample
    params = model.unet_config["params"]
    state = unet_to_diffusers(model.model.diffusion_model.state_dict(), unet_levels(params))
    config = write_unet({name: value for name, value in params.items() if name not in BEYOND}, case.side)
    if case.model == "digits":
        config |= {"class_embed_type": "projection", "resnet_time_scale_shift": "scale_shift"}
        config |= {"projection_class_embeddings_input_dim": params["adm_in_channels"]}
    network = filled(UNet2DConditionModel, config, state)
    return lambda x, t, cond: network(x, t, cond["c_crossattn"], class_labels=cond.get("c_adm")).sample


def filled(cls: Any, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Return a network of diffusers over these tensors, without copies."""
    with torch.device("meta"):
        network = cls(**config)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def inputs_of(case: Case, model: LatentDiffusion) -> dict[str, Any]:
    """Return a case's inputs, of random numbers."""
    generator = torch.Generator().manual_seed(0)
    decodes = case.part == "decoder"
    dtype = torch.float32 if decodes else next(model.model.parameters()).dtype

    def noise(*size: int) -> Tensor:
        return torch.randn(case.batch, *size, generator=generator).to(dtype)

    x = noise(model.channels, case.side, case.side)
    if decodes:
        return {"latents": x}
    params = model.unet_config["params"]
    cond = {"c_crossattn": noise(24 if case.model == "digits" else 77, params["context_dim"])}
    if "adm_in_channels" in params:
        cond["c_adm"] = noise(params["adm_in_channels"])
    return {"x": x, "t": torch.full((case.batch,), 500.0), "cond": cond}


if __name__ == "__main__":
    run(main)
