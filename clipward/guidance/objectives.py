"""Objectives: one number for each picture, which guidance raises. Higher is better."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipward.diffusion.schedule import Step
from clipward.errors import InputError
from clipward.guidance.contrasts import contrast_captions
from clipward.guidance.core import Objective, WeightedTexts
from clipward.networks.channels import to_rgb
from clipward.networks.classifier import Classifier
from clipward.networks.clip import Clip, preprocess
from clipward.networks.vocabulary import check_attributes

NamedNoise = Callable[[int | str], Tensor]

NONE = -1e4  # a logit that no exponential knows from −∞, and whose gradient is a number


class ClipSimilarity:
    """E_image(image) · E_text(text): the cosine between each picture and its own text.

    Args:
        clip: what scores.
        texts: one per image of the batch.
        noisy: the picture is x_t, for a noise-aware CLIP, and not x0 or what stands for it.
    """

    def __init__(self, clip: Clip, texts: Sequence[str], noisy: bool = False) -> None:
        self.clip, self.text_features, self.noisy = clip, clip.encode_text(texts), noisy  # (B, D)

    @property
    def logit_scale(self) -> float:
        """What the cosine was multiplied by in training, so that it is a log-probability but for a constant."""
        return self.clip.model.logit_scale.exp().item()

    def encode(self, image: Tensor, step: Step) -> Tensor:
        """What all texts of an image are compared with: (B, D)."""
        return self.clip.encode_image(image, step.alpha_bar_t if self.noisy else 1.0)

    def score(self, features: Tensor) -> Tensor:
        """(B,) of what :meth:`encode` returns, or (V·B,) where that has V views of each image."""
        return (_by_views(features, self.text_features) * self.text_features).sum(dim=-1).flatten()

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return self.score(self.encode(image, step))

    def pixel_gradient(self, image: Tensor) -> Tensor:
        """∇ of the cosine at CLIP's own input (its size, its mean and std), resized to the picture: (B, C, H, W)."""
        return _pixel_gradient(self.clip, image, self.score)


def _pixel_gradient(clip: Clip, image: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.enable_grad():
        pixels = preprocess(image.detach().float(), clip.preprocess).requires_grad_()
        gradient = torch.autograd.grad(score(clip.encode_pixels(pixels)).sum(), pixels)[0]
    resized = F.interpolate(gradient, image.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
    if image.shape[1] == 3:
        return resized
    seen = image.detach().requires_grad_()  # back from RGB to the picture's own channels
    with torch.enable_grad():
        return torch.autograd.grad(to_rgb(seen), seen, resized)[0]


class ClipDistance:
    """−‖E_image(image) − E_text(text)‖ of CLIP's own features, which are not of unit length (FreeDoM, MPGD).

    Args:
        clip: what scores.
        texts: one per image of the batch.
    """

    def __init__(self, clip: Clip, texts: Sequence[str]) -> None:
        self.clip, self.text_features = clip, clip.encode_text(texts, normalise=False)  # (B, D)

    def encode(self, image: Tensor, step: Step) -> Tensor:
        """As in :class:`ClipSimilarity`."""
        return self.clip.encode_image(image, normalise=False)

    def score(self, features: Tensor) -> Tensor:
        """(B,) of what :meth:`encode` returns."""
        return -(features - self.text_features).square().sum(dim=-1).clamp(min=1e-12).sqrt()

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return self.score(self.encode(image, step))


class PictureSimilarity(ClipSimilarity):
    """E_image(image) · E_image(picture), with a picture in the place of each text.

    Args:
        clip: what scores; a noise-aware one sees the picture as one without noise.
        pictures: (B, 3, H, W) in [-1, 1].
        noisy: as in :class:`ClipSimilarity`.
    """

    def __init__(self, clip: Clip, pictures: Tensor, noisy: bool = False) -> None:
        self.clip, self.noisy = clip, noisy
        with torch.no_grad():
            self.text_features = clip.encode_image(pictures)


class PictureDistance(ClipDistance):
    """−‖E_image(image) − E_image(picture)‖, with a picture in the place of each text.

    Args:
        clip: what scores.
        pictures: (B, 3, H, W) in [-1, 1].
    """

    def __init__(self, clip: Clip, pictures: Tensor) -> None:
        self.clip = clip
        with torch.no_grad():
            self.text_features = clip.encode_image(pictures, normalise=False)


class SeveralTexts:
    """(B, K): an objective for each of K texts of an image, which is encoded once.

    Args:
        objectives: one for each place k, of the k-th text of each image.
    """

    def __init__(self, objectives: Sequence[Any]) -> None:
        self.objectives = objectives

    @property
    def logit_scale(self) -> float:
        return self.objectives[0].logit_scale

    def score(self, features: Any) -> Tensor:
        return torch.stack([objective.score(features) for objective in self.objectives], dim=1)

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return self.score(self.objectives[0].encode(image, step))

    def pixel_gradient(self, image: Tensor, weights: Tensor) -> Tensor:
        """As in :class:`ClipSimilarity`, of the sum with (B, K) weights."""
        return _pixel_gradient(self.objectives[0].clip, image, lambda features: weights * self.score(features))


class Ensemble:
    """The mean of several objectives of one kind.

    Args:
        objectives: what is averaged.
        weights: of each, relative to the others.
    """

    def __init__(self, objectives: Sequence[Any], weights: Sequence[float]) -> None:
        self.objectives, self.shares = objectives, [weight / sum(weights) for weight in weights]

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return sum(
            share * objective(image, step) for share, objective in zip(self.shares, self.objectives, strict=True)
        )

    @property
    def logit_scale(self) -> float:
        return sum(share * objective.logit_scale for share, objective in zip(self.shares, self.objectives, strict=True))

    def pixel_gradient(self, image: Tensor, *weights: Tensor) -> Tensor:
        return sum(
            share * objective.pixel_gradient(image, *weights)
            for share, objective in zip(self.shares, self.objectives, strict=True)
        )


@dataclass(frozen=True)
class Objectives:
    """What a method may raise for a batch.

    Args:
        log_likelihood: log p(text | image), up to a constant, as the guiding model was trained to know it.
        noise: for the name of a draw, (B, C, H, W) of standard normal noise that belongs to the images.
        similarity: the cosine between each picture and its text; a classifier has none.
        feature_distance: minus the distance between the features of each picture and its text; a classifier has none.
        text_weights: (B, K) where images have several texts, or one whose weight is not 1. The objectives then give
            (B, K), and their weighted sum guides.
    """

    log_likelihood: Objective
    noise: NamedNoise
    similarity: Ensemble | None = None
    feature_distance: Objective | None = None
    text_weights: Tensor | None = None

    def weigh(self, objective: Objective) -> Objective:
        """The weighted sum of an objective over the texts of each image: (B,)."""
        return objective if self.text_weights is None else WeightedTexts(objective, self.text_weights)

    @property
    def cosine(self) -> Ensemble:
        if self.similarity is None:
            raise TypeError("a classifier has no cosine")
        return self.similarity

    @property
    def distance(self) -> Objective:
        if self.feature_distance is None:
            raise TypeError("a classifier has no features of a text")
        return self.feature_distance


class Scaled:
    """``factor`` times an objective."""

    def __init__(self, objective: Objective, factor: float) -> None:
        self.objective, self.factor = objective, factor

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return self.factor * self.objective(image, step)


class Distance:
    """−‖E_image − E_text‖ of features of unit length, by their cosine."""

    def __init__(self, cosine: Objective) -> None:
        self.cosine = cosine

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return -(2 - 2 * self.cosine(image, step)).clamp(min=1e-12).sqrt()


class SphericalDistance:
    """−2·arcsin(‖E_image − E_text‖/2)², half the square of the angle between them (Crowson's clip-guided diffusion)."""

    def __init__(self, cosine: Objective) -> None:
        self.distance = Distance(cosine)

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return -2 * (-self.distance(image, step) / 2).arcsin() ** 2


class MonteCarlo:
    """log E[exp L(x̂0 + r·noise)], r = σ·√(1−ᾱ_t): an objective smoothed over what x0 may be.

    With σ = 1 the noise is that of x0 given x_t under a unit Gaussian (Song et al. 2023, LGD-MC).

    Args:
        objective: what is smoothed, a log-likelihood.
        noise: for the name of a draw, (B, C, H, W) of standard normal noise that belongs to the images.
        count: draws.
        sigma: σ.
    """

    def __init__(self, objective: Objective, noise: NamedNoise, count: int, sigma: float = 1.0) -> None:
        self.objective, self.noise, self.count, self.sigma = objective, noise, count, sigma

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        r = self.sigma * (1 - step.alpha_bar_t) ** 0.5
        scores = [self.objective(image + r * self.noise(f"smooth/{step.t}/{i}"), step) for i in range(self.count)]
        return torch.stack(scores).logsumexp(dim=0) - math.log(self.count)


class Cutouts:
    """The mean of an objective over square cuts of a picture, of random sizes and places.

    Args:
        objective: of a cut.
        noise: as in :class:`MonteCarlo`; it decides the cuts.
        count: cuts.
        smallest: side of the smallest cut, as a share of the picture's.
    """

    def __init__(self, objective: Objective, noise: NamedNoise, count: int = 16, smallest: float = 0.5) -> None:
        self.objective, self.noise, self.count, self.smallest = objective, noise, count, smallest

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        height, width = image.shape[-2:]
        side = min(height, width)
        scores = []
        for i in range(self.count):
            draw = self.noise(f"cut/{step.t}/{i}").flatten(1)[:, :3]  # (B, 3)
            share = 0.5 * (1 + torch.erf(draw / 2**0.5))  # uniform
            cuts = []
            for picture, (size, left, top) in zip(image, share.tolist(), strict=True):
                length = round(side * (self.smallest + (1 - self.smallest) * size))
                y, x = round((height - length) * top), round((width - length) * left)
                cut = picture[None, :, y : y + length, x : x + length]
                cuts.append(F.interpolate(cut, (side, side), mode="bilinear", align_corners=False))
            scores.append(self.objective(torch.cat(cuts), step))
        return torch.stack(scores).mean(dim=0)


class Views:
    """The mean of an objective over four views: the picture, its mirror image, and both shifted by a 32nd of a side.

    Something that raises it in all views is in the picture, and not a texture that only fools CLIP. All views of a
    picture are encoded at once, so the objective must score V·B images by its B texts.

    Args:
        objective: what is averaged.
        in_turn: take two of the views in each step: at odd steps the picture and its shifted mirror image, at even ones
            the mirror image and the shifted picture.
    """

    def __init__(self, objective: Objective, in_turn: bool = False) -> None:
        self.objective, self.in_turn = objective, in_turn

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        by = max(1, image.shape[-1] // 32)
        mirrored = image.flip(-1)
        views = [image, mirrored, _moved(image, by), _moved(mirrored, -by)]
        if self.in_turn:
            views = views[::3] if step.number % 2 else views[1:3]
        return self.objective(torch.cat(views), step).unflatten(0, (len(views), -1)).mean(dim=0)


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


class ContrastiveLogLikelihood:
    """Σ over the groups of log p(text | image) among the text and its contrast captions, by CLIP's own logit scale.

    It uses CLIP as a classifier of what could be said instead: "an old man" against "a young man", against "an old
    woman", and against "a person". The gradient fades once a picture shows the text; that of a cosine never does.

    Args:
        clip: what scores.
        texts: one per image of the batch. A text without contrast captions is scored by its own logit.
        contrasts: groups of phrases that exclude each other; :func:`contrast_captions` makes captions of them.
        neutral: a text that is true of any picture; it is a group of its own.
        noisy: as in :class:`ClipSimilarity`.
        unwanted: which texts have a negative weight. Such a text is scored by −log(1 − p), p its probability among
            itself and the captions of all groups: with its weight, what rises is the probability of any other caption,
            and the gradient fades once the picture doesn't show the text.

    Raises:
        InputError: where a contrast caption is too long for the CLIP.
    """

    def __init__(
        self,
        clip: Clip,
        texts: Sequence[str],
        contrasts: Sequence[Sequence[str]],
        neutral: str | None = None,
        noisy: bool = False,
        unwanted: Sequence[bool] | None = None,
    ) -> None:
        self.clip, self.noisy = clip, noisy
        self.own = clip.encode_text(texts)  # (B, D)
        # the same shape whatever the texts, so that no picture depends on its neighbours
        groups, most = len(contrasts) + 1, max([1, *(len(phrases) - 1 for phrases in contrasts)])
        self.others = self.own.new_zeros(len(texts), groups, most, self.own.shape[-1])  # (B, groups, captions, D)
        self.mask = self.own.new_full((len(texts), groups, most), NONE)
        for i, text in enumerate(texts):
            found = [contrast_captions(text, phrases) for phrases in contrasts]
            found.append([] if neutral is None or neutral == text else [neutral])
            for group, captions in enumerate(found):
                if captions:
                    self.others[i, group, : len(captions)] = _encoded(clip, text, captions)
                    self.mask[i, group, : len(captions)] = 0
        self.alone = (self.mask == NONE).flatten(1).all(dim=1)
        self.unwanted = torch.tensor(unwanted, device=self.own.device) if any(unwanted or []) else None

    def encode(self, image: Tensor, step: Step) -> Tensor:
        """As in :class:`ClipSimilarity`, times the logit scale."""
        features = self.clip.encode_image(image, step.alpha_bar_t if self.noisy else 1.0)
        return self.clip.model.logit_scale.exp() * features

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return self.score(self.encode(image, step))

    def score(self, features: Tensor) -> Tensor:
        """(B,) of what :meth:`encode` returns, or (V·B,) where that has V views of each image."""
        features = _by_views(features, self.own)
        own = (features * self.own).sum(dim=-1)  # (V, B)
        ahead = (self.others @ features[..., None, :, None]).squeeze(-1) - own[..., None, None]
        ahead = ahead + self.mask  # (V, B, groups, captions)
        # not by log_softmax, whose gradient is rounded to 0 where a picture is 16 logits from its contrast captions
        answer = -F.softplus(ahead.logsumexp(dim=-1)).sum(dim=-1)
        if self.unwanted is not None:
            shown = F.softplus(-ahead.flatten(-2).logsumexp(dim=-1))
            answer = torch.where(self.unwanted, shown, answer)
        return torch.where(self.alone, own, answer).flatten()


def _by_views(features: Tensor, texts: Tensor) -> Tensor:
    """(V·B, D) features of V views of each image -> (V, B, D), for (B, D) texts."""
    return features.unflatten(0, (-1, len(texts)))


def _encoded(clip: Clip, text: str, captions: Sequence[str]) -> Tensor:
    try:
        return clip.encode_text(captions)
    except InputError as error:
        raise InputError(f"{error}; it is a contrast caption of {text!r}, by contrasts or neutral") from error


class ClassifierLogLikelihood:
    """log p(y | x_t), the sum of log p(value | x_t) over the attributes that a text names, by a noise-aware classifier.

    Args:
        classifier: what scores.
        texts: one per image of the batch.
        unwanted: which texts have a negative weight; they are scored by −log(1 − p(y | x_t)), so that the gradient
            fades once the picture doesn't show them.

    Raises:
        InputError: where it knows nothing of a text.
    """

    def __init__(self, classifier: Classifier, texts: Sequence[str], unwanted: Sequence[bool] | None = None) -> None:
        self.classifier, self.unwanted = classifier, list(unwanted or [False] * len(texts))
        for text in texts:
            check_attributes(classifier.vocabulary, text, "classifier")
        self.wanted = [classifier.find_attributes(text) for text in texts]
        self.places = {name: list(values) for name, values in classifier.vocabulary.items()}

    def encode(self, image: Tensor, step: Step) -> dict[str, Tensor]:
        """log p of each value of each attribute, (B, values)."""
        logits = self.classifier(image, step.alpha_bar_t)
        return {name: values.log_softmax(dim=1) for name, values in logits.items()}

    def __call__(self, image: Tensor, step: Step) -> Tensor:
        return self.score(self.encode(image, step))

    def score(self, log_p: dict[str, Tensor]) -> Tensor:
        """(B,) of what :meth:`encode` returns."""
        return torch.stack([self._score_one(log_p, i) for i in range(len(self.wanted))])

    def _score_one(self, log_p: dict[str, Tensor], i: int) -> Tensor:
        columns = [(log_p[name][i], self.places[name].index(value)) for name, value in self.wanted[i].items()]
        if not self.unwanted[i]:
            return sum((values[column] for values, column in columns), start=log_p[next(iter(log_p))].new_zeros(()))
        # 1 − Π p_a = Σ_a (1 − p_a)·Π_{b<a} p_b, of which no term is a difference of numbers near 1
        before, terms = columns[0][0].new_zeros(()), []
        for values, column in columns:
            others = torch.cat([values[:column], values[column + 1 :]])
            terms.append(before + others.logsumexp(dim=0))
            before = before + values[column]
        return -torch.stack(terms).logsumexp(dim=0)
