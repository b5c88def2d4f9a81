"""Averages chosen after training: closed forms, and reconstruction against the average itself."""

import numpy as np
import pytest
import torch
from conftest import refused
from safetensors.torch import load_file, save_file
from test_loop import assert_same, interrupt
from tiny_stages import config_of

from ldm.commands.convert import main as convert
from ldm.training import loop
from ldm.training.loop import Interrupted, train
from ldm.training.snapshots import LARGEST, SNAPSHOTS, combination, gamma_of, profile_product


@pytest.mark.parametrize("gamma", [0.0, 1.0, 6.94, 16.97, 100.0])
def test_gamma_is_the_inverse_of_the_width(gamma):
    width = ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5
    assert gamma_of(width) == pytest.approx(gamma, rel=1e-9, abs=1e-6)
    s = (np.arange(10**6) + 0.5) / 10**6
    p = (gamma + 1) * s**gamma
    assert width == pytest.approx(np.sqrt(np.mean(p * s**2) - np.mean(p * s) ** 2), rel=1e-5)


def test_the_papers_numbers_and_limits():
    assert [round(gamma_of(width), 2) for width in (0.05, 0.10)] == [16.97, 6.94]
    for width in (0.0, 0.3, float("nan")):
        refused("sigma_rel .* must be above 0 and at most 0.2887", gamma_of, width)
    assert gamma_of(LARGEST) == pytest.approx(0, abs=1e-6)


def test_products_of_profiles_equal_their_integrals():
    s = (np.arange(10**6) + 0.5) / 10**6 * 9.0
    for t, gamma, other_t, other in ((9, 17.0, 4, 7.0), (3, 2.0, 9, 0.5), (5, 7.0, 5, 7.0)):
        p, q = ((g + 1) * s**g / end ** (g + 1) * (s <= end) for end, g in ((t, gamma), (other_t, other)))
        assert profile_product(t, gamma, other_t, other) == pytest.approx(
            np.mean(p * q) * 9.0, rel=1e-4
        )  # of a sum over 10^6 points


def direct(trajectory: torch.Tensor, width: float) -> torch.Tensor:
    """The average at the end of a trajectory (t, d), constant between steps, by its integral."""
    edges = torch.arange(len(trajectory) + 1, dtype=torch.float64) / len(trajectory)
    return (edges ** (gamma_of(width) + 1)).diff() @ trajectory


def test_stored_averages_are_reconstructed_exactly():
    profiles = [(step, width) for step in (20, 40, 60) for width in (0.05, 0.10)]
    for i, (step, width) in enumerate(profiles):
        np.testing.assert_allclose(combination(profiles, step, width), np.eye(6)[i], atol=1e-8)


def test_others_are_nearly_so():
    torch.manual_seed(0)
    walk = torch.randn(800, 50, dtype=torch.float64).cumsum(0)
    profiles = [(step, width) for step in range(50, 801, 50) for width in (0.05, 0.10)]
    stored = torch.stack([direct(walk[:step], width) for step, width in profiles])
    for width in (0.07, 0.15, 0.2):
        found = torch.from_numpy(combination(profiles, 800, width)) @ stored
        assert (found - direct(walk, width)).norm() / direct(walk, width).norm() < 0.01, width


def run(folder, **settings) -> dict:
    config = config_of("pixel") | {"outdir": str(folder)}
    config["loop"] |= {"steps": 6, "ema_snapshots": 2, "keep_every": 1, "ema": 0.0, "precision": "fp32"}
    config["loop"] |= {"preview_every": 3, "save_every": 3} | settings
    return config


def test_a_run_and_convert(tmp_path, monkeypatch):
    """Snapshots are the averages of the weights after each step, resumed or not, and convert gives any width."""
    path = train(run(tmp_path / "alone"), device="cpu")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "preview", interrupt)
        train(run(tmp_path / "parts"), device="cpu")
    train(run(tmp_path / "parts"), resume=True, device="cpu")
    folder = path.parent / SNAPSHOTS
    assert [file.name for file in sorted(folder.iterdir())] == [f"{step:06d}.safetensors" for step in (2, 4, 6)]
    for file in folder.iterdir():
        assert_same(file, tmp_path / "parts" / "pixel" / "ema" / file.name)
    kept = [load_file(path.parent / f"model-{step:06d}.safetensors") for step in range(1, 6)] + [load_file(path)]
    name, out = "model.diffusion_model.out.2.weight", tmp_path / "out.safetensors"
    for width, near in ((0.05, 1e-5), (0.10, 1e-5), (0.08, 0.02)):
        convert([str(path.parent), str(out), "--sigma-rel", str(width)])
        walk = torch.stack([state[name].flatten() for state in kept]).double()
        found, wanted = load_file(out), direct(walk, width).float()
        assert (found[name].flatten() - wanted).norm() / wanted.norm() < near, width
    assert {key for key in kept[-1] if torch.equal(found[key], kept[-1][key])} <= {"schedule"}  # all weights train


def test_snapshots_of_a_killed_run_take_no_part(tmp_path):
    """A run that was killed before its first state may begin anew with other settings, in the same folder."""
    folder = tmp_path / "pixel" / "ema"
    folder.mkdir(parents=True)
    save_file({"0.05/weight": torch.ones(1)}, folder / "000005.safetensors")
    path = train(run(tmp_path, steps=4, keep_every=0), device="cpu")
    assert path.parent == folder.parent and sorted(file.name[:6] for file in folder.iterdir()) == ["000002", "000004"]


def test_mistakes_are_named(tiny_checkpoint, tmp_path):
    out = str(tmp_path / "out.safetensors")
    refused(
        "is not a run with snapshots: train it with loop.ema_snapshots=N",
        convert,
        [str(tiny_checkpoint), out, "--sigma-rel", "0.1"],
    )
    config = config_of("classifier") | {"outdir": str(tmp_path)}
    config["loop"]["ema_snapshots"] = 1
    refused("ClassifierStage does not train a diffusion model's weights", train, config, device="cpu")
