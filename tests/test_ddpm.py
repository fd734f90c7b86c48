from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import TINY_CLIP, TINY_UNET, checkpoint_of, randomise, tiny_faces, tiny_module, tiny_trainer, whole_batch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from clipward.callbacks.guided_samples import GuidedSamples
from clipward.datamodules.prompts import PromptDataModule
from clipward.diffusion.bound import variational_bound
from clipward.diffusion.denoiser import Prediction, add_noise, to_x0, training_target
from clipward.diffusion.sampling import Draw, ancestral
from clipward.diffusion.schedule import Schedule, Step
from clipward.errors import InputError
from clipward.guidance import core as guidance
from clipward.guidance.core import GuidanceError
from clipward.guidance.methods import METHODS
from clipward.guidance.objectives import ClipSimilarity
from clipward.lightning_modules.ddpm import DDPMModule, TrainingConfig, min_snr_weight
from clipward.networks.clip import OPENAI_PREPROCESSING, Clip, new_model, save_folder
from clipward.networks.unet import UNet
from clipward.sampler import Sampler, to_picture
from clipward.sampling_config import SamplingConfig
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.load import load_weights, save_weights

STEP = Schedule.from_name("linear").step(700, 680)


def fitted(root: Path, steps: int = 12, callbacks: tuple = (), precision: str = "32-true", **kwargs) -> DDPMModule:
    seed_everything(1)
    module = tiny_module(**kwargs)
    options = {"callbacks": list(callbacks), "enable_checkpointing": None, "precision": precision}
    trainer = tiny_trainer(root, max_steps=steps, **options)
    trainer.fit(module, tiny_faces())
    return module


def predictions(module: DDPMModule, data: PromptDataModule, root: Path, **kwargs) -> torch.Tensor:
    batches = tiny_trainer(root, **kwargs).predict(module, data)
    return torch.cat([batch["image"] for batch in batches])


def test_the_loss_falls(tmp_path: Path) -> None:
    seed_everything(0)
    module = tiny_module()
    trainer = tiny_trainer(tmp_path, max_steps=120, val_check_interval=1.0)
    data = tiny_faces()
    trainer.fit(module, data)
    after = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    before = tiny_trainer(tmp_path).validate(tiny_module(), data, verbose=False)[0]["val/loss"]
    assert after < 0.8 * before


def test_the_loss_is_the_mean_squared_error_in_the_networks_own_terms() -> None:
    x0, eps, t = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), torch.tensor([10, 90])
    for parametrisation in ("eps", "x0", "v"):
        module = tiny_module(parametrisation=parametrisation)
        module.configure_model()  # a new network puts out 0
        a = module.schedule.alpha_bar[t].float()[:, None, None, None]
        target = {"eps": eps, "x0": x0, "v": a.sqrt() * eps - (1 - a).sqrt() * x0}[parametrisation]
        torch.testing.assert_close(module.loss(x0, t, eps), target.square().mean())


def test_a_network_that_learns_its_variance_trains_it_by_the_bound() -> None:
    module = tiny_module(unet=replace(TINY_UNET, out_channels=6), parametrisation="eps", schedule="linear")
    module.configure_model()
    randomise(module.unet)
    x0, eps, t = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 3, 16, 16), torch.tensor([10, 90])
    a = module.schedule.alpha_bar[t].float()[:, None, None, None]
    x = a.sqrt() * x0 + (1 - a).sqrt() * eps
    output, share = module.unet(x, t).chunk(2, dim=1)
    bound = variational_bound(x0, x, (x - (1 - a).sqrt() * output) / a.sqrt(), share, t, module.schedule)
    torch.testing.assert_close(module.loss(x0, t, eps), (output - eps).square().mean() + 0.1 * bound.mean())


def test_validation_is_the_same_every_time(tmp_path: Path) -> None:
    module, data = tiny_module(), tiny_faces()
    losses = [tiny_trainer(tmp_path).validate(module, data, verbose=False)[0]["val/loss"] for _ in range(2)]
    assert losses[0] == losses[1]


def test_the_average_follows_its_formula(tmp_path: Path) -> None:
    seed_everything(0)
    module, history = tiny_module(), []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            history.append(pl_module.unet.conv_in.weight.detach().clone())

    module.configure_model()
    average = module.unet.conv_in.weight.detach().clone()
    tiny_trainer(tmp_path, max_steps=4, callbacks=[Watch()]).fit(module, tiny_faces())
    for n, weight in enumerate(history, start=1):
        decay = min(0.9, (1 + n) / (10 + n))
        average = decay * average + (1 - decay) * weight
    torch.testing.assert_close(module.ema.average["conv_in.weight"], average)
    assert not torch.equal(module.unet.conv_in.weight, average)


def test_a_checkpoint_holds_the_average_and_the_weights_that_train(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=12, save_weights_only=True)
    module = fitted(tmp_path, callbacks=(saver,))
    checkpoint = torch.load(checkpoint_of(tmp_path), weights_only=True)
    name = "unet.conv_in.weight"
    assert torch.equal(checkpoint["current_model_state"][name], module.unet.conv_in.weight)
    assert torch.equal(checkpoint["state_dict"][name], module.ema.average["conv_in.weight"])
    assert not any("clip" in key for key in checkpoint["state_dict"])
    weights = load_weights(Path(checkpoint_of(tmp_path)))
    assert weights.architecture == module.architecture
    assert torch.equal(weights.state["conv_in.weight"], module.ema.average["conv_in.weight"])


def test_fit_writes_the_average_for_others_to_use(tmp_path: Path) -> None:
    path = tmp_path / "ddpm.safetensors"
    module = fitted(tmp_path, save_path=str(path))
    weights = load_weights(path)
    assert weights.architecture == module.architecture
    for name, average in module.ema.average.items():
        torch.testing.assert_close(weights.state[name], average, atol=1e-3, rtol=1e-3)
    with pytest.raises(InputError, match="exists; choose another name"):
        fitted(tmp_path, save_path=str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"conv_in.weight": torch.zeros(2, 2)},
            r"got the key 'conv_in.weight' of shape \(2, 2\), expected \(8, 12, 3, 3\)",
        ),
        ({"conv_in.weight": None}, r"got no key 'conv_in.weight', expected one of shape \(8, 12, 3, 3\)"),
        ({"other": torch.zeros(3)}, r"got the key 'other', expected no such key"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_the_key(
    tmp_path: Path, tiny_weights: Path, change: dict, message: str
) -> None:
    weights = load_weights(tiny_weights)
    state = {name: value for name, value in (weights.state | change).items() if value is not None}
    save_weights(tmp_path / "bad.safetensors", Weights(weights.architecture, state))
    with pytest.raises(InputError, match=message):
        tiny_module(weights=str(tmp_path / "bad.safetensors")).configure_model()


def test_a_damaged_file_is_refused(tmp_path: Path, tiny_weights: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(tiny_weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="is damaged or no safetensors file"):
        load_weights(tmp_path / "cut.safetensors")


def test_the_weights_that_train_can_be_had_from_a_checkpoint(
    tmp_path: Path, tiny_clip: Path, tiny_weights: Path
) -> None:
    module = fitted(tmp_path, callbacks=(ModelCheckpoint(tmp_path, every_n_train_steps=12),))
    file, raw = checkpoint_of(tmp_path), module.unet.conv_in.weight
    assert torch.equal(load_weights(file, use_ema=False).state["conv_in.weight"], raw)
    pictures = {}
    for use_ema in (True, False):
        data = PromptDataModule(n_samples=1)
        by_weights = tiny_module(weights=file, use_ema=use_ema)
        pictures[use_ema] = predictions(by_weights, data, tmp_path)
        by_path = tiny_module(use_ema=use_ema)
        batches = tiny_trainer(tmp_path).predict(by_path, data, ckpt_path=file)
        assert torch.equal(batches[0]["image"], pictures[use_ema])
    assert not torch.equal(pictures[True], pictures[False])


def test_sampling_takes_what_the_weights_were_made_for(tmp_path: Path) -> None:
    unet = replace(TINY_UNET, out_channels=6)
    architecture = Architecture(unet, 16, "linear", 100, var_type="learned_range", clip_denoised=False)
    save_weights(tmp_path / "x.safetensors", Weights(architecture, randomise(UNet(unet)).state_dict()))
    module = tiny_module(weights=str(tmp_path / "x.safetensors"))
    module.configure_model()
    sampler = module.sampler
    assert (sampler.var_type, sampler.clip_denoised) == ("learned_range", False)
    sampler.config = SamplingConfig(var_type="fixed_large", clip_denoised=True)
    assert (sampler.var_type, sampler.clip_denoised) == ("fixed_large", True)
    assert tiny_module(unet=unet).architecture.variance == "learned_range"


def test_several_clips_guide_by_their_weighted_mean(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> None:
    torch.manual_seed(1)
    save_folder(tmp_path / "other", new_model(TINY_CLIP), TINY_CLIP, {"size": 16, **OPENAI_PREPROCESSING})
    names = [str(tiny_clip), str(tmp_path / "other")]
    data = PromptDataModule(text=["a man"], guidance_weight=[300.0], n_samples=1, unguided=False)

    def picture(**kwargs) -> dict:
        return tiny_trainer(tmp_path).predict(tiny_module(weights=str(tiny_weights), **kwargs), data)[0]

    first, both = picture(clip=names[0]), picture(clip=names, clip_weights=[3.0, 1.0])
    assert not torch.equal(first["image"], both["image"])
    torch.testing.assert_close(picture(clip=[names[0]] * 2)["image"], first["image"], atol=1e-3, rtol=0)
    a, b = (Clip.load(name) for name in names)
    cosines = [ClipSimilarity(clip, ["a man"])(both["image"], STEP).item() for clip in (a, b)]
    assert both["clip_similarity"][0] == pytest.approx(0.75 * cosines[0] + 0.25 * cosines[1], abs=1e-5)
    assert both["provenance"]["clip"] == f"3·{names[0]} + 1·{names[1]}"
    assert both["provenance"]["clip_hash"] == f"3·{a.hash} + 1·{b.hash}"
    with pytest.raises(InputError, match=r"clip_weights: got \[1.0\], expected a number above 0 for each of 2 CLIPs"):
        tiny_module(clip=names, clip_weights=[1.0])


def test_a_stopped_fit_goes_on_from_where_it_was(tmp_path: Path) -> None:
    stopped = fitted(tmp_path, steps=6, callbacks=(ModelCheckpoint(tmp_path, every_n_train_steps=6),))
    found = {}

    class AtStart(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: DDPMModule) -> None:
            found["weights"] = [p.detach().clone() for p in pl_module.unet.parameters()]
            found["average"] = {name: value.clone() for name, value in pl_module.ema.average.items()}
            found["momentum"] = trainer.optimizers[0].state_dict()["state"][0]["exp_avg"].clone()
            found["step"] = trainer.global_step

    resumed = tiny_module()
    trainer = tiny_trainer(tmp_path, max_steps=8, callbacks=[AtStart()])
    trainer.fit(resumed, tiny_faces(), ckpt_path=checkpoint_of(tmp_path))
    assert found["step"] == 6
    assert all(torch.equal(a, b) for a, b in zip(found["weights"], stopped.unet.parameters(), strict=True))
    assert all(torch.equal(found["average"][name], value) for name, value in stopped.ema.average.items())
    assert torch.equal(found["momentum"], stopped.trainer.optimizers[0].state_dict()["state"][0]["exp_avg"])
    assert trainer.global_step == 8
    assert not torch.equal(resumed.ema.average["conv_in.weight"], stopped.ema.average["conv_in.weight"])


def test_samples_during_fit_leave_the_training_bit_identical(tmp_path: Path, tiny_clip: Path) -> None:
    plain = fitted(tmp_path, clip=str(tiny_clip))
    sampler = GuidedSamples(text=["a man"], n_samples=1, every_n_steps=3)
    sampled = fitted(tmp_path, clip=str(tiny_clip), callbacks=(sampler,))
    assert sampler._drawn_step == 12
    for a, b in zip(plain.unet.parameters(), sampled.unet.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, average in plain.ema.average.items():
        assert torch.equal(average, sampled.ema.average[name])


def test_training_goes_on_where_samples_can_not_be_guided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise GuidanceError(0, "CLIP sees a near-constant picture at t=99")

    monkeypatch.setattr(Sampler, "best_of_n", refuse)
    sampler = GuidedSamples(n_samples=2, every_n_steps=3)
    with pytest.warns(
        UserWarning, match="samples of step 3: CLIP sees a near-constant picture at t=99; 2 samples stay"
    ):
        fitted(tmp_path, callbacks=(sampler,))
    assert sampler._drawn_step == 12
    assert len(list((tmp_path / "samples").glob("*.png"))) == 4


def test_settings_that_samples_can_not_have_stop_training_before_it_begins(tmp_path: Path) -> None:
    module = tiny_module(sampling=SamplingConfig(skip_steps=2000))
    trainer = tiny_trainer(tmp_path, max_steps=4, callbacks=[GuidedSamples(n_samples=2, every_n_steps=2)])
    with pytest.raises(InputError, match="skip_steps: got 2000, expected 1 to"):
        trainer.fit(module, tiny_faces())
    assert trainer.global_step == 0


def test_samples_are_drawn_at_the_ends_of_epochs(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    sampler = GuidedSamples(n_samples=3, every_n_steps=0, every_n_epochs=2, micro_batch=2)
    logger = TensorBoardLogger(tmp_path, name="logs")
    trainer = tiny_trainer(tmp_path, max_epochs=4, logger=logger, callbacks=[sampler], log_every_n_steps=1)
    trainer.fit(tiny_module(), tiny_faces())  # epochs of 4 steps
    assert sorted(path.name for path in tmp_path.rglob("samples/*.png")) == ["00000008.png", "00000016.png"]


def test_samples_during_fit_are_those_of_predict(
    tmp_path: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path, name="logs")
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4)
    sampler = GuidedSamples(text=["a man"], n_samples=2, every_n_steps=4)
    module = tiny_module(clip=str(tiny_clip))
    drawn = {}

    def keep(sampler: Sampler, text: list, seed: list, weight: list) -> torch.Tensor:
        drawn["image"], retries = best_of_n(sampler, text, seed, weight)
        return drawn["image"], retries

    best_of_n = Sampler.best_of_n
    monkeypatch.setattr(Sampler, "best_of_n", keep)
    trainer = tiny_trainer(
        tmp_path, max_steps=4, logger=logger, callbacks=[saver, sampler], enable_checkpointing=True, log_every_n_steps=1
    )
    trainer.fit(module, tiny_faces())
    monkeypatch.undo()
    assert list((tmp_path / "logs").rglob("samples/00000004.png"))
    again = tiny_module(clip=str(tiny_clip), weights=checkpoint_of(tmp_path / "ckpt"))
    data = PromptDataModule(text=["a man"], guidance_weight=[METHODS["contrastive_denoised"].weight], n_samples=2)
    images = predictions(again, data, tmp_path)
    order = [0, 2, 1, 3]  # the callback draws column by column
    torch.testing.assert_close(drawn["image"], images[order], atol=1e-5, rtol=0)


def test_predict_guides_under_a_plain_trainer(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> None:
    data = PromptDataModule(text=["a man"], guidance_weight=[0, 2000], n_samples=2)
    for inference_mode in (True, False):
        module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip))
        images = predictions(module, data, tmp_path, inference_mode=inference_mode)
        unguided, zero, guided = images[0::3], images[1::3], images[2::3]
        torch.testing.assert_close(unguided, zero, atol=1e-4, rtol=0)
        assert (guided - unguided).flatten(1).abs().max(dim=1).values.min() > 0.02


def test_guidance_raises_the_similarity(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> None:
    sampling = SamplingConfig(skip_steps=20)
    module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip), sampling=sampling)
    data = PromptDataModule(text=["a man"], guidance_weight=[0, 300], n_samples=4, unguided=False)
    batch = tiny_trainer(tmp_path).predict(module, data)[0]
    similarity = torch.tensor(batch["clip_similarity"])
    assert (similarity[1::2] > similarity[0::2]).all()


def test_of_the_candidates_the_nearest_to_the_text_is_kept(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> None:
    data = PromptDataModule(text=["a man", "a woman"], guidance_weight=[50], n_samples=3)

    def drawn(count: int) -> dict:
        sampling = SamplingConfig(skip_steps=3, candidates=count, ddim=True)  # without noise there is no resampling
        module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip), sampling=sampling)
        return tiny_trainer(tmp_path).predict(module, data)[0] | {"module": module}

    one, three = drawn(1), drawn(3)
    requests = list(data.requests)
    text, weight = [request.text for request in requests], [request.guidance_weight for request in requests]
    walks = [one["image"]]
    for number in (1, 2):
        seed = [f"{request.seed}/{number}" for request in requests]
        walks.append(three["module"].sampler.sample(text, seed, weight)[0])
    similarity = [three["module"].sampler.clip_similarity(images, text) for images in walks]
    chosen = [0 if not text[i] else max(range(3), key=lambda c, i=i: similarity[c][i]) for i in range(len(text))]
    assert len(set(chosen)) > 1
    torch.testing.assert_close(three["image"], torch.stack([walks[c][i] for i, c in enumerate(chosen)]))
    assert three["provenance"]["candidates"] == 3
    without = tiny_module(weights=str(tiny_weights), noisy_clip=str(tiny_clip), sampling=SamplingConfig(candidates=2))
    with pytest.raises(InputError, match="clip: got none"):
        tiny_trainer(tmp_path).predict(without, PromptDataModule(text=["a man"], guidance_weight=[0], unguided=False))


@pytest.mark.parametrize("ddim", [False, True])
@pytest.mark.parametrize("method", ["clip_guidance", "score_guidance"])
def test_a_picture_does_not_depend_on_its_batch(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path, method: str, ddim: bool
) -> None:
    sampling = SamplingConfig(method=method, skip_steps=5, ddim=ddim)
    images = []
    for micro_batch in (1, 7):
        module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip), sampling=sampling)
        data = PromptDataModule(text=["a man", "a girl"], guidance_weight=[50], n_samples=3, micro_batch=micro_batch)
        images.append(predictions(module, data, tmp_path))
    assert torch.equal(*images)


@pytest.mark.parametrize(("size", "multiple"), [(16, 4), (128, 1)])
def test_a_pass_has_as_many_pictures_in_every_batch(tmp_path: Path, tiny_clip: Path, size: int, multiple: int) -> None:
    """And a lone picture pays for no other one from 128×128 pixels on."""
    torch.manual_seed(0)
    module = tiny_module(clip=str(tiny_clip), image_size=size, sampling=SamplingConfig(skip_steps=2, ddim=False))
    module.configure_model()
    randomise(module.unet)
    sizes: set[int] = set()
    module.unet.register_forward_hook(lambda _, inputs, output: sizes.add(len(output)))
    sampler = module.sampler

    def draw(count: int) -> torch.Tensor:
        return sampler.sample_in_chunks(["a man"] * count, list(range(count)), [20.0, 0.0, 30.0, 0.0, 5.0][:count])[0]

    assert torch.equal(draw(5)[:1], draw(1))
    assert sizes == {multiple}
    assert sampler.settings()["batch_multiple"] == multiple


def test_an_unguided_picture_has_no_similarity_and_needs_no_clip(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path
) -> None:
    module = tiny_module(weights=str(tiny_weights))
    batch = tiny_trainer(tmp_path).predict(module, PromptDataModule(n_samples=2))[0]
    assert batch["clip_similarity"] == [None, None]
    assert batch["provenance"]["clip"] is None
    rows = [{"text": "", "guidance_weight": 0}, {"text": "a man", "guidance_weight": 0}]
    for data, loaded in (
        (PromptDataModule(n_samples=1), False),
        (PromptDataModule(prompts=rows[:1], n_samples=1), False),
        (PromptDataModule(prompts=rows, n_samples=1), True),  # the picture is compared with its text
        (PromptDataModule(text=["a man"], guidance_weight=[0], n_samples=1), True),
    ):
        module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip), sampling=SamplingConfig(skip_steps=1))
        (batch,) = tiny_trainer(tmp_path).predict(module, data)
        assert [clip.name for clip in module.models.loaded()] == [str(tiny_clip)] * loaded
        assert (batch["clip_similarity"][-1] is not None) == loaded == (batch["provenance"]["clip_hash"] is not None)


def test_weights_bring_their_own_architecture(tmp_path: Path, tiny_weights: Path) -> None:
    module = DDPMModule(weights=str(tiny_weights), sampling=SamplingConfig(skip_steps=2))
    assert predictions(module, PromptDataModule(n_samples=1), tmp_path).shape == (1, 3, 16, 16)


def test_predict_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="weights: got none"):
        tiny_trainer(tmp_path).predict(tiny_module(), PromptDataModule(n_samples=1))


def test_a_text_without_a_clip_is_refused(tmp_path: Path, tiny_weights: Path) -> None:
    with pytest.raises(InputError, match="clip: got none"):
        tiny_trainer(tmp_path).predict(tiny_module(weights=str(tiny_weights)), PromptDataModule(text=["a man"]))


def test_a_broken_guidance_names_the_request(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> None:
    module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip))
    module.models.clips[0].model.visual.proj.data.zero_()
    with pytest.raises(GuidanceError, match=r"at t=.* in request .*'text': 'a man'.*'seed': 4"):
        tiny_trainer(tmp_path).predict(module, PromptDataModule(text=["a man"], seed=4, n_samples=1))


@pytest.mark.parametrize(
    ("method", "precision"),
    [*((name, "32-true") for name in METHODS), ("contrastive", "bf16-mixed"), ("universal", "16-mixed")],
)
def test_a_weight_beyond_all_measure_gives_no_picture_of_black_and_white(
    method: str, precision: str, tmp_path: Path, tiny_weights: Path, tiny_clip: Path, noisy_clip: str, classifier: str
) -> None:
    models = {"clip": str(tiny_clip), "noisy_clip": noisy_clip, "classifier": classifier, "contrasts": "faces"}
    sampling = SamplingConfig(method=method, skip_steps=1, repeats=1, interval=(0, 1))
    module = tiny_module(weights=str(tiny_weights), sampling=sampling, **models)
    requests = PromptDataModule(text=["an old man"], guidance_weight=[1e38], n_samples=1, unguided=False)
    trainer = tiny_trainer(tmp_path, precision=precision)
    # what guides by the noise of a step does not guide the last one, which has none
    with pytest.raises(GuidanceError, match=r"far too large|diverges|does not guide any of these steps"):
        trainer.predict(module, requests)


def test_a_walk_that_diverges_is_an_error_at_its_last_step_too(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(x: torch.Tensor, pred: Prediction, step: Step, draw: Draw) -> torch.Tensor:
        return ancestral(x, pred, step, draw) * (float("inf") if step.s == -1 else 1)

    module = tiny_module(weights=str(tiny_weights), sampling=SamplingConfig(skip_steps=2, ddim=False))
    monkeypatch.setattr(Sampler, "make_update", lambda self, edit=None: diverging)
    with pytest.raises(GuidanceError, match="the picture diverges at t=0 in request"):
        tiny_trainer(tmp_path).predict(module, PromptDataModule(n_samples=1))


def test_what_is_not_finite_is_no_picture() -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not finite"):
            to_picture(torch.full((3, 2, 2), value))


def test_default_weights_serve_predict_and_not_fit(tmp_path: Path, tiny_weights: Path) -> None:
    module = tiny_module(default_weights=str(tiny_weights))
    predictions(module, PromptDataModule(n_samples=1), tmp_path)
    assert module.trained
    fit = tiny_module(default_weights=str(tiny_weights))
    tiny_trainer(tmp_path, max_steps=1).fit(fit, tiny_faces())
    assert not fit.trained
    tuned = tiny_module(weights=str(tiny_weights), optim=TrainingConfig(learning_rate=0.0))
    tiny_trainer(tmp_path, max_steps=1).fit(tuned, tiny_faces())
    torch.testing.assert_close(tuned.unet.conv_in.weight.data, load_weights(tiny_weights).state["conv_in.weight"])


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path, callbacks=(ModelCheckpoint(tmp_path, every_n_train_steps=12),))
    other = tiny_module(num_timesteps=50)
    with pytest.raises(InputError, match="the checkpoint has num_timesteps 100, not 50"):
        tiny_trainer(tmp_path, max_steps=20).fit(other, tiny_faces(), ckpt_path=checkpoint_of(tmp_path))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true"])
def test_fit_and_predict_in_every_precision(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path, precision: str
) -> None:
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=12)
    sampler = GuidedSamples(text=["a man"], n_samples=1, every_n_steps=6)
    module = fitted(tmp_path, clip=str(tiny_clip), precision=precision, callbacks=(saver, sampler))
    assert all(average.dtype == torch.float32 for average in module.ema.average.values())
    assert module.unet.conv_in.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    data = PromptDataModule(text=["a man"], guidance_weight=[20.0], n_samples=2, unguided=False)
    pictures = {}
    for p in {precision, "32-true"}:
        again = tiny_module(
            clip=str(tiny_clip), weights=checkpoint_of(tmp_path), sampling=SamplingConfig(skip_steps=20)
        )
        out = tiny_trainer(tmp_path, precision=p).predict(again, datamodule=data)
        pictures[p] = torch.cat([batch["image"] for batch in out])
        assert pictures[p].dtype == torch.float32
        assert out[0]["float32_retries"] == [0, 0]
    assert (pictures[precision] - pictures["32-true"]).abs().mean() < 0.1


def test_predict_counts_what_it_computed_again(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A U-Net whose gradient is lost in half precision, for the second of two pictures, gives float32's."""
    derivative = guidance._derivative

    def lost(scores: torch.Tensor, at: torch.Tensor, retain_graph: bool) -> torch.Tensor:
        g = derivative(scores, at, retain_graph)
        if module.unet.conv_in.weight.dtype != torch.float32:
            g[1] = torch.nan
        return g

    monkeypatch.setattr(guidance, "_derivative", lost)
    models = {
        "clip": str(tiny_clip),
        "weights": str(tiny_weights),
        "sampling": SamplingConfig(skip_steps=5, ddim=False, interval=(0, 1)),
    }
    data = PromptDataModule(text=["a man"], guidance_weight=[20.0], n_samples=2, unguided=False)
    module = tiny_module(**models)
    (batch,) = tiny_trainer(tmp_path, precision="bf16-true").predict(module, datamodule=data)
    assert batch["float32_retries"] == [0, 5]
    module = tiny_module(**models)
    (exact,) = tiny_trainer(tmp_path).predict(module, datamodule=data)
    difference = (batch["image"] - exact["image"]).abs().mean(dim=(1, 2, 3))
    assert difference[1] < difference[0] < 0.2


def test_where_memory_runs_out_half_as_many_are_drawn(
    tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = PromptDataModule(n_samples=13, micro_batch="auto")
    module = tiny_module(weights=str(tiny_weights))
    atomic_write = predictions(module, data, tmp_path)
    sizes = []

    def scarce(self: UNet, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        if len(x) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, x, t)

    forward, room = UNet.forward, 4
    monkeypatch.setattr(UNet, "forward", scarce)
    monkeypatch.setattr(Sampler, "_split", whole_batch)
    module = tiny_module(weights=str(tiny_weights))
    torch.testing.assert_close(predictions(module, data, tmp_path), atomic_write, atol=1e-5, rtol=0)
    assert list(dict.fromkeys(sizes)) == [16, 8, 4]
    room = 3
    with pytest.raises(InputError, match="micro_batch: not even 4 pictures fit into memory; "):
        predictions(tiny_module(weights=str(tiny_weights)), data, tmp_path)


def test_recomputed_activations_change_no_bit(tmp_path: Path, tiny_weights: Path, tiny_clip: Path) -> None:
    fits, pictures = [], []
    for again in (False, True):
        fits.append(fitted(tmp_path, checkpoint_activations=again))
        module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip), checkpoint_activations=again)
        data = PromptDataModule(text=["a man"], guidance_weight=[100.0], n_samples=2)
        pictures.append(predictions(module, data, tmp_path))
        assert module.unet.checkpointing == module.models.clips[0].checkpointing == again
    assert torch.equal(*pictures)
    for a, b in zip(fits[0].unet.parameters(), fits[1].unet.parameters(), strict=True):
        assert torch.equal(a, b)


def compiled_with(backend: object, monkeypatch: pytest.MonkeyPatch) -> None:
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend=backend))


def test_compiled_networks_guide_alike_and_are_compiled_once(
    tiny_weights: Path, tiny_clip: Path, noisy_clip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    for method in ("clip_guidance", "contrastive"):
        torch._dynamo.reset()
        counter, pictures = CompileCounterWithBackend("aot_eager"), []
        compiled_with(counter, monkeypatch)
        for compile in (False, True):
            sampling = SamplingConfig(method=method, skip_steps=6)
            module = tiny_module(
                weights=str(tiny_weights),
                clip=str(tiny_clip),
                noisy_clip=noisy_clip,
                compile=compile,
                sampling=sampling,
            )
            module.configure_model()
            pictures.append(module.sampler.sample(["a man"], [0], [20.0])[0])
        torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)
        assert counter.frame_count == 2  # the U-Net and the image tower, over all steps
        monkeypatch.undo()


@pytest.mark.slow
def test_the_c_compiler_gives_the_same_pictures(tiny_weights: Path, tiny_clip: Path) -> None:
    pictures = []
    for compile in (False, True):
        sampling = SamplingConfig(method="clip_guidance", skip_steps=6)
        module = tiny_module(weights=str(tiny_weights), clip=str(tiny_clip), compile=compile, sampling=sampling)
        module.configure_model()
        pictures.append(module.sampler.sample(["a man"], [0], [20.0])[0])
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=0)


def test_recomputed_activations_need_less_memory() -> None:
    network = randomise(UNet(TINY_UNET))
    kept = {}
    for again in (False, True):
        network.checkpointing, kept[again] = again, 0

        def keep(x: torch.Tensor, again: bool = again) -> torch.Tensor:
            kept[again] += x.numel()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            network(torch.randn(2, 3, 16, 16, requires_grad=True), torch.tensor([3, 4]))
    assert kept[True] < 0.5 * kept[False]


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path: Path) -> None:
    module = tiny_module(optim=TrainingConfig(learning_rate=1e-3))
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_on_exception=True, save_last=True)
    losses = module.losses

    def break_the_third(*args) -> torch.Tensor:
        return losses(*args) * (float("nan") if module.global_step == 2 else 1)

    module.losses = break_the_third
    trainer = tiny_trainer(tmp_path, max_steps=4, callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(InputError, match=r"gradient is not finite at step 3 \(epoch 0, batch 2\).*learning_rate"):
        trainer.fit(module, tiny_faces())
    last = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values())


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    module = tiny_module(optim=TrainingConfig(learning_rate=1e30), save_path=str(out))
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_on_exception=True, save_last=True)
    trainer = tiny_trainer(tmp_path, max_steps=2, callbacks=[saver], enable_checkpointing=True)
    with pytest.raises(InputError, match="not finite"):
        trainer.fit(module, tiny_faces())
    assert not out.exists()
    for path in tmp_path.rglob("*.ckpt"):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", -1),
        ("learning_rate", float("nan")),
        ("weight_decay", float("inf")),
        ("warmup_steps", -1),
        ("ema_decay", 2),
        ("ema_decay", 1),
        ("min_snr_gamma", 0),
        ("min_snr_gamma", float("inf")),
    ],
)
def test_optimiser_settings_out_of_range_are_refused(setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"optim.{setting}: got {value}, expected"):
        TrainingConfig(**{setting: value})


def test_min_snr_weights_the_loss_of_x0() -> None:
    alpha_bar = torch.tensor([0.99, 0.5, 0.01])[:, None, None, None]
    snr = alpha_bar / (1 - alpha_bar)
    torch.manual_seed(0)
    x0, eps, error = torch.randn(3, 3, 1, 2, 2)
    x = add_noise(x0, eps, alpha_bar)
    for parametrisation in ("x0", "eps", "v"):
        output = training_target(x0, eps, alpha_bar, parametrisation) + error
        wanted = snr.clamp(max=5) * (to_x0(output, x, alpha_bar, parametrisation) - x0) ** 2
        weighed = min_snr_weight(alpha_bar, 5, parametrisation) * error**2
        torch.testing.assert_close(weighed, wanted, atol=1e-4, rtol=1e-4)
