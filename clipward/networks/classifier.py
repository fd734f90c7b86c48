"""A small classifier of attributes, which also knows the words that name them."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from clipward.errors import InputError, first_line, shorten
from clipward.files import atomic_write, check_state, locate, read_safetensors, to_storable
from clipward.networks.channels import to_rgb
from clipward.networks.noise_level import NoiseConditionedConv, with_noise_level
from clipward.networks.vocabulary import Vocabulary, check_vocabulary, find_attributes

FORMAT = "clipward-classifier-1"
GROUPS, MOST_WIDTH = 8, 4096  # of the channels of a norm, and channels of the first stage


def check_width(width: int) -> None:
    """Raise :class:`InputError` where it is no number of channels that the norms can group."""
    if width % GROUPS or not GROUPS <= width <= MOST_WIDTH:
        raise InputError(
            f"model.width: got {shorten(width)}, expected a multiple of {GROUPS} from {GROUPS} to {MOST_WIDTH}"
        )


class Classifier(nn.Module):
    """Convolutions over a picture of any size, and a head for each attribute.

    Args:
        vocabulary: ``{attribute: {value: [words that name it]}}``; the order of the values is that of the labels.
        width: channels of the first stage; each of four stages halves the size and widens.
        noise_aware: whether it looks at x_t and knows ᾱ_t.
    """

    def __init__(self, vocabulary: Vocabulary, width: int = 32, noise_aware: bool = False) -> None:
        super().__init__()
        self.vocabulary, self.width, self.noise_aware = vocabulary, width, noise_aware
        layers: list[nn.Module] = []
        c = 3
        for stage in range(4):
            wide = width * min(4, 2**stage)
            conv = nn.Conv2d(c, wide, 3, stride=2, padding=1)
            layers += [NoiseConditionedConv(conv) if noise_aware and stage == 0 else conv]
            layers += [nn.GroupNorm(GROUPS, wide), nn.SiLU()]
            layers += [nn.Conv2d(wide, wide, 3, padding=1), nn.GroupNorm(GROUPS, wide), nn.SiLU()]
            c = wide
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2))
        self.heads = nn.ModuleDict({name: nn.Linear(c * 16, len(values)) for name, values in vocabulary.items()})

    def forward(self, image: Tensor, alpha_bar: Tensor | float = 1.0) -> dict[str, Tensor]:
        """(B, C, H, W) in [-1, 1], or x_t of ``alpha_bar`` if noise-aware -> logits (B, values) of each attribute."""
        image = to_rgb(image)
        features = self.body(with_noise_level(image, alpha_bar) if self.noise_aware else image)
        return {name: head(features) for name, head in self.heads.items()}

    def loss(self, image: Tensor, labels: Tensor, alpha_bar: Tensor | float = 1.0) -> Tensor:
        """Cross-entropy averaged over the attributes; ``labels`` is (B, attributes), −1 where one is not known."""
        logits = self(image, alpha_bar)
        known = (labels >= 0).sum(dim=0).clamp(min=1)  # (attributes,)
        sums = [
            F.cross_entropy(logits[name], labels[:, i], ignore_index=-1, reduction="sum") / known[i]
            for i, name in enumerate(self.vocabulary)
        ]
        return torch.stack(sums).mean()

    def find_attributes(self, text: str) -> dict[str, str]:
        """What a text names; see :func:`clipward.networks.vocabulary.find_attributes`."""
        return find_attributes(self.vocabulary, text)

    def features(self, image: Tensor) -> Tensor:
        """(B, C), averaged over the picture: what tells one set of pictures from another."""
        return self.body[:-3](to_rgb(image)).mean(dim=(2, 3))


def save_classifier(path: Path, classifier: Classifier) -> None:
    """Write safetensors in half precision, atomically."""
    header = {name: getattr(classifier, name) for name in ("vocabulary", "width", "noise_aware")}
    state = to_storable(classifier.state_dict(), half=True)
    with atomic_write(path) as aside:
        save_file(state, aside, {"format": FORMAT, "classifier": json.dumps(header)})


def load_classifier(name: str | Path, role: str = "judge") -> Classifier:
    """Read a classifier, frozen and in evaluation mode.

    Raises:
        InputError: where the file is missing or is none.
    """
    path = locate(name)
    metadata, state = read_safetensors(path, role)
    if metadata.get("format") != FORMAT:
        raise InputError(f"{role}: {path} is no classifier; expected one that configs/faces_judge.yaml makes")
    try:
        header = json.loads(metadata["classifier"])
        check_vocabulary(header["vocabulary"])
        with torch.device("meta"):
            check_state(Classifier(**header).state_dict(), state, role)
    except InputError:
        raise
    except Exception as error:  # what a stranger's header may be is without end
        raise InputError(f"{role}: {path} has a header of no classifier ({first_line(error)})") from error
    classifier = Classifier(**header)
    classifier.load_state_dict(state)
    return classifier.eval().requires_grad_(False)
