"""What a picture is scored by. A loss is raised by guidance: higher is better."""

from collections.abc import Sequence

from torch import Tensor

from diffusion.clip import Clip
from diffusion.guidance import GuidanceError
from diffusion.schedule import Step

FLAT = 0.01  # standard deviation of a picture in [-1, 1]


class ClipSimilarity:
    """E_image(image) · E_text(text): the cosine between each picture and its own text.

    Args:
        clip: the critic.
        texts: one per image of the batch.

    Raises:
        GuidanceError: when called for a step, where a picture is so flat that CLIP can't see anything in it.
    """

    def __init__(self, clip: Clip, texts: Sequence[str]) -> None:
        self.clip, self.text_features = clip, clip.encode_text(texts)  # (B, D)

    def __call__(self, image: Tensor, step: Step | None = None) -> Tensor:
        if step is not None:
            flat = image.detach().flatten(1).std(dim=1) < FLAT
            if flat.any():
                raise GuidanceError(int(flat.nonzero()[0]), f"CLIP sees a near-constant picture at t={step.t}")
        return (self.clip.encode_image(image) * self.text_features).sum(dim=-1)
