from pathlib import Path

import pytest
import torch
from conftest import TINY_CLIP
from PIL import Image

from diffusion.clip import Clip, preprocess
from diffusion.guidance import GuidanceError
from diffusion.losses import ClipSimilarity
from diffusion.schedule import Schedule
from errors import InputError
from lightning_modules.clip import OPENAI_PREPROCESSING
from lightning_modules.degrade import degrade


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
    both = ClipSimilarity(clip, texts)(image)
    torch.testing.assert_close(both[1], ClipSimilarity(clip, texts[1:])(image[1:])[0])
    assert both.abs().max() <= 1
    assert not any(p.requires_grad for p in clip.model.parameters())


def test_a_flat_picture_is_an_error_that_says_where(tiny_clip: Path) -> None:
    loss = ClipSimilarity(Clip.load(str(tiny_clip)), ["a man", "a man"])
    image = torch.stack([torch.rand(3, 16, 16), torch.full((3, 16, 16), -0.99)])
    with pytest.raises(GuidanceError, match="near-constant picture at t=7") as raised:
        loss(image, Schedule.named("linear").step(7, 6))
    assert raised.value.position == 1
    assert loss(image).shape == (2,)  # a finished picture may be as it likes


def test_texts_are_encoded_once(tiny_clip: Path) -> None:
    clip = Clip.load(str(tiny_clip))
    first = clip.encode_text(["a man"])
    clip.model.encode_text = None
    assert torch.equal(clip.encode_text(["a man", "a man"])[1], first[0])


def test_a_text_that_does_not_fit_is_refused_with_the_excess(tiny_clip: Path) -> None:
    clip = Clip.load(str(tiny_clip))
    fits = " ".join(["man"] * 14)
    clip.encode_text([fits])
    with pytest.raises(InputError, match="is 3 tokens too long for this CLIP, which reads 16"):
        clip.encode_text([fits + " man man man"])
    with pytest.raises(InputError, match="empty"):
        clip.encode_text(["  "])


def test_a_clip_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder nor a pretrained model"):
        Clip.load("ViT-B-32/nothing")
    with pytest.raises(InputError, match=r"has no open_clip_config\.json"):
        Clip.load(str(tmp_path))


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
