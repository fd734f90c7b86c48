"""CLIP, frozen: the only place that imports open_clip."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipward.errors import InputError, first_line, list_names, shorten
from clipward.files import atomic_write, check_state, locate, read_json, read_safetensors, state_hash
from clipward.networks.channels import to_rgb
from clipward.networks.noise_level import NoiseConditionedConv, with_noise_level
from clipward.networks.torchscript import is_torchscript, read_torchscript
from clipward.texts import Part
from clipward.values import fits

CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"
LEVEL_FILE = "noise_level.safetensors"  # what makes it noise-aware
MOST_LAYERS = 1000
MOST_SIDE, MOST_TOKENS = 8192, 8192  # pixels of a picture's side, and tokens of a text
MOST_FEATURES = 65536
VOCABULARY = 49408  # tokens that CLIP's own encoder knows
WHOLE = ("image_size", "patch_size", "width", "heads", "head_width", "context_length", "vocab_size")
MOST_TEXTS = 4096  # whose features are kept
LEAST_STD = 1e-6  # of a picture's values, by which they are divided
OPENAI_PREPROCESSING = {
    "mode": "RGB",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}


_tokenizers: dict[str, Any] = {}  # by what they are made from


def _load_tokenizer(source: str, text: dict[str, Any]) -> Any:
    """open_clip's tokenizer, made once for all CLIPs that read texts alike, as its vocabulary takes long to read."""
    import open_clip

    if "hf_tokenizer_name" in text or source.startswith("hf-hub:"):  # may lie beside the weights
        return open_clip.get_tokenizer(source)
    key = json.dumps(text, sort_keys=True)
    if key not in _tokenizers:
        _tokenizers[key] = open_clip.get_tokenizer(source)
    return _tokenizers[key]


class Clip:
    """A frozen open_clip model with differentiable preprocessing.

    Args:
        model: an open_clip model; it is put in evaluation mode, in float32, and its parameters are frozen.
        tokenizer: its own; ``tokenizer(text)`` cuts in silence, so lengths are checked before.
        preprocess: ``size``, ``mean``, ``std`` and ``interpolation``, as open_clip names them.
        name: what it was loaded from, for the record.
        config: open_clip's ``model_cfg``, for one that is to be trained on.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        preprocess: dict[str, Any],
        name: str = "",
        config: dict[str, Any] | None = None,
    ) -> None:
        self.model: Any = put_tokens_first(model.float().eval().requires_grad_(False))  # open_clip has no types
        self.tokenizer, self.preprocess, self.name, self.config = tokenizer, preprocess, name, config
        self.noise_aware = isinstance(getattr(self.model.visual, "conv1", None), NoiseConditionedConv)
        self.context_length: int = tokenizer.context_length
        self._texts: dict[str, Tensor] = {}
        self._hash = ""
        self.checkpointing = False  # recompute activations in the backward pass instead of keeping them

    @classmethod
    def load(cls, name: str, field: str = "clip") -> "Clip":
        """Load a pretrained model of open_clip.

        Args:
            name: a folder with ``open_clip_config.json`` and the weights (``local-dir:`` may stand before it);
                ``ARCHITECTURE/TAG``, such as ``ViT-B-32/openai``, which is downloaded; ``ARCHITECTURE/FILE`` for a file
                of weights that were trained with OpenAI's mean and standard deviation; OpenAI's own ``.pt`` file, which
                knows its architecture; or ``hf-hub:OWNER/NAME``.
            field: the setting that names it, for errors.

        Raises:
            InputError: where there is no such model, or its weights can't be had or don't fit.
        """
        try:
            return cls._load(name)
        except InputError as error:
            if not str(error).startswith("clip:"):
                raise
            raise InputError(f"{field}{str(error).removeprefix('clip')}") from error

    @classmethod
    def _load(cls, name: str) -> "Clip":
        import open_clip

        if not name:
            raise InputError("clip: got an empty name, expected a folder, a file or a name such as ViT-B-32/openai")

        folder, (architecture, _, rest) = locate(name.removeprefix("local-dir:")), name.partition("/")
        known = architecture in open_clip.list_models()
        options: dict[str, Any] = {}
        try:
            if folder.is_file():
                model = _from_openai(folder)
                _check_finite(model, name)
                config = _read_sizes(model)
                preprocess_cfg = OPENAI_PREPROCESSING | {"size": config["vision_cfg"]["image_size"]}
                return cls(model, new_tokenizer(77), preprocess_cfg, name, config)
            if folder.is_dir():
                if not (folder / CONFIG_FILE).is_file():
                    raise InputError(f"clip: got {name}, a folder without {CONFIG_FILE}; expected an open_clip folder")
                irregular = [path.name for path in folder.iterdir() if not path.is_file() and not path.is_dir()]
                if irregular:  # such as a pipe, which would be read forever
                    raise InputError(f"clip: got {name}, whose {shorten(irregular[0])} is no regular file; remove it")
                _check_config(folder / CONFIG_FILE)
                source = f"local-dir:{folder}"
            elif name.startswith("hf-hub:"):
                source = name
            elif known and Path(rest).is_file():
                source, options = architecture, {"pretrained": rest}
            elif (architecture, rest) in open_clip.list_pretrained():
                # the tag knows which activation it was trained with; the architecture may name another
                quick_gelu = bool(open_clip.get_pretrained_cfg(architecture, rest).get("quick_gelu"))
                source, options = architecture, {"pretrained": rest, "force_quick_gelu": quick_gelu}
            else:
                tags = list_names(open_clip.list_pretrained_tags_by_model(architecture), 5) if known else ""
                raise InputError(
                    f"clip: got {name!r}, expected a folder, a file or a pretrained model of open_clip, such as "
                    + (f"{architecture}/ with one of {tags}" if tags else "ViT-B-32/openai")
                )
            model = open_clip.create_model(source, require_pretrained=True, **options)
            if (folder / LEVEL_FILE).is_file():
                state = read_safetensors(folder / LEVEL_FILE, "clip")[1]
                conv = make_noise_aware(model)
                own = {key: value for key, value in conv.state_dict().items() if not key.startswith("conv.")}
                check_state(own, state, "clip")
                conv.load_state_dict(state, strict=False)
            _check_finite(model, name)
            config = open_clip.get_model_config(source)
            if options.get("force_quick_gelu"):
                config["quick_gelu"] = True
            tokenizer = _load_tokenizer(source, config.get("text_cfg", {}))
            return cls(model, tokenizer, dict(model.visual.preprocess_cfg), name, config)
        except ImportError as error:
            raise InputError(f"clip: {name} needs a package that is not installed ({first_line(error)})") from error
        except InputError:
            raise
        except Exception as error:  # open_clip raises many kinds for a folder that is not right
            raise InputError(f"clip: {name} can't be loaded ({first_line(error)})") from error

    def to(self, device: torch.device | str) -> "Clip":
        self.model.to(device)
        return self

    @property
    def hash(self) -> str:
        """SHA-256 over names and values of the weights, 16 digits; computed once."""
        self.keep_hash()
        return self._hash

    def keep_hash(self) -> None:
        """Compute the hash now, if it is not known yet."""
        self._hash = self._hash or state_hash(self.model.state_dict())

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str], normalise: bool = True) -> Tensor:
        """(N, D), of unit length unless ``normalise`` is False; the last texts that were encoded are kept.

        Raises:
            InputError: where a text is empty or longer than the context.
        """
        device = next(self.model.parameters()).device
        for text in dict.fromkeys(texts):
            if text not in self._texts:
                self.check_length(text)
                with torch.autocast(device.type, enabled=False):
                    features = self.model.encode_text(self.tokenizer([text]).to(device))
                self._texts[text] = features.float()[0]
        found = torch.stack([self._texts[text].to(device) for text in texts])
        for text in list(self._texts)[: max(0, len(self._texts) - MOST_TEXTS)]:
            del self._texts[text]
        return F.normalize(found, dim=-1) if normalise else found

    def check_length(self, text: str) -> None:
        """Raise :class:`InputError` where a text is empty or longer than the context."""
        if not text.strip():
            raise InputError("text: got an empty text, expected a sentence that says what to draw")
        over = count_tokens(self.tokenizer, text) - self.context_length
        if over > 0:
            raise InputError(
                f"text: {shorten(text)} is {over} tokens too long for this CLIP, which reads {self.context_length}"
            )

    def encode_image(self, image: Tensor, alpha_bar: Tensor | float = 1.0, normalise: bool = True) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, D), of unit length unless ``normalise`` is False; differentiable, float32.

        A noise-aware model takes x_t, and ``alpha_bar`` of its t, one for all or (B,); another model ignores the level.
        """
        return self.encode_pixels(preprocess(image.float(), self.preprocess), alpha_bar, normalise)

    def encode_pixels(self, pixels: Tensor, alpha_bar: Tensor | float = 1.0, normalise: bool = True) -> Tensor:
        """The same of what :func:`preprocess` returns."""
        encode = self.model.encode_image
        if self.noise_aware:
            pixels = with_noise_level(pixels, alpha_bar)
        with torch.autocast(pixels.device.type, enabled=False):
            recompute = self.checkpointing and torch.is_grad_enabled()
            features = checkpoint(encode, pixels, use_reentrant=False) if recompute else encode(pixels)
            return F.normalize(features.float(), dim=-1) if normalise else features.float()


def count_tokens(tokenizer: Any, text: str) -> int:
    """How many tokens a text is, with those of its start and its end; at least so many where it is sure to fit."""
    most = len(text.encode()) + 2  # no token is shorter than a byte
    if most <= tokenizer.context_length:
        return most
    if hasattr(tokenizer, "encode"):
        return len(tokenizer.encode(text)) + 2
    return len(tokenizer.tokenizer(text).input_ids)  # open_clip's wrapper of a tokenizer of transformers


def text_cosines(clip: Clip, image: Tensor, texts: Sequence[Sequence[Part]]) -> Tensor:
    """(B, T): the cosine of each picture, (B, C, H, W) in [-1, 1], and each text.

    Of a text of several parts it is Σ w·cosine / Σ |w|.
    """
    sentences = list(dict.fromkeys(part.text for parts in texts for part in parts))
    cosines = clip.encode_image(image) @ clip.encode_text(sentences).T  # (B, sentences)
    if all(len(parts) == 1 and parts[0].weight == 1 for parts in texts):
        return cosines[:, [sentences.index(parts[0].text) for parts in texts]]
    weights = cosines.new_zeros(len(sentences), len(texts))
    for column, parts in enumerate(texts):
        for part in parts:
            weights[sentences.index(part.text), column] += part.weight / sum(abs(each.weight) for each in parts)
    return cosines @ weights


def _check_config(file: Path) -> None:
    """Refuse what open_clip would take hours for, or what would fail at the first picture."""
    config = read_json(file, "clip")
    model, pictures = (config.get(key) or {} for key in ("model_cfg", "preprocess_cfg"))
    for part in ("vision_cfg", "text_cfg"):
        layers = (model.get(part) or {}).get("layers", 1)
        if any(type(each) is int and each > MOST_LAYERS for each in (layers if isinstance(layers, list) else [layers])):
            raise InputError(f"clip: got {shorten(layers)} layers in {shorten(file)}, expected at most {MOST_LAYERS}")
        for key in WHOLE:
            value = (model.get(part) or {}).get(key, 1)
            each = value if isinstance(value, list) and value else [value]
            if not all(type(number) is int and 0 < number < 2**31 for number in each):
                raise InputError(
                    f"clip: got {shorten(value)} for {key} in {shorten(file)}, expected a whole number above 0"
                )
    for key in ("mean", "std"):
        if key in pictures and not fits(tuple[float, float, float], pictures[key]):
            raise InputError(f"clip: got {shorten(pictures[key])} for {key} in {shorten(file)}, expected three numbers")
    if min(pictures.get("std", (1,))) < LEAST_STD:
        raise InputError(f"clip: got {shorten(pictures['std'])} for std in {shorten(file)}, expected numbers above 0")
    interpolation = pictures.get("interpolation", "bicubic")
    if interpolation not in ("bicubic", "bilinear"):
        raise InputError(
            f"clip: got {shorten(interpolation)} for interpolation in {shorten(file)}, expected bicubic or bilinear"
        )


def _check_finite(model: nn.Module, name: str) -> None:
    for key, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise InputError(f"clip: {shorten(name)} has values that are not finite ({key}), expected finite numbers")


def _from_openai(file: Path) -> Any:
    """The model of a TorchScript archive as OpenAI publishes them."""
    from open_clip.model import build_model_from_openai_state_dict

    if not is_torchscript(file):
        raise InputError(
            f"clip: {shorten(file)} is no TorchScript archive, so it does not say its architecture; use "
            "ARCHITECTURE/FILE, such as ViT-B-32-quickgelu/FILE for OpenAI's weights"
        )
    state = read_torchscript(file, "clip")
    return build_model_from_openai_state_dict(state, cast_dtype=torch.float32)


def _read_sizes(model: Any) -> dict[str, Any]:
    """The ``model_cfg`` of a model of OpenAI's: by it a folder of the same sizes can be saved."""
    visual, size = model.visual, model.visual.image_size
    vision: dict[str, Any] = {"image_size": size if isinstance(size, int) else size[0]}
    if hasattr(visual, "transformer"):
        vision |= {"layers": len(visual.transformer.resblocks), "patch_size": visual.conv1.kernel_size[0]}
        vision |= {"width": visual.conv1.out_channels}
    else:
        stages = (visual.layer1, visual.layer2, visual.layer3, visual.layer4)
        vision |= {"layers": [len(stage) for stage in stages], "width": visual.layer1[0].conv1.out_channels}
    blocks = model.transformer.resblocks
    text = {"context_length": model.context_length, "vocab_size": model.vocab_size, "layers": len(blocks)}
    text |= {"width": model.ln_final.weight.shape[0], "heads": blocks[0].attn.num_heads}
    return {"embed_dim": model.text_projection.shape[1], "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}


def preprocess(image: Tensor, config: dict[str, Any]) -> Tensor:
    """Pictures in [-1, 1] as CLIP wants them: in RGB, resized to its size with antialias, by its own mean and std.

    The whole picture is seen: one that is not square is squeezed into CLIP's square, and nothing is cut off.
    """
    size = config["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    pixels = (to_rgb(image) + 1) / 2
    if pixels.shape[-2:] != size:
        pixels = F.interpolate(pixels, size, mode=config["interpolation"], antialias=True, align_corners=False)
    mean, std = (pixels.new_tensor(config[key])[:, None, None] for key in ("mean", "std"))
    return (pixels - mean) / std


def new_model(model_cfg: dict[str, Any]) -> nn.Module:
    """A new open_clip model from ``embed_dim``, ``vision_cfg`` and ``text_cfg``, with random weights."""
    from open_clip import CLIP

    return put_tokens_first(CLIP(**model_cfg))


def check_new_model(model_cfg: dict[str, Any]) -> None:
    """Raise :class:`InputError` for sizes of which :func:`new_model` makes no CLIP that reads pictures and texts."""
    size, length = model_cfg["vision_cfg"].get("image_size", 224), model_cfg["text_cfg"].get("context_length", 77)
    vocabulary = model_cfg["text_cfg"].get("vocab_size", VOCABULARY)
    sizes = size if isinstance(size, list | tuple) else [size]
    if not all(type(each) is int and 0 < each <= MOST_SIDE for each in sizes):
        raise InputError(f"model.vision: got {shorten(size)} for image_size, expected pixels from 1 to {MOST_SIDE}")
    if type(length) is not int or not 3 <= length <= MOST_TOKENS:
        raise InputError(f"model.text: got {shorten(length)} for context_length, expected 3 to {MOST_TOKENS} tokens")
    if type(vocabulary) is not int or not VOCABULARY <= vocabulary <= 10 * VOCABULARY:
        raise InputError(
            f"model.text: got {shorten(vocabulary)} for vocab_size, expected {VOCABULARY}, the tokenizer's"
        )
    if not 0 < model_cfg["embed_dim"] <= MOST_FEATURES:
        raise InputError(f"model.embed_dim: got {shorten(model_cfg['embed_dim'])}, expected 1 to {MOST_FEATURES}")
    try:
        with torch.device("meta"):
            model: Any = new_model(model_cfg)
            model.encode_image(torch.zeros(1, 3, *(sizes * 2)[:2]))
            model.encode_text(torch.zeros(1, length, dtype=torch.long))
    except Exception as error:  # whatever open_clip and torch say of sizes that don't go together
        raise InputError(
            f"model: got sizes of no CLIP ({first_line(error)}); mend embed_dim, vision or text"
        ) from error


def put_tokens_first(model: nn.Module) -> nn.Module:
    """Let the transformers of an open_clip model work on (tokens, pictures, channels); they compute the same.

    With (pictures, tokens, channels), attention sees its input transposed, and torch then copies its weights once for
    each token: two pictures through ViT-B/32 take two seconds in bf16 on a CPU, in place of a tenth of one.
    """
    from open_clip.transformer import Transformer

    transformers: list[Any] = [module for module in model.modules() if type(module) is Transformer]
    for transformer in transformers:
        attentions: list[Any] = [each for each in transformer.modules() if isinstance(each, nn.MultiheadAttention)]
        if len(attentions) == len(transformer.resblocks):  # else it has blocks of its own
            for module in (transformer, *attentions):
                module.batch_first = False
    return model


def make_noise_aware(model: Any) -> NoiseConditionedConv:
    """Give the image tower's first convolution (a ResNet's or a ViT's) the noise level, and return it."""
    model.visual.conv1 = NoiseConditionedConv(model.visual.conv1)
    return model.visual.conv1


@cache
def new_tokenizer(context_length: int) -> Any:
    """CLIP's own byte-pair encoder, made once."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(context_length=context_length)


def save_folder(folder: Path, model: Any, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> None:
    """Write an open_clip folder, weights in half precision, that open_clip loads with ``local-dir:``.

    What a noise-aware model has beyond open_clip's goes to a file of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    inner, outer = "visual.conv1.conv.", "visual.conv1."
    noise_aware = isinstance(model.visual.conv1, NoiseConditionedConv)
    level = {k: v for k, v in half.items() if noise_aware and k.startswith(outer) and not k.startswith(inner)}
    plain = {k.replace(inner, outer): v for k, v in half.items() if k not in level}
    files = {WEIGHTS_FILE: plain} | (
        {LEVEL_FILE: {k.removeprefix(outer): v for k, v in level.items()}} if level else {}
    )
    for name, state in files.items():
        with atomic_write(folder / name) as aside:
            save_file({k: v.contiguous().cpu() for k, v in state.items()}, aside)


def contrastive_loss(rank: int = 0, world_size: int = 1) -> nn.Module:
    """The symmetric InfoNCE loss of CLIP over all devices: ``loss(image_features, text_features, logit_scale)``."""
    from open_clip import ClipLoss

    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)
