import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY_CLIP
from PIL import Image
from safetensors.torch import save_file

from clipward.diffusion.schedule import Schedule
from clipward.errors import InputError
from clipward.guidance.objectives import ClipSimilarity, Ensemble
from clipward.lightning_modules.degrade import degrade
from clipward.networks.clip import OPENAI_PREPROCESSING, Clip, new_model, preprocess, save_folder

STEP = Schedule.from_name("linear").step(700, 680)


def test_the_folder_is_one_that_open_clip_loads(tiny_clip: Path) -> None:
    import open_clip

    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}", require_pretrained=True)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_clip}")
    ours = Clip.load(str(tiny_clip))
    text = ["an old man with a smile"]
    with torch.no_grad():
        theirs = torch.nn.functional.normalize(model.eval().encode_text(tokenizer(text)), dim=-1)
    torch.testing.assert_close(ours.encode_text(text), theirs)
    assert transform.transforms[0].size == TINY_CLIP["vision_cfg"]["image_size"]


def test_it_computes_what_open_clip_computes(tiny_clip: Path) -> None:
    import open_clip

    found, own = Clip.load(str(tiny_clip)), open_clip.create_model(f"local-dir:{tiny_clip}").eval()
    assert own.visual.transformer.batch_first
    assert not any(getattr(module, "batch_first", False) for module in found.model.modules())
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = found.tokenizer(["a man", "a smiling woman", "an old man with a hat"])
    with torch.no_grad():
        torch.testing.assert_close(found.model.encode_image(pixels), own.encode_image(pixels), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.model.encode_text(texts), own.encode_text(texts), atol=1e-5, rtol=1e-4)


def test_preprocessing_is_that_of_open_clip_and_differentiable(tiny_clip: Path) -> None:
    import open_clip

    transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_clip}")[2]
    smooth = torch.nn.functional.interpolate(0.2 + 0.6 * torch.rand(1, 3, 6, 6), 64, mode="bicubic")[0].clamp(0, 1)
    pixels = (smooth * 255).round()
    picture = Image.fromarray(pixels.permute(1, 2, 0).byte().numpy())
    image = (pixels / 127.5 - 1)[None].requires_grad_()
    ours = preprocess(image, {"size": 16, **OPENAI_PREPROCESSING})
    torch.testing.assert_close(ours[0], transform(picture), atol=0.03, rtol=0)
    ours.sum().backward()
    assert (image.grad != 0).all()


def test_a_picture_scores_against_its_own_text(tiny_clip: Path) -> None:
    clip = Clip.load(str(tiny_clip))
    texts, image = ["a man", "a girl with red hair"], torch.rand(2, 3, 16, 16) * 2 - 1
    both = ClipSimilarity(clip, texts)(image, STEP)
    torch.testing.assert_close(both[1], ClipSimilarity(clip, texts[1:])(image[1:], STEP)[0])
    assert both.abs().max() <= 1
    assert not any(p.requires_grad for p in clip.model.parameters())


def test_texts_are_encoded_once(tiny_clip: Path) -> None:
    clip = Clip.load(str(tiny_clip))
    first = clip.encode_text(["a man"])
    clip.model.encode_text = None
    assert torch.equal(clip.encode_text(["a man", "a man"])[1], first[0])


def test_texts_are_not_kept_without_end(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipward.networks.clip.MOST_TEXTS", 2)
    clip = Clip.load(str(tiny_clip))
    texts = ["a man", "a girl", "old", "young"]
    together = clip.encode_text(texts)
    assert torch.equal(torch.cat([clip.encode_text([text]) for text in texts]), together)
    assert list(clip._texts) == texts[2:]


def test_a_text_that_does_not_fit_is_refused_with_the_excess(tiny_clip: Path) -> None:
    clip = Clip.load(str(tiny_clip))
    fits = " ".join(["man"] * 14)
    clip.encode_text([fits])
    with pytest.raises(InputError, match="is 3 tokens too long for this CLIP, which reads 16"):
        clip.encode_text([fits + " man man man"])
    with pytest.raises(InputError, match="empty"):
        clip.encode_text(["  "])


def test_a_clip_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"got 'ViT-B-32/nothing', expected .*ViT-B-32/ with one of openai, "):
        Clip.load("ViT-B-32/nothing")
    with pytest.raises(InputError, match=r"got 'nobody', expected .* such as ViT-B-32/openai"):
        Clip.load("nobody")
    with pytest.raises(InputError, match="clip: ViT-B-32/openai can't be loaded"):
        Clip.load("ViT-B-32/openai")  # there is no network
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP}))
    with pytest.raises(InputError, match="can't be loaded"):
        Clip.load(str(tmp_path))
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(InputError, match=r"a folder without open_clip_config\.json"):
        Clip.load(str(tmp_path))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("model_cfg", {"vision_cfg": {"layers": 10**9}}, "got 1000000000 layers in .*, expected at most 1000"),
        ("model_cfg", {"text_cfg": {"layers": [1, 10**9]}}, r"got \[1, 1000000000\] layers"),
        ("preprocess_cfg", {"mean": []}, r"got \[\] for mean in .*, expected three numbers"),
        ("preprocess_cfg", {"std": [1, 0, 1]}, r"got \[1, 0, 1\] for std in .*, expected numbers above 0"),
        ("preprocess_cfg", {"std": [1, "x", 1]}, r"got \[1, 'x', 1\] for std"),
        ("preprocess_cfg", {"std": [1, -1, 1]}, r"got \[1, -1, 1\] for std in .*, expected numbers above 0"),
        ("preprocess_cfg", {"std": [1, 1e-300, 1]}, r"got \[1, 1e-300, 1\] for std in .*, expected numbers above 0"),
        ("preprocess_cfg", {"interpolation": "x"}, "got 'x' for interpolation in .*, expected bicubic or bilinear"),
    ],
)
def test_a_folder_of_absurd_settings_is_refused(part: str, change: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CLIP, part: change}))
    with pytest.raises(InputError, match=f"^clip: {message}"):
        Clip.load(str(tmp_path))


def test_a_folder_of_weights_that_are_not_finite_is_refused(tmp_path: Path) -> None:
    model = new_model(TINY_CLIP)
    model.visual.proj.data[0, 0] = float("nan")
    save_folder(tmp_path, model, TINY_CLIP, {"size": 16, **OPENAI_PREPROCESSING})
    with pytest.raises(InputError, match=r"^clip: .* has values that are not finite \(visual.proj\)"):
        Clip.load(str(tmp_path))


def test_a_noise_level_of_another_network_is_refused(noisy_clip: str, tmp_path: Path) -> None:
    folder = shutil.copytree(noisy_clip, tmp_path / "clip")
    save_file({"stranger": torch.zeros(3)}, folder / "noise_level.safetensors")
    with pytest.raises(InputError, match=r"^clip: got no key '.*', expected one of shape"):
        Clip.load(str(folder))


def test_degrading_leaves_some_pictures_and_spoils_others() -> None:
    torch.manual_seed(0)
    image = torch.randn(64, 3, 16, 16)
    blurred = degrade(image, max_noise=0, blur=True)
    untouched = (blurred == image).flatten(1).all(dim=1).sum()
    assert 20 <= untouched <= 44
    assert torch.equal(degrade(image, max_noise=0, blur=False), image)
    strength = (degrade(image, max_noise=0.5, blur=False) - image).flatten(1).std(dim=1)
    assert strength.max() < 0.55
    assert strength.min() < 0.1


def test_a_file_of_weights_loads_under_its_architecture(tiny_clip: Path, tmp_path: Path) -> None:
    import open_clip

    (tmp_path / "tiny.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny.json")
    expected, text = Clip.load(str(tiny_clip)), ["a man"]
    torch.save({"state_dict": expected.model.state_dict()}, tmp_path / "weights.pt")
    clip = Clip.load(f"tiny/{tmp_path / 'weights.pt'}")
    assert clip.hash == expected.hash
    assert torch.equal(clip.encode_text(text), expected.encode_text(text))
    assert clip.preprocess["size"] in (16, (16, 16))
    with pytest.raises(
        InputError, match=r"does not say its architecture; use ARCHITECTURE/FILE, such as ViT-B-32-quickgelu/"
    ):
        Clip.load(str(tmp_path / "weights.pt"))
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="can't be loaded"):
        Clip.load(f"tiny/{tmp_path / 'weights.pt'}")


@pytest.mark.parametrize(
    "vision",
    [
        {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        {"image_size": 32, "layers": [1, 2, 1, 1], "width": 64},
    ],
    ids=["ViT", "ResNet"],
)
def test_openais_own_file_knows_its_architecture(tmp_path: Path, vision: dict) -> None:
    config = {
        "embed_dim": 32,
        "vision_cfg": vision,
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
        "quick_gelu": True,
    }
    model = new_model(config).half().float().eval()  # OpenAI publishes half precision

    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, child in model.named_children():
                self.add_module(name, child)
            for name, parameter in model.named_parameters(recurse=False):
                self.register_parameter(name, parameter)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.visual(image)

    image = torch.rand(1, 3, 32, 32)
    torch.jit.trace(Archive(), image, check_trace=False).save(tmp_path / "ViT.pt")
    clip = Clip.load(str(tmp_path / "ViT.pt"))
    assert clip.config == config
    with torch.no_grad():
        torch.testing.assert_close(clip.model.encode_image(image), model.encode_image(image))
        tokens = clip.tokenizer(["a man"])
        torch.testing.assert_close(clip.model.encode_text(tokens), model.encode_text(tokens))


def test_a_tag_brings_the_activation_it_was_trained_with(monkeypatch: pytest.MonkeyPatch, tiny_clip: Path) -> None:
    import open_clip

    given, tiny = {}, Clip.load(str(tiny_clip)).model
    monkeypatch.setattr(open_clip, "create_model", lambda name, **options: given.update(options) or tiny)
    for name, quick_gelu in (("ViT-B-32/openai", True), ("ViT-B-32/laion2b_s34b_b79k", False)):
        Clip.load(name)
        assert given["force_quick_gelu"] == quick_gelu


def test_an_ensemble_is_the_weighted_mean(tiny_clip: Path) -> None:
    clip, image = Clip.load(str(tiny_clip)), torch.rand(2, 3, 16, 16) * 2 - 1
    a, b = (ClipSimilarity(clip, [text] * 2) for text in ("a man", "a girl"))
    both = Ensemble([a, b], [1.0, 3.0])
    torch.testing.assert_close(both(image, STEP), 0.25 * a(image, STEP) + 0.75 * b(image, STEP))
    expected = 0.25 * a.pixel_gradient(image) + 0.75 * b.pixel_gradient(image)
    torch.testing.assert_close(both.pixel_gradient(image), expected)
