"""benchmarks/: what they measure, and by loading.py that loading maps files, at a size that shows it and in full."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import refused
from meta_models import TINY_1

import ldm
from benchmarks import (
    common,
    data,
    generators,
    guidance,
    loading,
    samplers,
    speed,
    speed_networks,
    speed_processes,
    training,
    trilemma,
)
from ldm.checkpoint.compvis import single_file
from ldm.checkpoint.diffusers_config import unet_levels
from ldm.checkpoint.diffusers_names import unet_to_diffusers
from ldm.checkpoint.diffusers_writer import write_unet
from ldm.data.captions import NUMBER_WORDS
from ldm.diffusion.denoiser import Prediction
from ldm.diffusion.sampling import SAMPLERS
from ldm.diffusion.schedule import make_schedule, sampling_sigmas
from ldm.evaluation.networks import Measuring
from ldm.evaluation.reference import load_reference
from ldm.evaluation.samples import from_pil, prompts_for, quantise, sample_images
from ldm.inference import precision
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.unet import UNetModel

WIDE = {"width": 512, "layers": 4, "heads": 8}  # 38 million parameters of text, 150 MB


def config_of(params: dict, **text) -> dict:
    conditioner = params["cond_stage_config"]
    return params | {"cond_stage_config": conditioner | {"params": conditioner["params"] | text}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model as safetensors and as .ckpt, and its configuration."""
    params = config_of(TINY_1["params"], **WIDE)
    params["unet_config"] = TINY_1["params"]["unet_config"] | {
        "params": TINY_1["params"]["unet_config"]["params"] | {"context_dim": 512}
    }
    model = LatentDiffusion(**params).eval()
    folder = tmp_path_factory.mktemp("wide")
    ldm.save(model, folder / "model.safetensors", format="compvis")
    state, _ = single_file(model.state_dict(), {"target": "ldm.latent_diffusion.LatentDiffusion", "params": params})
    torch.save({"state_dict": state}, folder / "model.ckpt")
    (folder / "config.json").write_text(json.dumps(params))
    return folder, sum(p.numel() * p.element_size() for p in model.state_dict().values()) / 2**30


@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".ckpt", marks=pytest.mark.full)])
def test_loading_maps_the_file(files, suffix):
    folder, weights = files
    ours = loading.measure(*loading.OURS, folder / f"model{suffix}", folder / "config.json")
    naive = loading.measure(*loading.NAIVE[suffix], folder / f"model{suffix}", folder / "config.json")
    # the tokenizer's vocabulary and the modules take 33 MB, which is a fifth of these weights; the check for NaN reads
    # the mapped file once, into pages that are not private
    assert ours["private_GiB"] < 0.3 * weights and ours["peak_GiB"] < 1.4 * weights
    assert naive["private_GiB"] > 0.9 * weights and naive["peak_GiB"] > 1.5 * weights  # the measure can tell


@pytest.mark.full
def test_stable_diffusion_at_full_size(tmp_path):
    """Issue 3: private memory at most 0.1 times the weights, peak at most 1.15, no second copy when casting."""
    files = loading.make_stable_diffusion(tmp_path)
    weights = files[0].stat().st_size / 2**30
    for path in files:
        found = loading.measure(*loading.OURS, path, tmp_path / "config.json")
        assert found["private_GiB"] < 0.1 * weights and found["peak_GiB"] < 1.15 * weights
        half = ("import ldm.loading", "model = ldm.load({path!r}, device='cpu', dtype=torch.float16)")
        found = loading.measure(*half, path, tmp_path / "config.json")
        assert found["private_GiB"] < 0.6 * weights  # half the bytes, and nothing of the mapped file


def test_what_cannot_be_compared_is_said_before_any_work(files, tmp_path):
    folder, _ = files
    (tmp_path / "rows.jsonl").write_text(json.dumps({"sampler": "ddim", "steps": 5, "n": 100}) + "\n")
    refused(f"{folder} is a folder", loading.main, ["--ckpt", str(folder)])
    out = ["--out", str(tmp_path / "rows.jsonl")]
    refused("rows.jsonl has rows of 100 images each", samplers.main, out)
    refused("rows.jsonl has rows of 100 images each", guidance.main, out)
    refused("No such file", samplers.main, ["--out", str(tmp_path / "none" / "rows.jsonl")], error=OSError)


@pytest.mark.parametrize(
    ("benchmark", "work", "command"),
    [
        (samplers, "compare_samplers", ["--out={}/rows.jsonl"]),
        (guidance, "compare_scales", ["--out={}/rows.jsonl"]),
        (trilemma, "compare_generators", ["--ddgan={}", "--ddpm={}"]),
    ],
)
def test_what_cannot_be_plotted_is_said_before_any_work(benchmark, work, command, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, work, lambda args: pytest.fail("it starts to work first"))
    command = [option.format(tmp_path) for option in command]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
        match = "--plot needs matplotlib: pip install matplotlib"
        refused(match, benchmark.main, [*command, "--plot=plot.png"])
    refused(f"{tmp_path} cannot be written", benchmark.main, [*command, f"--plot={tmp_path}"], error=OSError)


def test_sampler_table_and_plot(tmp_path):
    rows = [
        {"sampler": name, "steps": s, "evaluations": s, "accuracy": 0.995, "ratio": 1 + 5 / s, "recall": 0.8}
        for name in ("ddim", "unipc")
        for s in (5, 10)
    ]
    table = samplers.sampler_table(rows[:-1]).splitlines()
    assert table == [
        "| sampler | 5 steps | 10 steps |",
        "|---|---|---|",
        "| `ddim` | 99.5%, 2.00, 0.80 | 99.5%, 1.50, 0.80 |",
        "| `unipc` | 99.5%, 2.00, 0.80 | - |",
    ]
    samplers.plot_samplers(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_guidance_table_and_plot(tmp_path):
    shares = {"accuracy": 0.995, "precision": 0.9, "recall": 0.8}
    kinds = [(1.0, guidance.EVERYWHERE), (10.0, guidance.EVERYWHERE), (2.0, guidance.INTERVAL)]
    rows = [{"scale": scale, "where": where, "ratio": scale, **shares} for scale, where in kinds]
    assert guidance.guidance_table(rows).splitlines() == [
        "| scale, where | accuracy | distance / floor | precision | recall |",
        "|---|---|---|---|---|",
        "| 1 everywhere | 99.5% | 1.00 | 0.900 | 0.800 |",
        "| 10 everywhere | 99.5% | 10.00 | 0.900 | 0.800 |",
        "| 2 in the interval | 99.5% | 2.00 | 0.900 | 0.800 |",
    ]
    guidance.plot_guidance(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_guidance_in_an_interval_only(tiny_model, tmp_path, monkeypatch):
    """Each scale everywhere and in the model's own interval; at scale 1 once; rows that are there are kept."""
    reference, calls = load_reference(), []
    monkeypatch.setitem(tiny_model.defaults, "interval", [0.3, 2.5])
    monkeypatch.setattr(guidance, "load_model", lambda args: tiny_model)
    monkeypatch.setattr("ldm.evaluation.datasets.find_reference", lambda *args: (reference, None))

    def generate(model, prompts, seed, batch_size, **settings):
        calls.append((settings["scale"], *settings["interval"]))
        return reference.images[: len(prompts)]

    monkeypatch.setattr(generators, "sample_images", generate)
    out = ["--out", str(tmp_path / "rows.jsonl"), "--n=30"]
    for scales in (["1"], ["1", "3"]):
        guidance.main([*out, "--scales", *scales])
    assert calls == [(1, 0, float("inf")), (3, 0, float("inf")), (3, 0.3, 2.5)]
    rows = common.read_rows(tmp_path / "rows.jsonl")
    assert [(row["scale"], row["where"]) for row in rows] == [
        *((1, guidance.EVERYWHERE), (3, guidance.EVERYWHERE), (3, guidance.INTERVAL))
    ]
    assert all(0 <= row["accuracy"] <= 1 and row["recall"] > 0.5 for row in rows)


def test_trilemma_of_checkpoints(tiny_checkpoint, tmp_path, capsys, monkeypatch):
    set_precision, computed = precision.set_precision, []

    def watched(model, *args):
        set_precision(model, *args)
        computed.append(precision.precision_of(model))

    monkeypatch.setattr(precision, "set_precision", watched)
    files = [f"--{kind}={tiny_checkpoint}" for kind in ("vae", "ddgan", "ddpm")]
    options = ["--n=10", "--ddim-steps", "3", f"--plot={tmp_path / 'plot.png'}", "--device=cpu", "--precision=bf16"]
    trilemma.main([*files, *options])
    lines = capsys.readouterr().out.splitlines()
    assert [" ".join(line.split(" | ")[:2]) for line in lines[2:]] == [
        *("| VAE 1", "| DDGAN 4", "| DDPM 4", "| DDIM, 3 steps 3")
    ]
    assert (tmp_path / "plot.png").stat().st_size > 5000
    assert computed == ["bf16"] * 3


def test_trilemma_table_and_plot(tmp_path):
    rows = [
        {"name": name, "evaluations": n, "accuracy": a, "ratio": 2.5, "recall": 0.75, "precision": 0.8}
        | {"seconds": s, "cpu_seconds": s}
        for name, n, a, s in (("VAE", 1, None, 0.001), ("DDGAN", 4, 0.995, 0.0123))
    ]
    assert trilemma.trilemma_table(rows).splitlines()[2:] == [
        "| VAE | 1 | - | 2.50 | 0.75 | 0.80 | 0.001 | 0.001 |",
        "| DDGAN | 4 | 99.5% | 2.50 | 0.75 | 0.80 | 0.012 | 0.012 |",
    ]
    trilemma.plot_trilemma(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_prior_is_decoded_seed_by_seed(tiny_model):
    images = trilemma.sample_prior(tiny_model, 5, batch_size=2, seed=3)
    assert images.shape == (5, 28, 28) and images.dtype == torch.uint8
    latents = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(4))
    expected = quantise(tiny_model.decode(latents[None]))[0]  # the second one's seed
    assert (images[1].int() - expected.int()).abs().max() <= 1


def test_models_generate_the_references_captions(tiny_model):
    captions = load_reference().captions(3, "train")
    prompts, _ = prompts_for(tiny_model, captions)
    images = sample_images(tiny_model, prompts, batch_size=2, seed=1, scale=1, steps=2)
    expected = from_pil(tiny_model.generate([captions[2].text], seed=3, scale=1, steps=2))
    assert images.shape == (3, 28, 28) and (images[2].int() - expected[0].int()).abs().max() <= 1


@pytest.mark.parametrize("name", [str, NUMBER_WORDS.__getitem__])
def test_classes_of_a_folder_are_asked_for_by_name(name):
    captions = load_reference().captions(200, "train")
    names = sorted(map(name, range(10)))
    model = SimpleNamespace(cond_stage_model=SimpleNamespace(n_classes=11, names=names))
    prompts, stated = prompts_for(model, captions)
    assert prompts == [name(caption.digit) for caption in stated] and len({*prompts}) == 10
    model.cond_stage_model.names = ["cat", "dog"]
    refused("the model's classes are cat, dog: none is the digit", prompts_for, model, captions)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("ddim", [1, 1, 1, 1]),
        ("heun", [2, 2, 2, 1]),
        ("dpm2_a", [2, 2, 2, 1]),
        ("dpmpp_sde", [2, 2, 2, 1]),
        ("plms", [2, 1, 1, 1]),
        ("unipc", [1, 1, 1, 1]),
        ("dpmpp_3m_sde", [1, 1, 1, 1]),
    ],
)
def test_how_often_the_network_is_evaluated_is_known_before(name, expected):
    sigmas, calls = sampling_sigmas(make_schedule("scaled_linear"), 4), []

    def denoise(x, sigma):
        calls.append(sigma)
        return Prediction(torch.tanh(x))

    made = []
    for _ in SAMPLERS[name](denoise, torch.ones(2, 3), sigmas, noise=lambda: torch.randn(2, 3)):
        made.append(len(calls) - sum(made))
    assert generators.evaluations_by_step(SAMPLERS[name], sigmas) == made == expected
    # a step far down in pure noise is Euler's: Heun's method has no use for its end
    assert generators.evaluations_by_step(SAMPLERS["heun"], sampling_sigmas(make_schedule("cosine"), 4)) == [1, 2, 2, 1]


def test_evaluations(tiny_model):
    assert generators.evaluations(tiny_model) == 4
    assert generators.evaluations(tiny_model, sampler="ddpm", steps=10) == 10
    calls = []
    hook = tiny_model.model.register_forward_hook(lambda *_: calls.append(1))
    for own in ({"sampler": "heun", "steps": 10}, {"sampler": "dpm2", "steps": 5, "spacing": "leading"}):
        tiny_model.generate(["a"], scale=1, **own)
        assert generators.evaluations(tiny_model, **own) == len(calls) > 1.5 * own["steps"]  # most steps take two
        calls.clear()
    hook.remove()


def test_a_row_of_real_images_is_near_the_floor():
    reference, networks = load_reference(), Measuring.load()
    labels = reference.image_labels[:300]
    row = generators.measure("real", 0, lambda: reference.images[:300], reference, networks, labels)
    assert (row["name"], row["evaluations"], row["n"]) == ("real", 0, 300)
    assert 0.5 < row["ratio"] < 2 and row["recall"] > 0.7  # the first ones are cleaner than the rest
    assert 0 <= row["cpu_seconds"] < 1 and row["accuracy"] > 0.98
    noise = generators.measure("noise", 0, lambda: torch.randint(0, 256, (300, 28, 28)).byte(), reference, networks)
    assert noise["ratio"] > 20 and noise["recall"] < 0.05 and noise["accuracy"] is None


def test_labels_of_near_points_do_not_meet():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    points = [(0.5 + 0.01 * i, 0.5) for i in range(8)]
    common.add_labels(axes, [common.Label(f"label {i}", point, 5) for i, point in enumerate(points)], ((0, 1), (1, 0)))
    common.add_labels(axes, [common.Label("at the edge", (1.0, 0.3))], ((1, 0), (0, -1), (-1, 0)))
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 9 and all(axes.bbox.padded(2).count_contains(box.corners()) == 4 for box in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    discs = [axes.transData.transform(point) for point in points]
    assert not any(box.contains(*disc) for box in boxes for disc in discs)


def test_data_rates(capsys, monkeypatch):
    monkeypatch.setattr(data, "KINDS", {"small": ((16, 16), "png", 8)})
    monkeypatch.setattr(data, "ENCODERS", {"folder/autoencoder": 2})
    monkeypatch.setattr(data, "LARGE", ((64, 48), 8))
    data.main(["--seconds", "0.01", "--workers", "0", "--rounds", "1"])
    printed = capsys.readouterr().out.splitlines()
    waits = [line.split("|")[1:-1] for line in printed if line.startswith(("| 0.7 |", "| 2 |"))]
    assert len(waits) == 2 and all(0 < int(cell.strip(" %")) < 100 for _, *cells in waits for cell in cells)
    lines = [line for line in printed if "small" in line or "folder" in line]
    rows = [line.replace(",", "").replace("%", "").split("|")[2:-1] for line in lines]
    assert [len(row) for row in rows] == [4, 4] and all(float(cell) > 0 for row in rows for cell in row)


def test_diffusers_loop_has_the_loss_of_ours():
    diffusers = pytest.importorskip("diffusers")
    own = training.NETWORKS["tiny"].unet
    model = LatentDiffusion(
        {"target": "ldm.models.unet.UNetModel", "params": own},
        TINY_1["params"]["first_stage_config"],
        None,
        schedule=training.SCHEDULE,
    )
    unet = model.model.diffusion_model
    for p in unet.parameters():  # the last layer is zero at first
        torch.nn.init.normal_(p, std=0.05)
    theirs = diffusers.UNet2DConditionModel(**write_unet(own, 8))
    theirs.load_state_dict(unet_to_diffusers(unet.state_dict(), unet_levels(own)))
    (z, noise), text, t = torch.randn(2, 2, 4, 8, 8), torch.randn(2, 24, 128), torch.tensor([3, 700])
    expected = model.loss(z, {"c_crossattn": text}, t, noise).mean()
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(training.their_loss(theirs, scheduler, z, text, t, noise), expected)


def test_training_loops_take_turns(tmp_path):
    pytest.importorskip("diffusers")
    others = {"bare": training.bare_steps("tiny", "fp32")}
    others["diffusers"] = training.diffusers_steps("tiny", "fp32", str(tmp_path))
    found = training.measure(training.config_of("tiny", "fp32", str(tmp_path)), others, 4)
    assert list(found) == ["ours", "bare", "diffusers"]
    assert all(len(seconds) == 4 and min(seconds) > 0.001 for seconds in found.values())
    assert not list(tmp_path.rglob("model.safetensors"))  # it ends before it writes a result


@pytest.mark.parametrize("name", ["10M", "100M"])
def test_networks_have_the_size_of_their_name(name):
    with torch.device("meta"):
        unet = UNetModel(**training.NETWORKS[name].unet)
    assert sum(p.numel() for p in unet.parameters()) == pytest.approx(float(name[:-1]) * 1e6, rel=0.06)


@pytest.mark.parametrize(
    "case",
    [
        speed_networks.Case("unet", 2, 8, "digits"),
        speed_networks.Case("unet", 2, 8, "sd"),
        speed_networks.Case("decoder", 1, 8, "sd"),
    ],
    ids=str,
)
def test_forms_whose_speed_is_compared_compute_the_same(case, monkeypatch):
    monkeypatch.setattr(speed_networks, "from_compvis", lambda yaml: TINY_1)
    monkeypatch.setattr("ldm.inference.optimize.PACKED_FROM", 300)
    speed_networks.model_on_meta.cache_clear()
    found = speed_networks.measure(case, "fp32", rounds=2)
    speed_networks.model_on_meta.cache_clear()
    assert list(found) == ["plain", *(["optimized"] if case.part == "unet" else []), "diffusers"]
    for form in found.values():  # of float32, in another order of sums
        assert len(form.seconds) == 2 and min(form.seconds) > 0 and form.error < 1e-5 and form.flops > 1e6


@pytest.mark.full
def test_the_text_encoder_of_stable_diffusion_against_transformers():
    pytest.importorskip("diffusers")
    plain, theirs = speed_networks.measure(speed_networks.Case("text", 1, 77, "sd"), "fp32", rounds=1).values()
    assert theirs.error < 1e-5 and plain.flops == pytest.approx(2 * 77 * 12 * 12 * 768**2, rel=0.05)


def test_limits_of_the_machine():
    found = speed_networks.limits("fp32", rounds=1)
    assert list(found) == ["matrix", "matrix, packed", "convolution"]
    rates = [own.flops / own.seconds[0] for own in found.values()]
    assert min(rates) > 0.1 * max(rates) > 1e8  # the shapes and the FLOPs that are counted for them belong together


def test_processes_take_turns(tmp_path):
    forms = {"plain": ["-c", "open('{out}/a', 'a').write('x')"], "other": ["-c", "open('{out}/a', 'a').write('y')"]}
    found = speed_processes.take_turns(forms, 2, out=tmp_path)
    assert (tmp_path / "a").read_text() == "xyxy" and all(len(own.seconds) == 2 for own in found.values())
    refused(
        "(?s)import no_such_module ended with 1: .*No module",
        speed_processes.cpu_seconds,
        "-c",
        "import no_such_module",
    )


def test_table_and_plot_of_speeds(tmp_path):
    row = speed.Row("unet", "fp32", "plain", [0.2, 0.1, 1.0, 0.1], 1e-6, 3e9)
    rows = [
        row,
        speed.Row("unet", "fp32", "diffusers", [0.3]),
        speed.Row("load", "fp32", "plain", [2.0], memory=(1, 0.5)),
    ]
    assert speed.table(rows, {"fp32": 1e11}) == [
        ["unet", "fp32", "plain", "150.00", "67%", "2.00", "20%", "1e-06", "", ""],
        ["unet", "fp32", "diffusers", "300.00", "0%", "1.00", "", "", "", ""],
        ["load", "fp32", "plain", "2000.00", "0%", "1.00", "", "", "1.00", "0.50"],
    ]
    grown = [
        speed.Row(f"{name}: {n}", "fp32", "plain", [n]) for name in [*speed.CURVES, speed.BY_STEPS] for n in (1, 2)
    ]
    speed.plot_speeds(rows + grown, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
