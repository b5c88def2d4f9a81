"""The DreamBooth stage: its loss written out by hand, what trains, what is cached, exact resume, and what comes out."""

import copy
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import refused, save_noise
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F
from torch.utils.data import default_collate as collate

import ldm
from ldm.data.buckets import bucket_shapes
from ldm.data.dreambooth import DreamBooth
from ldm.finetune import dreambooth
from ldm.finetune.dreambooth import DreamBoothStage, embedding_repulsion
from ldm.finetune.flags import move_in
from ldm.finetune.lora_files import apply_lora
from ldm.finetune.parts import LAYERS
from ldm.labels import GAP, LINE
from ldm.latent_diffusion import LatentDiffusion
from ldm.training import objective, run_folder
from ldm.training.ema import EMA
from ldm.training.loop import train
from ldm.training.share import BatchShare
from ldm.util import call_with

CPU = torch.device("cpu")
PROMPT = {"instance_prompt": "a sks five"}
MIN_SNR = {"name": "min_snr", "gamma": 5.0}


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> dict:
    folders = save_noise(tmp_path_factory.mktemp("images"))
    return folders | {"class_images": {f"{i}.png": "a five" for i in range(5)}} | PROMPT


def by_name(subject: dict) -> dict:
    """The same subject as arguments of `SubjectImages`."""
    folders = {"instance_data_dir": subject["instance_dir"], "class_data_dir": subject["class_dir"]}
    return folders | PROMPT | {"class_prompt": "a five"}


@pytest.fixture(scope="module")
def checkpoints(tiny_model, tmp_path_factory) -> dict[str, str]:
    """The tiny model as eps, x0 and v, in half precision."""
    paths = {}
    for prediction in ("eps", "x0", "v"):
        model = LatentDiffusion(**{**tiny_model.config, "prediction": prediction})
        model.load_state_dict(tiny_model.state_dict())
        paths[prediction] = str(tmp_path_factory.mktemp("model") / f"{prediction}.safetensors")
        ldm.save(model, paths[prediction], dtype=torch.float16)
    return paths


@pytest.fixture(scope="module")
def in_buckets(subject, tmp_path_factory) -> dict:
    """Arguments of `DreamBooth` for three images in buckets: two upright ones and a square."""
    folder, generator = tmp_path_factory.mktemp("shapes"), torch.Generator().manual_seed(1)
    for i, (height, width) in enumerate([(40, 24), (32, 32), (80, 50)]):
        noise = torch.randint(0, 255, (height, width), generator=generator, dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    row = subject | {"instance_dir": str(folder)}
    return {
        "subjects": [row],
        "size": 32,
        "channels": 1,
        "min_samples": 2,
        "buckets": [list(shape) for shape in bucket_shapes(32, 8)],
    }


def make(checkpoints, subject, prediction="v", prior=True, data=None, **settings):
    """A stage, its data, and two samples of it: a batch, where they are of one shape."""
    prompts = {**PROMPT, "class_prompt": "a five"}
    stage = DreamBoothStage(checkpoints[prediction], **{"resolution": 32, "learning_rate": 1e-3, **prompts, **settings})
    row = subject if prior else {k: v for k, v in subject.items() if not k.startswith("class")}
    data = stage.prepare(DreamBooth(**(data or {"subjects": [row], "size": 32, "channels": 1})))
    samples = [data[1], data[2]]
    return stage, data, collate(samples) if data.groups is None else samples


def loss_by_hand(stage, batch, parts, gamma):
    """Terms of (Ruiz et al. 2022, eq. 2), drawing the random numbers again in the same order; t, ab for weights."""
    model, terms = stage.latent_diffusion, []
    torch.manual_seed(5)
    z = [batch[f"{p}mean"] + batch[f"{p}std"] * torch.randn_like(batch[f"{p}mean"]) for p in parts]
    samples = []
    for part in [torch.cat(z)] if z[0].shape == z[-1].shape else z:
        t, noise = torch.randint(0, 1000, (len(part),)), torch.randn_like(part)
        noise += 0.2 * torch.randn_like(part[:, :, :1, :1])
        samples += zip(model.scale_factor * part, t, noise, strict=True)
    captions = [caption for p in parts for caption in batch[f"{p}caption"]]
    for caption, (x, t, noise) in zip(captions, samples, strict=True):
        cond = model.cond_stage_model([caption])
        ab = model.schedule.alphas_cumprod[t].float()
        x_t = ab.sqrt() * x + (1 - ab).sqrt() * noise
        out = model.model.diffusion_model(x_t[None], t[None], cond["c_crossattn"], cond["c_adm"])[0]
        v = ab.sqrt() * noise - (1 - ab).sqrt() * x
        wanted = {"eps": noise, "x0": x, "v": v}[model.prediction]
        snr = ab / (1 - ab)
        weight = {"eps": min(snr, gamma) / snr, "x0": min(snr, gamma), "v": min(snr, gamma) / (snr + 1)}
        terms.append(F.mse_loss(out, wanted) * weight[model.prediction])
    return [sum(terms[:2]) / 2, sum(terms[2:]) / 2]


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "v in buckets"])
def test_the_loss_by_hand(checkpoints, subject, in_buckets, prediction):
    """Both terms are weighted sample by sample, which diffusers' script gets wrong; instances and class images may
    be of different shapes."""
    prediction, *buckets = prediction.split(" in ")
    settings = {"prior_weight": 0.3, "weight": MIN_SNR, "noise": {"offset": 0.2}}
    if buckets:
        stage, data, _ = make(checkpoints, in_buckets["subjects"][0], prediction, data=in_buckets, **settings)
        batch = collate([data[0], data[3]])
        assert batch["mean"].shape == (2, 4, 10, 6) and batch["class_mean"].shape == (2, 4, 8, 8)
    else:
        stage, _, batch = make(checkpoints, subject, prediction, **settings)
    torch.manual_seed(5)
    loss, values = stage.loss(batch)
    instance, prior = loss_by_hand(stage, batch, ["", "class_"], 5.0)
    torch.testing.assert_close(values["instance_loss"], instance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["class_loss"], prior, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, instance + 0.3 * prior, rtol=1e-4, atol=1e-6)
    assert abs(instance - prior) > 1e-3  # the two terms differ


def test_without_class_images_there_is_one_term(checkpoints, subject):
    stage, _, batch = make(checkpoints, subject, prior=False, noise={"offset": 0.2})
    torch.manual_seed(5)
    loss, values = stage.loss(batch)
    assert values.keys() == {"loss", "instance_loss"} and batch.keys() == {"mean", "std", "caption"}
    torch.testing.assert_close(loss, values["instance_loss"], rtol=0, atol=0)


@pytest.mark.parametrize("train_text", ["none", "all"])
def test_caches_change_nothing(checkpoints, subject, train_text):
    losses = []
    for cache in (True, False):
        stage, data, batch = make(checkpoints, subject, cache=cache, text_learning_rate=1e-4, train_text=train_text)
        assert ("mean" in batch) == cache and bool(stage.texts) == (cache and train_text == "none")
        torch.manual_seed(3)
        loss, _ = stage.loss(batch)
        loss.backward()
        losses.append((loss.detach(), stage.model.diffusion_model.out[2].weight.grad))
    for cached, fresh in zip(*losses, strict=True):
        torch.testing.assert_close(cached, fresh, rtol=1e-4, atol=1e-6)
    assert all(p.grad is None for p in stage.first_stage.parameters())
    assert (train_text == "all") == any(
        p.grad is not None for p in stage.latent_diffusion.cond_stage_model.parameters()
    )


def test_random_crops_are_not_cached(checkpoints, subject):
    stage = DreamBoothStage(checkpoints["v"], resolution=16, learning_rate=1e-3)
    data = stage.prepare(DreamBooth([subject], 16, channels=1, crop="random"))
    assert "image" in data[0] and "mean" not in data[0]


@pytest.mark.parametrize("layers", [*LAYERS, r"\bout\.2\."])
def test_only_the_chosen_layers_train(checkpoints, subject, layers):
    stage, _, batch = make(checkpoints, subject, layers=layers)
    before = copy.deepcopy(stage.latent_diffusion.state_dict())
    (optimizer,) = stage.optimizers()
    stage.loss(batch)[0].backward()
    optimizer.step()
    changed = {n for n, t in stage.latent_diffusion.state_dict().items() if not torch.equal(t, before[n])}
    fitting = {
        "all": lambda n: n.startswith("model."),
        "attention": lambda n: ".attn1." in n or ".attn2." in n,
        "cross-attention": lambda n: ".attn2." in n,
        "key-value": lambda n: ".attn2.to_k." in n or ".attn2.to_v." in n,
    }.get(layers, lambda n: n.startswith("model.diffusion_model.out.2."))
    assert changed == {n for n in before if fitting(n)} and changed


def test_the_text_encoder_has_its_own_learning_rate(checkpoints, subject):
    stage, _, batch = make(checkpoints, subject, text_learning_rate=1e-5, train_text="all")
    (optimizer,) = stage.optimizers()
    unet, text = optimizer.param_groups
    assert (unet["lr"], text["lr"]) == (1e-3, 1e-5)
    assert len(text["params"]) == len(list(stage.latent_diffusion.cond_stage_model.parameters()))
    before = [p.detach().clone() for p in text["params"]]
    stage.loss(batch)[0].backward()
    optimizer.step()
    moved = [(p - q).abs().max().item() for p, q in zip(text["params"], before, strict=True)]
    assert 0.5e-5 < max(moved) < 2e-5  # Adam's first step is the learning rate


def test_words_alone_can_be_trained(checkpoints, subject):
    """Rows of the word's tokens move, and nothing else of the text encoder: other prompts say the same to the bit."""
    stage, _, batch = make(checkpoints, subject, text_learning_rate=1e-2, train_text="words", weight_decay=0.1)
    encoder = stage.latent_diffusion.cond_stage_model
    before = copy.deepcopy(encoder.state_dict())
    other = encoder(["a five"])["c_crossattn"].detach()
    (optimizer,) = stage.optimizers()
    for _ in range(3):
        optimizer.zero_grad()
        stage.loss(batch)[0].backward()
        optimizer.step()
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    (name,) = changed
    rows = (encoder.state_dict()[name] != before[name]).any(1).nonzero()[:, 0].tolist()
    assert name == "model.token_embedding.weight" and rows == sorted(set(encoder.tokenizer.encode("sks")))
    assert torch.equal(encoder(["a five"])["c_crossattn"], other)
    with pytest.raises(ValueError, match="there are no words to train"):
        make(checkpoints, subject, text_learning_rate=1e-2, train_text="words", class_prompt=None)


def test_checkpointing_changes_memory_not_gradients(checkpoints, subject):
    grads = []
    for flag in (False, True):
        stage, _, batch = make(checkpoints, subject)
        if flag:
            stage.checkpoint_blocks()
        assert any(getattr(m, "use_checkpoint", False) for m in stage.model.modules()) == flag
        torch.manual_seed(3)
        stage.loss(batch)[0].backward()
        grads.append([p.grad for p in stage.model.parameters()])
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-7)


def config(checkpoints, subject, folder, steps=5, **settings):
    stage = {"ckpt": checkpoints["v"], "resolution": 32, "learning_rate": 1e-3, "previews": ["a sks five", "a five"]}
    loop = {"steps": steps, "batch_size": 2, "ema": 0.0, "report_to": "none", "preview_every": 3, "precision": "fp32"}
    stage |= {"preview_columns": 2, "sheet": str(folder / "contact_sheet.png"), **settings}
    return {
        "name": folder.name,
        "outdir": str(folder.parent),
        "seed": 1,
        "stage": {"target": "ldm.finetune.dreambooth.DreamBoothStage", "params": stage},
        "data": {"target": "ldm.inference.class_images.SubjectImages", "params": by_name(subject)},
        "loop": loop,
    }


def test_a_run_gives_one_file_no_larger_than_the_model(checkpoints, undisturbed):
    result, folder = undisturbed, undisturbed.parent
    model, before = ldm.load(result, device="cpu"), ldm.load(checkpoints["v"], device="cpu")
    base = open(checkpoints["v"], "rb").read()
    assert result.name == "model.safetensors" and result.stat().st_size <= len(base)
    with safe_open(result, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    after, was = model.state_dict(), before.state_dict()
    assert all(torch.equal(after[n], was[n]) for n in was if not n.startswith("model."))
    assert not torch.equal(after["model.diffusion_model.out.2.weight"], was["model.diffusion_model.out.2.weight"])
    assert len(model.generate(["a sks five"], steps=2)) == 1
    assert (folder / "previews" / "000003.png").exists()
    # 3 images of the subject, two prompts before and after
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.height == 5 * (LINE + GAP + 64) + GAP


@pytest.mark.parametrize("kind", ["plain", "buckets", "lora"])
def test_resuming_is_exact_mid_epoch_and_from_another_folder(checkpoints, subject, in_buckets, tmp_path, kind):
    """5 pairs in batches of 2 make epochs of 2 steps; step 3 is in the middle of one, as it is in buckets. A state of
    adapters holds nothing of the model."""

    def settings(name):
        lora = {"rank": 2, "targets": ["attention", "text"]} if kind == "lora" else None
        text = {"train_text": "all", "text_learning_rate": 1e-4}
        images = in_buckets["subjects"][0] if kind == "buckets" else subject
        made = config(checkpoints, images, tmp_path / name, lora=lora, **text)
        made["loop"] |= {"save_every": 3, "steps": 5}
        made["data"]["params"] |= {"buckets": kind == "buckets", "min_samples": 2}
        return made

    whole, part = train(settings("whole")), settings("part")
    stopped = DreamBoothStage.loss
    calls = []

    def failing(self, batch):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return stopped(self, batch)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DreamBoothStage, "loss", failing)
        train(part)
    state = torch.load(tmp_path / "part" / "resume.pt", weights_only=True)
    assert state["step"] == 3
    assert {name.split(".")[0] for name in state["networks"]} == ({"adapters"} if kind == "lora" else {"model", "text"})
    shutil.move(tmp_path / "part", tmp_path / "elsewhere")
    move_in(str(tmp_path / "elsewhere"), tmp_path / "third")
    resumed = train(settings("third"), resume=True)
    assert whole.read_bytes() == resumed.read_bytes()
    refused("holds no run to resume", move_in, str(tmp_path / "part"), tmp_path / "fourth", error=FileNotFoundError)
    refused("already holds a run", move_in, str(tmp_path / "elsewhere"), tmp_path / "third")


@pytest.fixture(scope="module")
def undisturbed(checkpoints, subject, tmp_path_factory) -> Path:
    """The result of a run."""
    return train(config(checkpoints, subject, tmp_path_factory.mktemp("undisturbed") / "run"))


@pytest.mark.parametrize("full_at", ["state", "sheet", "result"])
def test_a_full_disk_loses_nothing(checkpoints, subject, undisturbed, tmp_path, full_at):
    """The second state, or the result, does not fit: the last state is whole, and the run goes on from it."""
    settings = config(checkpoints, subject, tmp_path / "part")
    settings["loop"] |= {"save_every": 2 if full_at == "state" else 500}
    writers = {"state": (torch, "save", 2), "result": (run_folder, "save_file", 1)}
    writers |= {"sheet": (dreambooth, "save_contact_sheet", 1)}
    module, name, number = writers[full_at]
    write, calls = getattr(module, name), []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) < number:
            return write(*args, **kwargs)
        try:
            raise OSError(28, "No space left")
        except OSError:
            if full_at == "state":
                raise RuntimeError("PytorchStreamWriter failed")  # noqa: B904 torch does not chain it either
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, full)
        refused("cannot write .*resume.pt" if full_at == "state" else "No space left", train, settings, error=OSError)
    kept = torch.load(tmp_path / "part" / "resume.pt", weights_only=True)
    assert kept["step"] == (2 if full_at == "state" else 5)
    assert not [p for p in (tmp_path / "part").iterdir() if p.suffix == ".tmp" or p.name == "model.safetensors"]
    assert train(settings, resume=True).read_bytes() == undisturbed.read_bytes()


@pytest.mark.parametrize("train_text", [False, True])
def test_lora_trains_adapters_alone(checkpoints, subject, tmp_path, train_text):
    """The original model with the adapters' file computes what the merged model does."""
    lora = {"rank": 2, "targets": ["attention", "text"] if train_text else ["attention"]}
    settings = {"lora": lora, "lora_file": str(tmp_path / "run" / "lora.safetensors")}
    settings |= {"train_text": "all" if train_text else "none", "text_learning_rate": 1e-2}
    result = train(config(checkpoints, subject, tmp_path / "run", **settings))
    base, merged = ldm.load(checkpoints["v"], device="cpu"), ldm.load(result, device="cpu")
    before = base.state_dict()
    changed = {n for n, t in merged.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all(".attn" in n and not n.startswith("first") for n in changed)
    assert train_text == any(n.startswith("cond_stage_model") for n in changed)
    x, t, prompts = torch.randn(1, 4, 8, 8), torch.tensor([500]), ["a sks five"]
    plain = base.apply_model(x, t, base.condition(prompts))
    apply_lora(base, tmp_path / "run" / "lora.safetensors")
    adapted = base.apply_model(x, t, base.condition(prompts))
    wanted = merged.apply_model(x, t, merged.condition(prompts))
    # the merged weights and the adapters are each rounded to half precision
    error, change = (adapted - wanted).abs().max(), (adapted - plain).abs().max()
    assert error < 0.1 * change


def test_without_an_average_no_copy_of_the_weights_is_kept():
    module = torch.nn.Linear(2, 2)
    average, before = EMA(module, 0.0), module.weight.detach().clone()
    average.update()
    with average.applied():
        assert torch.equal(module.weight, before)
    assert average.shadow == {} and average.state_dict() == {"updates": 1, "shadow": {}}


def test_adafactor_needs_a_learning_rate_of_its_own(checkpoints, subject):
    rates = {"weights": 6e-4, "lora": 7e-3}
    with pytest.raises(ValueError, match="adafactor's learning rate is relative to the weights: give learning_rate"):
        make(checkpoints, subject, learning_rate=rates, optimizer="adafactor")
    assert make(checkpoints, subject, learning_rate=1e-3, optimizer="adafactor")[0].learning_rate == 1e-3


def test_words_are_kept_apart_from_the_class(checkpoints, subject):
    """The repulsion in closed form; that of a stage by hand; and with nothing else to learn, it falls to zero."""
    texts, others = {"a": torch.eye(2)[[0, 1, 0]]}, {"a": torch.tensor([[0.8, 0.6], [0.6, 0.8]])}
    assert embedding_repulsion(texts, others, 3).item() == pytest.approx(0.3)
    assert embedding_repulsion(texts | {"b": texts["a"]}, others | {"b": 0.1 * others["a"]}, 2).item() == pytest.approx(
        0.3
    )
    stage, _, batch = make(checkpoints, subject, text_learning_rate=1e-2, train_text="words", weight_decay=0.0)
    encoder = stage.latent_diffusion.cond_stage_model
    own, other, null = (encoder([text]) for text in ("a sks five", "a five", ""))
    cosines = [F.cosine_similarity(*((c[k] - null[k]).flatten(1) for c in (own, other))).item() for k in null]
    _, values = stage.loss(batch)
    assert values["embedding_repulsion"].item() == pytest.approx(sum(max(0, c - 0.5) for c in cosines), abs=1e-5)
    assert values["embedding_repulsion"] > 0.1
    (optimizer,) = stage.optimizers()
    for _ in range(40):
        optimizer.zero_grad()
        near = stage.loss(batch)[1]["embedding_repulsion"]
        near.backward()
        optimizer.step()
    assert near < 0.02
    assert "embedding_repulsion" not in make(checkpoints, subject)[0].loss(batch)[1]


def test_eight_bit_adam_where_it_is_installed(checkpoints, subject, tmp_path, monkeypatch):
    """bitsandbytes' class gets the groups and settings, and a run goes by it. (Here torch's AdamW stands in for it.)"""
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, params, **settings):
            made.append(([group["lr"] for group in params], settings))
            super().__init__(params, **settings)

    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", SimpleNamespace(AdamW8bit=AdamW8bit))
    settings = {"optimizer": "adamw8bit", "betas": (0.8, 0.9), "weight_decay": 0.1, "text_learning_rate": 1e-4}
    settings["train_text"] = "all"
    assert train(config(checkpoints, subject, tmp_path / "run", 2, **settings)).exists()
    assert made == [([1e-3, 1e-4], {"betas": (0.8, 0.9), "weight_decay": 0.1})] * 4  # three are only tried


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "attn7"}, "layers 'attn7' match no weight"),
        ({"layers": "("}, "use all, attention"),
        ({"prior_weight": -1.0}, "prior_weight -1.0 must be a number of at least 0"),
        ({"weight": {"name": "min_snr", "gamma": 0.0}}, "gamma of min-SNR"),
        ({"noise": {"offset": -0.1}}, "offset -0.1 must not be below 0"),
        ({"train_text": "word"}, "train_text 'word' is unknown: use none, words, all or auto"),
        ({"train_text": "all", "text_learning_rate": {"words": 1e-3}}, "a mapping with one for 'all'"),
        ({"lora": {"rnk": 4}}, r"^lora: .*'rnk'; it takes \['rank', 'alpha', 'targets', 'seed'\]$"),
    ],
)
def test_mistakes(checkpoints, settings, message):
    given = {"ckpt": str(checkpoints["v"]), "resolution": 32, "learning_rate": 1e-3, **settings}
    refused(message, call_with, "stage", DreamBoothStage, given)


def test_micro_batches_averages_and_bf16(checkpoints, subject, tmp_path, monkeypatch):
    """Two micro-batches give one batch's gradient; EMA's weights in closed form; bf16 rounds what fp32 computes.

    Noise is that of the image, so that it does not depend on the batch.
    """
    monkeypatch.setattr(objective, "training_timesteps", lambda batch, T, **_: torch.full((batch,), T // 2))
    monkeypatch.setattr(objective, "training_noise", lambda x0, **_: x0.flip(-1))
    monkeypatch.setattr(BatchShare, "randn", lambda self, like: torch.zeros_like(like))
    monkeypatch.setattr(DreamBoothStage, "preview", lambda self: [Image.new("L", (8, 8))])
    monkeypatch.setattr(DreamBoothStage, "preview_labels", lambda self: [])

    def run(name, **loop):
        made = config(checkpoints, subject, tmp_path / name, 1, sheet=None)
        made["loop"] |= {"batch_size": 4, **loop}
        return weights(train(made)), json.loads((tmp_path / name / "metrics.jsonl").read_text())

    def weights(path):
        state = ldm.load(path, device="cpu").model.state_dict()
        return torch.cat([tensor.flatten().float() for tensor in state.values()])

    (after, whole), (_, micro) = run("whole"), run("micro", batch_size=2, accumulate=2)
    for key in ("loss", "grad_norm_0"):
        assert micro[key] == pytest.approx(whole[key], rel=1e-4), key
    average, _ = run("average", ema=0.9)
    wanted = (2 * weights(checkpoints["v"]) + 9 * after) / 11  # its decay is (1 + n) / (10 + n) at first
    torch.testing.assert_close(average, wanted, rtol=1e-3, atol=2e-5)  # half precision
    assert (average - after).abs().max() > 1e-4
    _, rounded = run("rounded", precision="bf16")
    assert 0 < abs(rounded["loss"] / whole["loss"] - 1) < 0.02
