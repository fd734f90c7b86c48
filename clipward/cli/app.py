"""``clipward app``: a page on this machine that draws pictures while a person watches."""

import errno
import hashlib
import io
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

from PIL import Image

from clipward.cli.help import COMMANDS
from clipward.cli.parser import OneLineParser
from clipward.cli.settings import find_config
from clipward.errors import InputError, shorten
from clipward.files import atomic_write, check_writable, locate
from clipward.guidance.core import GuidanceError
from clipward.guidance.methods import AUTO, METHODS
from clipward.guidance.models import GuidanceConfig
from clipward.model import MICRO_BATCH, Model, check_names, load
from clipward.sampler import to_picture
from clipward.sampling_config import SamplingConfig
from clipward.texts import check_text
from clipward.values import check_seed, check_weight
from clipward.yaml_files import read_mapping

OWN_HOST = "127.0.0.1"  # which no other machine can reach
BETWEEN = 0.3  # seconds between two looks at the pictures that form
POLICY = (  # the page asks nobody but this server
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'; form-action 'self'"
)


@dataclass(frozen=True)
class Order:
    """What a person asks for on the page.

    Args:
        text: a sentence; without one, the pictures are unguided.
        guidance_weight: how strongly it guides.
        seed: the first seed.
        n_samples: pictures, one for each seed.
        method: how the text guides.
        skip_steps: steps from noise to picture; the method's own number where it is None.
        init_image: the file of a picture to edit.
        mask: the file that is white where it is drawn.
        strength: the noise level that the edit begins at, from 0 to 1.

    Raises:
        InputError: for a value out of its range.
    """

    text: str
    guidance_weight: float
    seed: int
    n_samples: int
    method: str
    skip_steps: int | None
    init_image: Path | None = None
    mask: Path | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", check_text(self.text).strip())
        object.__setattr__(self, "guidance_weight", check_weight(self.guidance_weight))
        object.__setattr__(self, "seed", check_seed(self.seed))
        if not 1 <= self.n_samples <= MICRO_BATCH:
            raise InputError(f"pictures: got {self.n_samples}, expected 1 to {MICRO_BATCH}")

    @property
    def edit(self) -> dict[str, Any]:
        """The settings of an edit, for Python and as flags."""
        if self.init_image is None:
            return {}
        given = {"init_image": str(self.init_image), "mask": self.mask and str(self.mask), "strength": self.strength}
        return {name: value for name, value in given.items() if value is not None}


class Studio:
    """A model that draws one order at a time, and shows how its pictures form.

    Args:
        model: what draws.
        command: the words that begin a command which draws by the same model.
        save_dir: the folder for the pictures and masks that are edited.
    """

    def __init__(self, model: Model, command: Sequence[str], save_dir: Path) -> None:
        self.model, self.command, self.save_dir = model, list(command), save_dir
        self._stop, self._worker = Event(), Thread()

    @property
    def methods(self) -> list[str]:
        """``auto``, and the methods whose models are at hand."""
        config = self.model.sampler.models.config
        at_hand = {"clip": config.clips, "noisy clip": config.noisy_clip, "classifier": config.classifier}
        return [AUTO, *(name for name, method in METHODS.items() if at_hand[method.guided_by])]

    def draw(self, order: Order) -> Iterator[tuple[list[tuple[Image.Image, str]], str]]:
        """Yield the pictures, each with what is said below it, and a line on how far they are; at the end the result.

        A drawing that still runs is stopped first.

        Raises:
            InputError: for an order that the model can't draw.
            GuidanceError: where the guidance has no gradient.
        """
        self.stop()
        stop, news = Event(), SimpleQueue[Any]()
        self._stop, self._worker = stop, Thread(target=self._work, args=(order, stop, news), daemon=True)
        self._worker.start()
        seeds = range(order.seed, order.seed + order.n_samples)
        while True:
            latest = news.get()
            try:
                while latest[0] == "step":  # the newest is shown, the others were too fast
                    latest = news.get_nowait()
            except Empty:
                pass
            kind, *rest = latest
            if kind == "stopped":
                return
            if kind == "error":
                raise rest[0]
            if kind == "step":
                x0, t, number = rest
                captions = [f"seed {seed}" for seed in seeds]
                said = f"step {number}: noise level {t} of {len(self.model.schedule)}"
            else:
                x0, similarities, seconds = rest
                captions = [
                    f"seed {seed}" + ("" if similarity is None else f", {similarity:.2f}")
                    for seed, similarity in zip(seeds, similarities, strict=True)
                ]
                said = f"done in {seconds:.1f} s; on each picture: its seed" + (
                    ", and how similar it is to the text" if order.text else ""
                )
            yield [(to_picture(image), caption) for image, caption in zip(x0, captions, strict=False)], said
            if kind == "done":
                return
            time.sleep(BETWEEN)

    def _work(self, order: Order, stop: Event, news: "SimpleQueue[Any]") -> None:
        number = 0

        def watch(state: Any) -> None:
            nonlocal number
            if stop.is_set():
                raise _Stopped
            number += 1
            news.put(("step", state.x0.cpu(), state.step.t, number))

        try:
            begun = time.perf_counter()
            image = self.model.sample(
                order.text or (),
                guidance_weight=order.guidance_weight,
                n_samples=order.n_samples,
                seed=order.seed,
                callback=watch,
                return_tensors=True,
                method=order.method,
                skip_steps=order.skip_steps,
                **order.edit,
            )
            similarity = self.model.sampler.clip_similarity(image, [order.text] * order.n_samples)
            news.put(("done", image.cpu(), similarity, time.perf_counter() - begun))
        except _Stopped:
            news.put(("stopped",))
        except BaseException as error:  # is raised again where the news are read
            news.put(("error", error))

    def stop(self) -> None:
        """End the drawing that runs, after its step."""
        self._stop.set()
        if self._worker.is_alive():
            self._worker.join()

    def commands(self, order: Order) -> list[str]:
        """For each picture the command that draws it."""
        guided = {"text": order.text, "guidance_weight": f"{order.guidance_weight:.17g}", "unguided": "false"}
        flags = {**(guided if order.text else {}), "method": order.method, **order.edit}
        if order.skip_steps is not None:
            flags["skip_steps"] = str(order.skip_steps)
        words = [*map(shlex.quote, self.command), *(f"--{name}={shlex.quote(str(flags[name]))}" for name in flags)]
        return [
            " ".join([*words, "--n_samples=1", f"--seed={seed}", f"--save_dir=out/seed{seed}"])
            for seed in range(order.seed, order.seed + order.n_samples)
        ]

    def keep(self, value: dict[str, Any] | None) -> tuple[Path | None, Path | None]:
        """Save an uploaded picture, and what was brushed over it as a mask, under names made from their pixels.

        Args:
            value: of an image editor: ``background`` and ``layers``, pictures of Pillow.

        Returns:
            the files of the picture and of the mask; None where there is none.
        """
        if not value or value.get("background") is None:
            return None, None
        picture = value["background"].convert("RGBA")
        if picture.getchannel("A").getextrema() == (0, 0):  # an empty canvas
            return None, None
        mask = Image.new("L", picture.size)
        for layer in value.get("layers") or []:
            brushed = layer.convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha > 127))
            mask.paste(255, mask=brushed)
        image = self._save(picture.convert("RGB"), "picture")
        return image, self._save(mask, "mask") if mask.getextrema() != (0, 0) else None

    def _save(self, picture: Image.Image, kind: str) -> Path:
        file = io.BytesIO()
        picture.save(file, "png")
        path = self.save_dir / f"{kind}-{hashlib.sha256(picture.tobytes()).hexdigest()[:12]}.png"
        if not path.exists():
            with atomic_write(path) as aside:
                aside.write_bytes(file.getvalue())
        return path


class _Stopped(Exception):
    """Ends a walk between two steps."""


def build(studio: Studio) -> Any:
    """The page, as Gradio's ``Blocks``."""
    gradio = import_gradio()
    sampler = studio.model.sampler

    def weight_of(name: str) -> float:
        return METHODS[sampler.method_name if name == AUTO else name].weight

    def draw(
        text: str, weight: float, seed: int, count: int, method: str, steps: int, edited: Any, strength: float
    ) -> Iterator[tuple[Any, str, str]]:
        try:
            image, mask = studio.keep(edited)
            order = Order(text or "", weight, seed, int(count), method, int(steps) or None, image, mask, strength)
            commands = "\n".join(studio.commands(order))
            for pictures, said in studio.draw(order):
                yield pictures, said, commands
        except (InputError, GuidanceError) as error:
            raise gradio.Error(str(error), print_exception=False) from error

    size = max(sampler.architecture.size)
    with gradio.Blocks(title="Clipward", analytics_enabled=False, fill_width=True) as page:
        gradio.Markdown("# Clipward\nType a sentence. A CLIP guides every step from noise to picture towards it.")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                text = gradio.Textbox(label="Text", value="an old man with a smile", lines=2, max_lines=4)
                with gradio.Row():
                    go = gradio.Button("Draw", variant="primary", min_width=80)
                    halt = gradio.Button("Stop", min_width=80)
                with gradio.Row():
                    weight = gradio.Number(weight_of(sampler.config.method), label="Guidance weight", min_width=120)
                    seed = gradio.Number(1, label="First seed", precision=0, minimum=0, min_width=120)
                count = gradio.Slider(1, MICRO_BATCH, 4, step=1, label="Pictures, one for each seed")
                steps = gradio.Slider(
                    0, 250, sampler.config.skip_steps or 0, step=1, label="Steps (0: the method's own)"
                )
                method = gradio.Dropdown(studio.methods, value=sampler.config.method, label="Method")
                with gradio.Accordion("Edit a picture", open=False):
                    gradio.Markdown(
                        "Upload a picture, and brush over the part to draw. Without a stroke, all of it is drawn."
                    )
                    edited = gradio.ImageEditor(
                        show_label=False,
                        type="pil",
                        image_mode="RGBA",
                        sources=["upload", "clipboard"],
                        transforms=[],
                        layers=False,
                        brush=gradio.Brush(max(8, size // 8), colors=["#ff2d95"], color_mode="fixed"),
                        canvas_size=(512, 512),
                        format="png",
                        elem_id="edit",
                    )
                    strength = gradio.Slider(0, 1, 0.6, label="Strength: 0 keeps the picture, 1 begins at noise")
            with gradio.Column(scale=3, min_width=320):
                pictures = gradio.Gallery(
                    show_label=False,
                    format="png",
                    columns=4 if size < 256 else 2,
                    object_fit="contain",
                    buttons=["download", "fullscreen"],
                    elem_id="pictures",
                )
                said = gradio.Textbox(label="Progress", interactive=False, max_lines=1, elem_id="said")
                commands = gradio.Code(
                    label="The commands that draw them, one for each picture",
                    language="shell",
                    interactive=False,
                    wrap_lines=True,
                    lines=2,
                    max_lines=12,
                    elem_id="commands",
                )
        asked = [text, weight, seed, count, method, steps, edited, strength]
        for trigger in (go.click, text.submit):
            trigger(draw, asked, [pictures, said, commands], concurrency_id="draw", api_visibility="private")
        halt.click(studio.stop, api_visibility="private", queue=False)
        method.change(weight_of, method, weight, api_visibility="private")
    return page


def make_server(studio: Studio, host: str, port: int) -> Any:
    """The page as an ASGI application, whose answers forbid the browser to ask any other server."""
    gradio = import_gradio()
    from fastapi import FastAPI

    server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @server.middleware("http")
    async def add_policy(request: Any, go_on: Callable[[Any], Any]) -> Any:
        answer = await go_on(request)
        answer.headers["Content-Security-Policy"] = POLICY
        return answer

    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # none to download
    theme = gradio.themes.Default(**fonts)
    page = build(studio)
    page.queue(default_concurrency_limit=1)
    return gradio.mount_gradio_app(
        server, page, "/", server_name=host, server_port=port, footer_links=[], theme=theme, ssr_mode=False
    )


def import_gradio() -> Any:
    """Gradio, without its statistics.

    Raises:
        InputError: where it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise InputError('app: Gradio is not installed; use pip install "gradio>=6.31,<7"') from error
    return gradio


def load_studio(
    config: str = "faces", weights: str | None = None, device: str | None = None, save_dir: str = "out/app"
) -> Studio:
    """The model of a config, with the words of a command that draws by it.

    Raises:
        InputError: where the config is none of a model that draws, or its weights can't be read.
    """
    section = read_mapping(find_config(config)).get("model")
    section = section if isinstance(section, dict) else {}  # another config's path, or nothing
    settings = section.get("init_args") or {}
    name = weights or settings.get("weights") or settings.get("default_weights")
    if name is None or not str(section.get("class_path")).endswith("DDPMModule"):
        raise InputError(f"config: got {shorten(config)}, expected one of a model that draws, such as faces")
    guidance, sampling = (settings.get(part) or {} for part in ("guidance", "sampling"))
    check_names(guidance, GuidanceConfig)
    check_names(sampling, SamplingConfig)
    how = {key: settings[key] for key in ("use_ema", "compile") if key in settings}
    model = load(locate(name), device=device, **how, **guidance, **sampling)  # guided as the config says alone
    command = ["clipward", "predict", "-c", config, *([f"--weights={weights}"] if weights else [])]
    return Studio(model, command, Path(save_dir))


def app(
    config: str = "faces",
    weights: str | None = None,
    device: str | None = None,
    host: str = OWN_HOST,
    port: int = 7860,
    save_dir: str = "out/app",
) -> None:
    """Open a page in the browser that draws pictures while you watch.

    Args:
        config: a YAML file, or the name of a config that ships, such as faces or celebahq.
        weights: a file, a folder, or a diffusers model on the hub; by default the config's own.
        device: such as cuda; by default a GPU where there is one, else the CPU.
        host: the address to listen at. With the default, no other machine can open the page; 0.0.0.0 lets any do so.
        port: of the address.
        save_dir: the folder for the pictures and masks that you edit.
    """
    if not 0 < port < 2**16:
        raise InputError(f"port: got {port}, expected 1 to 65535")
    import_gradio()
    import uvicorn

    check_writable(Path(save_dir), "save_dir", folder=True)
    check_free(host, port)
    studio = load_studio(config, weights, device, save_dir)
    server = make_server(studio, host, port)
    print(f"open http://{host}:{port} in a browser; Ctrl-C ends the program", flush=True)
    if host != OWN_HOST:
        print("any machine that reaches this address can draw with this one", flush=True)
    uvicorn.run(server, host=host, port=port, log_level="warning")
    studio.stop()


def check_free(host: str, port: int) -> None:
    """Raise :class:`InputError` where no server can listen at an address."""
    import socket

    if not host:  # which would be all addresses
        raise InputError(f"host: got nothing, expected an address, such as {OWN_HOST}")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError | socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise InputError(
                f"host: got {shorten(host)}, expected an address of this machine, such as {OWN_HOST}"
            ) from error
        raise InputError(f"port: can't listen at {host}:{port} ({error.strerror}); use another") from error


def parse(args: Sequence[str]) -> dict[str, Any]:
    """The arguments of :func:`app`.

    Raises:
        InputError: for what is none.
    """
    parser = OneLineParser(prog="clipward app", description=COMMANDS["app"].does)
    parser.add_argument("-c", "--config", default="faces", help="a YAML file, or the name of a config that ships")
    parser.add_function_arguments(app, skip={"config"})
    return vars(parser.parse_args(args))


def run(args: Sequence[str]) -> None:
    app(**parse(args))
