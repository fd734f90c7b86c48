"""The command line: ``python cli.py {fit,validate,test,predict} -c CONFIG …`` and ``python cli.py convert IN OUT``."""

import logging
import signal
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from clipward.callbacks.checkpoints import WholeCheckpointIO, check, last_checkpoint
from clipward.callbacks.evaluation import Evaluation
from clipward.callbacks.gallery import Output
from clipward.callbacks.prediction_writer import PredictionWriter
from clipward.datamodules.prompts import PromptDataModule
from clipward.diffusion.denoiser import Parametrisation
from clipward.diffusion.schedule import ScheduleName
from clipward.errors import InputError
from clipward.evaluation.judges import Judges
from clipward.guidance.core import GuidanceError
from clipward.guidance.methods import METHODS
from clipward.sampler import SamplingConfig
from clipward.weights.architecture import Weights
from clipward.weights.diffusers import save_diffusers
from clipward.weights.load import load_weights, save_weights

# Short names of the model's arguments; they are set only where they are given.
MODEL_FLAGS: dict[str, dict[str, Any]] = {
    "weights": {"type": str},
    "use_ema": {"type": bool},
    "clip": {"type": str, "nargs": "+"},
    "clip_weights": {"type": float, "nargs": "+"},
    "noisy_clip": {"type": str},
}
SAMPLING_FLAGS = ("method", "candidates", "skip_steps", "skip_type", "ddim_eta", "var_type")
REQUEST_FLAGS: dict[str, dict[str, Any]] = {
    "text": {"type": str, "nargs": "+", "help": "sentences that the pictures should obey"},
    "guidance_weight": {"type": float, "nargs": "+", "help": "how hard they should: each text is drawn with each"},
    "n_samples": {"type": int, "default": 4, "help": "seeds for each text and weight"},
    "seed": {"type": int, "default": 0, "help": "the first seed"},
    "unguided": {"type": bool, "default": True, "help": "draw each seed without guidance too"},
    "prompts": {
        "type": str,
        "help": "a .txt file with a text a line, or requests: a .jsonl or .parquet file or a data set on the hub",
    },
    "micro_batch": {
        "type": int | Literal["auto"],
        "default": 16,
        "help": "pictures sampled at once on each device; auto takes as many as fit",
    },
}


DESCRIPTION = """CLIP-guided diffusion, trained and sampled in one framework.
`convert IN OUT --to {safetensors,diffusers}` writes weights in another format; `convert --help` says more."""


class ClipwardCLI(LightningCLI):
    """LightningCLI, where predict and test read requests in place of ``data``, and common flags have short names."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        hidden = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders", "weights_only"}
        return {"fit": hidden, "validate": hidden, "test": hidden, "predict": hidden | {"return_predictions"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("predict", "test"):
            for flag, options in REQUEST_FLAGS.items():
                parser.add_argument(f"--{flag}", **options)
            parser.add_argument("--save_dir", type=str, default=f"out/{subcommand}", help="the folder for what is made")
            parser.add_argument("--overwrite", type=bool, default=False, help="replace what another command made")
        if subcommand == "predict":
            parser.add_argument("--output", type=Output, default="files", help="a PNG for each picture, or shards")
            parser.add_argument("--shard_size", type=int, default=1000, help="pictures a shard")
        if subcommand == "test":
            parser.add_argument("--judge", type=str, nargs="+", required=True, help="who looks at the pictures")
            parser.add_argument(
                "--features",
                type=str,
                default="judge",
                help="what measures fidelity: `judge`, `inception` (needs torch-fidelity), or a file of its weights",
            )
            parser.set_defaults({"n_samples": 16})
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for flag, options in MODEL_FLAGS.items():
            parser.add_argument(f"--{flag}", **options, help=f"short for --model.{flag}")
        kinds = get_type_hints(SamplingConfig)
        for flag in SAMPLING_FLAGS:
            parser.add_argument(f"--{flag}", type=kinds[flag] | None, help=f"short for --model.sampling.{flag}")
        parser.add_argument("--ddim", action="store_true", default=None, help="short for --model.sampling.ddim true")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        config.trainer.inference_mode = False
        self._check_strategy(config.trainer)
        self._find_checkpoint(config)
        for flag in MODEL_FLAGS:
            self._shorten(flag, flag)
        for flag in (*SAMPLING_FLAGS, "ddim"):
            self._shorten(flag, f"sampling.{flag}")
        if self.subcommand in ("predict", "test"):
            config.trainer.logger = False
            logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
            # Requests carry their own indices, and know how they are dealt.
            for beside_the_point in ("Couldn't infer the batch indices", "Your `IterableDataset` has `__len__`"):
                warnings.filterwarnings("ignore", beside_the_point)

    def _check_strategy(self, trainer: Any) -> None:
        name = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path
        if "fsdp" in name.lower():
            raise InputError(f"trainer.strategy: {name} given; -c configs/fsdp.yaml, which shards by FSDP2, would do")
        if name.endswith("Sharded") and str(trainer.precision) == "16-mixed":
            raise InputError("trainer.precision: 16-mixed given, which Lightning doesn't shard; bf16-mixed would do")

    def _find_checkpoint(self, config: Any) -> None:
        """``last`` is the newest below the logger's folder; for others Lightning would go on with what there is."""
        path = config.get("ckpt_path")
        if path is None or (path in ("best", "hpc") and self.subcommand == "fit"):
            return
        logs = config.trainer.get("logger.init_args") or {}
        root = Path(logs.get("save_dir") or config.trainer.default_root_dir or ".") / (logs.get("name") or "")
        if path == "last":
            found = last_checkpoint(root)
            if found is None and self.subcommand != "fit":
                raise InputError(f"ckpt_path: there is no checkpoint below {root}")
            print(f"ckpt_path: {found or f'no checkpoint below {root} yet; starting at the beginning'}")
            config.ckpt_path = None if found is None else str(found)
        elif not Path(path).exists():
            raise InputError(f"ckpt_path: there is no file {path}")
        else:
            check(Path(path), root)

    def _shorten(self, flag: str, argument: str) -> None:
        config = self.config[self.subcommand]
        if config.get(flag) is None:
            return
        if f"init_args.{argument}" not in config.model:
            raise InputError(f"{flag}: {config.model.class_path} has no such argument")
        config.model[f"init_args.{argument}"] = config.pop(flag)
        config[flag] = None

    def instantiate_classes(self) -> None:
        self.callback = None
        if self.subcommand in ("predict", "test"):
            config = self.config[self.subcommand]
            if config.guidance_weight is None:
                config.guidance_weight = [METHODS[config.model.init_args.sampling.method].weight]
            self.requests = PromptDataModule(**{flag: config[flag] for flag in REQUEST_FLAGS})
            if self.subcommand == "predict":
                text = self._parser("predict").dump(config, skip_unset=False)
                self.callback = PredictionWriter(
                    config.save_dir, text, config.overwrite, config.output, config.shard_size
                )
                self.requests.done = self.callback.finished()
            else:
                judges = Judges(config.judge, (r.text for r in self.requests.requests), config.features)
                self.callback = Evaluation(judges, config.save_dir, config.overwrite)
        super().instantiate_classes()
        if self.subcommand == "test" and getattr(self.datamodule, "path", "") is not None:
            self.callback.data = self.datamodule

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        if self.subcommand == "fit":
            self.save_config_callback = SaveConfigCallback
            self.save_config_kwargs = {"config_filename": "config.fit.yaml"}
        plugins = self._get(self.config_init, "trainer.plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, WholeCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs)
        if self.callback is not None:
            trainer.callbacks.append(self.callback)
        return trainer

    def before_predict(self) -> None:
        self.datamodule = self.requests

    def predict(self, **kwargs: Any) -> None:
        if next(iter(self.requests.predict_dataloader()), None) is not None:
            self.trainer.predict(**kwargs)
        elif self.trainer.is_global_zero:
            self.callback.finish()

    def before_test(self) -> None:
        self.datamodule = self.requests

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs | ({"return_predictions": False} if subcommand == "predict" else {})

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's hyper-parameters must not override the command line."""


def convert(
    source: str,
    target: str,
    to: Literal["safetensors", "diffusers"] = "safetensors",
    use_ema: bool = True,
    half: bool = False,
    image_size: int | None = None,
    head_channels: int | None = None,
    schedule: ScheduleName | None = None,
    parametrisation: Parametrisation | None = None,
) -> None:
    """Write weights of any kind that --weights takes as our safetensors or as a diffusers folder.

    Args:
        source: the weights: a file, a folder, or the name of a diffusers model on the hub.
        target: the file (safetensors) or folder (diffusers) to write.
        to: what to write.
        use_ema: take the averaged weights where a file has both.
        half: write safetensors in half precision.
        image_size: of the pictures, where the source doesn't know it.
        head_channels: of an attention head, where the source doesn't know it; 64 in OpenAI's published networks.
        schedule: where the source doesn't know it; linear in all that pesser and OpenAI published for faces.
        parametrisation: what the network puts out, where the source doesn't know it.
    """
    path = Path(target)
    if path.exists():
        raise InputError(f"target: {target} exists; another name would do")
    weights = load_weights(source, use_ema, head_channels)
    told = {"image_size": image_size, "schedule": schedule, "parametrisation": parametrisation}
    architecture = replace(weights.architecture, **{name: value for name, value in told.items() if value is not None})
    weights = Weights(architecture, weights.state)
    if to == "diffusers":
        save_diffusers(path, weights)
    else:
        save_weights(path, weights, half)
    count = sum(value.numel() for value in weights.state.values())
    print(f"{target}: {count / 1e6:.1f} M parameters for {architecture.image_size}×{architecture.image_size} pictures")


def main(args: list[str] | None = None) -> None:
    given = sys.argv[1:] if args is None else args
    try:
        if given[:1] == ["convert"]:
            auto_cli(convert, args=given[1:], prog="cli.py convert")
            return
        ClipwardCLI(
            args=args,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"description": DESCRIPTION},
        )
    except (InputError, GuidanceError) as error:
        sys.exit(f"error: {error}")
    except SIGTERMException:  # raised when all is saved
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
