"""Class labels and classifier-free guidance, beside what a text guides."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_UNET, metadata, randomise, tiny_faces, tiny_module, tiny_trainer
from layouts import OpenAI
from torch import Tensor

from clipward.cli import main
from clipward.datamodules.faces import ATTRIBUTES, FacesDataModule
from clipward.diffusion.denoiser import ClassConditional, NetworkDenoiser
from clipward.diffusion.sampling import Noise, ancestral, sample
from clipward.diffusion.schedule import Schedule
from clipward.errors import InputError
from clipward.guidance.core import GradientGuidance, GuidedDenoiser, grad_denoised, shift_mean
from clipward.guidance.models import GuidanceConfig, GuidanceModels
from clipward.networks.unet import UNet
from clipward.sampler import Sampler
from clipward.sampling_config import SamplingConfig
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.diffusers import save_diffusers
from clipward.weights.load import load_weights, save_weights

THREE = replace(TINY_UNET, patch=1, freq_shift=0, num_classes=3)


def make_network(unet=THREE) -> UNet:
    return randomise(UNet(unet)).eval()


# the network and its weights


@pytest.mark.parametrize("null_class", [True, False])
def test_diffusers_has_the_same_network_both_ways(null_class: bool, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    given = Architecture(replace(THREE, null_class=null_class), 16, "cosine", class_names=("a", "b", "c"))
    network = make_network(given.unet)
    weights = Weights(given, network.state_dict())
    save_diffusers(tmp_path / "theirs", weights)
    theirs = diffusers.UNet2DModel.from_pretrained(tmp_path / "theirs/unet")
    x, t = torch.randn(4, 3, 16, 16), torch.tensor([1, 50, 500, 900])
    label = torch.tensor([0, 2, 1, -1 if null_class else 1])
    expected = theirs(x, t, torch.where(label < 0, 3, label)).sample
    torch.testing.assert_close(network(x, t, label), expected)
    back = load_weights(tmp_path / "theirs")
    assert back.architecture == replace(
        given, scheduler=replace(given.scheduler, skip_type="leading")
    )  # diffusers' own
    own = UNet(back.architecture.unet).eval()
    back.into(own)
    torch.testing.assert_close(own(x, t, label), expected)


def test_a_model_of_diffusers_has_no_null_class_that_it_does_not_name(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": None}
    theirs = diffusers.UNet2DModel(16, num_class_embeds=5, attn_norm_num_groups=4, **blocks, **sizes)
    theirs.save_pretrained(tmp_path / "unet")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    weights = load_weights(tmp_path)
    assert (weights.architecture.unet.num_classes, weights.architecture.unet.null_class) == (5, False)
    network = UNet(weights.architecture.unet).eval()
    weights.into(network)
    x, t, label = torch.randn(2, 3, 16, 16), torch.tensor([3, 700]), torch.tensor([4, 0])
    torch.testing.assert_close(network(x, t, label), theirs.eval()(x, t, label).sample)
    with pytest.raises(InputError, match="class_label: got none, expected one of the 5 classes"):
        network(x, t)


def test_openais_class_conditional_layout_is_read(tmp_path: Path) -> None:
    """Its label embedding is added to that of t, as a bias of the layer before would be."""
    layout, label = OpenAI(), 2
    state = layout.make()
    embedding = torch.randn(7, len(state["time_embed.2.bias"]))
    torch.save({**state, "label_emb.weight": embedding}, tmp_path / "openai.pt")
    weights = load_weights(tmp_path / "openai.pt")
    assert (weights.architecture.unet.num_classes, weights.architecture.unet.null_class) == (7, False)
    network = UNet(weights.architecture.unet).eval()
    weights.into(network)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([10, 600])
    shifted = {**state, "time_embed.2.bias": state["time_embed.2.bias"] + embedding[label]}
    expected = layout.forward(shifted, x, t)
    torch.testing.assert_close(network(x, t, torch.full((2,), label)), expected, atol=1e-4, rtol=1e-4)


def test_files_keep_the_names_of_classes_and_those_without_load_as_before(tmp_path: Path) -> None:
    given = Architecture(THREE, 16, class_names=("cat", "dog", "7"))
    save_weights(tmp_path / "a.safetensors", Weights(given, make_network().state_dict()))
    assert load_weights(tmp_path / "a.safetensors").architecture == given
    assert [given.find_class(label) for label in ("dog", 1, "1", "7")] == [1, 1, 1, 2]
    old = {name: value for name, value in TINY.to_dict().items() if name != "class_names"}
    old["unet"] = {name: value for name, value in old["unet"].items() if name not in ("num_classes", "null_class")}
    assert Architecture.from_dict(old) == TINY
    with pytest.raises(
        InputError, match="class_label: got 'cow', expected one of cat, dog, 7, or a number from 0 to 2"
    ):
        given.find_class("cow")
    with pytest.raises(InputError, match="the model knows no classes"):
        TINY.find_class("cow")
    with pytest.raises(InputError, match=r"unet\.num_classes: got 3, expected 2"):
        replace(given, class_names=("a", "b"))


# classifier-free guidance

MEANS, SPREAD = torch.tensor([-0.6, 0.7]), 0.2


class Mixture:
    """The ideal network of two classes, N(m_c, 0.2²) each and equally likely: it puts out ε, in float64."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def log_density(self, x: Tensor, t: int, label: int) -> Tensor:
        """log p_t(x | c), or of both classes for −1."""
        a = float(self.schedule.alpha_bar[t])
        variance = a * SPREAD**2 + 1 - a
        each = torch.stack([-((x - a**0.5 * mean) ** 2) / (2 * variance) for mean in MEANS.double()])
        return each[label] if label >= 0 else each.logsumexp(dim=0)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        a, at = float(self.schedule.alpha_bar[int(t[0])]), x.double()
        with torch.enable_grad():
            at = at if at.requires_grad else at.requires_grad_()
            score = torch.autograd.grad(
                self.log_density(at, int(t[0]), int(label[0])).sum(), at, create_graph=x.requires_grad
            )[0]
        return -((1 - a) ** 0.5) * score


def test_the_guided_score_is_that_of_the_class_plus_w_times_that_of_the_classifier() -> None:
    """∇log p(x | c) + w·∇log p(c | x) of a mixture of Gaussians, in closed form (Ho & Salimans 2022, §3.2)."""
    schedule = Schedule.from_name("cosine", 100)
    mixture, w = Mixture(schedule), 1.5
    x, t = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1), torch.full((9,), 40)
    found = ClassConditional(mixture, 1, torch.ones_like(t), weight=w)(x, t)
    at = x.clone().requires_grad_()
    log_joint = torch.stack([mixture.log_density(at, 40, c) for c in (0, 1)])
    log_classifier = log_joint.log_softmax(dim=0)[1]
    score = torch.autograd.grad((log_joint[1] + w * log_classifier).sum(), at)[0]
    torch.testing.assert_close(found, (-((1 - schedule.alpha_bar[40].item()) ** 0.5) * score).float().to(found.dtype))


@pytest.mark.parametrize(("weight", "label"), [(0.0, 1), (0.0, 0), (0.0, -1), (2.0, 1)])
def test_samples_are_of_the_class(weight: float, label: int) -> None:
    schedule = Schedule.from_name("cosine", 100)
    denoise = NetworkDenoiser(
        ClassConditional(Mixture(schedule), 1, torch.full((4,), label), weight), "eps", "fixed_small"
    )
    noise = Noise(range(4), (1, 32, 32))
    *_, last = sample(denoise, schedule.steps(100), ancestral, noise)
    found, count = last.x, last.x.numel()
    if weight:  # guidance moves away from the other class
        assert MEANS[1] < found.mean() < MEANS[1] + 0.1
        return
    mean, std = (MEANS[label].item(), SPREAD) if label >= 0 else (MEANS.mean().item(), (SPREAD**2 + 0.65**2) ** 0.5)
    assert found.mean().item() == pytest.approx(mean, abs=4 * std / count**0.5 + 0.01)
    assert found.std().item() == pytest.approx(std, rel=0.06)


def test_the_gradient_of_a_text_goes_through_both_passes() -> None:
    """Against finite differences of the objective of the mixed prediction, in float64."""
    schedule = Schedule.from_name("cosine", 100)
    step = schedule.steps(10)[4]
    conditional = ClassConditional(Mixture(schedule), 1, torch.tensor([0]), weight=1.3)
    denoise = NetworkDenoiser(conditional, "eps", "fixed_small")

    def objective(image: Tensor, step: object) -> Tensor:
        return (image**3).sum(dim=(1, 2, 3))

    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    weight, seen = torch.ones(1), []

    def record(pred: object, direction: Tensor, step: object) -> object:
        seen.append(direction)
        return shift_mean(pred, direction, step)

    GuidedDenoiser(denoise, [GradientGuidance(objective, weight, grad_denoised, record)])(x, step)

    def value(at: Tensor) -> float:
        return objective(denoise(at.clone().requires_grad_(), step).x0, step).item()

    h, expected = 1e-3, torch.zeros_like(x)
    for place in range(4):
        shift = torch.zeros(4, dtype=torch.float64)
        shift[place] = h
        shift = shift.reshape(x.shape)
        expected.view(-1)[place] = (value(x + shift) - value(x - shift)) / (2 * h)
    torch.testing.assert_close(seen[0].double(), expected, atol=2e-2, rtol=2e-2)


def test_a_learned_variance_is_that_of_the_class() -> None:
    def network(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        value = 1.0 + label.float()[:, None, None, None]
        return torch.cat([value.expand_as(x), 10 * value.expand_as(x)], dim=1)

    label = torch.tensor([2])
    output = ClassConditional(network, 3, label, weight=0.5)(torch.zeros(1, 3, 2, 2), torch.zeros(1).long())
    assert output[0, :3].unique().tolist() == [3 + 0.5 * 3]
    assert output[0, 3:].unique().tolist() == [30]


# sampling


def make_sampler(**sampling) -> Sampler:
    given = replace(TINY, unet=replace(TINY_UNET, num_classes=3), class_names=("a", "b", "c"))
    network = make_network(given.unet)
    return Sampler(network, given, GuidanceModels(GuidanceConfig()), SamplingConfig(skip_steps=3, **sampling))


def test_pictures_depend_on_the_class_and_its_weight() -> None:
    drawn = [
        make_sampler(class_label=label, class_weight=weight).sample([""], [0], [0.0])[0]
        for label, weight in ((None, 0.0), ("a", 0.0), ("b", 0.0), ("b", 2.0))
    ]
    assert all(not torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])
    assert torch.equal(drawn[2], make_sampler(class_label=1).sample([""], [0], [0.0])[0])


def test_each_picture_of_a_batch_may_have_a_class_of_its_own() -> None:
    labels = ["a", None, 2, "b"]  # None is that of the settings, here any class
    sampler = make_sampler(class_weight=1.5)
    sampler.check(labels=labels)
    together, _ = sampler.best_of_n([""] * 4, [0] * 4, [0.0] * 4, labels=labels)
    for image, label in zip(together, labels, strict=True):
        weight = 0.0 if label is None else 1.5
        alone, _ = make_sampler(class_label=label, class_weight=weight).sample([""], [0], [0.0])
        torch.testing.assert_close(image, alone[0])
    assert len({image.numpy().tobytes() for image in together}) == 4
    sampler = make_sampler(class_label="b")
    drawn, _ = sampler.sample([""] * 2, [0] * 2, [0.0] * 2, labels=[None, 1])
    assert torch.equal(drawn[0], drawn[1])
    with pytest.raises(InputError, match="class_label: got 3, expected one of a, b, c"):
        sampler.check(labels=["a", 3])


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"class_weight": 1.0}, "class_weight: got 1 without a class"),
        ({"class_label": "d"}, "class_label: got 'd', expected one of a, b, c, or a number from 0 to 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(sampling: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_sampler(**sampling).check()


def test_a_model_without_a_null_class_is_guided_by_no_weight() -> None:
    sampler = make_sampler(class_label="a", class_weight=1.0)
    sampler.architecture = replace(sampler.architecture, unet=replace(sampler.architecture.unet, null_class=False))
    with pytest.raises(InputError, match="class_weight: got 1, expected 0, since this model was trained without"):
        sampler.check()


# training


def test_label_dropout_trains_the_null_class_alone_where_it_is_1(tmp_path: Path) -> None:
    for share, moved in ((1.0, [False] * 5 + [True]), (0.0, [True] * 5 + [False])):
        module = tiny_module(unet=replace(TINY_UNET, num_classes=5))
        module.optim = replace(module.optim, label_dropout=share, weight_decay=0.0)
        torch.manual_seed(0)
        module.configure_model()
        randomise(module.unet)
        before = module.unet.class_embedding.weight.detach().clone()
        data = FacesDataModule(size=16, train_count=64, val_count=8, batch_size=64, classes="hair")
        tiny_trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(module, data)
        changed = (module.unet.class_embedding.weight.detach() != before).any(dim=1).tolist()
        assert changed == moved, share


def test_data_without_classes_are_refused(tmp_path: Path) -> None:
    module = tiny_module(unet=replace(TINY_UNET, num_classes=5))
    with pytest.raises(InputError, match=r"data.classes: got none, expected what the classes are"):
        tiny_trainer(tmp_path, max_steps=1).fit(module, tiny_faces())


def test_train_and_draw_a_class_by_its_name(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model.network.unet.num_classes", "5", "--data.classes", "hair"]
    main(["fit", "-c", config, *flags, "--model.save_path", "own.safetensors"])
    assert load_weights("own.safetensors").architecture.class_names == ATTRIBUTES["hair"]
    rows: list[dict] = [{"text": "a man", "class_label": "red"}, {"text": "", "guidance_weight": 0}]
    rows.append({"text": "a man", "class_label": 3})
    flags = ["--prompts", "rows.jsonl", "--class_label", "black", "--class_weight", "1.5", "--n_samples", "1"]
    draw = ["predict", "-c", config, "--weights", "own.safetensors", *flags]

    def write(rows: list[dict]) -> None:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(rows)
    main([*draw, "--save_dir", "out"])
    expected = [("red", 1.5), ("black", 1.5), (ATTRIBUTES["hair"][3], 1.5)]
    assert [(row["class_label"], row["class_weight"]) for row in metadata(tmp_path / "out")] == expected
    main(["predict", "--again", "out/000002.png", "--save_dir", "again"])
    assert Path("again/000002.png").read_bytes() == Path("out/000002.png").read_bytes()
    main([*draw, "--save_dir", "out"])
    for changed in ({"class_label": 2}, {}):
        write([*rows[:2], {"text": "a man"} | changed])
        with pytest.raises(SystemExit, match=rf"index 2, class_label: '{ATTRIBUTES['hair'][3]}' there, '.*' here"):
            main([*draw, "--save_dir", "out"])
    for label, message in (
        ("green", "class_label: got 'green', expected one of black, brown"),
        (1.5, "prompts: row 4 of 'rows.jsonl': class_label: got 1.5, expected the name or the number of a class"),
    ):
        write([*rows, {"text": "a man", "class_label": label}])
        with pytest.raises(SystemExit, match=message):
            main([*draw, "--save_dir", "none"])
    assert not Path("none").exists()
