"""Optimizers by name and by class: what they keep, what is refused, and that a run resumes exactly with each."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from conftest import refused
from test_loop import AUTOENCODER, assert_same, config, interrupt
from tiny_stages import config_of

from ldm.training import loop
from ldm.training.fsdp import check_fsdp
from ldm.training.loop import Interrupted, train
from ldm.training.muon import orthogonal
from ldm.training.optimizers import average_of, clip_gradients, make_optimizer
from ldm.training.processes import make_accelerator


def weights() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(4, 3))


def test_what_the_named_ones_keep():
    for name, elements in (("adamw", 2 * 12), ("adafactor", 4 + 3)):
        weight = weights()
        optimizer = make_optimizer([weight], 1e-3, name)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        state = [v for k, v in optimizer.state[weight].items() if k != "step"]
        assert sum(v.numel() for v in state if torch.is_tensor(v)) == elements, name


def test_a_class_takes_the_stages_settings_and_its_own():
    target = {"target": "torch.optim.RAdam", "params": {"eps": 1e-5, "weight_decay": 0.5}}
    (group,) = make_optimizer([weights(), weights().requires_grad_(False)], 0.1, target, [0.5, 0.6], 0.3).param_groups
    assert len(group["params"]) == 1
    assert [group[k] for k in ("lr", "betas", "weight_decay", "eps")] == [0.1, (0.5, 0.6), 0.5, 1e-5]
    (group,) = make_optimizer(
        [{"params": [weights()], "lr": 0.2}], optimizer={"target": "torch.optim.SGD"}
    ).param_groups
    assert group["lr"] == 0.2 and group["weight_decay"] == 0.01


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("sgd", "optimizer 'sgd' is unknown: use adamw, adamw8bit, adafactor, or a target with params"),
        ({"target": "torch.optim.LBFGS"}, "'torch.optim.LBFGS' is not an allowed class"),
        ({"target": "torch.nn.Linear"}, "'torch.nn.Linear' is not a class of optimizers"),
        ({"target": "torch.optim.SGD", "parms": {}}, "is unknown"),
        ({"target": "torch.optim.SGD", "params": {"lr": 1.0}}, "without lr and params: the stage's learning_rate"),
        ({"target": "torch.optim.SGD", "params": [1]}, "must be a mapping"),
        ({"target": "torch.optim.SGD", "params": {"momentun": 1}}, "^optimizer torch.optim.SGD: .*momentun.*momentum"),
        (
            {"target": "torch.optim.SGD", "params": {"momentum": -1.0}},
            "^optimizer .*: .*Invalid momentum|-1",
        ),
    ],
)
def test_mistakes_are_named(optimizer, message):
    refused(message, make_optimizer, [weights()], 0.1, optimizer)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ({"target": "torch.optim.Adam", "params": {"capturable": True}}, "Adam cannot train here: .*supported devices"),
        ({"target": "torch.optim.SGD", "params": {"differentiable": True}}, "SGD cannot train here: .*leaf"),
        ({"target": "torch.optim.LBFGS"}, "LBFGS cannot train here: .*'closure'"),
        ({"target": "torch.optim.SparseAdam"}, "SparseAdam cannot train here: .*dense gradients"),
        ({"target": "torch.optim.Muon"}, "Muon only supports 2D parameters"),
    ],
)
def test_what_fails_in_a_step_is_named_before_the_first(optimizer, message, monkeypatch, tmp_path):
    """Also by the stages that no rehearsal tries; here an autoencoder's, which has vectors and kernels."""
    if not hasattr(torch.optim, optimizer["target"].rpartition(".")[2]):
        pytest.skip(f"this torch has no {optimizer['target']}")
    monkeypatch.setenv("LDM_ALLOW", "torch")
    run = config(tmp_path)
    run["stage"] = {**AUTOENCODER, "params": {**AUTOENCODER["params"], "optimizer": optimizer}}
    refused(message, train, run, device="cpu")
    assert not (tmp_path / "autoencoder" / "config.yaml").exists()


@pytest.mark.skipif(find_spec("prodigyopt") is not None, reason="prodigyopt is installed")
def test_a_package_that_is_missing():
    refused("'prodigyopt.Prodigy' does not exist: No module named 'prodigyopt'", make_optimizer, [weights()], 1.0,
            {"target": "prodigyopt.Prodigy"})  # fmt: skip


@pytest.mark.parametrize("size", [0.1, 0.9999995, 1.0, 30.0, float("nan")])
def test_gradients_are_clipped_as_by_torch(size, tmp_path):
    """To the bit, within torch's margin of 1e-6 too; the ones without a gradient are left out."""
    accelerator = make_accelerator("fp32", 1, torch.device("cpu"), "none", tmp_path)
    found = []
    for clip in (torch.nn.utils.clip_grad_norm_, lambda *a: clip_gradients(accelerator, *a)):
        parameters = [weights(), weights(), weights()]
        gradients = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
        for weight, gradient in zip(parameters, gradients / gradients.norm() * size, strict=False):
            weight.grad = gradient.clone()
        found.append(torch.stack([clip(parameters, 1.0), *[p.grad.norm() for p in parameters[:2]]]))
        found.append(torch.stack([p.grad for p in parameters[:2]]))
    for theirs, ours in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


CLASSES = {
    "torch.optim.SGD": {"momentum": 0.9},
    "torch.optim.RMSprop": {},
    "torch.optim.Adafactor": {},
    "schedulefree.AdamWScheduleFree": {"warmup_steps": 2},
    "schedulefree.RAdamScheduleFree": {},
    "prodigyopt.Prodigy": {},
    "ldm.training.muon.Muon": {"momentum": 0.9},
}


@pytest.mark.parametrize("target", CLASSES)
def test_a_run_resumes_exactly(target, tmp_path, monkeypatch):
    """Stopped at step 3 of 6, after a preview, with two optimizers where the stage has two."""
    if find_spec(target.partition(".")[0]) is None:
        pytest.skip(f"{target.partition('.')[0]} is not installed")
    own = "schedulefree" in target
    paths = []
    for name in ("alone", "parts"):
        run = config(tmp_path / name, tensorboard=False, ema=0.0 if own else 0.9)
        run["stage"] = run["stage"] | {
            "params": run["stage"]["params"] | {"optimizer": {"target": target, "params": CLASSES[target]}}
        }
        if name == "parts":
            with monkeypatch.context() as patch, pytest.raises(Interrupted):
                patch.setattr(loop, "preview", interrupt)
                train(run, device="cpu")
        paths.append(train(run, resume=name == "parts", device="cpu"))
    assert_same(*paths)


@pytest.mark.parametrize("stage", ["clip", "pixel", "classifier", "noisy_classifier", "ddgan"])
def test_every_stage_takes_one(stage, tmp_path):
    run = config_of(stage) | {"outdir": str(tmp_path)}
    run["stage"]["params"]["optimizer"] = {"target": "torch.optim.Adagrd"}
    refused("torch.optim.Adagrd", train, run, device="cpu")


@pytest.mark.skipif(find_spec("schedulefree") is None, reason="schedulefree is not installed")
def test_schedule_free_shows_its_average_and_trains_on(tmp_path):
    weight = weights()
    optimizer = make_optimizer([weight], 0.1, {"target": "schedulefree.SGDScheduleFree"}, weight_decay=0.0)
    average, z, x = average_of(torch.nn.ParameterList([weight]), [optimizer], 0.0, "auto"), 1.0, 1.0
    for k in range(1, 4):  # Defazio et al. 2024, eq. 3 to 5, with the gradient y of y^2 / 2 and beta 0.9
        y = 0.1 * z + 0.9 * x
        torch.testing.assert_close(weight.detach(), torch.full((4, 3), y))
        weight.grad = weight.detach().clone()
        optimizer.step()
        z -= 0.1 * y
        x += (z - x) / k
        trained = weight.detach().clone()
        with average.applied():
            torch.testing.assert_close(weight.detach(), torch.full((4, 3), x))
        assert torch.equal(weight, trained)
    refused("SGDScheduleFree averages the weights itself: set loop.ema=0", average_of, weight, [optimizer], 0.9, "auto")


MUON = {"target": "ldm.training.muon.Muon"}


@pytest.mark.parametrize(("in_bf16", "error"), [(False, 1e-4), (True, 0.05)])
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 40, 5), (1, 6, 6)])
def test_a_matrix_is_made_orthogonal(shape, in_bf16, error, monkeypatch):
    """Its singular values become about 1 and its singular vectors stay, where it has values above 1e-3 of its norm."""
    monkeypatch.setattr("ldm.training.muon.computes_in_bf16", lambda device: in_bf16)
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    seen = u.mT @ found @ v.mT
    values = seen.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.65 and values.max() < 1.25
    torch.testing.assert_close(seen, torch.diag_embed(values), atol=error, rtol=0)
    assert torch.equal(orthogonal(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


def test_muon_without_gradients_and_with_fsdp():
    weight = weights()
    optimizer = make_optimizer([weight], 0.1, MUON)
    optimizer.step()
    assert torch.equal(weight, weights())
    stage = SimpleNamespace(rehearses=True)
    refused("FSDP is not for Muon, which needs whole matrices", check_fsdp, stage, [optimizer])


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_moves_matrices_as_torchs_does_and_vectors_as_adamw():
    """Kernels, too, as matrices of out x the rest; torch computes in bfloat16."""
    shapes = [(6, 9), (9, 6), (4, 3, 3, 3), (5,), ()]
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) for shape in shapes]
    ours = [torch.nn.Parameter(weight.clone()) for weight in start]
    theirs = [torch.nn.Parameter(w.reshape(len(w), -1).clone() if w.ndim > 1 else w.clone()) for w in start]
    own = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = [
        make_optimizer(ours, 0.02, MUON, [0.9, 0.99], 0.1),
        torch.optim.Muon(theirs[:3], **own, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(theirs[3:], **own, betas=(0.9, 0.99)),
    ]
    for k in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(k + a.numel()))
            b.grad = a.grad.reshape(b.shape)
        for optimizer in optimizers:
            optimizer.step()
    for k, (a, b, first) in enumerate(zip(ours, theirs, start, strict=True)):
        moved = (a - first).norm().item()
        torch.testing.assert_close(a.reshape(b.shape), b, rtol=0, atol=0.02 * moved if k < 3 else 1e-6)
