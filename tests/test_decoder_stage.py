"""The stage that trains a decoder alone: it learns, and what the latents depend on stays as it was, to the bit."""

import copy

import pytest
import torch
from conftest import TINY, refused
from torch.utils.data import default_collate

from ldm.checkpoint.networks import KL_TARGET, VQ_TARGET
from ldm.checkpoint.writing import save_file
from ldm.data.digits import Digits
from ldm.loading import load_network
from ldm.training.decoder import DecoderStage
from ldm.util import instantiate_from_config

KL = TINY["first_stage_config"]["params"]
VQ = {**KL, "n_embed": 8, "ddconfig": {**KL["ddconfig"], "double_z": False}}


@pytest.mark.parametrize(("target", "params"), [(KL_TARGET, KL), (VQ_TARGET, VQ)])
def test_the_decoder_learns_and_the_latents_stay(target, params, tmp_path):
    torch.manual_seed(0)
    config = {"target": target, "params": copy.deepcopy(params)}
    path = tmp_path / "first.safetensors"
    save_file(path, instantiate_from_config(config).state_dict(), config)
    stage = DecoderStage(str(path), 1e-2, "l1", 0.5, {"input_nc": 1, "ndf": 4, "n_layers": 1}, preview_columns=4)
    data = Digits(first=64)
    stage.prepare(data)
    stage.train()
    batch, optimizers, errors = default_collate([data[i] for i in range(8)]), stage.optimizers(), []
    for number in range(30):
        for k, optimizer in enumerate(optimizers):
            loss, metrics, _ = stage.turn(batch, k, number, None)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            errors.append(metrics.get("error"))
    assert errors[-2] < 0.8 * errors[0]
    stage.finish(data)
    exported, state = stage.export()
    assert exported == config
    before = load_network(path).state_dict()
    changed = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, state[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_a_first_stage_without_a_decoder_is_refused(tmp_path):
    target = "ldm.models.identity.IdentityFirstStage"
    config = {"target": target, "params": {"channels": 1}}
    save_file(tmp_path / "first.safetensors", {}, config)
    refused("give a KL or a VQ autoencoder", DecoderStage, str(tmp_path / "first.safetensors"), 1e-3)
