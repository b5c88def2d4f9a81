"""Networks whose speed is compared, in one process: ours, its fast form and diffusers', over the same weights.

Stable Diffusion's have random weights; its UNet takes 8 GB of memory. FLOPs are counted on the meta device, where
nothing is computed, and attention is two products; the machine's limit is the best that large products reach here.
"""

import tempfile
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ldm
from benchmarks import training
from ldm.checkpoint.compvis_config import from_compvis
from ldm.checkpoint.diffusers_config import unet_levels
from ldm.checkpoint.diffusers_names import unet_to_diffusers, vae_to_diffusers
from ldm.checkpoint.diffusers_writer import write_unet, write_vae
from ldm.inference.optimize import optimize, packs, to_packed
from ldm.input_files import read_yaml
from ldm.latent_diffusion import LatentDiffusion

STABLE_DIFFUSION = Path(__file__).parents[1] / "configs" / "stable-diffusion" / "v1-inference.yaml"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Case(NamedTuple):
    """A network at a batch and a size of its latents."""

    part: str  # of a model: "unet", "decoder" or "text"
    batch: int
    side: int
    model: str  # "digits", which ships, or "sd"
    calls: int = 1  # timed together

    def __str__(self) -> str:
        return f"{self.model} {self.part}, {self.batch} of {self.side}" + (
            f" x {self.side}" if self.part != "text" else ""
        )


class Found(NamedTuple):
    """The CPU seconds of a form's calls in each round, its relative difference from the first form, and its FLOPs."""

    seconds: list[float]
    error: float | None = None
    flops: float | None = None


BEYOND = ("num_classes", "adm_in_channels", "use_scale_shift_norm")  # of the digits, which Stable Diffusion lacks
PARTS = {"unet": "model", "decoder": "first_stage_model", "text": "cond_stage_model"}


def take_turns(forms: dict[str, Callable[[], Any]], rounds: int, calls: int = 1) -> dict[str, list[float]]:
    """Return the CPU seconds of a call of each form, in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = process_time()
            for _ in range(calls):
                form()
            seconds[name].append((process_time() - start) / calls)
    return seconds


@torch.inference_mode()
def measure(case: Case, precision: str, rounds: int) -> dict[str, Found]:
    """Return what each form of the case's network takes."""
    model = ldm.load(device="cpu") if case.model == "digits" else stable_diffusion(case.part)
    if case.part == "unet":
        model.model.to(DTYPES[precision])
    inputs, forms = inputs_of(case, model), forms_of(case, model)
    with FlopCounterMode(display=False) as counter:
        call(case.part, model_on_meta(case), tuple(x.to("meta", torch.float32) for x in inputs))
    results = {name: form(*inputs).float() for name, form in forms.items()}  # which warms them up
    errors = {name: float((y - results["plain"]).norm() / results["plain"].norm()) for name, y in results.items()}
    bound = {name: lambda form=form: form(*inputs) for name, form in forms.items()}
    seconds = take_turns(bound, rounds, case.calls)
    return {name: Found(seconds[name], errors[name], counter.get_total_flops()) for name in forms}


def call(part: str, model: LatentDiffusion, inputs: tuple[Tensor, ...]) -> Tensor:
    """Return what a part of our model computes."""
    if part == "unet":
        x, t, context, *pooled = inputs
        return model.apply_model(x, t, {"c_crossattn": context} | ({"c_adm": pooled[0]} if pooled else {}))
    return model.decode(*inputs) if part == "decoder" else model.cond_stage_model(inputs[0].long())["c_crossattn"]


def forms_of(case: Case, model: LatentDiffusion) -> dict[str, Callable[..., Tensor]]:
    """Return the forms of a case's network, over the same weights: no fast form where it is the plain one."""
    fast, forms = optimize(model), {"plain": lambda *inputs: call(case.part, model, inputs)}
    if case.part == "unet" and "are packed" in fast.notes[-1]:
        forms["optimized"] = lambda *inputs: call(case.part, fast, inputs)
    try:
        return forms | {"diffusers": their_form(case, model)}
    except ImportError:
        return forms


@cache
def model_on_meta(case: Case) -> LatentDiffusion:
    """Return a case's model without weights."""
    shipped = ldm.load(device="cpu").config
    with torch.device("meta"):
        params = shipped if case.model == "digits" else from_compvis(read_yaml(STABLE_DIFFUSION))["params"]
        return LatentDiffusion(**params).eval().requires_grad_(False)


def fill(network: nn.Module) -> None:
    """Give a network on the meta device random weights, of which no output is far from 1."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                tensor = torch.zeros(parameter.shape) if name == "bias" else torch.ones(parameter.shape)
                tensor = tensor.uniform_(-0.035, 0.035) if parameter.ndim > 1 else tensor
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))


def stable_diffusion(part: str) -> LatentDiffusion:
    """Return Stable Diffusion 1, with random weights, and with a part alone that is real."""
    with torch.device("meta"):
        model = LatentDiffusion(**from_compvis(read_yaml(STABLE_DIFFUSION))["params"]).eval().requires_grad_(False)
    fill(getattr(model, PARTS[part]))
    if part != "unet":  # what says that the model is on a CPU
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
    if case.part == "text":
        from transformers import CLIPTextConfig, CLIPTextModel

        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        with torch.device("meta"):
            prefixed = any(
                name.startswith("text_model.") for name in CLIPTextModel(CLIPTextConfig(**sizes)).state_dict()
            )
        prefix = "transformer." if prefixed else "transformer.text_model."  # transformers from 5.6 on
        state = {name.removeprefix(prefix): t for name, t in model.cond_stage_model.state_dict().items()}
        network = CLIPTextModel(CLIPTextConfig(**sizes)).eval().requires_grad_(False)
        network.load_state_dict(state)
        return lambda tokens: network(tokens).last_hidden_state
    params = model.unet_config["params"]
    state = unet_to_diffusers(model.model.diffusion_model.state_dict(), unet_levels(params))
    config = write_unet({name: value for name, value in params.items() if name not in BEYOND}, case.side)
    if case.model == "digits":
        config |= {"class_embed_type": "projection", "resnet_time_scale_shift": "scale_shift"}
        config |= {"projection_class_embeddings_input_dim": params["adm_in_channels"]}
    network = filled(UNet2DConditionModel, config, state)
    return lambda x, t, context, y=None: network(x, t, context, class_labels=y).sample


def filled(cls: Any, config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """Return a network of diffusers over these tensors, without copies."""
    with torch.device("meta"):
        network = cls(**config)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def inputs_of(case: Case, model: LatentDiffusion) -> tuple[Tensor, ...]:
    """Return a case's inputs, of random numbers."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(model.model.parameters()).dtype

    def noise(*size: int) -> Tensor:
        return torch.randn(case.batch, *size, generator=generator).to(dtype)

    if case.part == "text":
        return (torch.randint(0, 40000, (case.batch, 77), generator=generator),)
    x = noise(model.channels, case.side, case.side)
    if case.part == "decoder":
        return (x,)
    params = model.unet_config["params"]
    pooled = [noise(params["adm_in_channels"])] if "adm_in_channels" in params else []
    context = noise(24 if case.model == "digits" else 77, params["context_dim"])
    return (x, torch.full((case.batch,), 500.0), context, *pooled)


@torch.inference_mode()
def limits(precision: str, rounds: int) -> dict[str, Found]:
    """Return what large products take: of matrices, by torch and with packed weights, and of convolutions."""
    dtype = DTYPES[precision]
    x, maps = torch.randn(2048, 2048).to(dtype), torch.randn(2, 320, 64, 64).to(dtype)
    linear, packed = (nn.Linear(2048, 2048, dtype=dtype) for _ in range(2))
    conv = nn.Conv2d(320, 320, 3, padding=1, dtype=dtype).to(memory_format=torch.channels_last)
    maps = maps.contiguous(memory_format=torch.channels_last)
    forms = {"matrix": lambda: linear(x), "matrix, packed": lambda: packed(x), "convolution": lambda: conv(maps)}
    if packs(dtype):
        to_packed(packed, False)
    flops = {"convolution": 2 * maps.numel() * 320 * 9}
    for form in forms.values():
        form()
    return {name: Found(s, None, flops.get(name, 2 * 2048**3)) for name, s in take_turns(forms, rounds).items()}


def training_steps(network: str, precision: str, rounds: int) -> dict[str, Found]:
    """Return what the steps of loops take that train a network of benchmarks.training: ours, diffusers', and bare."""
    own, others = training.NETWORKS[network], {"bare": training.bare_steps(network, precision)}
    with tempfile.TemporaryDirectory() as folder:
        if own.unet is not None and find_spec("diffusers"):  # pooled text is nothing that their network takes
            others["diffusers"] = training.diffusers_steps(network, precision, folder)
        seconds = training.measure(training.config_of(network, precision, folder), others, own.warm + rounds)
    return {name: Found(s[own.warm :]) for name, s in seconds.items()}


def generation(steps: int, rounds: int) -> dict[str, Found]:
    """Return what an image of the digits takes from prompt to pixels, in that many denoising steps."""
    model = ldm.load(device="cpu")
    found = take_turns({"plain": lambda: model.generate(["a five"], steps=steps)}, rounds + 1)
    return {"plain": Found(found["plain"][1:])}
