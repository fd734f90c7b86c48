from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_CLIP, randomise, tiny_module, tiny_trainer

from datamodules.prompts import PromptDataModule
from diffusion.classifier import Classifier, save_classifier
from diffusion.clip import OPENAI_PREPROCESSING, make_noise_aware, new_model, save_folder
from diffusion.methods import METHODS, SamplingConfig
from errors import InputError

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


def test_a_bank_makes_the_evidence_a_probability(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path, noisy_clip: str
) -> None:
    module = tiny_module(clip=str(tiny_clip), noisy_clip=noisy_clip, bank=["a woman", "a girl", "a man"])
    image, text = torch.randn(2, 3, 16, 16), ["a man", "an old man"]
    module.configure_model()
    step = module.steps[0]
    clip = module.critics.noisy_clip
    features = clip.encode_image(image, step.alpha_bar_t)
    logits = clip.model.logit_scale.exp() * features @ clip.encode_text(["a man", "an old man", "a woman", "a girl"]).T
    critic = module.critics.critic("noisy clip", text, None, torch.device("cpu"))
    found = critic.evidence(image, step)
    torch.testing.assert_close(found[0], logits[0, [0, 2, 3]].log_softmax(0)[0])
    torch.testing.assert_close(found[1], logits[1].log_softmax(0)[1])


def test_an_interval_without_a_step_is_refused(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> None:
    sampling = SamplingConfig(interval=(0.3, 0.4), skip_steps=4)
    module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip), sampling=sampling)
    with pytest.raises(InputError, match=r"sampling.interval: no step lies in \(30, 40\]"):
        tiny_trainer(tmp_path).predict(module, PromptDataModule(text=["a man"], n_samples=1))
    with pytest.raises(InputError, match="two rising numbers from 0 to 1"):
        SamplingConfig(interval=(0.5, 0.2))
