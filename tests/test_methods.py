"""Each method against its own authors' step, transcribed on the same noise, network and CLIP."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from diffusers import DDPMScheduler
from torch import Tensor

from diffusion.clip import Clip
from diffusion.denoiser import NetworkDenoiser
from diffusion.guidance import Clamp, GuidedDenoiser
from diffusion.losses import ClipSimilarity
from diffusion.methods import METHODS
from diffusion.sampling import ancestral
from diffusion.schedule import Schedule
from diffusion.unet import UNet, UNetConfig

TEXTS, WEIGHTS = ["a man", "a girl with red hair"], torch.tensor([80.0, 30.0])
T, S = 700, 680
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
NETWORK = randomise(UNet(UNetConfig(channels=(8, 16), num_res_blocks=1, attention_levels=(1,), norm_groups=4))).eval()


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 2, 3, 24, 24, generator=generator).unbind()


def step_of(method: str, clip: Clip, drawn: tuple[Tensor, Tensor], clamp: bool = True) -> Tensor:
    x, noise = drawn
    guidances = [Clamp()] * clamp + METHODS[method](ClipSimilarity(clip, TEXTS), WEIGHTS)
    denoise = GuidedDenoiser(NetworkDenoiser(NETWORK, "eps", "fixed_small"), guidances)
    step = Schedule.named("linear").step(T, S)
    return ancestral(x, denoise(x, step), step, lambda: noise)


def pixels_of(picture: Tensor, clip: Clip) -> Tensor:
    mean, std = (torch.tensor(clip.preprocess[key])[:, None, None] for key in ("mean", "std"))
    small = F.interpolate(picture / 2 + 0.5, (16, 16), mode="bicubic", antialias=True, align_corners=False)
    return (small - mean) / std


def cosine(pixels: Tensor, clip: Clip) -> Tensor:
    text = clip.model.encode_text(clip.tokenizer(TEXTS))
    return F.cosine_similarity(clip.model.encode_image(pixels), text, dim=-1)


def posterior(x: Tensor, x0: Tensor) -> tuple[Tensor, float]:
    """Mean and variance of q(x_s | x_t, x0) by Ho et al. 2020, eq. 7."""
    alpha = ALPHA_BAR[T] / ALPHA_BAR[S]
    beta = 1 - alpha
    by_x0 = ALPHA_BAR[S].sqrt() * beta / (1 - ALPHA_BAR[T])
    by_x = alpha.sqrt() * (1 - ALPHA_BAR[S]) / (1 - ALPHA_BAR[T])
    variance = (1 - ALPHA_BAR[S]) / (1 - ALPHA_BAR[T]) * beta
    return by_x0.item() * x0 + by_x.item() * x, variance.item()


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-5, rtol=1e-5)


def test_clip_guidance_is_the_formula_as_written(drawn: tuple[Tensor, Tensor], tiny_clip: Path) -> None:
    clip, (x, noise) = Clip.load(str(tiny_clip)), drawn
    x_t = x.clone().requires_grad_()
    eps = NETWORK(x_t, torch.tensor([T, T]))
    x0 = ((x_t - (1 - ALPHA_BAR[T]).sqrt().float() * eps) / ALPHA_BAR[T].sqrt().float()).clamp(-1, 1)
    gradient = torch.autograd.grad(cosine(pixels_of(x0, clip), clip).sum(), x_t)[0]
    mean, variance = posterior(x, x0)
    expected = mean + WEIGHTS[:, None, None, None] * variance * gradient + variance**0.5 * noise
    same(step_of("clip_guidance", clip, drawn), expected)
    assert (WEIGHTS[:, None, None, None] * variance * gradient).abs().max() > 1e-3


def test_clip_guidance_pixel_is_the_formula_as_coded(drawn: tuple[Tensor, Tensor], tiny_clip: Path) -> None:
    clip, (x, noise) = Clip.load(str(tiny_clip)), drawn
    with torch.no_grad():
        eps = NETWORK(x, torch.tensor([T, T]))
    x0 = ((x - (1 - ALPHA_BAR[T]).sqrt().float() * eps) / ALPHA_BAR[T].sqrt().float()).clamp(-1, 1)
    pixels = pixels_of(x0, clip).requires_grad_()
    small = torch.autograd.grad(cosine(pixels, clip).sum(), pixels)[0]
    gradient = F.interpolate(small, (24, 24), mode="bilinear", align_corners=False)
    mean, variance = posterior(x, x0)
    shift = WEIGHTS[:, None, None, None] * ALPHA_BAR[T].item() ** -0.5 * variance * gradient
    same(step_of("clip_guidance_pixel", clip, drawn), mean + shift + variance**0.5 * noise)
    assert shift.abs().max() > 1e-3


def test_score_guidance_is_the_gradient_added_to_the_score(drawn: tuple[Tensor, Tensor], tiny_clip: Path) -> None:
    clip, (x, _) = Clip.load(str(tiny_clip)), drawn
    x_t = x.clone().requires_grad_()
    eps = NETWORK(x_t, torch.tensor([T, T]))
    sigma = (1 - ALPHA_BAR[T]).sqrt().float()
    x0 = (x_t - sigma * eps) / ALPHA_BAR[T].sqrt().float()
    gradient = torch.autograd.grad(cosine(pixels_of(x0, clip), clip).sum(), x_t)[0]
    score = -eps.detach() / sigma + WEIGHTS[:, None, None, None] * gradient
    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(50)  # 700 -> 680
    expected = scheduler.step(-sigma * score, T, x, generator=torch.Generator().manual_seed(9)).prev_sample
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
    same(step_of("score_guidance", clip, (x, noise), clamp=False), expected)
