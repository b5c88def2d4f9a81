"""CompVis's `ldm.modules.encoders.modules` over our networks: its encoders return tensors.

CLIP's weights are read from a folder, a file or Hugging Face's cache, and never downloaded. If there are none, the
encoder is built without them and a warning says so: CompVis's code loads a checkpoint afterwards. Only the encoders
that no checkpoint contains, FrozenCLIPTextEmbedder and FrozenClipImageEmbedder, may download through open_clip.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint.compvis_config import clip_config
from ldm.conditioning import bert, classes, spatial
from ldm.conditioning.public_clip import open_clip_params, read_text_encoder
from ldm.conditioning.text import TextEncoder
from ldm.conditioning.tokenizer import Tokenizer
from ldm.models.clip_transformers import CLIPTextModel


class AbstractEncoder(nn.Module):
    """CompVis's base class of encoders: `encode` calls `forward`, which may be replaced."""

    if TYPE_CHECKING:  # the subclasses' networks and buffers

        def __getattr__(self, name: str) -> Any: ...

    device = property(lambda self: next(self.parameters()).device, lambda self, _: None)  # setting: no effect

    def encode(self, *args: Any, embedding_manager: Callable | None = None, **kwargs: Any) -> Any:
        """Encode prompts. Textual inversion's manager maps tokens (b, n) and vectors (b, n, d) to other vectors."""
        if embedding_manager is None:
            return self(*args, **kwargs)
        with self.token_embedding.register_forward_hook(lambda _, given, out: embedding_manager(given[0], out)):
            return self(*args, **kwargs)

    def freeze(self) -> None:
        self.eval().requires_grad_(False)


class Embeddings(nn.ModuleDict):
    """transformers' CLIPTextEmbeddings. Checkpoints may contain `position_ids` or not; it is not used."""

    token_embedding: nn.Embedding
    position_embedding: nn.Embedding
    position_ids: Tensor

    def __init__(self, modules: Mapping[str, nn.Module], length: int) -> None:
        super().__init__(modules)
        self.register_buffer("position_ids", torch.arange(length, device="cpu")[None])

    def forward(
        self, input_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        embedded = self.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
        positions = torch.arange(embedded.shape[1], device=embedded.device) if position_ids is None else position_ids
        return embedded + self.position_embedding(positions)  # (b, n, d)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        state_dict.setdefault(f"{prefix}position_ids", self.position_ids)
        super()._load_from_state_dict(state_dict, prefix, *args)


class TextModel(nn.ModuleDict):
    """transformers' CLIPTextTransformer: the networks of a text tower, and their forward pass."""

    embeddings: Any
    encoder: Any
    final_layer_norm: nn.LayerNorm

    def __init__(self, modules: Mapping[str, nn.Module], eos: int) -> None:
        super().__init__(modules)
        self.eos = eos

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:  # fmt: skip
        """Encode tokens (b, n): `last_hidden_state` (b, n, d), `pooler_output` (b, d), both normed, `hidden_states`.

        attention_mask: (b, n), 0 for tokens that the others do not attend to.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        if output_attentions:
            raise ValueError("output_attentions is not supported: the kernels do not return attention weights")
        mask = None
        if attention_mask is not None and not attention_mask.all():
            n = input_ids.shape[1]
            causal = torch.ones(n, n, dtype=torch.bool, device=input_ids.device).tril()
            mask = causal & attention_mask.bool()[:, None, None]  # (b, 1, n, n)
        states = [self.embeddings(input_ids, position_ids)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1], mask))
        last = self.final_layer_norm(states[-1])
        ends = (input_ids == self.eos).int().argmax(dim=-1)  # (b,)
        pooled = last[torch.arange(len(last), device=last.device), ends]
        out = BaseModelOutputWithPooling(last, pooled, tuple(states) if output_hidden_states else None)
        return out.to_tuple() if return_dict is False else out


class TransformersTextModel(CLIPTextModel):
    """Our text tower with the interface of transformers' CLIPTextModel before 5.6, which removed `text_model`."""

    device = property(lambda self: self.get_input_embeddings().weight.device)
    dtype = property(lambda self: self.get_input_embeddings().weight.dtype)

    def __init__(self, vocab_size: int, width: int, layers: int, heads: int, context_length: int, activation: str):
        from transformers import CLIPTextConfig

        super().__init__(vocab_size, width, layers, heads, context_length, activation)
        self.text_model = TextModel(dict(self.text_model.items()), eos=vocab_size - 1)
        self.text_model.embeddings = Embeddings(self.text_model.embeddings, context_length)
        sizes: dict[str, Any] = {"vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": heads, "max_position_embeddings": context_length, "hidden_act": activation}
        sizes |= {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": vocab_size - 1}
        first: Any = self.blocks()[0] if layers else None
        sizes["intermediate_size"] = first.mlp.fc1.out_features if layers else 4 * width
        self.config = CLIPTextConfig(**sizes)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.text_model.embeddings(tokens)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Encode tokens (b, n) as `TextModel` does."""
        return self.text_model(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.text_model.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.text_model.embeddings.token_embedding = value

    def resize_token_embeddings(self, new_num_tokens: int | None = None) -> nn.Embedding:
        """Give the token embedding another number of rows, for words added to the tokenizer; new rows are random."""
        old = self.get_input_embeddings()
        if new_num_tokens is None or new_num_tokens == old.num_embeddings:
            return old
        new = nn.Embedding(new_num_tokens, old.embedding_dim, device=old.weight.device, dtype=old.weight.dtype)
        kept = min(new_num_tokens, old.num_embeddings)
        with torch.no_grad():
            nn.init.normal_(new.weight, std=0.02)
            new.weight[:kept] = old.weight[:kept]
        self.set_input_embeddings(new.requires_grad_(old.weight.requires_grad))
        self.config.vocab_size = self.vocab_size = new_num_tokens
        return new


class FrozenCLIPEmbedder(AbstractEncoder):
    """Stable Diffusion 1's text encoder: prompts -> (b, 77, d).

    Args:
        version: A folder in transformers' layout, or a name on Hugging Face's hub.
        device: Not used, here and below.
        layer: "last", "pooled" (b, 1, d), or "hidden": state number `layer_idx`, without the final norm.
    """

    LAYERS = ("last", "pooled", "hidden")
    null = ""
    token_embedding = property(lambda self: self.transformer.text_model.embeddings.token_embedding)

    def __init__(
        self, version: str = "openai/clip-vit-large-patch14", device: Any = "cuda", max_length: int = 77,
        freeze: bool = True, layer: str = "last", layer_idx: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if layer not in self.LAYERS or (layer == "hidden") != (layer_idx is not None):
            raise ValueError(f"layer {layer!r} and layer_idx {layer_idx}: use last, pooled, or hidden with a layer_idx")
        folder = version if Path(version).is_dir() else _cached(version, "config.json")
        params, state = _read(folder, version, None if folder else clip_config({"version": version})["params"])
        tokenizer = Tokenizer(**{"context_length": params.get("context_length", 77), **params.get("tokenizer", {})})
        self.tokenizer = _as_transformers(tokenizer)
        sizes = (tokenizer.vocab_size, params["width"], params["layers"], params["heads"], tokenizer.context_length)
        with torch.random.fork_rng(devices=[]):  # transformers' from_pretrained leaves the generator as it was, too
            self.transformer = TransformersTextModel(*sizes, params["activation"])
        self.max_length, self.layer, self.layer_idx = max_length, layer, layer_idx
        if state is not None:
            self.load_state_dict(state)
        if freeze:
            self.freeze()

    def word_ids(self, text: str) -> list[int]:
        """Return the tokens of a text without start and end."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def forward(self, text: str | Sequence[str]) -> Tensor:
        settings = {"truncation": True, "max_length": self.max_length, "padding": "max_length", "return_tensors": "pt"}
        tokens = self.tokenizer(text, **settings)["input_ids"].to(self.device)  # (b, n)
        out = self.transformer(input_ids=tokens, output_hidden_states=self.layer == "hidden")
        if self.layer == "hidden":
            return out.hidden_states[self.layer_idx]
        return out.last_hidden_state if self.layer == "last" else out.pooler_output[:, None]


class FrozenOpenCLIPEmbedder(AbstractEncoder, TextEncoder):
    """Stable Diffusion 2's text encoder, `model`: prompts -> (b, 77, d). version: a file, or open_clip's tag."""

    LAYERS = ("last", "penultimate")

    def __init__(
        self, arch: str = "ViT-H-14", version: str = "laion2b_s32b_b79k", device: Any = "cuda", max_length: int = 77,
        freeze: bool = True, layer: str = "last",
    ) -> None:  # fmt: skip
        if layer not in self.LAYERS:
            raise ValueError(f"unknown layer {layer!r}; choose from last, penultimate")
        name = f"{arch}/{version}"
        params, state = _read(name if Path(version).is_file() else None, name, open_clip_params(arch))
        params["layer"] = layer
        super().__init__(**params)
        self.max_length, self.layer_idx = max_length, self.LAYERS.index(layer)
        mask = torch.full((self.model.context_length,) * 2, -torch.inf, device="cpu").triu(1)
        self.model.register_buffer("attn_mask", mask, persistent=False)
        if state is not None:
            self.load_state_dict(state)
        if freeze:
            self.freeze()

    def forward(self, text: str | Sequence[str]) -> Tensor:
        return self.encode_with_transformer(self.tokenizer([text] if isinstance(text, str) else text).to(self.device))

    def encode_with_transformer(self, text: Tensor) -> Tensor:
        x = self.model.embed(text).transpose(0, 1)  # (n, b, d)
        x = self.text_transformer_forward(x, attn_mask=self.model.get_buffer("attn_mask"))
        return self.model.final_norm(x.transpose(0, 1))

    def text_transformer_forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Run all blocks but the last `layer_idx` on x (n, b, d). attn_mask: not used, as the blocks are causal."""
        blocks = self.model.blocks()
        x = x.transpose(0, 1)
        for block in blocks[: len(blocks) - self.layer_idx]:
            x = block(x)
        return x.transpose(0, 1)


class FrozenCLIPTextEmbedder(AbstractEncoder, TextEncoder):
    """CLIP's pooled text embeddings: (b, p), of length 1 with `normalize`; `encode` repeats them, (b, n_repeat, p).

    version: OpenAI's name of the model, or open_clip's name of an architecture and a file, "ViT-B-32-quickgelu/FILE".
    """

    def __init__(
        self, version: str = "ViT-L/14", device: Any = "cuda", max_length: int = 77, n_repeat: int = 1,
        normalize: bool = True,
    ) -> None:  # fmt: skip
        params, state = read_text_encoder("/".join(_openai(version)))
        super().__init__(**params, pooled=True)
        self.load_state_dict(state)
        self.max_length, self.n_repeat, self.normalize = max_length, n_repeat, normalize

    def forward(self, text: str | Sequence[str]) -> Tensor:
        z = TextEncoder.forward(self, [text] if isinstance(text, str) else text)["c_adm"]
        return z / z.norm(dim=1, keepdim=True) if self.normalize else z

    def encode(self, text: str | Sequence[str]) -> Tensor:
        return self(text)[:, None].expand(-1, self.n_repeat, -1)


class FrozenClipImageEmbedder(nn.Module):
    """CLIP's embeddings of images (b, 3, h, w) in [-1, 1]: (b, p). model: like FrozenCLIPTextEmbedder's version."""

    model: Any
    mean: Tensor
    std: Tensor

    def __init__(self, model: str = "ViT-L/14", jit: bool = False, device: Any = "cuda", antialias: bool = False):
        import open_clip

        super().__init__()
        architecture, weights = _openai(model)
        self.model, self.antialias = open_clip.create_model(architecture, weights), antialias
        for name in ("mean", "std"):
            values = torch.tensor(getattr(open_clip, f"OPENAI_DATASET_{name.upper()}")).view(3, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def preprocess(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, self.model.visual.image_size, mode="bicubic", align_corners=True, antialias=self.antialias)
        return ((x + 1) / 2 - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        return self.model.encode_image(self.preprocess(x))


class BERTEmbedder(AbstractEncoder, bert.BERTEncoder):
    """latent-diffusion's text encoder of prompts, if BERT's vocabulary is in Hugging Face's cache, or tokens (b, n)."""

    token_embedding = property(lambda self: self.transformer.token_emb)

    def __init__(
        self, n_embed: int, n_layer: int, vocab_size: int = bert.BERT_TOKENS, max_seq_len: int = 77,
        device: Any = "cuda", use_tokenizer: bool = True, embedding_dropout: float = 0.0,
    ) -> None:  # fmt: skip
        folder = _cached("bert-base-uncased", "vocab.txt") if use_tokenizer else None
        vocab = None if folder is None else bert.read_vocab(Path(folder) / "vocab.txt")
        super().__init__(n_embed, n_layer, vocab_size, max_seq_len, vocab, embedding_dropout)

    def word_ids(self, text: str) -> list[int]:
        ids, (_, sep, *_) = self.tokens([text, ""]).tolist()
        return ids[1 : ids.index(sep)]

    def forward(self, text: Any) -> Tensor:
        return bert.BERTEncoder.encode(self, text)  # (b, n, d)


class TransformerEmbedder(BERTEmbedder):
    """BERTEmbedder for tokens only."""

    def __init__(self, n_embed: int, n_layer: int, vocab_size: int, max_seq_len: int = 77, device: Any = "cuda"):
        super().__init__(n_embed, n_layer, vocab_size, max_seq_len, use_tokenizer=False)


class ClassEmbedder(AbstractEncoder, classes.ClassEmbedder):
    """Embeds the classes of a batch, `batch[key]` (b,), as (b, 1, d).

    ucg_rate: The share dropped in training only. CompVis's later code (default 0.1) also drops them in sampling.
    """

    def __init__(self, embed_dim: int, n_classes: int = 1000, key: str = "class", ucg_rate: float = 0.0) -> None:
        super().__init__(embed_dim, n_classes)
        self.key, self.ucg_rate = key, ucg_rate

    def forward(self, batch: Any, key: str | None = None, disable_dropout: bool = False) -> Tensor:
        numbers = batch[self.key if key is None else key] if isinstance(batch, Mapping) else batch
        numbers = torch.as_tensor(numbers, device=self.device)
        if self.training and not disable_dropout:
            numbers = numbers.masked_fill(torch.rand(numbers.shape, device=self.device) < self.ucg_rate, self.null)
        return classes.ClassEmbedder.encode(self, numbers)

    def get_unconditional_conditioning(self, bs: int, device: Any = None) -> dict[str, Tensor]:
        return {self.key: torch.full((bs,), self.null, device=self.device)}


class SpatialRescaler(AbstractEncoder, spatial.SpatialRescaler):
    def forward(self, x: Tensor) -> Tensor:
        return spatial.SpatialRescaler.encode(self, x)


def _openai(name: str) -> tuple[str, str]:
    """Split a name into open_clip's architecture, and a file or the tag of OpenAI's weights."""
    architecture, _, file = name.partition("/")
    return (architecture, file) if Path(file).is_file() else (name.replace("/", "-"), "openai")


def _cached(repository: str, needed: str) -> str | None:
    """Return the folder in Hugging Face's cache that has that file of a model, if any."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(repository, needed)
    except ValueError:  # not a valid name on the hub
        return None
    return str(Path(found).parent) if isinstance(found, str) else None


def _read(path: str | None, name: str, params: Any) -> tuple[dict[str, Any], Any]:
    """Return TextEncoder's arguments and weights; without a path, `params` and None."""
    if path is not None:
        return read_text_encoder(path)
    warnings.warn(f"no weights of {name!r} were found: load a checkpoint into this text encoder", stacklevel=3)
    return params, None


def _as_transformers(tokenizer: Tokenizer) -> Any:
    from tokenizers import decoders
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    class CLIPTokenizer(PreTrainedTokenizerFast):
        encoder = property(lambda self: self.get_vocab())
        decoder: Any = property(lambda self: {i: token for token, i in self.get_vocab().items()})

    start, end, pad = (tokenizer.pipeline.id_to_token(i) for i in (tokenizer.sot, tokenizer.eos, tokenizer.pad))
    names = {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": pad}
    length = tokenizer.context_length
    made = CLIPTokenizer(tokenizer_object=tokenizer.pipeline, **names, model_max_length=length)
    frame = [(start, tokenizer.sot), (end, tokenizer.eos)]
    made.backend_tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("</w>", " "), decoders.Strip(" ", 0, 1)]
    )
    made.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start} $A {end}", special_tokens=frame)
    return made
