import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import TINY, TINY_UNET, randomise
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from layouts import OpenAI, Pesser, Xyfjason
from safetensors.torch import load_file, save_file

from clipward.diffusion.denoiser import NetworkDenoiser
from clipward.diffusion.sampling import ancestral
from clipward.diffusion.schedule import Schedule, Scheduler
from clipward.errors import InputError
from clipward.networks.unet import UNet, UNetConfig
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.diffusers import save_diffusers
from clipward.weights.load import PROJECTS, load_weights, save_weights

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
        "unknown.pt": {"model": raw, "ema": {"online": average, "step": 7}},
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
        ("unknown.pt", False, False),
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
            "got averaged weights without names in .*ema.pt'; put model.pt of the same run beside",
        ),
        ("other/ema.pt", True, "got averaged weights without names in .*ema.pt', expected the shapes of model"),
        ("unknown.pt", True, "got an ema in .*unknown.pt' that is no dictionary of tensors; use --use_ema false"),
        ("apart/ema.pt", False, "got .*ema.pt' with averaged weights alone; use --use_ema true"),
        ("alone/ema.pt", False, "got .*ema.pt' with averaged weights alone; use --use_ema true"),
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
        {"variance_type": "fixed_small_log"},
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
    assert back.architecture == replace(architecture, scheduler=Scheduler(skip_type="leading"))
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


LEFT_OUT = object()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("schedule", "sigmoid", "got 'sigmoid' for architecture.schedule, expected linear, scaled_linear or cosine"),
        ("schedule", "x" * 10_000, "got 'xxx"),
        ("schedule", LEFT_OUT, "got no architecture.schedule, expected linear, scaled_linear or cosine"),
        ("parametrisation", "score", "got 'score' for architecture.parametrisation, expected eps, x0 or v"),
        (
            "var_type",
            "learned",
            "got 'learned' for architecture.var_type, expected fixed_small, fixed_large or learned",
        ),
        ("image_size", "16", "got '16' for architecture.image_size, expected a whole number"),
        ("image_size", True, "got True for architecture.image_size, expected a whole number"),
        ("num_timesteps", 1.5, "got 1.5 for architecture.num_timesteps, expected a whole number"),
        ("num_timesteps", None, "got None for architecture.num_timesteps, expected a whole number"),
        ("betas", [1e-4], "got [0.0001] for architecture.betas, expected a list of 2 numbers"),
        ("betas", [1e-4, "x"], "got [0.0001, 'x'] for architecture.betas, expected a list of 2 numbers"),
        ("clip_denoised", 1, "got 1 for architecture.clip_denoised, expected true or false"),
        ("colour", "red", "got 'colour' in architecture, which this version lacks; use a newer one"),
        ("x" * 10_000, 1, "got 'xxx"),
        ("unet", [64], "got [64] for architecture.unet, expected a dictionary"),
        ("unet", LEFT_OUT, "got no architecture.unet, expected a dictionary"),
        ("unet.channels", 64, "got 64 for architecture.unet.channels, expected a list of whole numbers"),
        ("unet.channels", LEFT_OUT, "got no architecture.unet.channels, expected a list of whole numbers"),
        ("unet.norm_eps", float("nan"), "got nan for architecture.unet.norm_eps, expected a number"),
        ("unet.freq_shift", 2, "got 2 for architecture.unet.freq_shift, expected 0 or 1"),
        ("unet.head_channels", "64", "got '64' for architecture.unet.head_channels, expected a whole number or null"),
        ("unet.channels", [2**40, 2**40], "got [1099511627776, 1099511627776]"),
        ("unet.channels", [32] * 1_000_000, "expected at most 16 numbers"),
        ("unet.num_res_blocks", 10**9, "unet.num_res_blocks: got 1000000000, expected 1 to 128"),
        ("unet.attention_levels", [-1], "unet.attention_levels: got [-1], expected levels from 0"),
        ("unet.patch", 10**9, "unet.patch: got 1000000000, expected 1 to 256"),
        ("num_timesteps", 10**15, "num_timesteps: got 1000000000000000, expected 1 to 1000000"),
        ("unet.depth", 4, "got 'depth' in architecture.unet, which this version lacks; use a newer one"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_header_is_refused_by_its_field(field: str, value: object, message: str, tmp_path: Path) -> None:
    header = Architecture(UNetConfig(channels=(32,)), 16).to_dict()
    part = header["unet"] if field.startswith("unet.") else header
    part[field.removeprefix("unet.")] = value
    if value is LEFT_OUT:
        del part[field.removeprefix("unet.")]
    metadata = {"format": "clipward-ddpm-1", "architecture": json.dumps(header)}
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(InputError) as raised:
        load_weights(tmp_path / "a.safetensors")
    assert message in str(raised.value)
    assert len(str(raised.value)) < 200


def test_a_header_of_a_huge_network_takes_no_memory(tmp_path: Path) -> None:
    config = UNetConfig(channels=(2**15,) * 5, num_res_blocks=50, attention_levels=(0, 1, 2, 3, 4))  # 10^13 parameters
    metadata = {"format": "clipward-ddpm-1", "architecture": json.dumps(Architecture(config).to_dict())}
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(InputError, match="weights: got the key 'a', expected no such key"):
        load_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.complex64])
def test_weights_of_another_type_are_refused(tmp_path: Path, kind: torch.dtype) -> None:
    state = {name: value.to(kind) for name, value in randomise(UNet(TINY_UNET)).state_dict().items()}
    save_weights(tmp_path / "a.safetensors", Weights(TINY, state))
    with pytest.raises(InputError, match=r"weights: got the key '.*' of (int32|bool|complex64) values, expected float"):
        load_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("half", [False, True])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, half: bool) -> None:
    state = randomise(UNet(TINY_UNET)).state_dict()
    state["conv_in.weight"][0, 0, 0, 0] = float("nan")
    save_weights(tmp_path / "a.safetensors", Weights(TINY, state), half)
    with pytest.raises(InputError, match=r"weights: got the key 'conv_in.weight' with values that are not finite"):
        load_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 20}, "image_size: got 20, expected a multiple of 32 for this U-Net"),
        ({"image_size": 0}, "image_size: got 0, expected a multiple of 32 for this U-Net"),
        ({"image_size": 2**40}, "image_size: got 1099511627776, expected a multiple of 32 for this U-Net, up to 16384"),
        ({"num_timesteps": 0}, "num_timesteps: got 0, expected 1 to 1000000"),
        ({"num_timesteps": 10**12}, "num_timesteps: got 1000000000000, expected 1 to 1000000"),
        ({"betas": (-0.1, 0.02)}, r"betas: got \[-0.1, 0.02\], expected two rising numbers between 0 and 1"),
        ({"betas": (0.5, 0.1)}, "betas: got"),
        (
            {"betas": (0.9, 0.99)},
            r"betas: got \[0.9, 0.99\] with num_timesteps 1000; alpha_bar: expected",
        ),
        ({"betas": (1e-300, 1e-299)}, r"betas: got .* with num_timesteps 1000; alpha_bar: expected"),
        ({"betas": (0.5, float("nan"))}, "betas: got"),
    ],
)
def test_an_architecture_out_of_range_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Architecture(**settings)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "clipward-ddpm-1"}, "got no architecture in the file's header"),
        (
            {"format": "clipward-ddpm-1", "architecture": "{"},
            "got '{' for architecture in the file's header, expected JSON",
        ),
        ({"format": "clipward-ddpm-1", "architecture": "3"}, "got 3 for architecture, expected a dictionary"),
        ({"format": "clipward-classifier-1"}, "got a file of format 'clipward-classifier-1', expected clipward-ddpm-1"),
    ],
)
def test_a_file_with_another_header_is_refused(metadata: dict[str, str], message: str, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(InputError, match=f"^weights: {message}"):
        load_weights(tmp_path / "a.safetensors")


def test_a_header_of_the_first_version_has_todays_defaults() -> None:
    unet = {"image_channels": 3, "out_channels": None, "patch": 2, "channels": [48, 80], "num_res_blocks": 1}
    unet |= {"attention_levels": [1], "dropout": 0.0, "norm_groups": 16, "norm_eps": 1e-06}
    header = {"unet": unet, "image_size": 64, "schedule": "cosine", "num_timesteps": 1000, "parametrisation": "v"}
    config = UNetConfig(patch=2, channels=(48, 80), num_res_blocks=1, attention_levels=(1,), norm_groups=16)
    assert Architecture.from_dict(header) == Architecture(config, 64, "cosine", parametrisation="v")


@pytest.mark.parametrize("use_ema", [True, False])
def test_a_checkpoint_without_its_parameters_is_refused(use_ema: bool, tmp_path: Path) -> None:
    torch.save({"architecture": Architecture().to_dict(), "epoch": 3}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"^weights: got no (state_dict|current_model_state) in the checkpoint"):
        load_weights(tmp_path / "last.ckpt", use_ema)


@pytest.mark.parametrize("layout", [Pesser(), OpenAI(), Xyfjason()], ids=lambda layout: type(layout).__name__)
@pytest.mark.parametrize("kept", [1, 4, 6, 20, -1])
def test_a_part_of_a_state_is_refused(layout: Layout, kept: int, tmp_path: Path) -> None:
    torch.save(dict(list(layout.make().items())[:kept]), tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"^weights: got"):
        load_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("layout", [Pesser(), OpenAI(), Xyfjason()], ids=lambda layout: type(layout).__name__)
def test_a_state_of_odd_shapes_is_refused(layout: Layout, tmp_path: Path) -> None:
    state = layout.make()
    project = next(project for project in PROJECTS if project.matches(state))
    for name in [*list(state)[:8], *list(state)[8::13], *list(state)[-4:]]:
        for shape in ((), (3,), (0, 3), (48, 3, 3, 3)):
            if state[name].shape != shape:
                with pytest.raises(InputError):
                    project.from_state(state | {name: torch.zeros(shape)}, tmp_path)


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
        assert str(raised.value) == f"weights: got the key {name!r} of shape {given}, expected {shape}"
        torch.save({key: value for key, value in state.items() if key != name}, file)
        with pytest.raises(InputError) as raised:
            load_weights(file)
        assert str(raised.value) == f"weights: got no key {name!r}, expected one of shape {shape}".replace(", 1)", ")")
        torch.save(state | {"bogus.weight": torch.zeros(10, 4)}, file)
        with pytest.raises(InputError, match=r"got the key 'bogus.weight', expected no such key"):
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
        with pytest.raises(InputError, match=r"got .*y\.pt\', which is .*damaged"):
            load_weights(tmp_path / "y.pt")
    torch.save({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "z.pt")
    with pytest.raises(InputError, match="got the keys a, b, expected those of a network by diffusers, pesser/"):
        load_weights(tmp_path / "z.pt")
    torch.save({"step": 3}, tmp_path / "z.pt")
    with pytest.raises(InputError, match=r"got no tensors in .*, expected a dictionary, bare or under"):
        load_weights(tmp_path / "z.pt")
    with pytest.raises(InputError, match=r"there is no file .*nowhere"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"expected one with ddpm\.safetensors, or with diffusers"):
        load_weights(tmp_path)


def test_a_name_that_the_hub_lacks_is_refused() -> None:
    with pytest.raises(
        InputError, match="got 'nobody/nothing', which is no file or folder, and the hub gives no such model"
    ):
        load_weights("nobody/nothing")


@pytest.fixture(scope="module")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_diffusers(folder)
    return folder


def write_setting(path: Path, setting: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {setting: value}))


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        (
            "_class_name",
            "UNet2DConditionModel",
            "got _class_name 'UNet2DConditionModel' in config.json, expected UNet2DM",
        ),
        ("act_fn", "relu", "got act_fn 'relu' in config.json, expected silu, swish"),
        ("center_input_sample", True, "got center_input_sample true in config.json, expected false"),
        ("mid_block_type", None, "got mid_block_type null in config.json, expected UNetMidBlock2D"),
        (
            "resnet_time_scale_shift",
            "ada_group",
            "got resnet_time_scale_shift 'ada_group' in config.json, expected defa",
        ),
        (
            "resnet_time_scale_shift",
            "scale_shift",
            "got attn_norm_num_groups null in config.json, expected norm_num_gro",
        ),
        ("attn_norm_num_groups", 16, "got attn_norm_num_groups 16 in config.json, expected norm_num_groups, 32"),
        (
            "down_block_types",
            ["DownBlock2D", "SkipDownBlock2D"],
            "got down_block_types 'SkipDownBlock2D' in config.json",
        ),
        ("down_block_types", "DownBlock2D", "got down_block_types 'DownBlock2D' in config.json, expected a list of 2"),
        (
            "up_block_types",
            ["UpBlock2D"] * 2,
            "got up_block_types ['UpBlock2D', 'UpBlock2D'] in config.json, expected at",
        ),
        ("up_block_types", ["UpBlock2D"], "got up_block_types ['UpBlock2D'] in config.json, expected a list of 2"),
        (
            "upsample_type",
            "resnet",
            "got down_block_types ['DownBlock2D', 'AttnDownBlock2D'] in config.json, expected one",
        ),
        ("block_out_channels", [32, 64, 64], "got down_block_types ['DownBlock2D', 'AttnDownBlock2D'] in config.json"),
        (
            "block_out_channels",
            [32, "64"],
            "got [32, '64'] for block_out_channels in config.json, expected a list of wh",
        ),
        ("freq_shift", 2, "got 2 for freq_shift in config.json, expected 0 or 1"),
        ("flip_sin_to_cos", "no", "got 'no' for flip_sin_to_cos in config.json, expected true or false"),
        ("sample_size", [16], "got [16] for sample_size in config.json, expected a whole number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_diffusers_network_that_ours_cannot_be_is_refused_by_setting(
    setting: str, value: object, message: str, saved_pipeline: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved_pipeline, tmp_path / "pipe")
    write_setting(tmp_path / "pipe/unet/config.json", setting, value)
    with pytest.raises(InputError) as raised:
        load_weights(tmp_path / "pipe")
    assert str(raised.value).startswith(f"weights: {message}")


REFUSED = (
    "FlowMatchEulerDiscrete",
    "EDMEuler",
    "ScoreSdeVe",
    "CMStochasticIterative",
    "IPNDM",
    "KarrasVe",
    "VQDiffusion",
)


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        *(("_class_name", f"{name}Scheduler", "DDPMScheduler, DDPMParallelScheduler") for name in REFUSED),
        ("beta_schedule", "sigmoid", "linear, scaled_linear, squaredcos_cap_v2"),
        ("beta_schedule", "x" * 10_000, "linear"),
        ("beta_schedule", "", "linear, scaled_linear, squaredcos_cap_v2"),
        ("timestep_spacing", [], "leading"),
        ("prediction_type", "flow_prediction", "epsilon, sample, v_prediction"),
        ("variance_type", "learned", "fixed_small, fixed_large, learned_range"),
        ("trained_betas", [0.1, 0.2], "null"),
        ("trained_betas", [0.1] * 1000, "null"),
        ("rescale_betas_zero_snr", True, "false"),
        ("thresholding", True, "false"),
        ("use_flow_sigmas", True, "false"),
        ("timestep_type", "continuous", "discrete"),
        ("clip_sample_range", 2.0, "1"),
        ("num_train_timesteps", "many", "a whole number"),
        ("beta_end", None, "a number"),
        ("timestep_spacing", "log", "leading, linspace, trailing"),
        ("steps_offset", 0.5, "a whole number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_diffusers_scheduler_that_ours_cannot_be_is_refused_by_setting(
    setting: str, value: object, expected: str, saved_pipeline: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved_pipeline, tmp_path / "pipe")
    write_setting(tmp_path / "pipe/scheduler/scheduler_config.json", setting, value)
    with pytest.raises(InputError) as raised:
        load_weights(tmp_path / "pipe")
    got, wanted = str(raised.value).split(f" in scheduler_config.json, expected {expected}")
    assert got.startswith("weights: got ")
    assert setting in got
    assert max(len(got), len(wanted)) < 150


@pytest.mark.parametrize(
    "name",
    [
        *("DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep"),
        *("DEISMultistep", "UniPCMultistep", "EulerDiscrete", "EulerAncestralDiscrete"),
    ],
)
@pytest.mark.parametrize("settings", [{}, {"beta_schedule": "squaredcos_cap_v2"}], ids=["defaults", "cosine"])
def test_a_scheduler_that_differs_in_sampling_alone_gives_its_schedule(
    name: str, settings: dict, saved_pipeline: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved_pipeline, tmp_path / "pipe")
    theirs = getattr(diffusers, f"{name}Scheduler")(**settings)
    theirs.save_pretrained(tmp_path / "pipe/scheduler")
    ours = load_weights(tmp_path / "pipe").architecture
    torch.testing.assert_close(ours.noise_schedule().alpha_bar.float(), theirs.alphas_cumprod, atol=1e-5, rtol=1e-3)
    assert ours.clip_denoised == getattr(theirs.config, "clip_sample", False)
    assert (ours.parametrisation, ours.variance) == ("eps", "fixed_small")


def test_blocks_may_have_their_first_names(saved_pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(saved_pipeline, tmp_path / "pipe")
    for way in ("down", "up"):
        config, setting = tmp_path / "pipe/unet/config.json", f"{way}_block_types"
        write_setting(config, setting, [f"UNetRes{name}" for name in json.loads(config.read_text())[setting]])
    assert load_weights(tmp_path / "pipe").architecture == load_weights(saved_pipeline).architecture


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("scheduler/scheduler_config.json", "[1]", r"got \[1\] for .*, expected a dictionary"),
        ("unet/config.json", "null", "got None for .*, expected a dictionary"),
        ("unet/config.json", "{", "can't be read as JSON"),
        (
            "model_index.json",
            json.dumps({"vqvae": ["diffusers", "VQModel"]}),
            "got the part 'vqvae' in model_index.json",
        ),
    ],
)
def test_a_diffusers_file_of_another_kind_is_refused(
    file: str, text: str, message: str, saved_pipeline: Path, tmp_path: Path
) -> None:
    shutil.copytree(saved_pipeline, tmp_path / "pipe")
    (tmp_path / "pipe" / file).write_text(text)
    with pytest.raises(InputError, match=f"^weights: .*{message}"):
        load_weights(tmp_path / "pipe")


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
