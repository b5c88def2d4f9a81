"""Text encoders that train with the UNet take the words of the data set's captions, and a checkpoint has them."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import TINY, refused
from tiny_stages import config_of, write_inputs

import ldm
from ldm.checkpoint.writing import save_file
from ldm.conditioning.bert import BERT_SPECIAL, vocabulary_of
from ldm.conditioning.word_sum import WordSum
from ldm.data.digits import Digits
from ldm.training.diffusion import DiffusionStage
from ldm.training.loop import train

UNET = copy.deepcopy(TINY["unet_config"])
UNET["params"] = {k: v for k, v in UNET["params"].items() if k not in ("num_classes", "adm_in_channels")}
ENCODERS = {"bert.BERTEncoder": {"n_embed": 32, "n_layer": 1}, "word_sum.WordSum": {"n_embed": 32}}


def stage_of(name: str, first_stage: str, **params) -> DiffusionStage:
    cond = {"target": f"ldm.conditioning.{name}", "params": {**ENCODERS[name], "max_seq_len": 24, **params}}
    own = {"learning_rate": 1e-2, "schedule": {"name": "cosine"}, "defaults": TINY["defaults"]}
    torch.manual_seed(0)
    return DiffusionStage(UNET, first_stage, cond, **own)


def test_a_vocabulary_has_the_words_of_texts():
    assert vocabulary_of(["A Café, two", "two red"]) == [*BERT_SPECIAL, ",", "a", "cafe", "red", "two"]


def test_a_sum_of_words_ignores_their_order_and_padding():
    words = vocabulary_of(["a red five left of blue two"])
    encoder = WordSum(16, len(words), 12, words)
    same = ["a red five left of a blue two", "a blue two left of a red five", "a red five left of a blue two zebra"]
    first, second, other = encoder(same)["c_crossattn"]
    assert first.shape == (1, 16) and torch.equal(first, second) and not torch.allclose(first, other, atol=1e-3)
    longer = WordSum(16, len(words), 20, words)
    longer.load_state_dict(encoder.state_dict())
    assert torch.allclose(longer.encode(same[:1]), first, atol=1e-6)
    assert encoder.null == "" and encoder(["", "five"])["c_crossattn"].shape == (2, 1, 16)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_trains_on_the_words_of_its_captions(name, tiny_parts, tmp_path):
    stage = stage_of(name, tiny_parts["first_stage"])
    assert stage.reads == ("image", "caption")
    data = Digits(first=8)
    batch = stage.prepare(data).__getitems__(list(range(8)))
    encoder = stage.latent_diffusion.cond_stage_model
    assert encoder.tokenizer is not None and encoder.vocab_size < 400  # not BERT's 30,522
    tokens = encoder.tokenizer([data.caption_of(i).text for i in range(8)])
    assert not (tokens == BERT_SPECIAL.index("[UNK]")).any() and set(stage.networks) == {"model", "cond_stage"}
    before = encoder.token_emb.weight.clone() if name == "word_sum.WordSum" else None
    (optimizer,) = stage.train().optimizers()
    batch = {key: [one[key] for one in batch] for key in ("caption", "mean", "std")}
    batch |= {key: torch.stack(batch[key]) for key in ("mean", "std")}
    for _ in range(2):  # the UNet's last layer starts at zero, and passes gradients after one step
        stage.loss(batch)[0].backward()
        lacking = [n for n, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
        optimizer.step()
    assert lacking == [] and (before is None or not torch.equal(before, encoder.token_emb.weight))
    config, state = stage.train(False).export()
    save_file(tmp_path / "model.safetensors", state, config)
    model, prompts = ldm.load(tmp_path / "model.safetensors"), ["a five and a two", "a two and a five"]
    one, other = model.condition(prompts)["c_crossattn"]
    assert torch.equal(encoder(prompts)["c_crossattn"][0], one) and torch.equal(one, other) == (name[0] == "w")
    assert len(model.generate(prompts, steps=2)) == 2


def test_an_own_vocabulary_stays(tiny_parts):
    words = vocabulary_of(["a five"])
    stage = stage_of("word_sum.WordSum", tiny_parts["first_stage"], vocab=words, vocab_size=len(words))
    stage.prepare(Digits(first=8))
    assert stage.latent_diffusion.cond_stage_config["params"]["vocab"] == words
    refused("has 7 tokens and the model 8", WordSum, 16, 8, 12, words)


@pytest.mark.parametrize("name", ["clip", "classes"])
def test_a_run_is_not_resumed_with_captions_of_other_words(name, tmp_path, monkeypatch, capsys):
    """Where a text encoder is built on the words of the captions, alone or with a UNet."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    config = config_of(name)
    config["data"] = {"target": "ldm.data.folder.Folder", "params": {"root": "instance", "size": 32, "channels": 1}}
    if name == "classes":
        target, params = "ldm.conditioning.word_sum.WordSum", {"n_embed": 32, "max_seq_len": 8}
        config["stage"]["params"]["cond_stage"] = {"target": target, "params": params}

    def resume(words: str, steps: int) -> None:
        for i, word in enumerate(words.split()):
            Path(f"instance/{i}.txt").write_text(word)
        train(config | {"loop": config["loop"] | {"steps": steps}}, resume=steps > 2, device="cpu")

    resume("five two red", 2)
    refused("was started with captions of other words", resume, "five two blue", 3)
    resume("red five two", 3)
    state = torch.load(path := tmp_path / "out" / name / "resume.pt", weights_only=True)
    del state["data"]["words"]  # as before they were remembered
    torch.save(state, path)
    resume("red five two", 4)
    assert "other images" not in capsys.readouterr().err
