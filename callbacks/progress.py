"""What a person sees of ``predict``: a screen of what runs on what, and how far it is, in bars or in a few lines."""

import sys
import time
from collections.abc import Iterable, Sequence, Sized
from statistics import fmean
from textwrap import wrap
from typing import Any

import lightning as L
import torch
from PIL import Image
from tqdm import tqdm

from clipward.diffusion.sampling import State
from clipward.editing import Edit
from clipward.guidance.methods import AUTO
from clipward.guidance.models import REASONS
from clipward.sampler import HasSampler, Sampler, to_picture

WIDTH, LEFT = 80, 11  # of the screen, and of its column of names
PARTS = 10  # of a run, between two lines
LOOK_EVERY = 10  # steps between two similarities, which so cost less than a hundredth of the time
FRAMES = 8  # of a picture on its way


class WalkPlace:
    """Which pictures of a batch a walk draws: where memory runs out, a batch takes several walks."""

    def __init__(self) -> None:
        self.ended = self.begun = 0

    def __call__(self, state: State) -> slice:
        """The pictures of a state, which must be seen after each step."""
        if state.step.number == 1:  # also where a walk is taken again
            self.begun = self.ended
        place = slice(self.begun, self.begun + len(state.x))
        if state.step.s == -1:
            self.ended = place.stop
        return place


class Frames:
    """Keeps what the pictures of a batch look like on their way: x̂0 after a few steps.

    Args:
        count: pictures.
        steps: of the walk.
    """

    def __init__(self, count: int, steps: int) -> None:
        self.numbers = {round(1 + i * (steps - 1) / (FRAMES - 1)) for i in range(FRAMES)}
        self.of: list[list[Image.Image]] = [[] for _ in range(count)]
        self._place = WalkPlace()

    def watch(self, state: State) -> None:
        place = self._place(state)
        for i, x0 in zip(range(place.start, place.stop), state.x0, strict=True):
            if state.step.number == 1:
                self.of[i] = []
            if state.step.number in self.numbers and state.step.s != -1:  # the last is the picture itself
                self.of[i].append(to_picture(x0.clamp(-1, 1)))


class PredictionProgress(L.Callback):
    """Shows how far ``predict`` is. It changes no picture.

    In a terminal there are two bars, one over pictures and one over steps. Elsewhere there is a line for each tenth of
    the run. Both have the time that is left, and the similarity of the predicted pictures and their texts, which is
    computed at every tenth step.

    Args:
        save_dir: where the pictures go.
        shows: whether there are bars or lines; the first screen is there anyway.
    """

    def __init__(self, save_dir: str, shows: bool = True) -> None:
        self.save_dir, self.shows = save_dir, shows
        self.bars: list[tqdm] = []
        self._similarity: float | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: HasSampler) -> None:
        if not trainer.is_global_zero:
            return
        requests, done = trainer.datamodule.requests, len(trainer.datamodule.done)
        self.sampler, self.total = pl_module.sampler, len(requests) - done if isinstance(requests, Sized) else None
        print(f"{format_rows(describe_run(trainer, pl_module, self.save_dir, self.total, done))}\n", flush=True)
        self._started, self._drawn, self._printed = time.monotonic(), 0, 0
        if self.shows:
            pl_module.watchers.append(self.watch)
        if self.shows and sys.stderr.isatty():
            left = "{elapsed} gone, {remaining} left"
            form = f"{{desc}} {{percentage:3.0f}}% |{{bar}}| {left if self.total else '{elapsed} gone'}"
            self.bars = [
                tqdm(
                    total=1.0, desc=name, file=sys.stderr, bar_format=form, dynamic_ncols=True, leave=False, position=i
                )
                for i, name in enumerate(["pictures", "steps"])
            ]

    def on_predict_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: dict[str, list], *_: Any) -> None:
        self._batch, self._place, self._world = batch, WalkPlace(), trainer.world_size
        if trainer.is_global_zero:
            self._steps = len(self.sampler.list_steps(batch["edit"][0]))

    def watch(self, state: State) -> None:
        """After each step."""
        place, number = self._place(state), state.step.number
        if number % LOOK_EVERY == 0 and state.step.s != -1 and not self.sampler.is_shared:
            x0, (text, edit) = state.x0.clamp(-1, 1), (self._batch[name][place] for name in ("text", "edit"))
            self._average(self.sampler.clip_similarity(x0, text, edit))
        drawn = place.start + (place.stop - place.start) * number / self._steps
        self._show(self._drawn + self._world * drawn, number)

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: dict[str, Any], *_: Any) -> None:
        if trainer.is_global_zero and self.shows:
            self._average(outputs["clip_similarity"])
            self._drawn += self._world * len(self._batch["index"])
            self._show(self._drawn, self._steps, ended=True)

    def _average(self, found: Sequence[float | None]) -> None:
        known = [similarity for similarity in found if similarity is not None]
        self._similarity = fmean(known) if known else None

    def _show(self, drawn: float, number: int, ended: bool = False) -> None:
        whole = self._drawn if self.total is None else min(self._drawn, self.total)
        similarity = "" if self._similarity is None else f", similarity {self._similarity:.3f}"
        if self.bars:
            pictures, steps = self.bars
            pictures.set_description_str(f"{whole}{'' if self.total is None else f'/{self.total}'} pictures", False)
            steps.set_description_str(f"step {number}/{self._steps}{similarity}", False)
            pictures.n = 0.0 if not self.total else min(1.0, drawn / self.total)
            steps.n = number / self._steps if self._steps else 1.0
            for bar in self.bars:
                bar.refresh()
            return
        elapsed = time.monotonic() - self._started
        if self.total is None:  # a stream: at each doubling
            part, said = (whole.bit_length() if ended else 0), f"{whole} pictures"
        else:
            share = min(1.0, drawn / self.total)
            part = min(int(PARTS * share + 1e-6), PARTS if ended else PARTS - 1)  # 100 % is printed when all is written
            said = f"{share:4.0%}  {whole} of {self.total} pictures"
            said += "" if ended else f", step {number} of {self._steps}"
            said += f", {format_time(elapsed / share - elapsed)} left" if 0 < share < 1 else ""
        if part > self._printed:
            self._printed = part
            print(f"{said}, {format_time(elapsed)} gone{similarity}", file=sys.stderr, flush=True)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._close()  # before the writer says where everything lies, which it does in on_predict_end

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        for bar in reversed(self.bars):
            bar.close()
        self.bars = []


def describe_run(
    trainer: L.Trainer, module: HasSampler, save_dir: str, total: int | None, done: int
) -> list[tuple[str, str]]:
    """What runs on what, as names and values."""
    sampler, made = module.sampler, module.provenance()
    network = sampler.network
    (height, width), count = sampler.architecture.size, sum(p.numel() for p in network.parameters()) / 1e6
    size = f"{width}×{height} pixels"
    rows = [("weights", f"{made['weights']} ({made['weights_hash']}), {count:.1f} M parameters, {size}")]
    guided = next(iter(trainer.datamodule.guiding_texts()), None) is not None
    rows += describe_guidance(sampler, made, guided)
    walks = dict.fromkeys(describe_walk(sampler, edit) for edit in trainer.datamodule.list_kinds())
    best = "" if made["candidates"] == 1 else f", the best of {made['candidates']}"
    rows.append(("steps", f"{'; '.join(walks)}{best}"))
    threads = torch.get_num_threads()
    device = f"{made['device']} with {threads} thread{'' if threads == 1 else 's'}"
    if made["device"] == "cuda":
        device = torch.cuda.get_device_name(sampler.device)
    world = trainer.world_size
    rows.append(("device", f"{device}, {made['precision']}, {world} process{'' if world == 1 else 'es'}"))
    at_once = trainer.datamodule.micro_batch
    pictures = "as they come" if total is None else str(total)
    at_once = "as many at once as fit" if at_once == "auto" else f"{at_once} at once"
    rows.append(("pictures", f"{pictures}, {at_once}, to {save_dir}{f'; {done} are there already' if done else ''}"))
    return rows


def describe_walk(sampler: Sampler, edit: Edit | None) -> str:
    """How a picture comes from noise, or from the picture that is edited."""
    made, repeats = sampler.describe_steps(edit), sampler.repeats(edit)
    found = f"{made['steps']} of {made['sampler']}, spaced by {made['skip_type']}"
    return found if repeats == 1 else f"{found}, each {repeats} times"


def describe_guidance(sampler: Sampler, made: dict[str, Any], guided: bool) -> Iterable[tuple[str, str]]:
    """The method, why ``auto`` took it, and the models that guide and score."""
    by = {"clip": made.get("clip"), "noisy clip": made.get("noisy_clip"), "classifier": made.get("classifier")}
    model = by[sampler.method.guided_by]
    if guided:
        reason = f", {REASONS[made['method']]}" if sampler.config.method == AUTO else ""
        schedule = made.get("weight_schedule")
        yield "method", f"{made['method']}{reason}{f', the weight times {schedule}' if schedule else ''}"
        yield "guided by", str(model)
        if made.get("negative_text"):
            yield "away from", made["negative_text"]
    else:
        yield "method", "none, unguided"
    if made.get("clip_hash") and (made["clip"] != model or not guided):
        yield "scored by", made["clip"]


def format_rows(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values in two columns of a terminal; what has no space is never broken."""
    lines = []
    for name, value in rows:
        first, *others = wrap(value, WIDTH - LEFT, break_long_words=False, break_on_hyphens=False)
        lines += [f"{name:<{LEFT}}{first}", *(" " * LEFT + line for line in others)]
    return "\n".join(lines)


def format_time(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
