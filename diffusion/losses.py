"""What a picture is scored by. A loss is raised by guidance: higher is better."""

from collections.abc import Sequence

from torch import Tensor

from diffusion.clip import Clip
from diffusion.schedule import Step


class ClipSimilarity:
    """E_image(image) · E_text(text): the cosine between each picture and its own text.

    Args:
        clip: the critic.
        texts: one per image of the batch.
    """

    def __init__(self, clip: Clip, texts: Sequence[str]) -> None:
        self.clip, self.text_features = clip, clip.encode_text(texts)  # (B, D)

    def __call__(self, image: Tensor, step: Step | None = None) -> Tensor:
        return (self.clip.encode_image(image) * self.text_features).sum(dim=-1)
