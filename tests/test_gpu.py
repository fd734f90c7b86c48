"""What needs a GPU: run by ``pytest -m gpu``, skipped without one."""

from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import randomise, tiny_faces, tiny_module, tiny_trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from clipward.datamodules.prompts import PromptDataModule
from clipward.guidance import core as guidance
from clipward.networks.unet import UNetConfig
from clipward.sampling_config import SamplingConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def draw(root: Path, weights: Path, clip: Path, micro_batch: int = 16, precision: str = "32-true", **settings) -> dict:
    sampling = SamplingConfig(skip_steps=5, **settings)
    module = tiny_module(weights=str(weights), clip=str(clip), sampling=sampling)
    data = PromptDataModule(text=["a man", "a girl"], guidance_weight=[50], n_samples=3, micro_batch=micro_batch)
    trainer = tiny_trainer(root, accelerator="gpu", devices=1, precision=precision)
    found = trainer.predict(module, data)
    return {
        "image": torch.cat([batch["image"].cpu() for batch in found]),
        "retries": [count for batch in found for count in batch["float32_retries"]],
    }


@pytest.mark.parametrize("method", ["contrastive_denoised", "clip_guidance_pixel"])
def test_pictures_are_the_same_for_any_micro_batch(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path, method: str
) -> None:
    one, many = (draw(tmp_path, tiny_weights, tiny_clip, size, method=method)["image"] for size in (1, 16))
    torch.testing.assert_close(one, many, atol=1 / 255, rtol=0)


def test_a_step_that_half_precision_breaks_is_taken_in_float32(
    tmp_path: Path, tiny_weights: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    derivative = guidance._derivative

    def lost(scores: torch.Tensor, at: torch.Tensor, retain_graph: bool) -> torch.Tensor:
        g = derivative(scores, at, retain_graph)
        return g * torch.nan if torch.is_autocast_enabled("cuda") else g

    exact = draw(tmp_path, tiny_weights, tiny_clip)
    monkeypatch.setattr(guidance, "_derivative", lost)
    retried = draw(tmp_path, tiny_weights, tiny_clip, precision="16-mixed")
    assert max(retried["retries"]) == 5
    torch.testing.assert_close(retried["image"], exact["image"], atol=1 / 255, rtol=0)


def test_where_memory_really_runs_out_half_as_many_are_drawn() -> None:
    config = UNetConfig(channels=(64, 128), num_res_blocks=1, attention_levels=(), norm_groups=8)
    module = tiny_module(unet=config, image_size=128, sampling=SamplingConfig(skip_steps=1))
    module.configure_model()
    randomise(module.unet)
    module.to("cuda")
    sizes: list[int] = []
    module.unet.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction(min(1.0, 2 * 2**30 / total))
    try:
        image, _ = module.sampler.sample_in_chunks([""] * 256, list(range(256)), [0.0] * 256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert image.shape == (256, 3, 128, 128)
    assert sizes[0] == 256
    assert 4 <= sizes[-1] < 256


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp2"])
def test_training_by_nccl_and_amp(tmp_path: Path, precision: str, strategy: str) -> None:
    if (strategy, precision) == ("fsdp2", "16-mixed"):
        pytest.skip("Lightning does not shard 16-mixed")
    strategies = {"ddp": DDPStrategy(process_group_backend="nccl"), "fsdp2": ModelParallelStrategy()}
    trainer: L.Trainer = tiny_trainer(
        tmp_path,
        accelerator="gpu",
        devices=1,
        max_steps=4,
        precision=precision,
        strategy=strategies.get(strategy, "auto"),
    )
    module = tiny_module()
    trainer.fit(module, tiny_faces())
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())
    assert trainer.global_step == 4


def test_compiled_networks_draw_alike(tiny_weights: Path, tiny_clip: Path) -> None:
    pictures = []
    for compile in (False, True):
        module = tiny_module(
            weights=str(tiny_weights), clip=str(tiny_clip), compile=compile, sampling=SamplingConfig(skip_steps=5)
        )
        module.configure_model()
        module.to("cuda")
        pictures.append(module.sampler.sample(["a man"], [0], [20.0])[0].cpu())
    torch.testing.assert_close(*pictures, atol=1 / 255, rtol=0)
