"""Texts of several parts, negative texts, and a weight that follows a schedule."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import metadata, tiny_module
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import GROUPS

import clipward
from clipward.cli import main
from clipward.datamodules.prompts import PromptDataModule
from clipward.diffusion.denoiser import Prediction
from clipward.diffusion.sampling import Noise
from clipward.diffusion.schedule import Step
from clipward.errors import InputError
from clipward.evaluation.judges import check_prompt
from clipward.guidance.core import GradientAscent, RefuseFlat, Sum, WeightedTexts
from clipward.guidance.methods import METHODS
from clipward.guidance.weight_schedule import ScheduledGuidance, WeightSchedule
from clipward.networks.clip import Clip
from clipward.networks.vocabulary import find_allowed, load_vocabulary
from clipward.sampler import Sampler
from clipward.sampling_config import SamplingConfig
from clipward.texts import Part, split_negative, split_text


@pytest.fixture(scope="module", autouse=True)
def clips_are_loaded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Clip, "load", lru_cache(Clip.load))
        yield


# the grammar

TEXTS = [
    ("an old man", [("an old man", 1)]),
    ("an old man:2", [("an old man", 2)]),
    ("an old man:2 | a beard:-1", [("an old man", 2), ("a beard", -1)]),
    ("a man|a beard", [("a man", 1), ("a beard", 1)]),
    ("a man:+.5|a dog :1.", [("a man", 0.5), ("a dog", 1)]),
    ("a man:2 ", [("a man", 2)]),
    ("  a man ", [("  a man ", 1)]),  # taken as it is
    ("ratio 3:2", [("ratio 3:2", 1)]),  # a colon after a digit has no weight behind it
    ("at 12:30 | ratio 16:9:2", [("at 12:30", 1), ("ratio 16:9:2", 1)]),
    ("at 12:30 :2", [("at 12:30", 2)]),
    ("Blade Runner 2049 :2", [("Blade Runner 2049", 2)]),
    (r"version\:2", [("version:2", 1)]),
    (r"version\:2:3", [("version:2:3", 1)]),
    (r"version\:2 :3", [("version:2", 3)]),
    (r"a\|b | c\\", [("a|b", 1), ("c\\", 1)]),
    (r"a\\:2", [("a\\", 2)]),
    (r"C:\new", [(r"C:\new", 1)]),  # a backslash before anything else is one
    ("a sign: 2", [("a sign: 2", 1)]),
    ("a:b", [("a:b", 1)]),
    ("a:1e3", [("a:1e3", 1)]),
    ("a:", [("a:", 1)]),
    ("", []),
    ("  ", []),
]


@pytest.mark.parametrize(("text", "parts"), TEXTS, ids=[text for text, _ in TEXTS])
def test_a_text_is_split_as_documented(text: str, parts: list) -> None:
    assert split_text(text) == [Part(*part) for part in parts]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a man | ", r"text: part 2 of 'a man \| ' is empty"),
        ("|", r"text: part 1 of '\|' is empty"),
        (":2", "text: ':2' is empty, expected a sentence"),
        ("a man | a dog:0", r"text: part 2 of 'a man \| a dog:0' has the weight 0, expected a size from 1e-6"),
        ("a man | a dog:0.0000000001", r"text: part 2 of 'a man \| a dog:0.0000000001' has the weight 1e-10, expected"),
        (f"a man | a dog:{'9' * 40}", r"has the weight 1e\+40, expected a size from 1e-6 to 1e6"),
        ("a man:" + "9" * 400, "has the weight inf"),
    ],
)
def test_a_text_that_cannot_be_split_is_one_line(text: str, message: str) -> None:
    for call in (lambda: split_text(text), lambda: PromptDataModule(text=[text])):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert str(caught.value).isprintable()


@settings(max_examples=200, deadline=None, database=None)
@given(
    st.lists(st.tuples(st.text(min_size=1).filter(str.strip), st.sampled_from([1, 2.5, -1])), min_size=2, max_size=3)
)
def test_any_sentence_can_be_written_with_escapes(parts: list) -> None:
    escapes = {ord(character): "\\" + character for character in "|:\\"}
    written = [f"{text.translate(escapes)} :{weight}" for text, weight in parts]
    assert split_text(" | ".join(written)) == [Part(text.strip(), weight) for text, weight in parts]


def test_a_negative_text_has_the_other_sign() -> None:
    assert split_negative("a beard | glasses:2") == [Part("a beard", -1), Part("glasses", -2)]
    assert split_negative(None) == []
    with pytest.raises(InputError, match="negative_text: got ' ', expected a phrase; leave it out for none"):
        split_negative(" ")
    with pytest.raises(InputError, match="negative_text: 'a beard' has the weight -1, expected one above 0"):
        clipward.GuidanceConfig(negative_text="a beard:-1")
    with pytest.raises(InputError, match=r"negative_text: part 2 of 'a \|' is empty"):
        clipward.GuidanceConfig(negative_text="a |")


# the objectives

NOISE = Noise((1,), (3, 16, 16))
FIRST, SECOND = "an old man", "a girl with red hair"


def objectives_of(guidance) -> list:
    if isinstance(guidance, Sum):
        return [each for inner in guidance.guidances for each in objectives_of(inner)]
    return [guidance.objective] if hasattr(guidance, "objective") else []


def gradient(objective, image: torch.Tensor, step) -> torch.Tensor:
    image = image.clone().requires_grad_()
    return torch.autograd.grad(objective(image, step).sum(), image)[0]


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_is_the_weighted_sum_of_the_gradients_of_the_parts(
    method: str,
    tiny_clip: Path,
    noisy_clip: str,
    classifier: str,
) -> None:
    module = tiny_module(clip=[str(tiny_clip), noisy_clip], clip_weights=[2, 1], noisy_clip=noisy_clip,
                         classifier=classifier, contrasts=GROUPS, neutral="a person")  # fmt: skip
    module.configure_model()
    models, image, weight = module.models, torch.randn(1, 3, 16, 16), torch.ones(1)
    step = module.sampler.list_steps()[0]

    def parts_of(text: str) -> list:
        objectives = models.objectives(METHODS[method], [text], NOISE, torch.device("cpu"))
        guidances = METHODS[method].guidances(objectives, weight)
        return [each for guidance in guidances for each in objectives_of(guidance)]

    both = parts_of(f"{FIRST}:2 | {SECOND}:0.5")
    for joint, first, second in zip(both, parts_of(FIRST), parts_of(SECOND), strict=True):
        assert isinstance(joint, WeightedTexts)
        assert not isinstance(first, WeightedTexts)  # a lone text goes the way it always went
        if type(first).__name__ in ("TotalVariation", "Range"):  # they know no text
            torch.testing.assert_close(joint(image, step), first(image, step))
            continue
        expected = 2 * gradient(first, image, step) + 0.5 * gradient(second, image, step)
        torch.testing.assert_close(gradient(joint, image, step), expected, rtol=1e-4, atol=1e-6)
        assert expected.abs().max() > 1e-5
        if method == "clip_guidance_pixel":
            expected = 2 * first.pixel_gradient(image) + 0.5 * second.pixel_gradient(image)
            torch.testing.assert_close(joint.pixel_gradient(image), expected, rtol=1e-4, atol=1e-6)


def test_away_from_a_text_rises_the_probability_of_its_contrast_captions(tiny_clip: Path, noisy_clip: str) -> None:
    module = tiny_module(clip=str(tiny_clip), noisy_clip=noisy_clip, contrasts=GROUPS, neutral="a person")
    module.configure_model()
    image, step, clip = torch.randn(1, 3, 16, 16), module.sampler.list_steps()[0], module.models.noisy_clip
    objectives = module.models.objectives(METHODS["contrastive"], ["an old man:-2"], NOISE, torch.device("cpu"))
    captions = ["an old man", "a young man", "an old woman", "a person"]
    features = clip.encode_image(image, step.alpha_bar_t)[0]
    p = (clip.model.logit_scale.exp() * clip.encode_text(captions) @ features).softmax(0)
    found = WeightedTexts(objectives.log_likelihood, objectives.text_weights)(image, step)
    torch.testing.assert_close(found, 2 * (1 - p[:1]).log(), rtol=1e-4, atol=1e-5)


def test_away_from_a_text_rises_the_probability_that_an_attribute_differs(classifier: str) -> None:
    module = tiny_module(classifier=classifier)
    module.configure_model()
    image, step = torch.randn(1, 3, 16, 16), module.sampler.list_steps()[0]
    objectives = module.models.objectives(METHODS["classifier_guidance"], ["an old man:-1"], NOISE, torch.device("cpu"))
    logits = module.models.classifier(image, step.alpha_bar_t)
    places = {name: list(values).index(value) for name, value, values in
              (("age", "old", ["young", "old"]), ("gender", "man", ["woman", "man"]))}  # fmt: skip
    p = torch.stack([logits[name].softmax(1)[0, place] for name, place in places.items()]).prod()
    found = WeightedTexts(objectives.log_likelihood, objectives.text_weights)(image, step)
    torch.testing.assert_close(found[0], (1 - p).log(), rtol=1e-4, atol=1e-5)


def sampler_of(weights: Path, **kwargs) -> Sampler:
    sampling = SamplingConfig(method=kwargs.pop("method", "contrastive"), skip_steps=3, **kwargs.pop("sampling", {}))
    module = tiny_module(weights=str(weights), sampling=sampling, contrasts=GROUPS, neutral="a person", **kwargs)
    module.configure_model()
    return module.sampler


@pytest.mark.parametrize("method", ["contrastive", "clip_guidance_pixel", "dps"])
def test_a_lone_text_has_the_same_bits_beside_any_other(
    method: str,
    tiny_weights: Path,
    tiny_clip: Path,
    noisy_clip: str,
) -> None:
    sampler = sampler_of(tiny_weights, method=method, clip=str(tiny_clip), noisy_clip=noisy_clip)
    alone, _ = sampler.sample([FIRST, SECOND], [1, 2], [50.0, 50.0])
    weighed, _ = sampler.sample([f"{FIRST}:1", SECOND], [1, 2], [50.0, 50.0])
    mixed, _ = sampler.sample([FIRST, f"{SECOND} | {FIRST}:-1 | a dog:3"], [1, 2], [50.0, 50.0])
    assert torch.equal(alone, weighed)
    assert torch.equal(alone[0], mixed[0])
    assert not torch.equal(alone[1], mixed[1])


def test_a_weight_of_two_is_twice_the_guidance_weight(tiny_weights: Path, tiny_clip: Path) -> None:
    sampler = sampler_of(tiny_weights, method="clip_guidance", clip=str(tiny_clip))
    torch.testing.assert_close(sampler.sample([f"{FIRST}:2"], [1], [30.0])[0], sampler.sample([FIRST], [1], [60.0])[0])


def test_a_negative_text_is_a_part_of_every_text(tiny_weights: Path, tiny_clip: Path) -> None:
    model = clipward.load(tiny_weights, clip=str(tiny_clip), method="clip_guidance", skip_steps=3)
    options = {"n_samples": 1, "guidance_weight": 50, "return_tensors": True}
    one = model.sample([FIRST, "a dog:2"], negative_text="glasses | hats:2", **options)
    written = model.sample([f"{FIRST} | glasses:-1 | hats:-2", "a dog:2 | glasses:-1 | hats:-2"], **options)
    assert torch.equal(one, written)
    assert not torch.equal(one, model.sample([FIRST, "a dog:2"], **options))  # only for its call


def test_the_similarity_of_parts_is_their_weighted_mean(tiny_weights: Path, tiny_clip: Path) -> None:
    sampler, image = sampler_of(tiny_weights, clip=str(tiny_clip)), torch.randn(2, 3, 16, 16)
    cosines = sampler.models.cosines(image, [FIRST, SECOND])
    found = sampler.clip_similarity(image, [f"{FIRST}:3 | {SECOND}:-1", FIRST])
    torch.testing.assert_close(found[0], ((3 * cosines[0, 0] - cosines[0, 1]) / 4).item())
    torch.testing.assert_close(found[1], cosines[1, 0].item())


def test_a_part_that_is_too_long_is_named(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> None:
    text = "a man | " + "a red hat " * 9
    sampler = sampler_of(tiny_weights, method="clip_guidance", clip=str(tiny_clip))
    with pytest.raises(InputError, match=r"^text: 'a red hat .* tokens too long .*; it is part 2 of 'a man \| a red"):
        sampler.models.check_texts([text], METHODS["clip_guidance"])


def test_judges_know_what_is_not_to_be_seen() -> None:
    vocabulary = load_vocabulary("faces")[0]
    text = "a man:2 | red hair:-1 | glasses:-1"
    assert find_allowed(vocabulary, text) == {
        "gender": {"man"}, "hair": {"black", "brown", "blond", "grey"}, "glasses": {"without"}
    }  # fmt: skip
    seen = {"gender": "man", "age": "old", "hair": "red", "smile": "serious", "glasses": "without"}
    assert check_prompt(vocabulary, seen, text) == {"gender": True, "hair": False, "glasses": True}
    assert check_prompt(vocabulary, seen, "a man") == {"gender": True}


# the schedule of the weight


def test_a_schedule_is_linear_between_its_points() -> None:
    schedule = WeightSchedule.parse("0.0:0.5 0.4:1 0.8:0")
    shares = [0, 0.1, 0.2, 0.4, 0.5, 0.7, 0.8, 0.9, 1]
    expected = [0.5, 0.625, 0.75, 1, 0.75, 0.25, 0, 0, 0]
    assert [schedule.factor(share) for share in shares] == pytest.approx(expected)
    assert WeightSchedule.parse("0.5:2").factor(0.1) == WeightSchedule.parse("0.5:2").factor(0.9) == 2


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "1", "0.5", "0:1 0:2", "0.5:1 0.4:1", "-0.1:1", "0:1 1.1:1", "0:-1", "0:0"),
        *("0:nan", "nan:1", "0:inf", "a:b", "0:1:2", "0:1,1:2"),
    ],
)
def test_a_schedule_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match=r"^sampling.weight_schedule: got .*, expected pairs of t/T") as caught:
        SamplingConfig(weight_schedule=text)
    assert str(caught.value).isprintable()


def test_each_step_guides_by_the_factor_of_its_level(tiny_weights: Path, tiny_clip: Path) -> None:
    sampler = sampler_of(tiny_weights, method="tfg", clip=str(tiny_clip))
    objectives = sampler.models.objectives(METHODS["tfg"], [FIRST], NOISE, torch.device("cpu"))
    weight, schedule = torch.tensor([4.0]), WeightSchedule.parse("0:0.5 0.5:1 0.9:0")

    def guide(weight: torch.Tensor) -> list:
        (both,) = METHODS["tfg"].guidances(objectives, weight)
        return [each for each in both.guidances if isinstance(each, GradientAscent)]

    scheduled = ScheduledGuidance(guide, weight, schedule, 100)
    x = torch.randn(1, 3, 16, 16)
    pred = Prediction(x.clone(), x.clone(), torch.tensor(0.1))
    for t, factor in ((0, 0.5), (25, 0.75), (50, 1.0), (70, 0.5)):
        step = sampler.schedule.step(t, t - 1)
        (expected,) = guide(factor * weight)
        torch.testing.assert_close(scheduled(pred, x, step).x0, expected(pred, x, step).x0)
    nothing = replace(sampler.schedule.step(95, 90))
    assert scheduled(pred, x, nothing) is pred
    assert not scheduled.needs_graph(nothing)


def test_where_a_schedule_is_0_no_picture_is_refused(
    monkeypatch: pytest.MonkeyPatch, tiny_weights: Path, tiny_clip: Path
) -> None:
    looked_at = []

    class Look(RefuseFlat):
        def __call__(self, pred: Prediction, x: torch.Tensor, step: Step) -> Prediction:
            looked_at.append(step.t)
            return super().__call__(pred, x, step)

    monkeypatch.setattr("clipward.sampler.RefuseFlat", Look)
    sampling = {"weight_schedule": "0.4:0 0.41:1"}  # the steps are at 0, 33 and 66 of 100
    sampler = sampler_of(tiny_weights, method="clip_guidance", clip=str(tiny_clip), sampling=sampling)
    sampler.sample([FIRST], [1], [90.0])
    assert looked_at == [66]


def test_a_schedule_of_one_changes_no_bit_and_steps_of_0_are_an_interval(tiny_weights: Path, tiny_clip: Path) -> None:
    def draw(**sampling) -> torch.Tensor:
        sampler = sampler_of(tiny_weights, method="clip_guidance", clip=str(tiny_clip), sampling=sampling)
        sampler.check()
        return sampler.sample([FIRST], [1], [90.0])[0]

    assert torch.equal(draw(), draw(weight_schedule="0:1"))
    above = draw(weight_schedule="0.4:0 0.41:1")  # the steps are at 0, 33 and 66 of 100
    assert torch.equal(above, draw(interval=(0.4, 1)))
    assert not torch.equal(above, draw())
    with pytest.raises(InputError, match=r"weight_schedule: got '0.9:0 1:1', which is 0 at all steps that guide"):
        draw(weight_schedule="0.9:0 1:1")


def test_the_command_line_records_them(config: str, tmp_path: Path) -> None:
    flags = ["--text", "an old man:2 | a hat:-1", "--negative_text", "glasses", "--weight_schedule", "0:0.5 0.9:1"]
    main(["predict", "-c", config, *flags, "--n_samples", "1", "--save_dir", str(tmp_path / "x")])
    row = metadata(tmp_path / "x")[1]
    assert row["text"] == "an old man:2 | a hat:-1"
    assert (row["negative_text"], row["weight_schedule"]) == ("glasses", "0:0.5 0.9:1")
    main(["predict", "-c", str(tmp_path / "x/config.predict.yaml"), "--save_dir", str(tmp_path / "y")])
    assert (tmp_path / "x/000001.png").read_bytes() == (tmp_path / "y/000001.png").read_bytes()


def test_python_takes_them(tiny_weights: Path, tiny_clip: Path) -> None:
    model = clipward.load(tiny_weights, clip=str(tiny_clip), skip_steps=3)
    options = {"n_samples": 1, "guidance_weight": 50, "return_tensors": True}
    plain = model.sample("an old man:2 | a beard:-1", **options)
    changed = model.sample("an old man:2 | a beard:-1", weight_schedule="0:0.1 1:2", **options)
    assert F.mse_loss(plain, changed) > 0
    with pytest.raises(InputError, match=r"weight_schedule: got 'high'"):
        model.sample("a man", weight_schedule="high")
