import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import randomise
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from layouts import OpenAI, Pesser, Xyfjason
from safetensors.torch import load_file, save_file

from clipward.diffusion.denoiser import NetworkDenoiser
from clipward.diffusion.sampling import ancestral
from clipward.diffusion.schedule import Schedule
from clipward.errors import InputError
from clipward.networks.unet import UNet, UNetConfig
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.diffusers import save_diffusers
from clipward.weights.load import load_weights, save_weights

Layout = Pesser | OpenAI | Xyfjason
T = torch.tensor([0, 17, 999])


def output(weights: Weights, x: torch.Tensor, t: torch.Tensor = T) -> torch.Tensor:
    network = UNet(weights.architecture.unet).eval()
    weights.into(network)
    with torch.no_grad():
        return network(x, t)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def tiny_diffusers(folder: Path, **scheduler) -> UNet2DModel:
    """A pipeline with a random network, as diffusers writes it."""
    network = UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    )
    DDPMPipeline(randomise(network).eval(), DDPMScheduler(**scheduler)).save_pretrained(folder)
    return network


# from others


@pytest.mark.parametrize(
    "layout",
    [
        Pesser(),
        Pesser(ch_mult=(1, 2), attn_resolutions=(32, 16), num_res_blocks=1),
        OpenAI(),
        OpenAI(channel_mult=(1, 2), attention_ds=(1,), resblock_updown=False, num_res_blocks=1),
        OpenAI(use_scale_shift_norm=False, learn_sigma=False, attention_ds=(4,), channel_mult=(1, 2, 1)),
        Xyfjason(),
        Xyfjason(dim_mults=(1, 2), use_attn=(True, True), num_res_blocks=1),
        Xyfjason(dim_mults=(1, 1, 1), use_attn=(False, False, False), num_res_blocks=3),
    ],
)
@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_a_bare_state_is_recognised_and_computes_the_same(layout: Layout, kind: str, tmp_path: Path) -> None:
    state, file = layout.make(), tmp_path / "weights"  # the name says nothing
    (torch.save if kind == "pickle" else save_file)(state, file)
    weights, x = load_weights(file), torch.randn(3, 3, 16, 16)
    same(output(weights, x), layout.forward(state, x, T))


@pytest.mark.parametrize(
    ("layout", "var_type", "head_channels"),
    [(Pesser(), "fixed_small", None), (OpenAI(), "learned_range", 64), (Xyfjason(), "fixed_small", None)],
)
def test_what_a_bare_state_does_not_say_is_as_published(
    layout: Layout, var_type: str, head_channels: int | None, tmp_path: Path
) -> None:
    torch.save(layout.make(), tmp_path / "x.pt")
    ours = load_weights(tmp_path / "x.pt").architecture
    assert (ours.image_size, ours.var_type, ours.unet.head_channels) == (32, var_type, head_channels)
    assert (ours.schedule, ours.num_timesteps, ours.betas) == ("linear", 1000, (1e-4, 0.02))
    assert (ours.parametrisation, ours.clip_denoised) == ("eps", True)


@pytest.mark.parametrize("layout", [OpenAI(num_head_channels=32), Xyfjason(dim=64, n_heads=2, dim_mults=(1, 1, 1))])
def test_the_width_of_a_head_can_be_given(layout: OpenAI | Xyfjason, tmp_path: Path) -> None:
    torch.save(state := layout.make(), tmp_path / "x.pt")
    x = torch.randn(3, 3, 16, 16)
    theirs = layout.forward(state, x, T)
    same(output(load_weights(tmp_path / "x.pt", head_channels=32), x), theirs)
    assert not torch.allclose(output(load_weights(tmp_path / "x.pt"), x), theirs, atol=1e-3)


@pytest.mark.parametrize("half", [False, True])
def test_a_state_is_found_in_what_training_programs_save(half: bool, tmp_path: Path) -> None:
    raw = {name: value.half() if half else value for name, value in Pesser(ch_mult=(1, 2)).make().items()}
    average = {name: value + 1 for name, value in raw.items()}
    wrapped = {
        "shadow": {"ema": {"shadow": average, "decay": 0.999}, "model": raw, "optimizer": {"lr": 1}, "step": 7},
        "ema": {"ema": average, "model": raw},
        "parallel": {"model": {f"module.{name}": value for name, value in raw.items()}},
        "lightning": {"state_dict": {f"model.net.{name}": value for name, value in raw.items()}, "epoch": 3},
        "bare": raw,
    }
    for name, content in wrapped.items():
        torch.save(content, tmp_path / name)
        has_average = name in ("shadow", "ema")
        for use_ema in (True, False):
            value = load_weights(tmp_path / name, use_ema).state["conv_in.bias"]
            same(value, (average if has_average and use_ema else raw)["conv_in.bias"].float())


def xyfjason_files(folder: Path) -> tuple[dict, dict]:
    """Write the files of the document's training programs; the weights that train, and their averages."""
    raw = Xyfjason().make()
    average = {name: value + 1 for name, value in raw.items()}
    as_state, as_list = ({"decay": 0.9, "num_updates": 7, "shadow": s} for s in (average, list(average.values())))
    for name, content in {
        "together/model.pt": {"model": raw, "ema": as_state, "optimizer": {"lr": 1e-4}, "step": 7},
        "together_list/model.pt": {"model": raw, "ema": as_list, "step": 7},
        "parallel/model.pt": {"model": {f"module.{key}": value for key, value in raw.items()}, "ema": as_list},
        "apart/model.pt": {"model": raw},
        "apart/ema.pt": as_state,
        "apart_list/model.pt": raw,
        "apart_list/ema.pt": as_list,
        "alone/ema.pt": as_list,
        "other/ema.pt": as_list,
        "other/model.pt": dict(list(raw.items())[:-1]),
        "lightning.ckpt": {"state_dict": raw},
        "bare.pt": raw,
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        torch.save(content, folder / name)
    return raw, average


@pytest.mark.parametrize(
    ("file", "use_ema", "averaged"),
    [
        ("together/model.pt", True, True),
        ("together/model.pt", False, False),
        ("together_list/model.pt", True, True),
        ("together_list/model.pt", False, False),
        ("parallel/model.pt", True, True),
        ("parallel/model.pt", False, False),
        ("apart/model.pt", True, False),
        ("apart/ema.pt", True, True),
        ("apart_list/ema.pt", True, True),
        ("lightning.ckpt", True, False),
        ("bare.pt", True, False),
    ],
)
def test_the_documents_own_files_are_read_as_they_came(
    file: str, use_ema: bool, averaged: bool, tmp_path: Path
) -> None:
    raw, average = xyfjason_files(tmp_path)
    weights = load_weights(tmp_path / file, use_ema)
    theirs = average if averaged else raw
    for ours, name in (
        ("conv_in.bias", "first_conv.bias"),
        ("up.2.blocks.1.conv2.weight", "up_blocks.2.1.blk2.3.weight"),
    ):
        assert torch.equal(weights.state[ours], theirs[name])


@pytest.mark.parametrize(
    ("file", "use_ema", "message"),
    [
        (
            "alone/ema.pt",
            True,
            "got averaged weights without names in .*ema.pt; put the model.pt of the same run beside",
        ),
        ("other/ema.pt", True, "got averaged weights without names in .*ema.pt, expected the shapes of model"),
        ("apart/ema.pt", False, "got .*ema.pt with averaged weights alone; use --use_ema true"),
        ("alone/ema.pt", False, "got .*ema.pt with averaged weights alone; use --use_ema true"),
    ],
)
def test_averaged_weights_that_cannot_be_read_are_refused(
    file: str, use_ema: bool, message: str, tmp_path: Path
) -> None:
    xyfjason_files(tmp_path)
    with pytest.raises(InputError, match=f"^weights: {message}"):
        load_weights(tmp_path / file, use_ema)


@pytest.mark.parametrize("place", ["pipeline", "root", "file", "bin", "old attention"])
def test_a_diffusers_folder_computes_the_same(place: str, tmp_path: Path) -> None:
    network, folder = tiny_diffusers(tmp_path / "pipe"), tmp_path / "pipe"
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    if place in ("root", "old attention"):  # as google/ddpm-celebahq-256 has it
        for each in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
            each.rename(folder / each.name)
        file = folder / file.name
    if place == "bin":
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
    if place == "old attention":
        then = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        state = load_file(file)
        for new, old in then.items():
            state = {name.replace(f"{new}.", f"{old}."): value for name, value in state.items()}
        save_file(state, file)
    x = torch.randn(3, 3, 16, 16)
    weights = load_weights(file if place == "file" else folder)
    with torch.no_grad():
        same(output(weights, x), network(x, T).sample)
    assert weights.architecture.image_size == 16


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.001, "beta_end": 0.03, "num_train_timesteps": 200},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "clip_sample": False},
        {"prediction_type": "sample", "variance_type": "fixed_large"},
    ],
)
def test_the_schedulers_settings_are_obeyed(scheduler: dict, tmp_path: Path) -> None:
    tiny_diffusers(tmp_path, **scheduler)
    theirs, ours = DDPMScheduler(**scheduler), load_weights(tmp_path).architecture
    schedule = Schedule.from_name(ours.schedule, ours.num_timesteps, ours.betas)
    torch.testing.assert_close(schedule.alpha_bar.float(), theirs.alphas_cumprod, atol=1e-5, rtol=1e-4)
    assert ours.clip_denoised == theirs.config.clip_sample
    x, out, noise = torch.randn(3, 2, 3, 8, 8)
    t = 3 * ours.num_timesteps // 4
    theirs.set_timesteps(ours.num_timesteps)
    generator = torch.Generator().manual_seed(5)
    expected = theirs.step(out, t, x, generator=generator).prev_sample
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    pred = NetworkDenoiser(lambda x, t: out, ours.parametrisation, ours.var_type)(x, schedule.step(t, t - 1))
    if ours.clip_denoised:
        from clipward.guidance.core import Clamp

        pred = Clamp()(pred, x, schedule.step(t, t - 1))
    torch.testing.assert_close(
        ancestral(x, pred, schedule.step(t, t - 1), lambda: noise), expected, atol=1e-4, rtol=1e-4
    )


# to others


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(channels=(32, 64), num_res_blocks=1, attention_levels=(1,)),
        UNetConfig(channels=(32, 64, 64), attention_levels=(0, 2), out_channels=6, head_channels=32, freq_shift=0),
        UNetConfig(channels=(32, 64, 64), attention_levels=(1,), scale_shift_norm=True, downsample_padding=1),
        UNetConfig(channels=(64, 64, 64), attention_levels=(1, 2), scale_shift_norm=True, resblock_updown=True),
    ],
)
def test_diffusers_opens_what_we_write_and_computes_the_same(config: UNetConfig, tmp_path: Path) -> None:
    network = randomise(UNet(config)).eval()
    architecture = Architecture(config, 16, "cosine", 200, parametrisation="v", var_type="fixed_large")
    save_diffusers(tmp_path / "out", Weights(architecture, network.state_dict()))
    pipeline, x = DDPMPipeline.from_pretrained(tmp_path / "out"), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        same(network(x, T), pipeline.unet(x, T).sample)
    alpha_bar = Schedule.from_name("cosine", 200).alpha_bar.float()
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod, alpha_bar, atol=1e-5, rtol=1e-3)
    back = load_weights(tmp_path / "out")
    assert back.architecture == architecture
    assert all(torch.equal(back.state[name], value) for name, value in network.state_dict().items())


def test_a_patch_is_nothing_diffusers_has(tmp_path: Path) -> None:
    config = UNetConfig(patch=2, channels=(32, 64))
    with pytest.raises(InputError, match="to: got diffusers, which has no network of patch 2; use safetensors"):
        save_diffusers(tmp_path / "out", Weights(Architecture(config, 16), UNet(config).state_dict()))
    assert not list(tmp_path.iterdir())


def test_our_safetensors_keep_every_bit(tmp_path: Path) -> None:
    config = UNetConfig(channels=(32, 64))
    weights = Weights(Architecture(config, 32, "scaled_linear", 300, (1e-3, 0.03)), UNet(config).state_dict())
    save_weights(tmp_path / "a.safetensors", weights)
    back = load_weights(tmp_path / "a.safetensors")
    assert back.architecture == weights.architecture
    assert all(torch.equal(back.state[name], value) for name, value in weights.state.items())


# refused


def test_a_state_with_a_wrong_key_is_refused_by_its_own_name(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    for layout, name in (
        (Pesser(), "up.0.block.1.conv2.weight"),
        (OpenAI(), "output_blocks.1.0.out_layers.3.weight"),
        (OpenAI(), "middle_block.1.qkv.weight"),
        (Xyfjason(), "up_blocks.1.2.blk2.3.weight"),
    ):
        state = layout.make()
        shape = tuple(state[name].shape)
        torch.save(state | {name: state[name][:1]}, file)
        given = (1, *shape[1:])
        with pytest.raises(InputError) as raised:
            load_weights(file)
        assert str(raised.value) == f"weights: got the key {name} of shape {given}, expected {shape}"
        torch.save({key: value for key, value in state.items() if key != name}, file)
        with pytest.raises(InputError) as raised:
            load_weights(file)
        assert str(raised.value) == f"weights: got no key {name}, expected one of shape {shape}".replace(", 1)", ")")
        torch.save(state | {"label_emb.weight": torch.zeros(10, 4)}, file)
        with pytest.raises(InputError, match=r"the key label_emb.weight of shape \(10, 4\), expected no such key"):
            load_weights(file)


def test_a_file_that_could_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": Pesser().make(), "path": tmp_path}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"holds more than tensors, which could run code \(.*Posix.*state dict alone"):
        load_weights(tmp_path / "x.pt")


def test_a_cut_or_foreign_file_is_refused(tmp_path: Path) -> None:
    torch.save(Pesser().make(), tmp_path / "x.pt")
    sound = (tmp_path / "x.pt").read_bytes()
    for content in (b"", b"hello", sound[: len(sound) // 2], sound[:-100]):
        (tmp_path / "y.pt").write_bytes(content)
        with pytest.raises(InputError, match=r"y\.pt is .*damaged"):
            load_weights(tmp_path / "y.pt")
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "z.pt")
    with pytest.raises(InputError, match="got the keys a, b …, expected those of a network by diffusers, pesser/"):
        load_weights(tmp_path / "z.pt")
    torch.save({"step": 3}, tmp_path / "z.pt")
    with pytest.raises(InputError, match="got no dictionary of tensors"):
        load_weights(tmp_path / "z.pt")
    with pytest.raises(InputError, match=r"there is no file .*nowhere"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"expected one with ddpm\.safetensors, or with diffusers"):
        load_weights(tmp_path)


def test_a_name_that_the_hub_lacks_is_refused() -> None:
    with pytest.raises(InputError, match="nobody/nothing is no file or folder, and the hub gives no such model"):
        load_weights("nobody/nothing")


@pytest.mark.parametrize(
    ("file", "setting", "value", "message"),
    [
        ("unet", "act_fn", "relu", "got act_fn 'relu' in config.json, expected 'silu'"),
        (
            "unet",
            "down_block_types",
            ["SkipDownBlock2D", "DownBlock2D"],
            "got 'SkipDownBlock2D' among down_block_types",
        ),
        ("unet", "num_class_embeds", 10, "num_class_embeds 10"),
        ("unet", "block_out_channels", None, "got no block_out_channels in config.json"),
        (
            "scheduler",
            "beta_schedule",
            "sigmoid",
            "got beta_schedule 'sigmoid' in scheduler_config.json, expected one of linear",
        ),
        ("scheduler", "trained_betas", [0.1, 0.2], "got trained_betas"),
        ("scheduler", "clip_sample_range", 2.0, "clip_sample_range 2.0"),
    ],
)
def test_a_diffusers_setting_that_is_not_ours_is_refused(
    file: str, setting: str, value: object, message: str, tmp_path: Path
) -> None:
    tiny_diffusers(tmp_path)
    path = next((tmp_path / file).glob("*config.json"))
    config = json.loads(path.read_text()) | {setting: value}
    path.write_text(json.dumps({name: setting for name, setting in config.items() if setting is not None}))
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        load_weights(tmp_path)


def test_a_diffusers_folder_without_its_parts_is_refused(tmp_path: Path) -> None:
    tiny_diffusers(tmp_path / "pipe")
    shutil.rmtree(tmp_path / "pipe/scheduler")
    with pytest.raises(InputError, match=r"got no scheduler_config\.json"):
        load_weights(tmp_path / "pipe")
    (tmp_path / "pipe/unet/config.json").unlink()
    with pytest.raises(InputError, match=r"got no config\.json beside .*safetensors"):
        load_weights(tmp_path / "pipe/unet/diffusion_pytorch_model.safetensors")


# whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "parameters"),
    [
        (Pesser(128, (1, 1, 2, 2, 4, 4), 2, (16,), 256), 113.67e6),
        (OpenAI(256, (1, 1, 2, 2, 4, 4), 2, (8, 16, 32)), 552.81e6),
        (Xyfjason(128, (1, 1, 2, 2, 4, 4), (False, False, False, False, True, False)), 113.67e6),
    ],
    ids=["Ho et al.'s CelebA-HQ 256", "Dhariwal & Nichol's learned_range 256", "the document's CelebA-HQ 256"],
)
def test_the_published_networks_at_their_full_size(layout: Layout, parameters: float, tmp_path: Path) -> None:
    torch.save(state := layout.make(), tmp_path / "x.pt")
    weights = load_weights(tmp_path / "x.pt")
    assert weights.architecture.image_size == 256
    assert sum(value.numel() for value in weights.state.values()) == pytest.approx(parameters, rel=1e-4)
    x, t = torch.randn(1, 3, 64, 64), torch.tensor([500])
    with torch.no_grad():
        torch.testing.assert_close(output(weights, x, t), layout.forward(state, x, t), atol=1e-4, rtol=1e-4)
