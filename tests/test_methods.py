"""Each method against its own authors' step, transcribed on the same noise, network and CLIP."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from diffusers import DDPMScheduler
from torch import Tensor

from clipward.diffusion.denoiser import NetworkDenoiser
from clipward.diffusion.sampling import Noise, ancestral
from clipward.diffusion.schedule import Schedule
from clipward.guidance.core import Clamp, GuidedDenoiser
from clipward.guidance.methods import METHODS
from clipward.guidance.objectives import (
    ClassifierLogLikelihood,
    ClipDistance,
    ClipSimilarity,
    Ensemble,
    Objectives,
    Scaled,
)
from clipward.networks.classifier import Classifier
from clipward.networks.clip import Clip, make_noise_aware
from clipward.networks.noise_level import with_noise_level
from clipward.networks.unet import UNet, UNetConfig

TEXTS, WEIGHTS = ["a man", "a girl with red hair"], torch.tensor([80.0, 30.0])
T, S = 700, 680
ALPHA_BAR = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)
NETWORK = randomise(UNet(UNetConfig(channels=(8, 16), num_res_blocks=1, attention_levels=(1,), norm_groups=4))).eval()

NOISE = Noise((1, 2), (3, 24, 24))


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 2, 3, 24, 24, generator=generator).unbind()


def step_of(
    method: str,
    clip: Clip,
    drawn: tuple[Tensor, Tensor],
    clamp: bool = True,
    weight: Tensor = WEIGHTS,
    noisy: bool = False,
    objectives: Objectives | None = None,
    number: int = 1,
) -> Tensor:
    x, noise = drawn
    if objectives is None:
        cosine = Ensemble([ClipSimilarity(clip, TEXTS, noisy)], [1.0])
        distance = ClipDistance(clip, TEXTS)
        objectives = Objectives(Scaled(cosine, cosine.logit_scale), NOISE, cosine, distance)
    guidances = [Clamp()] * clamp + METHODS[method].guide(objectives, weight)
    denoise = GuidedDenoiser(NetworkDenoiser(NETWORK, "eps", "fixed_small"), guidances)
    step = replace(Schedule.from_name("linear").step(T, S), number=number)
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


# the other published methods: the step that each adds to x_s, worked out by their authors' formulas

AT, AS = ALPHA_BAR[T].item(), ALPHA_BAR[S].item()
BETA = 1 - AT / AS
PLAIN = torch.tensor([1.0, 0.5])


def by(weight: Tensor) -> Tensor:
    return weight[:, None, None, None]


class Walk:
    """The unclamped x̂0 at x_t with its graph, and the unguided x_s."""

    def __init__(self, drawn: tuple[Tensor, Tensor]) -> None:
        self.x, self.noise = drawn[0].clone().requires_grad_(), drawn[1]
        self.eps = NETWORK(self.x, torch.tensor([T, T]))
        self.x0 = (self.x - (1 - AT) ** 0.5 * self.eps) / AT**0.5
        mean, self.variance = posterior(drawn[0], self.x0.detach())
        self.plain = mean + self.variance**0.5 * self.noise

    def gradient(self, score: Tensor, at: Tensor | None = None) -> Tensor:
        return torch.autograd.grad(score.sum(), self.x if at is None else at, retain_graph=True)[0]

    def with_prediction(self, x0: Tensor, eps: Tensor) -> Tensor:
        """DDIM's form of the ancestral step (Song et al. 2021, eq. 12 with η = 1)."""
        direction = (1 - AS - self.variance) ** 0.5
        return (AS**0.5 * x0 + direction * eps + self.variance**0.5 * self.noise).detach()


def distance(image: Tensor, clip: Clip) -> Tensor:
    features = F.normalize(clip.model.encode_image(pixels_of(image, clip)), dim=-1)
    return (features - F.normalize(clip.model.encode_text(clip.tokenizer(TEXTS)), dim=-1)).norm(dim=-1)


def logit(image: Tensor, clip: Clip, alpha_bar: float | None = None) -> Tensor:
    pixels = pixels_of(image, clip)
    return clip.model.logit_scale.exp() * cosine(with_noise_level(pixels, alpha_bar) if alpha_bar else pixels, clip)


def moved(method: str, clip: Clip, drawn: tuple[Tensor, Tensor], expected: Tensor, walk: Walk, **kwargs) -> None:
    """That the step is what is expected, and that guidance has a part in it."""
    kwargs = {"weight": PLAIN, **kwargs}
    same(step_of(method, clip, drawn, clamp=False, **kwargs), expected)
    assert (expected - walk.plain).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def views_of(x: Tensor) -> list[Tensor]:
    """A picture, its mirror image, and both shifted by a 32nd of 24 pixels, which is less than one: by one."""
    rows = torch.arange(24)
    down, up = ((rows + 1).clamp(max=23), (rows - 1).clamp(min=0))
    mirrored = x[..., range(23, -1, -1)]
    return [x, mirrored, x[..., down, :][..., down], mirrored[..., up, :][..., up]]


def noisy_gradient(clip: Clip, x: Tensor, number: int | None = None) -> Tensor:
    """Makes ``clip`` noise-aware, and takes the gradient of its logit at x_t, or of the mean over a step's views."""
    randomise(make_noise_aware(clip.model), seed=4)
    clip.noise_aware = True
    x = x.clone().requires_grad_()
    first, mirrored, moved_first, moved_mirrored = views_of(x)
    turns = {None: [x], 1: [first, moved_mirrored], 0: [mirrored, moved_first]}
    seen = turns[None if number is None else number % 2]
    return torch.autograd.grad(sum(logit(view, clip, AT).sum() for view in seen) / len(seen), x)[0]


def test_glide_takes_the_gradient_at_x_t_of_a_clip_that_knows_its_noise(drawn, tiny_clip: Path) -> None:
    clip, walk = Clip.load(str(tiny_clip)), Walk(drawn)
    gradient = noisy_gradient(clip, drawn[0])
    moved("glide", clip, drawn, walk.plain + by(PLAIN) * walk.variance * gradient, walk, noisy=True)


def limited(walk: Walk, score: Tensor, binds: bool) -> Tensor:
    """x_s where ``score`` is added to the score, so far that x̂0 moves by √(1−ᾱ_t) at most, as a root mean square."""
    move = (1 - AT) / AT**0.5 * score
    share = move.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() / (1 - AT) ** 0.5
    assert (share > 1).all() == binds
    x0 = walk.x0 + move * (1 / share).clamp(max=1)
    eps = walk.eps - (1 - AT) ** 0.5 * score * (1 / share).clamp(max=1)
    return walk.with_prediction(x0.detach(), eps.detach())


@pytest.mark.parametrize(("strength", "number"), [(0.05, 1), (0.05, 2), (1e4, 3)])
def test_contrastive_adds_the_gradient_over_views_to_the_score_up_to_a_limit(
    drawn, tiny_clip: Path, strength: float, number: int
) -> None:
    clip, walk = Clip.load(str(tiny_clip)), Walk(drawn)
    gradient = noisy_gradient(clip, drawn[0], number)
    expected = limited(walk, by(strength * PLAIN) * gradient, strength > 1)
    moved("contrastive", clip, drawn, expected, walk, weight=strength * PLAIN, noisy=True, number=number)


def test_classifier_guidance_is_algorithm_1(drawn) -> None:
    vocabulary = {"gender": {"woman": ["girl"], "man": ["man"]}, "hair": {"red": ["red hair"], "grey": ["grey hair"]}}
    torch.manual_seed(0)
    classifier, walk = Classifier(vocabulary, 8, noise_aware=True).eval(), Walk(drawn)
    objectives = Objectives(ClassifierLogLikelihood(classifier, TEXTS), NOISE)
    x = drawn[0].clone().requires_grad_()
    out = classifier(x, torch.tensor([AT, AT]))
    log_p = out["gender"].softmax(1)[0, 1].log() + (out["gender"].softmax(1)[1, 0] * out["hair"].softmax(1)[1, 0]).log()
    gradient = torch.autograd.grad(log_p, x)[0]
    expected = walk.plain + by(PLAIN) * walk.variance * gradient
    moved("classifier_guidance", None, drawn, expected, walk, objectives=objectives)


def test_dps_divides_the_gradient_of_the_square_by_the_residual(drawn, tiny_clip: Path) -> None:
    clip, walk = Clip.load(str(tiny_clip)), Walk(drawn)
    residual = distance(walk.x0, clip)
    gradient = walk.gradient(residual**2) / by(residual.detach())
    moved("dps", clip, drawn, walk.plain - by(PLAIN) * gradient, walk)


def raw_distance(image: Tensor, clip: Clip) -> Tensor:
    """‖E_image − E_text‖ of features as CLIP puts them out."""
    text = clip.model.encode_text(clip.tokenizer(TEXTS))
    return (clip.model.encode_image(pixels_of(image, clip)) - text).norm(dim=-1)


def rho(walk: Walk, gradient: Tensor, i: int) -> Tensor:
    """What FreeDoM's and MPGD's code multiplies a gradient by, before their scale."""
    c1 = AS**0.5 * (1 - AT / AS) / (1 - AT)
    l1 = (walk.eps[i] * walk.eps[i]).mean().sqrt() * (1 - AT) ** 0.5 / AT**0.5 * c1
    return l1 / (gradient[i] * gradient[i]).mean().sqrt()


def test_freedom_steps_by_the_noise_over_the_gradient_image_by_image(drawn, tiny_clip: Path) -> None:
    clip, walk, expected = Clip.load(str(tiny_clip)), Walk(drawn), []
    gradient = walk.gradient(raw_distance(walk.x0, clip))
    for i, weight in enumerate(PLAIN):
        expected.append(walk.plain[i] - weight * 0.02 * rho(walk, gradient, i) * gradient[i])
    moved("freedom", clip, drawn, torch.stack(expected), walk)
    assert METHODS["freedom"].clamp == "never"


def test_mpgd_moves_x0_by_the_gradient_there_and_eps_with_it_until_late(drawn, tiny_clip: Path) -> None:
    clip, walk, moves = Clip.load(str(tiny_clip)), Walk(drawn), []
    x0 = walk.x0.detach().requires_grad_()
    gradient = walk.gradient(raw_distance(x0, clip), x0)
    for i, weight in enumerate(PLAIN):
        moves.append(weight * rho(walk, gradient, i) / AS**0.5 * gradient[i])
    found = walk.x0 - torch.stack(moves)
    expected = walk.with_prediction(found, (drawn[0] - AT**0.5 * found) / (1 - AT) ** 0.5)
    moved("mpgd", clip, drawn, expected, walk)
    assert (METHODS["mpgd"].interval, METHODS["mpgd"].clamp) == ((0.1, 1), "never")


def test_dsg_turns_the_noise_and_keeps_its_length(drawn, tiny_clip: Path) -> None:
    clip, walk, expected = Clip.load(str(tiny_clip)), Walk(drawn), []
    gradient = walk.gradient(raw_distance(walk.x0, clip))
    mean, sigma = walk.plain - walk.variance**0.5 * walk.noise, walk.variance**0.5
    for i, weight in enumerate(PLAIN):
        radius = (3 * 24 * 24) ** 0.5 * sigma
        best, sample = -radius * gradient[i] / gradient[i].norm(), sigma * walk.noise[i]
        mixed = sample + 0.05 * weight * (best - sample)
        expected.append(mean[i] + radius * mixed / mixed.norm())
    cosine_of = Ensemble([ClipSimilarity(clip, TEXTS)], [1.0])
    by_number = {1: walk.noise}
    objectives = Objectives(cosine_of, by_number.__getitem__, cosine_of, ClipDistance(clip, TEXTS))
    moved("dsg", clip, drawn, torch.stack(expected), walk, objectives=objectives)


def test_universal_guidance_is_score_addition_clamped_after_it(drawn, tiny_clip: Path) -> None:
    clip, walk = Clip.load(str(tiny_clip)), Walk(drawn)
    eps = walk.eps - 5 * by(PLAIN) * (1 - AT) ** 0.5 * walk.gradient(logit(walk.x0, clip))
    x0 = ((drawn[0] - (1 - AT) ** 0.5 * eps) / AT**0.5).detach()
    moved("universal", clip, drawn, walk.with_prediction(x0, eps), walk)
    assert (METHODS["universal"].repeats, METHODS["universal"].clamp) == (5, "last")


@pytest.mark.parametrize("weight", [0.2, 1e4])
def test_contrastive_denoised_goes_through_the_network_up_to_a_limit(drawn, tiny_clip: Path, weight: float) -> None:
    clip, walk = Clip.load(str(tiny_clip)), Walk(drawn)
    gradient = walk.gradient(sum(logit(view, clip) for view in views_of(walk.x0)) / 4)
    expected = limited(walk, by(weight * PLAIN) * gradient, weight > 1)
    moved("contrastive_denoised", clip, drawn, expected, walk, weight=weight * PLAIN)


def test_lgd_mc_smooths_the_loss_over_what_x0_may_be(drawn, tiny_clip: Path) -> None:
    clip, walk = Clip.load(str(tiny_clip)), Walk(drawn)
    variance_exploding = (1 - AT) / AT
    r = (variance_exploding / (1 + variance_exploding)) ** 0.5
    scores = torch.stack([logit(walk.x0 + r * NOISE(f"smooth/{T}/{i}"), clip) for i in range(10)])
    gradient = walk.gradient(scores.exp().mean(dim=0).log())
    eps = walk.eps - by(PLAIN) * (1 - AT) ** 0.5 * gradient
    x0 = (drawn[0] - (1 - AT) ** 0.5 * eps) / AT**0.5
    moved("lgd_mc", clip, drawn, walk.with_prediction(x0, eps), walk)


def test_tfg_adds_both_gradients_of_the_smoothed_objective(drawn, tiny_clip: Path) -> None:
    clip, walk = Clip.load(str(tiny_clip)), Walk(drawn)
    delta_noise = (1 - AT) ** 0.5 * NOISE(f"smooth/{T}/0")
    on_sample = 0.5 * by(PLAIN) * walk.gradient(logit(walk.x0 + delta_noise, clip))
    on_x0 = torch.zeros_like(drawn[0])
    for _ in range(4):
        x0 = (walk.x0.detach() + on_x0).requires_grad_()
        on_x0 = on_x0 + 8 * by(PLAIN) * walk.gradient(logit(x0 + delta_noise, clip), x0)
    expected = walk.plain + on_sample / (AT / AS) ** 0.5 + AS**0.5 * on_x0
    moved("tfg", clip, drawn, expected, walk)


def cuts(image: Tensor, count: int, smallest: float) -> list[Tensor]:
    """The same cuts that the method takes, by hand."""
    normal, found = torch.distributions.Normal(0.0, 1.0), []
    for i in range(count):
        batch = []
        for picture, draw in zip(image, NOISE(f"cut/{T}/{i}").flatten(1)[:, :3], strict=True):
            size, left, top = normal.cdf(draw).tolist()
            length = round(24 * (smallest + (1 - smallest) * size))
            y, x = round((24 - length) * top), round((24 - length) * left)
            cut = picture[:, y : y + length, x : x + length][None]
            batch.append(F.interpolate(cut, (24, 24), mode="bilinear", align_corners=False))
        found.append(torch.cat(batch))
    return found


def test_polyak_steps_by_the_noise_over_the_square_of_the_gradient(drawn, tiny_clip: Path) -> None:
    clip, walk = Clip.load(str(tiny_clip)), Walk(drawn)
    similarity = torch.stack([cosine(pixels_of(cut, clip), clip) for cut in cuts(walk.x0, 4, 0.8)]).mean(dim=0)
    gradient = walk.gradient((2 - 2 * similarity).sqrt())
    step = [e.norm() / g.norm() ** 2 for e, g in zip(walk.eps, gradient, strict=True)]
    weight = torch.tensor([0.01, 0.02])
    expected = walk.plain - by(weight * torch.stack(step)) * gradient
    moved("polyak", clip, drawn, expected, walk, weight=weight)


def test_cutouts_is_crowsons_sum_on_a_blend(drawn, tiny_clip: Path) -> None:
    clip, walk = Clip.load(str(tiny_clip)), Walk(drawn)
    share = (1 - AT) ** 0.5
    blend = share * walk.x0 + (1 - share) * walk.x
    similarity = torch.stack([cosine(pixels_of(cut, clip), clip) for cut in cuts(blend, 16, 0.5)]).mean(dim=0)
    spherical = 2 * ((2 - 2 * similarity).sqrt() / 2).arcsin() ** 2
    beyond = F.pad(blend, (0, 1, 0, 1), "replicate")
    across, down = beyond[..., :-1, 1:] - beyond[..., :-1, :-1], beyond[..., 1:, :-1] - beyond[..., :-1, :-1]
    tv = (across**2 + down**2).flatten(1).mean(dim=1)
    outside = (walk.x0 - walk.x0.clamp(-1, 1)).square().flatten(1).mean(dim=1)
    weight = torch.tensor([0.1, 0.05])
    gradient = -walk.gradient(spherical * 1000 * weight + tv * 150 + outside * 50)
    moved("cutouts", clip, drawn, walk.plain + walk.variance * gradient, walk, weight=weight)
