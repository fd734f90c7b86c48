"""What a picture is scored by. A loss is raised by guidance: higher is better."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipward.diffusion.schedule import Step
from clipward.errors import InputError
from clipward.guidance.contrasts import opposed
from clipward.guidance.core import Loss
from clipward.networks.classifier import Classifier, check_named
from clipward.networks.clip import Clip, preprocess

Named = Callable[[str], Tensor]

NONE = -1e4  # a logit that no exponential knows from −∞, and whose gradient is a number


class ClipSimilarity:
    """E_image(image) · E_text(text): the cosine between each picture and its own text.

    Args:
        clip: the critic.
        texts: one per image of the batch.
        noisy: the picture is x_t, for a noise-aware CLIP, and not x0 or what stands for it.
    """

    def __init__(self, clip: Clip, texts: Sequence[str], noisy: bool = False) -> None:
        self.clip, self.text_features, self.noisy = clip, clip.encode_text(texts), noisy  # (B, D)

    @property
    def logit_scale(self) -> float:
        """What the cosine was multiplied by in training, so that it is a log-probability but for a constant."""
        return self.clip.model.logit_scale.exp().item()

    def __call__(self, image: Tensor, step: Step | None = None) -> Tensor:
        alpha_bar = step.alpha_bar_t if self.noisy else 1.0
        return (self.clip.encode_image(image, alpha_bar) * self.text_features).sum(dim=-1)

    def pixel_gradient(self, image: Tensor) -> Tensor:
        """∇ of the cosine at CLIP's own input (its size, its mean and std), resized to the picture: (B, C, H, W)."""
        with torch.enable_grad():
            pixels = preprocess(image.detach().float(), self.clip.preprocess).requires_grad_()
            similarity = (self.clip.encode_pixels(pixels) * self.text_features).sum()
            gradient = torch.autograd.grad(similarity, pixels)[0]
        return F.interpolate(gradient, image.shape[-2:], mode="bilinear", antialias=True, align_corners=False)


class Ensemble:
    """The mean of several losses of one kind.

    Args:
        losses: what is averaged.
        weights: of each, relative to the others.
    """

    def __init__(self, losses: Sequence[Any], weights: Sequence[float]) -> None:
        self.losses, self.shares = losses, [weight / sum(weights) for weight in weights]

    def __call__(self, image: Tensor, step: Step | None = None) -> Tensor:
        return sum(share * loss(image, step) for share, loss in zip(self.shares, self.losses, strict=True))

    @property
    def logit_scale(self) -> float:
        return sum(share * loss.logit_scale for share, loss in zip(self.shares, self.losses, strict=True))

    def pixel_gradient(self, image: Tensor) -> Tensor:
        return sum(share * loss.pixel_gradient(image) for share, loss in zip(self.shares, self.losses, strict=True))


@dataclass(frozen=True)
class Critic:
    """What guides a batch: a loss for each way of asking whether its pictures obey.

    Args:
        cosine: between each picture and its text; a classifier has none.
        evidence: log p(text | image) as the critic was trained to know it, but for a constant.
        noise: for the name of a draw, (B, C, H, W) of standard normal noise that belongs to the images.
    """

    cosine: Ensemble | None
    evidence: Loss
    noise: Named


class Scaled:
    """``factor`` times a loss."""

    def __init__(self, loss: Loss, factor: float) -> None:
        self.loss, self.factor = loss, factor

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return self.factor * self.loss(image, step)


class Distance:
    """−‖E_image − E_text‖ of features of unit length, by their cosine."""

    def __init__(self, cosine: Loss) -> None:
        self.cosine = cosine

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return -(2 - 2 * self.cosine(image, step)).clamp(min=1e-12).sqrt()


class SphericalDistance:
    """−2·arcsin(‖E_image − E_text‖/2)², half the square of the angle between them (Crowson's clip-guided diffusion)."""

    def __init__(self, cosine: Loss) -> None:
        self.distance = Distance(cosine)

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return -2 * (-self.distance(image, step) / 2).arcsin() ** 2


class MonteCarlo:
    """log E[exp L(x̂0 + r·noise)], r = σ·√(1−ᾱ_t): a loss that is smoothed over what x0 may be.

    With σ = 1 the noise is that of x0 given x_t under a unit Gaussian (Song et al. 2023, LGD-MC).

    Args:
        loss: what is smoothed, a log-likelihood.
        noise: for the name of a draw, (B, C, H, W) of standard normal noise that belongs to the images.
        count: draws.
        sigma: σ.
    """

    def __init__(self, loss: Loss, noise: Named, count: int, sigma: float = 1.0) -> None:
        self.loss, self.noise, self.count, self.sigma = loss, noise, count, sigma

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        r = self.sigma * (1 - step.alpha_bar_t) ** 0.5
        scores = [self.loss(image + r * self.noise(f"smooth/{step.t}/{i}"), step) for i in range(self.count)]
        return torch.stack(scores).logsumexp(dim=0) - math.log(self.count)


class Cutouts:
    """The mean of a loss over square cuts of a picture, of random sizes and places.

    Args:
        loss: of a cut.
        noise: as in :class:`MonteCarlo`; it decides the cuts.
        count: cuts.
        smallest: side of the smallest cut, as a share of the picture's.
    """

    def __init__(self, loss: Loss, noise: Named, count: int = 16, smallest: float = 0.5) -> None:
        self.loss, self.noise, self.count, self.smallest = loss, noise, count, smallest

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        side = image.shape[-1]
        scores = []
        for i in range(self.count):
            draw = self.noise(f"cut/{step.t}/{i}").flatten(1)[:, :3]  # (B, 3)
            share = 0.5 * (1 + torch.erf(draw / 2**0.5))  # uniform
            cuts = []
            for picture, (size, left, top) in zip(image, share.tolist(), strict=True):
                length = round(side * (self.smallest + (1 - self.smallest) * size))
                y, x = (round((side - length) * at) for at in (top, left))
                cut = picture[None, :, y : y + length, x : x + length]
                cuts.append(F.interpolate(cut, (side, side), mode="bilinear", align_corners=False))
            scores.append(self.loss(torch.cat(cuts), step))
        return torch.stack(scores).mean(dim=0)


class Views:
    """The mean of a loss over four views: as it is, mirrored, and each of these moved by a 32nd of its side both ways.

    What raises it in all of them is what the picture shows, and not a texture that its critic mistakes for it.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        by = max(1, image.shape[-1] // 32)
        mirrored = image.flip(-1)
        views = [image, mirrored, _moved(image, by), _moved(mirrored, -by)]
        return torch.stack([self.loss(view, step) for view in views]).mean(dim=0)


def _moved(image: Tensor, by: int) -> Tensor:
    """Up and to the left by so many pixels; what comes in repeats the border."""
    height, width = image.shape[-2:]
    margin = abs(by)
    padded = F.pad(image, [margin] * 4, "replicate")
    return padded[..., margin + by : margin + by + height, margin + by : margin + by + width]


class TotalVariation:
    """−Σ of the squares of differences between neighbours, as a mean over the picture."""

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        padded = F.pad(image, (0, 1, 0, 1), "replicate")
        across = padded[..., :-1, 1:] - padded[..., :-1, :-1]
        down = padded[..., 1:, :-1] - padded[..., :-1, :-1]
        return -(across**2 + down**2).mean(dim=(1, 2, 3))


class Range:
    """−(x − clamp(x))², as a mean over the picture: what lies beyond [-1, 1]."""

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return -((image - image.clamp(-1, 1)) ** 2).mean(dim=(1, 2, 3))


class ClipAnswer:
    """Σ log p(text | image) among the text and its rivals of a kind, over the kinds, with CLIP's own logit scale.

    CLIP as a classifier of what could be said instead: an old man is told from a young man, from an old woman, and from
    just any person. The gradient fades where a picture shows it; a bare cosine always asks for more.

    Args:
        clip: the critic.
        texts: one per image of the batch. One that has no rivals is scored by its own logit.
        opposites: groups of phrases that exclude each other; a text's rivals of a kind are by :func:`opposed`.
        neutral: what is true of any picture, a rival of its own kind.
        noisy: as in :class:`ClipSimilarity`.

    Raises:
        InputError: where a rival is too long for the CLIP.
    """

    def __init__(
        self,
        clip: Clip,
        texts: Sequence[str],
        opposites: Sequence[Sequence[str]],
        neutral: str | None = None,
        noisy: bool = False,
    ) -> None:
        self.clip, self.noisy = clip, noisy
        self.own = clip.encode_text(texts)  # (B, D)
        # the same shape whatever the texts, so that no picture depends on its neighbours
        kinds, most = len(opposites) + 1, max([1, *(len(group) - 1 for group in opposites)])
        self.rivals = self.own.new_zeros(len(texts), kinds, most, self.own.shape[-1])  # (B, K, R, D)
        self.mask = self.own.new_full((len(texts), kinds, most), NONE)
        for i, text in enumerate(texts):
            found = [*(opposed(text, group) for group in opposites), [neutral] * (neutral not in (None, text))]
            for kind, others in enumerate(found):
                if others:
                    self.rivals[i, kind, : len(others)] = _encoded(clip, text, others)
                    self.mask[i, kind, : len(others)] = 0
        self.alone = (self.mask == NONE).flatten(1).all(dim=1)

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        features = self.clip.encode_image(image, step.alpha_bar_t if self.noisy else 1.0)
        features = self.clip.model.logit_scale.exp() * features
        own = (features * self.own).sum(dim=-1)  # (B,)
        ahead = (self.rivals @ features[:, None, :, None]).squeeze(-1) - own[:, None, None]  # (B, K, R)
        # not by log_softmax, whose gradient is rounded to 0 where a picture is 16 logits from its rivals
        answer = -F.softplus((ahead + self.mask).logsumexp(dim=2)).sum(dim=1)
        return torch.where(self.alone, own, answer)


def _encoded(clip: Clip, text: str, rivals: Sequence[str]) -> Tensor:
    try:
        return clip.encode_text(rivals)
    except InputError as error:
        raise InputError(f"{error}; it is a rival of {text!r}, by opposites or neutral") from error


class ClassifierAnswer:
    """Σ log p(value | x_t) over the attributes that a text names, by a noise-aware classifier.

    Args:
        classifier: the critic.
        texts: one per image of the batch.

    Raises:
        InputError: where it knows nothing of a text.
    """

    def __init__(self, classifier: Classifier, texts: Sequence[str]) -> None:
        self.classifier = classifier
        for text in texts:
            check_named(classifier.vocabulary, text, "classifier")
        self.wanted = [classifier.named(text) for text in texts]

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        logits = self.classifier(image, step.alpha_bar_t)
        log_p = {name: values.log_softmax(dim=1) for name, values in logits.items()}
        places = {name: list(values) for name, values in self.classifier.vocabulary.items()}
        sums = [
            sum(log_p[name][i, places[name].index(value)] for name, value in wanted.items())
            for i, wanted in enumerate(self.wanted)
        ]
        return torch.stack(sums)
