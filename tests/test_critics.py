from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_CLIP, randomise, tiny_module, tiny_trainer

from clipward.datamodules.prompts import PromptDataModule
from clipward.errors import InputError
from clipward.guidance.contrasts import opposed
from clipward.guidance.methods import METHODS
from clipward.guidance.objectives import ClipAnswer
from clipward.lightning_modules.ddpm import DDPMModule
from clipward.networks.classifier import Classifier, save_classifier
from clipward.networks.clip import OPENAI_PREPROCESSING, make_noise_aware, new_model, save_folder
from clipward.sampler import SamplingConfig

CONFIG = yaml.safe_load((Path(__file__).parent.parent / "configs/faces_classifier.yaml").read_text())
VOCABULARY = CONFIG["model"]["init_args"]["vocabulary"]


@pytest.fixture(scope="session")
def noisy_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("noisy_clip")
    torch.manual_seed(0)
    model = new_model(TINY_CLIP)
    randomise(make_noise_aware(model))
    save_folder(folder, model, TINY_CLIP, {"size": 16, **OPENAI_PREPROCESSING})
    return str(folder)


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    torch.manual_seed(0)
    save_classifier(path, Classifier(VOCABULARY, 8, noise_aware=True))
    return str(path)


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
    assert len(provenance[used[METHODS[method].critic]]) == 16


@pytest.mark.parametrize(
    ("method", "kwargs", "message"),
    [
        ("evidence", {}, "noisy_clip: none given, for a method that looks at noisy pictures"),
        ("glide", {"noisy_clip": "{clip}"}, "noisy_clip: .* knows no noise; one that configs/faces_noisy_clip"),
        ("classifier_guidance", {}, "classifier: none given"),
        ("clip_guidance", {"clip": None}, "clip: none given"),
    ],
)
def test_a_critic_that_is_missing_or_of_the_wrong_kind_is_named(
    method: str, kwargs: dict, message: str, tmp_path: Path, tiny_weights: Path, tiny_clip: Path
) -> None:
    given = {"clip": str(tiny_clip)} | {k: v and v.format(clip=tiny_clip) for k, v in kwargs.items()}
    module = tiny_module(weights=str(tiny_weights), sampling=SamplingConfig(method=method), **given)
    with pytest.raises(InputError, match=message):
        tiny_trainer(tmp_path).predict(module, PromptDataModule(text=["a man"], n_samples=1))


GROUPS = [["old", "young"], ["man", "woman"], ["no glasses", "glasses"], ["red hair", "black hair", "grey hair"]]


def test_a_text_is_opposed_by_itself_with_one_phrase_exchanged() -> None:
    assert opposed("An old man", GROUPS[0]) == ["A young man"]
    assert opposed("a young man and a young owl", GROUPS[0]) == ["an old man and an old owl"]
    assert opposed("an old woman", GROUPS[1]) == ["an old man"]
    assert opposed("a old man with an hat", GROUPS[0]) == ["a young man with an hat"]
    assert opposed("a man with No glasses", GROUPS[2]) == ["a man with glasses"]
    assert opposed("a man with glasses", GROUPS[2]) == ["a man with no glasses"]
    assert opposed("red hair", GROUPS[3]) == ["black hair", "grey hair"]
    assert opposed("a human with reddish hair", [*GROUPS[1], "red"]) == []


def answers(module: DDPMModule, text: list[str], image: torch.Tensor, method: str = "evidence") -> torch.Tensor:
    module.configure_model()
    critic = module.critics.critic(METHODS[method], text, None, torch.device("cpu"))
    return critic.evidence(image, module.steps[0])


def test_evidence_is_the_probability_among_opposites_kind_by_kind(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path, noisy_clip: str
) -> None:
    clips = {"clip": str(tiny_clip), "noisy_clip": noisy_clip}
    module = tiny_module(**clips, opposites=GROUPS, neutral="a face")
    image, text = torch.randn(4, 3, 16, 16), ["an old man", "a girl with red hair", "an old man", "a tree"]
    found = answers(module, text, image)
    clip, step = module.critics.noisy_clip, module.steps[0]
    features = clip.encode_image(image, step.alpha_bar_t)

    def log_p(i: int, *rivals: str) -> torch.Tensor:
        logits = clip.model.logit_scale.exp() * clip.encode_text([text[i], *rivals]) @ features[i]
        return logits.log_softmax(0)[0]

    old_man = [log_p(i, "a young man") + log_p(i, "an old woman") + log_p(i, "a face") for i in (0, 2)]
    girl = log_p(1, "a girl with black hair", "a girl with grey hair") + log_p(1, "a face")
    tree = log_p(3, "a face")
    torch.testing.assert_close(found, torch.stack([old_man[0], girl, old_man[1], tree]), atol=1e-5, rtol=1e-5)
    alone = torch.cat([answers(module, [text[i]], image[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(found, alone, atol=1e-6, rtol=0)

    without = answers(tiny_module(**clips, opposites=GROUPS), text, image)
    logit = clip.model.logit_scale.exp() * (features * clip.encode_text(text)).sum(dim=1)
    torch.testing.assert_close(without[3], logit[3])  # nothing is known that it could be told from
    torch.testing.assert_close(answers(module, text, image, "glide"), logit)  # as its authors have it


def test_a_rival_that_is_too_long_for_the_clip_is_told_of_by_its_text(noisy_clip: str, tiny_clip: Path) -> None:
    module = tiny_module(clip=str(tiny_clip), noisy_clip=noisy_clip, opposites=[["old", "very " * 20 + "young"]])
    wanted = r"very young man' is .* tokens too long for .* a rival of 'an old man', by opposites"
    with pytest.raises(InputError, match=wanted):
        answers(module, ["an old man"], torch.randn(1, 3, 16, 16))


def test_a_picture_that_is_far_from_all_opposites_still_has_a_gradient(noisy_clip: str, tiny_clip: Path) -> None:
    module = tiny_module(clip=str(tiny_clip), noisy_clip=noisy_clip, opposites=GROUPS)
    module.configure_model()
    clip = module.critics.noisy_clip
    image = torch.randn(1, 3, 16, 16).requires_grad_()
    features = clip.encode_image(image, module.steps[0].alpha_bar_t)
    texts = sorted(["an old man", "a young man"], key=lambda text: (features @ clip.encode_text([text]).T).item())
    apart = (features @ (clip.encode_text([texts[1]]) - clip.encode_text([texts[0]])).T).item()
    with torch.no_grad():
        clip.model.logit_scale.fill_(torch.tensor(40 / apart).log())  # log p = -e⁻⁴⁰
    score = ClipAnswer(clip, texts[1:], GROUPS[:1], noisy=True)(image, module.steps[0])
    gradient = torch.autograd.grad(score.sum(), image)[0]
    assert 0 < gradient.abs().max() < 1e-10


@pytest.mark.parametrize("group", [["old"], ["old", "Old"], ["old", " "]])
def test_a_group_that_opposes_nothing_is_refused(group: list[str]) -> None:
    with pytest.raises(InputError, match=r"opposites: .* two or more phrases that exclude each other would do"):
        tiny_module(opposites=[group])


def test_an_interval_without_a_step_is_refused(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> None:
    sampling = SamplingConfig(interval=(0.3, 0.4), skip_steps=4)
    module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip), sampling=sampling)
    with pytest.raises(InputError, match=r"sampling.interval: no step lies in \(30, 40\]"):
        tiny_trainer(tmp_path).predict(module, PromptDataModule(text=["a man"], n_samples=1))
    with pytest.raises(InputError, match="two rising numbers from 0 to 1"):
        SamplingConfig(interval=(0.5, 0.2))
