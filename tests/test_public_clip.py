"""Public CLIP text encoders: small ones that transformers and open_clip wrote, read here to the same numbers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refused
from golden_fill import published_shapes, shapes
from safetensors.torch import load_file, save_file
from torch import nn

from ldm.conditioning import public_clip
from ldm.conditioning.public_clip import load_text_encoder, read_text_encoder, transformers_params
from ldm.conditioning.text import TextEncoder

PROMPTS = ["a photograph of a cat", "", "“Bold” claims, 100%!"]
TEXT = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
VISION |= {"image_size": 8, "patch_size": 8}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"layers": 1, "width": 32, "head_width": 32, "patch_size": 8, "image_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 3},
}
NAMES = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads"}
NAMES |= {"activation": "hidden_act", "vocab_size": "vocab_size", "context_length": "max_position_embeddings"}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}  # float32, features of order 1


def randomised(model: nn.Module) -> nn.Module:
    """Weights of order 1, so that a wrong activation, head count or layer shows; transformers starts with tiny ones."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.5)
    return model.eval()


def transformers_folder(folder: Path, whole: bool = False, **changes) -> tuple[Path, nn.Module]:
    """A folder as transformers writes it, of CLIPModel or CLIPTextModel, and the model."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

    if whole:
        model = CLIPModel(CLIPConfig(text_config=TEXT | changes, vision_config=VISION, projection_dim=24))
    else:
        model = CLIPTextModel(CLIPTextConfig(**TEXT | changes))
    randomised(model).save_pretrained(folder)
    return folder, model


def hidden_states(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' state before the last block, and the last one after the final norm."""
    tower = getattr(model, "text_model", model)
    with torch.no_grad():
        out = tower(input_ids=tokens, output_hidden_states=True)
    return out.hidden_states[-2], out.last_hidden_state


def agrees(encoder: TextEncoder, theirs: nn.Module) -> None:
    tokens = encoder.tokenizer(PROMPTS)
    torch.testing.assert_close(encoder(PROMPTS)["c_crossattn"], hidden_states(theirs, tokens)[1], **TOLERANCE)
    assert not any(p.requires_grad for p in encoder.parameters()) and not encoder.training


def tokenizer_files(folder: Path, pad: str) -> None:
    """The files of the tokenizer, of any version of transformers, with CLIP's own vocabulary."""
    from ldm.checkpoint.diffusers_text import vocabulary
    from ldm.conditioning.tokenizer import clip_merges

    ids = {name: i for i, name in enumerate(vocabulary(clip_merges()))}
    (folder / "vocab.json").write_text(json.dumps(ids))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *clip_merges()]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": pad}}))


def write_shards(folder: Path, state: dict[str, torch.Tensor], suffix: str) -> list[str]:
    """Write weights in two files with their index, as transformers names them; return the names of the files."""
    stem, write = ("model", save_file) if suffix == "safetensors" else ("pytorch_model", torch.save)
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(sorted(state))}
    for file in files:
        write({name: state[name] for name, its in weight_map.items() if its == file}, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


@pytest.mark.parametrize("activation, inner", [("quick_gelu", 128), ("gelu", 128), ("quick_gelu", 72)])
@pytest.mark.parametrize("whole", [False, True], ids=["CLIPTextModel", "CLIPModel"])
def test_a_folder_of_transformers(tmp_path, whole, activation, inner):
    folder, theirs = transformers_folder(tmp_path, whole, hidden_act=activation, intermediate_size=inner)
    agrees(load_text_encoder(str(folder)), theirs)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_keys_with_and_without_text_model_and_position_ids(tmp_path, prefix):
    folder, theirs = transformers_folder(tmp_path)
    state = {prefix + k.removeprefix("text_model."): v for k, v in load_file(folder / "model.safetensors").items()}
    state[f"{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, folder / "model.safetensors")
    agrees(load_text_encoder(str(folder)), theirs)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_kind_of_file(tmp_path, suffix, sharded):
    folder, theirs = transformers_folder(tmp_path, whole=True)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if sharded:
        files = write_shards(folder, state, suffix)
    elif suffix == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    agrees(load_text_encoder(str(folder)), theirs)
    if sharded:
        (folder / files[1]).unlink()
        refused(files[1], load_text_encoder, str(folder), error=FileNotFoundError)


def test_layers_and_types(tmp_path):
    folder, theirs = transformers_folder(tmp_path)
    encoder = load_text_encoder(str(folder), layer="hidden", layer_index=-2)
    before_last = hidden_states(theirs, encoder.tokenizer(PROMPTS))[0]
    torch.testing.assert_close(encoder(PROMPTS)["c_crossattn"], before_last, **TOLERANCE)
    half = load_text_encoder(str(folder), dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}


def test_the_padding_is_the_tokenizers(tmp_path):
    """Stable Diffusion 1's folder pads with the end of text; Stable Diffusion 2's with "!", which is token 0."""
    folder, _ = transformers_folder(tmp_path)
    assert load_text_encoder(str(folder)).tokenizer.pad == 49407
    for pad, number in (("<|endoftext|>", 49407), ("!", 0)):
        tokenizer_files(folder, pad)
        assert load_text_encoder(str(folder)).tokenizer.pad == number
        assert read_text_encoder(str(folder))[0]["tokenizer"] == {"pad": number}  # the merges are CLIP's own


def test_the_configuration_is_read_as_transformers_reads_it(tmp_path):
    """Defaults for what is left out; text_config_dict, which old files have, before text_config."""
    from transformers import CLIPConfig

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "projection_dim": 768}
    large = {"model_type": "clip", "text_config_dict": sizes, "text_config": {**sizes, "hidden_act": "gelu"}}
    for config in (large, {"model_type": "clip", "text_config": TEXT}, {"model_type": "clip"}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        theirs = CLIPConfig.from_pretrained(tmp_path).text_config
        ours = transformers_params(config)
        assert ours == {"layout": "transformers"} | {our: getattr(theirs, name) for our, name in NAMES.items()}
    assert transformers_params(large)["activation"] == "quick_gelu"


@pytest.fixture
def small_architecture(tmp_path, monkeypatch):
    """open_clip's list of architectures with one more, "tiny"; returns a function that changes it."""
    folder = tmp_path / "model_configs"
    folder.mkdir()
    monkeypatch.setattr(public_clip, "_open_clip_models", lambda: folder)

    def write(**changes):
        (folder / "tiny.json").write_text(json.dumps(OPEN_CLIP | changes))

    write()
    return write


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("kind", ["plain", "training", "safetensors"])
def test_a_file_of_open_clip(tmp_path, small_architecture, quick, kind):
    """Every way in which open_clip's files come: the state, a training checkpoint of it, safetensors."""
    import open_clip

    small_architecture(quick_gelu=quick)
    theirs = randomised(open_clip.CLIP(**OPEN_CLIP, quick_gelu=quick))
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    path = tmp_path / "weights.pt"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "plain":
        torch.save(state | {"logit_scale": state["logit_scale"].reshape(1)}, path)
    else:
        modules = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"epoch": 3, "name": "tiny", "state_dict": modules, "optimizer": {"state": {}}}, path)
    ours = load_text_encoder(f"tiny/{path}", layer="penultimate")
    tokens = open_clip.tokenize(PROMPTS)
    with torch.no_grad():
        x = theirs.token_embedding(tokens) + theirs.positional_embedding
        for block in theirs.transformer.resblocks[:-1]:
            x = block(x, attn_mask=theirs.attn_mask)
        torch.testing.assert_close(ours(PROMPTS)["c_crossattn"], theirs.ln_final(x), **TOLERANCE)
        last = load_text_encoder(f"tiny/{path}")
        pooled = last.model.pool(last(PROMPTS)["c_crossattn"], tokens, last.tokenizer.eos)
        torch.testing.assert_close(pooled, theirs.encode_text(tokens), **TOLERANCE)


def test_open_clips_tags(tmp_path, small_architecture, monkeypatch):
    """A tag is open_clip's to download; weights that it lists as trained with quick GELU get that."""
    import open_clip.pretrained

    torch.save(open_clip.CLIP(**OPEN_CLIP).state_dict(), tmp_path / "weights.pt")
    for quick in (False, True):
        tags = {"here": {"file": str(tmp_path / "weights.pt"), "quick_gelu": quick}}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", tags)
        activation = read_text_encoder("tiny/here")[0]["activation"]
        assert activation == ("quick_gelu" if quick else "gelu")
    refused(r"'there' is neither a file nor a tag of tiny \(here\)", load_text_encoder, "tiny/there")


def test_the_real_list_of_architectures(monkeypatch):
    """ViT-H-14, Stable Diffusion 2's: sizes from open_clip's list, names and shapes those of published files."""
    read = []
    weights = {
        name: torch.empty(shape, device="meta")
        for name, shape in published_shapes("sd-v2", "cond_stage_model.model.").items()
    }
    contents = type("Contents", (), {"state": weights | {"visual.proj": torch.empty(1)}})
    monkeypatch.setattr(public_clip, "read_tensors", lambda path: read.append(path) or contents)
    params, state = read_text_encoder(f"ViT-H-14/{__file__}")
    assert read == [Path(__file__)]
    with torch.device("meta"):
        encoder = TextEncoder(**params, layer="penultimate")
    assert shapes(encoder) == {name: tuple(t.shape) for name, t in state.items()}
    assert shapes(encoder) == published_shapes("sd-v2", "cond_stage_model.")
    assert (params["heads"], params["activation"]) == (16, "gelu")
    assert read_text_encoder(f"ViT-L-14-quickgelu/{__file__}")[0]["activation"] == "quick_gelu"


def test_text_towers_of_another_kind_are_refused():
    refused("not CLIP's own.*hf_model_name", load_text_encoder, f"roberta-ViT-B-32/{__file__}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"intermediate_size": 64}, r"do not fit.*another shape \(.*fc1"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps 1e-06: known is 1e-05"),
        ({"hidden_act": "relu"}, "hidden_act 'relu': known is quick_gelu or gelu"),
        ({"vocab_size": 100}, "100 tokens and context 77, its tokenizer"),
        ({"num_hidden_layers": 4}, r"do not fit.*16 missing.*layers.3.layer_norm1.bias"),
        ({"max_position_embeddings": 60}, r"1 of another shape \(.*position_embedding.weight\)"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(tmp_path, changes, message):
    folder, _ = transformers_folder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused(message, load_text_encoder, str(folder))


def test_folders_that_lack_something(tmp_path):
    refused("config.json' does not exist", load_text_encoder, str(tmp_path), error=FileNotFoundError)
    folder, _ = transformers_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    refused("holds no weights .model.safetensors", load_text_encoder, str(folder), error=FileNotFoundError)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no connection."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def test_a_model_in_the_cache_of_the_hub(cache):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--someone--tiny-clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    folder, theirs = transformers_folder(repository / "snapshots" / commit, whole=True)
    tokenizer_files(folder, "!")
    encoder = load_text_encoder("someone/tiny-clip")
    agrees(encoder, theirs)
    assert encoder.tokenizer.pad == 0


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_only_what_is_needed_is_downloaded(tmp_path, monkeypatch, suffix):
    """The images' and other frameworks' files stay on the hub, and so does the second format of the weights."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    remote, theirs = transformers_folder(tmp_path / "remote", whole=True)
    local = tmp_path / "local"
    local.mkdir()
    tokenizer_files(remote, "!")
    state = load_file(remote / "model.safetensors")
    (remote / "model.safetensors").unlink()
    write_shards(remote, state, "bin")
    needed = set(write_shards(remote, state, suffix))
    (remote / "tf_model.h5").touch()
    fetched = []

    def download(repository: str, file: str) -> str:
        assert repository == "someone/tiny-clip"
        if not (remote / file).is_file():
            raise EntryNotFoundError(file)
        fetched.append(file)
        return shutil.copy(remote / file, local / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    agrees(load_text_encoder("someone/tiny-clip"), theirs)
    index = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}[suffix]
    small = {"config.json", "vocab.json", "merges.txt", "tokenizer_config.json"}
    assert set(fetched) == small | needed | {index}


@pytest.mark.parametrize("name", ["openai/clip-vit-large-patch14", "no/such/folder", "/no/such/folder", "bad name"])
def test_what_is_nowhere_is_one_sentence(cache, name):
    with pytest.raises(ValueError, match="is not a folder, not a model of open_clip, and cannot be loaded") as error:
        load_text_encoder(name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_open_clips_weights_without_a_connection(cache):
    with pytest.raises(ValueError, match="'ViT-H-14/laion2b_s32b_b79k' cannot be downloaded") as error:
        load_text_encoder("ViT-H-14/laion2b_s32b_b79k")
    assert "\n" not in str(error.value)
