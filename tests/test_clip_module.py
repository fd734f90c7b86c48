from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CLIP, randomise, tiny_faces, tiny_trainer

from clipward.datamodules.celebahq import CelebAHQDataModule
from clipward.datamodules.faces import ATTRIBUTES
from clipward.datamodules.streams import StreamDataModule
from clipward.diffusion.schedule import Schedule
from clipward.errors import InputError
from clipward.guidance.objectives import ClipSimilarity
from clipward.lightning_modules.classifier import ClassifierModule
from clipward.lightning_modules.clip import ClipModule
from clipward.lightning_modules.degrade import diffuse
from clipward.lightning_modules.optim import OptimConfig
from clipward.lightning_modules.sharding import Sharded
from clipward.networks.clip import (
    OPENAI_PREPROCESSING,
    Clip,
    check_new_model,
    make_noise_aware,
    new_model,
    preprocess,
    save_folder,
)
from clipward.networks.noise_level import NoiseConditionedConv, with_noise_level
from clipward.networks.vocabulary import check_labels_of


def test_a_new_noise_level_changes_nothing() -> None:
    conv, x = torch.nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8)
    conditioned = NoiseConditionedConv(conv)
    assert torch.equal(conditioned(with_noise_level(x, torch.tensor([0.9, 0.1]))), conv(x))


def test_the_noise_level_is_each_pictures_own() -> None:
    conditioned = randomise(NoiseConditionedConv(torch.nn.Conv2d(3, 8, 3)))
    x = torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1)
    both = conditioned(with_noise_level(x, torch.tensor([0.9, 0.1])))
    assert not torch.allclose(both[0], both[1])
    torch.testing.assert_close(conditioned(with_noise_level(x[:1], 0.1))[0], both[1])


def test_the_noise_level_leaves_no_trace(tmp_path: Path) -> None:
    model = new_model(TINY_CLIP)
    randomise(make_noise_aware(model))
    save_folder(tmp_path, model, TINY_CLIP, {"size": 16, **OPENAI_PREPROCESSING})
    clip, image = Clip.load(str(tmp_path)), torch.rand(3, 3, 16, 16) * 2 - 1
    pixels = preprocess(image, clip.preprocess)
    before = clip.encode_pixels(pixels)
    clip.encode_image(image[:2], 0.1)
    assert torch.equal(clip.encode_pixels(pixels), before)


@pytest.mark.parametrize("tower", ["ViT", "ResNet"])
def test_a_noise_aware_folder_is_read_again_and_open_clip_opens_it_too(tower: str, tmp_path: Path) -> None:
    import open_clip

    config = TINY_CLIP if tower == "ViT" else {**TINY_CLIP, "vision_cfg": RESNET}
    model = new_model(config).eval()
    randomise(make_noise_aware(model))
    save_folder(tmp_path, model.half().float(), config, {"size": 32, **OPENAI_PREPROCESSING})
    clip, image = Clip.load(str(tmp_path)), torch.rand(2, 3, 32, 32) * 2 - 1
    assert clip.noise_aware
    conditioned = clip.model.visual.conv1
    torch.testing.assert_close(conditioned.film.weight, model.visual.conv1.film.weight, atol=1e-3, rtol=1e-3)
    features = [clip.encode_image(image, alpha_bar) for alpha_bar in (1.0, 0.3)]
    assert not torch.allclose(*features, atol=1e-3)
    plain = open_clip.create_model(f"local-dir:{tmp_path}", require_pretrained=True)
    torch.testing.assert_close(plain.visual.conv1.weight, conditioned.conv.weight)


RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 32}


def test_the_noisy_similarity_gives_clip_the_noise_level_and_the_clean_one_does_not(tmp_path: Path) -> None:
    model = new_model(TINY_CLIP)
    randomise(make_noise_aware(model))
    save_folder(tmp_path, model, TINY_CLIP, {"size": 16, **OPENAI_PREPROCESSING})
    clip, image, step = Clip.load(str(tmp_path)), torch.rand(1, 3, 16, 16), Schedule.from_name("linear").step(700, 680)
    text = clip.encode_text(["a man"])
    for noisy, alpha_bar in ((True, step.alpha_bar_t), (False, 1.0)):
        expected = (clip.encode_image(image, alpha_bar) * text).sum(dim=-1)
        assert torch.equal(ClipSimilarity(clip, ["a man"], noisy)(image, step), expected)


def test_it_learns_from_noise_on_top_of_another_clip(tmp_path: Path, tiny_clip: Path) -> None:
    module = ClipModule(
        clip=str(tiny_clip),
        noise_aware=True,
        save_dir=str(tmp_path / "out"),
        levels=[50, 900],
        optim=OptimConfig(learning_rate=1e-2),
    )
    trainer = tiny_trainer(tmp_path, max_steps=8)
    trainer.fit(module, tiny_faces())
    assert {"val/retrieval", "val/retrieval_t50", "val/retrieval_t900"} <= trainer.callback_metrics.keys()
    clip, before = Clip.load(str(tmp_path / "out")), Clip.load(str(tiny_clip))
    assert clip.noise_aware
    assert not before.noise_aware
    assert clip.model.visual.conv1.film.weight.abs().max() > 0
    assert not torch.equal(clip.model.visual.proj, before.model.visual.proj)
    again = ClipModule(clip=str(tiny_clip), save_dir=str(tmp_path / "out"))
    with pytest.raises(InputError, match="not empty"):
        tiny_trainer(tmp_path, max_steps=1).fit(again, tiny_faces())


def test_diffusing_is_the_forward_process() -> None:
    torch.manual_seed(0)
    schedule, image = Schedule.from_name("cosine"), torch.full((4000, 1, 2, 2), 0.5)
    x, alpha_bar = diffuse(image, schedule, [600] * 4000)
    a = schedule.alpha_bar[600].item()
    assert alpha_bar.unique().item() == pytest.approx(a)
    assert x.mean().item() == pytest.approx(0.5 * a**0.5, abs=0.02)
    assert x.var().item() == pytest.approx(1 - a, rel=0.05)
    assert len(diffuse(image[:50], schedule)[1].unique()) > 30


@pytest.mark.parametrize(
    ("part", "sizes", "message"),
    [
        ("vision_cfg", {"image_size": -16}, "model.vision: got -16 for image_size, expected pixels from 1 to"),
        ("vision_cfg", {"head_width": 3}, "model: got sizes of no CLIP"),
        ("vision_cfg", {"bogus": 1}, "model: got sizes of no CLIP"),
        ("text_cfg", {"context_length": "x"}, "model.text: got 'x' for context_length, expected 3 to"),
        ("text_cfg", {"heads": 3}, "model: got sizes of no CLIP"),
        ("text_cfg", {"vocab_size": 10}, "model.text: got 10 for vocab_size, expected 49408, the tokenizer's"),
    ],
)
def test_sizes_of_no_clip_are_refused_before_training(part: str, sizes: dict[str, Any], message: str) -> None:
    check_new_model(TINY_CLIP)
    with pytest.raises(InputError, match=f"^{message}"):
        check_new_model(TINY_CLIP | {part: TINY_CLIP[part] | sizes})


class Labelled:
    """Data that says what its pictures are labelled with."""

    def __init__(self, attributes: dict[str, list[str]] | None) -> None:
        self.attributes = attributes


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (None, "data.labels: got none, expected labels of a, b, as in here"),
        ({"b": ["u", "v"], "a": ["x", "y"]}, "data.labels: got b, a, expected a, b, as in here"),
        ({"a": ["x", "y"]}, "data.labels: got a, expected a, b, as in here"),
        ({"a": ["y", "x"], "b": ["u", "v"]}, "data.labels: got y, x for a, expected x, y, in the order of here"),
    ],
)
def test_labels_of_another_vocabulary_are_refused(attributes: dict[str, list[str]] | None, message: str) -> None:
    vocabulary = {"a": ["x", "y"], "b": ["u", "v"]}
    for good in (Labelled({**vocabulary, "c": ["s", "t"]}), object()):
        check_labels_of(good, vocabulary, "here")
    with pytest.raises(InputError, match=f"^{message}$"):
        check_labels_of(Labelled(attributes), vocabulary, "here")


def test_the_first_caption_that_is_cut_is_named_once(recwarn: pytest.WarningsRecorder) -> None:
    module = ClipModule(**{name.removesuffix("_cfg"): value for name, value in TINY_CLIP.items()})
    module.configure_model()
    image, fits, long = torch.zeros(2, 3, 16, 16), "man " * 14, "man " * 15
    module.features({"caption": [fits, fits]}, image)
    assert not recwarn.list
    for _ in range(2):
        module.features({"caption": [fits, long]}, image)
    said = [str(each.message) for each in recwarn.list]
    assert said == [f"data.caption_column: {long!r}, and perhaps others, is cut to the CLIP's 16 tokens"]


@pytest.mark.parametrize("pictures", [CelebAHQDataModule, StreamDataModule])
def test_a_fit_asks_the_data_for_captions_and_labels(tmp_path: Path, pictures: type) -> None:
    bare = pictures(str(tmp_path), size=16, batch_size=1)
    with pytest.raises(InputError, match=r"^data.caption_column: got none, expected the column of the captions"):
        ClipModule(**{name.removesuffix("_cfg"): value for name, value in TINY_CLIP.items()}).check_data(bare)
    with pytest.raises(InputError, match=r"^data.labels: got none, expected labels of gender, age, hair"):
        ClassifierModule("faces", width=8).check_data(bare)
    ClassifierModule("faces", width=8).check_data(tiny_faces())
    labels = {name: dict.fromkeys(values, "x") for name, values in [*ATTRIBUTES.items(), ("more", ("a", "b"))]}
    further = pictures(str(tmp_path), size=16, batch_size=1, labels=labels)
    with pytest.raises(InputError, match=r"^data.labels: got more, which model.vocabulary has not; leave it out$"):
        ClassifierModule("faces", width=8).check_data(further)


@pytest.mark.parametrize("name", ["ClipModule", "ClassifierModule"])
def test_networks_that_can_not_be_sharded_are_refused(name: str) -> None:
    tiny = {each.removesuffix("_cfg"): value for each, value in TINY_CLIP.items()}
    module = ClipModule(**tiny) if name == "ClipModule" else ClassifierModule("faces", width=8)
    strategy = Sharded()
    strategy.connect(module)
    with pytest.raises(
        InputError, match=r"^trainer.strategy: got fsdp, which serves diffusion models alone; use -c ddp"
    ):
        strategy.setup_environment()
