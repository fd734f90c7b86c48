"""Compare the time and the memory of a step with other loops: a table in Markdown and JSON.

    make bench

draws and trains with random weights of Ho et al.'s network for 256×256 pixels and of CLIP's ViT-B/32. All loops have
the same weights. Each runs in a process of its own, as its users get it, and they take turns. The table has medians of
CPU seconds of one thread. The other loops are diffusers' (``pip install diffusers``): its U-Net with its scheduler; the
same with one gradient of CLIP through the U-Net; the arithmetic of its community pipeline ``clip_guided``, which passes
the U-Net twice in each step; and the step of its example ``train_unconditional``.

    python benchmarks/bench.py --quick true

takes a small network and a few seconds. The script writes ``out/bench/table.md`` and ``report.json`` after every round.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

import clipward
from clipward.cli.precision import choose_precision
from clipward.networks.clip import OPENAI_PREPROCESSING, make_noise_aware, save_folder
from clipward.networks.unet import UNet, UNetConfig
from clipward.weights.architecture import Architecture, Weights
from clipward.weights.diffusers import save_diffusers

ROOT = Path(__file__).parent.parent
TEXT = "an old man with a smile"
NETWORK = Architecture(UNetConfig(), image_size=256, schedule="linear", betas=(1e-4, 0.02))
SMALL = replace(NETWORK, unet=replace(NETWORK.unet, channels=(32, 32, 64), attention_levels=(2,)), image_size=128)
TRAINED = replace(
    NETWORK, unet=replace(NETWORK.unet, channels=(64, 128, 128, 256), attention_levels=(3,)), image_size=64
)
CLIP = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
SMALL_CLIP = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
BATCH = 8  # pictures of a training step
HAS_BF16 = choose_precision("cpu")[0] == "bf16-mixed"  # whether the processor computes in it


def prepare(folder: Path, quick: bool) -> None:
    """Write random weights: ``unet`` and ``train`` as diffusers has them, ``clip`` and ``noisy_clip``."""
    from open_clip import CLIP as OpenClip

    torch.manual_seed(0)
    for name, architecture in {"unet": SMALL if quick else NETWORK, "train": SMALL if quick else TRAINED}.items():
        network = UNet(architecture.unet)
        nn.init.normal_(network.conv_out.weight, std=0.01)  # zero in a new network
        save_diffusers(folder / name, Weights(architecture, network.state_dict()))
    config = SMALL_CLIP if quick else CLIP
    size = {"size": config["vision_cfg"]["image_size"], **OPENAI_PREPROCESSING}
    model = OpenClip(**config)
    save_folder(folder / "clip", model, config, size)
    make_noise_aware(model)
    save_folder(folder / "noisy_clip", model, config, size)


class Meter:
    """CPU seconds of each step after the first, and the peak of memory above what there was at the beginning."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self._begin, self.ends = read_memory("VmRSS"), [time.process_time()]

    def end_step(self, *_: Any) -> None:
        self.ends.append(time.process_time())

    def found(self) -> dict[str, float]:
        steps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return {"seconds": median(steps[1:]), "bytes": read_memory("VmHWM") - self._begin}


def read_memory(field: str) -> int:
    """Bytes of a field of ``/proc/self/status``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


# ours, as clipward.load and clipward fit give it


def draw(method: str | None, folder: Path, steps: int, bf16: bool = False) -> dict[str, float]:
    model = clipward.load(folder / "unet", clip=str(folder / "clip"), noisy_clip=str(folder / "noisy_clip"))
    settings: dict[str, Any] = {} if method is None else {"method": method}
    network_time = 0.0

    def begin(*_: Any) -> None:
        nonlocal network_time
        network_time -= time.process_time()

    def end(*_: Any) -> None:
        nonlocal network_time
        network_time += time.process_time()

    if method is not None:
        models = model.sampler.models
        for clip in models.clips if method != "contrastive" else [models.noisy_clip]:
            clip.encode_text([TEXT])
    model.network.register_forward_pre_hook(begin)
    model.network.register_forward_hook(end)
    meter = Meter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.sample(TEXT if method else (), n_samples=1, skip_steps=steps + 1, callback=meter.end_step, **settings)
    whole = meter.ends[-1] - meter.ends[0]
    return meter.found() | {"beside the network": (whole - network_time) / whole}


def train(folder: Path, steps: int) -> dict[str, float]:
    import lightning as L
    from torch.utils.data import DataLoader

    from clipward.allocator import keep_freed_memory
    from clipward.lightning_modules.ddpm import DDPMModule, TrainingConfig

    class Pictures(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            size = self.trainer.model.architecture.size
            return DataLoader([{"image": torch.randn(3, *size)} for _ in range(BATCH * (steps + 1))], batch_size=BATCH)

    class End(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            meter.end_step()

    keep_freed_memory()
    module = DDPMModule(weights=str(folder / "train"), optim=TrainingConfig(learning_rate=1e-4))
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator="cpu", max_steps=steps + 1, gradient_clip_val=1.0, callbacks=[End()], **quiet)
    meter = Meter()
    trainer.fit(module, Pictures())
    return meter.found()


# diffusers, as its documentation and its examples use it


class ClipScore:
    """The cosine of pictures in [-1, 1] and the text, by open_clip's model as it comes."""

    def __init__(self, folder: Path) -> None:
        import open_clip
        from torchvision import transforms

        model = open_clip.create_model(f"local-dir:{folder}").eval().requires_grad_(False)
        with torch.no_grad():
            text = model.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")([TEXT]))
        self.model, self.text = model, nn.functional.normalize(text, dim=-1)
        mean, std = OPENAI_PREPROCESSING["mean"], OPENAI_PREPROCESSING["std"]
        self.resize = transforms.Resize(model.visual.image_size, antialias=True)
        self.normalise = transforms.Normalize(mean, std)

    def __call__(self, image: Tensor) -> Tensor:
        pixels = self.normalise(self.resize((image / 2 + 0.5).clamp(0, 1)))
        return (nn.functional.normalize(self.model.encode_image(pixels), dim=-1) * self.text).sum()


def draw_by_diffusers(passes: int, folder: Path, steps: int) -> dict[str, float]:
    """A walk that is unguided (0 passes with a gradient), or guided by one, or by one beside an unguided pass (2)."""
    from diffusers import DDPMScheduler, UNet2DModel

    network = UNet2DModel.from_pretrained(folder / "unet", subfolder="unet", local_files_only=True).eval()
    scheduler = DDPMScheduler.from_pretrained(folder / "unet", subfolder="scheduler", local_files_only=True)
    score = ClipScore(folder / "clip") if passes else None
    scheduler.set_timesteps(steps + 1)
    x, meter = torch.randn(1, 3, *load_size(network)), Meter()
    for t in scheduler.timesteps:
        if passes != 1:
            with torch.no_grad():
                output = network(x, t).sample
        if score is not None:
            x = x.detach().requires_grad_()
            guided = network(x, t).sample
            level = scheduler.alphas_cumprod[t]
            x0 = (x - (1 - level) ** 0.5 * guided) / level**0.5
            share = (1 - level) ** 0.5 if passes == 2 else 1.0
            gradient = torch.autograd.grad(100 * score(share * x0 + (1 - share) * x), x)[0]
            output = (guided.detach() if passes == 1 else output) - (1 - level) ** 0.5 * gradient
        with torch.no_grad():
            x = scheduler.step(output, t, x).prev_sample
        meter.end_step()
    return meter.found()


def load_size(network: Any) -> tuple[int, int]:
    size = network.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


def train_by_diffusers(folder: Path, steps: int) -> dict[str, float]:
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    network = UNet2DModel.from_pretrained(folder / "train", subfolder="unet", local_files_only=True).train()
    scheduler = DDPMScheduler.from_pretrained(folder / "train", subfolder="scheduler", local_files_only=True)
    average = EMAModel(network.parameters(), decay=0.9999, model_cls=UNet2DModel, model_config=network.config)
    optimiser = torch.optim.AdamW(network.parameters(), 1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    rate = get_scheduler("cosine", optimiser, num_warmup_steps=500, num_training_steps=10_000)
    pictures, meter = torch.randn(BATCH, 3, *load_size(network)), Meter()
    for _ in range(steps + 1):
        noise, t = torch.randn_like(pictures), torch.randint(1000, (BATCH,))
        loss = nn.functional.mse_loss(network(scheduler.add_noise(pictures, noise, t), t).sample, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        rate.step()
        optimiser.zero_grad()
        average.step(network.parameters())
        meter.end_step()
    return meter.found()


LOOPS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "unguided": lambda folder, steps: draw(None, folder, steps),
    "through the U-Net": lambda folder, steps: draw("clip_guidance", folder, steps),
    "at x̂0": lambda folder, steps: draw("clip_guidance_pixel", folder, steps),
    "default": lambda folder, steps: draw("contrastive", folder, steps),
    "diffusers, unguided": lambda folder, steps: draw_by_diffusers(0, folder, steps),
    "diffusers, one gradient": lambda folder, steps: draw_by_diffusers(1, folder, steps),
    "diffusers, community": lambda folder, steps: draw_by_diffusers(2, folder, steps),
    **({"through the U-Net, bf16": lambda *given: draw("clip_guidance", *given, bf16=True)} if HAS_BF16 else {}),
    "training": train,
    "diffusers, training": train_by_diffusers,
}
RATIOS = {  # of one loop's seconds to another's, and what is aimed at
    ("through the U-Net", "unguided"): "≤ 2.15",
    ("at x̂0", "unguided"): "≤ 1.05",
    ("default", "unguided"): "≤ 1.12",
    ("unguided", "diffusers, unguided"): "≤ 0.90",
    ("diffusers, community", "through the U-Net"): "≥ 1.7",
    ("diffusers, one gradient", "through the U-Net"): "≥ 1.25",
    ("training", "diffusers, training"): "≤ 0.95",
    ("through the U-Net, bf16", "through the U-Net"): "≤ 0.62",
}


def bench(
    save_dir: Path = Path("out/bench"),
    rounds: int = 5,
    steps: int = 2,
    quick: bool = False,
    only: list[str] | None = None,
    loop: str | None = None,
    folder: Path | None = None,
) -> None:
    """Take all loops in turn, and print the table.

    Args:
        save_dir: the folder to write to.
        rounds: how often each loop runs.
        steps: of each run, after a first one that is not timed.
        quick: take small networks.
        only: the loops to take.
        loop: run this one here, with the weights of ``folder``, and print its figures as JSON.
        folder: where the weights are.
    """
    if loop is not None and folder is not None:
        print(json.dumps(LOOPS[loop](folder, steps)))
        return
    if unknown := [name for name in only or () if name not in LOOPS]:
        sys.exit(f"only: got {', '.join(map(repr, unknown))}, expected names among {', '.join(LOOPS)}")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in only or LOOPS}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as weights:
        prepare(Path(weights), quick)
        for number in range(rounds):
            for name, runs in found.items():
                command = [sys.executable, __file__, "--loop", name, "--folder", weights, "--steps", str(steps)]
                ran = subprocess.run(command, capture_output=True, text=True, env=environment)
                if ran.returncode:
                    sys.exit(ran.stderr)
                runs.append(json.loads(ran.stdout.splitlines()[-1]))
            save_dir.mkdir(parents=True, exist_ok=True)
            (save_dir / "report.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            table = format_tables(found)
            (save_dir / "table.md").write_text(table + "\n")
            print(f"round {number + 1} of {rounds}\n\n{table}\n", flush=True)


def format_tables(found: dict[str, list[dict[str, float]]]) -> str:
    """The medians of each loop, and their ratios with the range over the rounds, in Markdown."""
    lines = ["| loop | CPU seconds a step | peak above the models, MiB |", "|---|---|---|"]
    for name, runs in found.items():
        seconds, peak = (median(run[key] for run in runs) for key in ("seconds", "bytes"))
        lines.append(f"| {name} | {seconds:.3f} | {peak / 2**20:.0f} |")
    lines += ["", "| | found | range | aim |", "|---|---|---|---|"]
    for (one, other), aim in RATIOS.items():
        if one in found and other in found:
            ratios = [a["seconds"] / b["seconds"] for a, b in zip(found[one], found[other], strict=True)]
            low, high = min(ratios), max(ratios)
            lines.append(f"| {one} ÷ {other} | {median(ratios):.2f} | {low:.2f} to {high:.2f} | {aim} |")
    if "through the U-Net" in found and "diffusers, community" in found:
        ours, theirs = (median(run["bytes"] for run in found[name]) for name in list(RATIOS)[4][::-1])
        lines.append(f"| memory through the U-Net ÷ diffusers, community | {ours / theirs:.2f} | | ≤ 0.45 |")
    if "unguided" in found:
        beside = median(run["beside the network"] for run in found["unguided"])
        lines.append(f"| share of an unguided walk beside the network | {beside:.1%} | | ≤ 2 % |")
    return "\n".join(lines)


if __name__ == "__main__":
    auto_cli(bench)
