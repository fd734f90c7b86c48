"""CLIP-guided diffusion: type a sentence, and a diffusion model that was never trained on text draws it.

import clipward
model = clipward.load("faces64")
pictures = model.sample(["an old man with a smile"], guidance_weight=20, n_samples=4, seed=1)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipward.editing import Edit
    from clipward.errors import InputError
    from clipward.guidance.core import GuidanceError
    from clipward.guidance.methods import METHODS
    from clipward.guidance.models import GuidanceConfig
    from clipward.model import Model, load
    from clipward.sampling_config import SamplingConfig

__version__ = version("clipward")
__all__ = ["METHODS", "Edit", "GuidanceConfig", "GuidanceError", "InputError", "Model", "SamplingConfig", "load"]

HOMES = {
    "METHODS": "clipward.guidance.methods",
    "Edit": "clipward.editing",
    "GuidanceConfig": "clipward.guidance.models",
    "GuidanceError": "clipward.guidance.core",
    "InputError": "clipward.errors",
    "Model": "clipward.model",
    "SamplingConfig": "clipward.sampling_config",
    "load": "clipward.model",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch takes seconds, and ``clipward --help`` needs none of it."""
    if name not in HOMES:
        raise AttributeError(f"module 'clipward' has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
