from pathlib import Path

import pytest
import torch
from conftest import tiny_module, tiny_trainer

from clipward.datamodules.prompts import PromptDataModule
from clipward.errors import InputError
from clipward.guidance.contrasts import contrast_captions, load_contrasts
from clipward.guidance.methods import METHODS
from clipward.guidance.objectives import ContrastiveLogLikelihood
from clipward.lightning_modules.ddpm import DDPMModule
from clipward.sampler import Sampler
from clipward.sampling_config import SamplingConfig


@pytest.mark.parametrize("method", METHODS)
def test_every_method_guides_and_leaves_what_has_no_weight_alone(
    method: str, tmp_path: Path, tiny_weights: Path, tiny_clip: Path, noisy_clip: str, classifier: str
) -> None:
    sampling = SamplingConfig(method=method, skip_steps=4)
    module = tiny_module(
        weights=str(tiny_weights), clip=str(tiny_clip), noisy_clip=noisy_clip, classifier=classifier, sampling=sampling
    )
    weight = METHODS[method].weight * (1 if method == "polyak" else 10)  # more would saturate every pixel
    data = PromptDataModule(text=["an old man with a smile"], guidance_weight=[0.0, weight], n_samples=1)
    plain, off, guided = tiny_trainer(tmp_path).predict(module, data)[0]["image"]
    assert torch.equal(plain, off)
    assert (guided - plain).abs().max() > 1e-5
    provenance = module.provenance()
    assert provenance["repeats"] == METHODS[method].repeats
    used = {"clip": "clip_hash", "noisy clip": "noisy_clip_hash", "classifier": "classifier_hash"}
    assert len(provenance[used[METHODS[method].guided_by]]) == 16


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        ("contrastive", {}, "noisy_clip: got none, expected .* the method looks at noisy pictures"),
        ("glide", {"noisy_clip": "{clip}"}, "noisy_clip: got .* no noise level; expected one that configs/faces_noisy"),
        ("classifier_guidance", {}, "classifier: got none"),
        ("clip_guidance", {"clip": None}, "clip: got none"),
    ],
)
def test_a_model_that_is_missing_or_of_the_wrong_kind_is_named(
    method: str, kwargs: dict, message: str, tmp_path: Path, tiny_weights: Path, tiny_clip: Path
) -> None:
    given = {"clip": str(tiny_clip)} | {k: v and v.format(clip=tiny_clip) for k, v in kwargs.items()}
    module = tiny_module(weights=str(tiny_weights), sampling=SamplingConfig(method=method), **given)
    with pytest.raises(InputError, match=message):
        tiny_trainer(tmp_path).predict(module, PromptDataModule(text=["a man"], n_samples=1))


GROUPS = [["old", "young"], ["man", "woman"], ["no glasses", "glasses"], ["red hair", "black hair", "grey hair"]]


def test_a_contrast_caption_exchanges_one_phrase() -> None:
    assert contrast_captions("An old man", GROUPS[0]) == ["A young man"]
    assert contrast_captions("a young man and a young owl", GROUPS[0]) == ["an old man and an old owl"]
    assert contrast_captions("an old woman", GROUPS[1]) == ["an old man"]
    assert contrast_captions("a old man with an hat", GROUPS[0]) == ["a young man with an hat"]
    assert contrast_captions("a man with No glasses", GROUPS[2]) == ["a man with glasses"]
    assert contrast_captions("a man with glasses", GROUPS[2]) == ["a man with no glasses"]
    assert contrast_captions("red hair", GROUPS[3]) == ["black hair", "grey hair"]
    assert contrast_captions("a human with reddish hair", [*GROUPS[1], "red"]) == []


def test_a_phrase_may_have_several_spellings() -> None:
    group = ["black hair", "blond hair / blonde hair", "gray hair / grey hair"]
    assert contrast_captions("a man with grey hair", group) == ["a man with black hair", "a man with blond hair"]
    assert contrast_captions("black hair", group) == ["blond hair", "gray hair"]
    assert load_contrasts([group]) == [group]
    with pytest.raises(InputError, match="contrasts: got"):
        load_contrasts([["black hair", "gray hair / Black hair"]])


def answers(module: DDPMModule, text: list[str], image: torch.Tensor, method: str = "contrastive") -> torch.Tensor:
    module.configure_model()
    objectives = module.models.objectives(METHODS[method], text, None, torch.device("cpu"))
    return objectives.log_likelihood(image, module.sampler.list_steps()[0])


def test_the_log_likelihood_compares_with_contrast_captions_group_by_group(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path, noisy_clip: str
) -> None:
    clips = {"clip": str(tiny_clip), "noisy_clip": noisy_clip}
    module = tiny_module(**clips, contrasts=GROUPS, neutral="a face")
    image, text = torch.randn(4, 3, 16, 16), ["an old man", "a girl with red hair", "an old man", "a tree"]
    found = answers(module, text, image)
    clip, step = module.models.noisy_clip, module.sampler.list_steps()[0]
    features = clip.encode_image(image, step.alpha_bar_t)

    def log_p(i: int, *captions: str) -> torch.Tensor:
        logits = clip.model.logit_scale.exp() * clip.encode_text([text[i], *captions]) @ features[i]
        return logits.log_softmax(0)[0]

    old_man = [log_p(i, "a young man") + log_p(i, "an old woman") + log_p(i, "a face") for i in (0, 2)]
    girl = log_p(1, "a girl with black hair", "a girl with grey hair") + log_p(1, "a face")
    tree = log_p(3, "a face")
    torch.testing.assert_close(found, torch.stack([old_man[0], girl, old_man[1], tree]), atol=1e-5, rtol=1e-5)
    alone = torch.cat([answers(module, [text[i]], image[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=1e-6)

    without = answers(tiny_module(**clips, contrasts=GROUPS), text, image)
    logit = clip.model.logit_scale.exp() * (features * clip.encode_text(text)).sum(dim=1)
    torch.testing.assert_close(without[3], logit[3])  # it has no contrast captions
    torch.testing.assert_close(answers(module, text, image, "glide"), logit)  # as its authors have it


def test_a_contrast_caption_that_is_too_long_names_its_text(noisy_clip: str, tiny_clip: Path) -> None:
    module = tiny_module(clip=str(tiny_clip), noisy_clip=noisy_clip, contrasts=[["old", "very " * 20 + "young"]])
    wanted = r"very young man' is .* tokens too long for .* a contrast caption of 'an old man', by contrasts"
    with pytest.raises(InputError, match=wanted):
        answers(module, ["an old man"], torch.randn(1, 3, 16, 16))


def test_a_picture_far_from_all_contrasts_still_has_a_gradient(noisy_clip: str, tiny_clip: Path) -> None:
    module = tiny_module(clip=str(tiny_clip), noisy_clip=noisy_clip, contrasts=GROUPS)
    module.configure_model()
    clip = module.models.noisy_clip
    image = torch.randn(1, 3, 16, 16).requires_grad_()
    features = clip.encode_image(image, module.sampler.list_steps()[0].alpha_bar_t)
    texts = sorted(["an old man", "a young man"], key=lambda text: (features @ clip.encode_text([text]).T).item())
    apart = (features @ (clip.encode_text([texts[1]]) - clip.encode_text([texts[0]])).T).item()
    with torch.no_grad():
        clip.model.logit_scale.fill_(torch.tensor(40 / apart).log())  # log p = -e⁻⁴⁰
    score = ContrastiveLogLikelihood(clip, texts[1:], GROUPS[:1], noisy=True)(image, module.sampler.list_steps()[0])
    gradient = torch.autograd.grad(score.sum(), image)[0]
    assert 0 < gradient.abs().max() < 1e-10


@pytest.mark.parametrize("group", [["old"], ["old", "Old"], ["old", " "]])
def test_a_group_of_one_phrase_is_refused(group: list[str]) -> None:
    with pytest.raises(InputError, match=r"contrasts: .* two or more different phrases that exclude each other"):
        tiny_module(contrasts=[group])


def test_an_interval_without_a_step_is_refused(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> None:
    sampling = SamplingConfig(interval=(0.3, 0.4), skip_steps=4)
    module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip), sampling=sampling)
    with pytest.raises(InputError, match=r"sampling.interval: no step lies in \(30, 40\]"):
        tiny_trainer(tmp_path).predict(module, PromptDataModule(text=["a man"], n_samples=1))
    with pytest.raises(InputError, match="two rising numbers from 0 to 1"):
        SamplingConfig(interval=(0.5, 0.2))


def test_a_noise_aware_clip_guides_as_a_clean_one(tmp_path: Path, tiny_weights: Path, noisy_clip: str) -> None:
    sampling = SamplingConfig(method="clip_guidance_pixel", skip_steps=3)
    module = tiny_module(weights=str(tiny_weights), clip=noisy_clip, sampling=sampling)
    data = PromptDataModule(text=["a man"], guidance_weight=[10], n_samples=3, unguided=False, micro_batch=2)
    assert sum(len(batch["image"]) for batch in tiny_trainer(tmp_path).predict(module, data)) == 3


@pytest.mark.parametrize("name", ["faces", "photographs"])
def test_contrast_groups_ship(name: str) -> None:
    assert ["old", "young"] in load_contrasts(name)


def test_contrast_groups_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rooms.yaml"
    path.write_text("- [a kitchen, a bedroom]\n- [bright, dark]\n")
    assert load_contrasts(str(path)) == [["a kitchen", "a bedroom"], ["bright", "dark"]]
    path.write_text("- kitchen\n")
    with pytest.raises(InputError, match="contrasts: got 'kitchen'"):
        load_contrasts(str(path))
    with pytest.raises(InputError, match=r"contrasts: got 'birds', expected .* faces, photographs"):
        load_contrasts("birds")


@pytest.mark.parametrize(
    ("method", "text", "message"),
    [
        ("clip_guidance", "a man " * 9, "text: .* tokens too long for this CLIP, which reads 16"),
        ("contrastive", "an old " + "fine " * 11 + "man", "is a contrast caption of"),
        ("classifier_guidance", "a dog", "the classifier finds nothing to look for in 'a dog'"),
    ],
)
def test_a_text_that_cannot_guide_is_found_before_anything_is_drawn(
    method: str, text: str, message: str, tmp_path: Path, tiny_weights: Path, tiny_clip: Path, noisy_clip: str,
    classifier: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    module = tiny_module(
        weights=str(tiny_weights), clip=str(tiny_clip), noisy_clip=noisy_clip, classifier=classifier,
        contrasts=[["old", "very very very old"]], sampling=SamplingConfig(method=method, skip_steps=2),
    )  # fmt: skip
    monkeypatch.setattr(Sampler, "sample", lambda *_: pytest.fail("drawn before the texts were checked"))
    with pytest.raises(InputError, match=message):
        tiny_trainer(tmp_path).predict(module, PromptDataModule(text=["a man", text], n_samples=1))
