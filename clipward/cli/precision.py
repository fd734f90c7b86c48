"""The choice of a precision: bf16 where the processor computes in it."""

import re
from pathlib import Path

import torch

AUTO = "auto"
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
CPU_FLAGS = ("avx512_bf16", "amx_bf16")  # of Linux, for arithmetic in bf16


def choose_precision(accelerator: str = "auto") -> tuple[str, str]:
    """Lightning's name of the fastest precision that keeps pictures as good, and why.

    Args:
        accelerator: of the Trainer; ``auto`` takes a GPU where there is one.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        known = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = cpu_flags().intersection(CPU_FLAGS)
        name, known = f"this CPU ({', '.join(sorted(found))})" if found else "this CPU", bool(found)
    if known:
        return "bf16-mixed", f"{name} computes in bf16"
    return "32-true", f"{name} doesn't compute in bf16"


def cpu_flags(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """What the processor can do, by Linux's names; nothing on other systems."""
    try:
        found = re.search(r"^flags\s*:(.*)$", path.read_text(), re.MULTILINE)
    except OSError:
        return set()
    return set(found[1].split()) if found else set()
