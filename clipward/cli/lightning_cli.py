"""``fit``, ``validate``, ``test`` and ``predict``, by way of LightningCLI."""

import errno
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from clipward.callbacks.checkpoints import (
    NEEDED,
    TO_TRAIN,
    AtomicCheckpointIO,
    check,
    check_content,
    last_checkpoint,
    remove_unfinished,
)
from clipward.callbacks.evaluation import Evaluation
from clipward.callbacks.gallery import Output
from clipward.callbacks.guided_samples import GuidedSamples
from clipward.callbacks.prediction_writer import PredictionWriter
from clipward.callbacks.progress import PredictionProgress
from clipward.callbacks.signals import (
    MAIN,
    PATIENCE,
    Stopped,
    StopSignals,
    end_with_main,
    is_launched,
    quiet_after_main,
    wait_for_main,
)
from clipward.cli.again import AGAIN, VARY, Again
from clipward.cli.flags import (
    DEFAULTS,
    EDIT_FLAGS,
    FLAGS,
    MODEL_FLAGS,
    NUMBER_FLAGS,
    OUTPUT_FLAGS,
    REQUEST_FLAGS,
    Flag,
)
from clipward.cli.help import COMMANDS
from clipward.cli.messages import first_process
from clipward.cli.own_samples import draw_own_samples
from clipward.cli.parser import OneLineParser
from clipward.cli.precision import AUTO, PRECISIONS, choose_precision
from clipward.cli.run_folder import BEGUN, removing_unbegun
from clipward.cli.settings import prepare, shipped
from clipward.cli.trainer_values import check_trainer
from clipward.datamodules.celebahq import CelebAHQDataModule
from clipward.datamodules.own_samples import OwnSamplesDataModule
from clipward.datamodules.prompts import PromptDataModule
from clipward.datamodules.streams import StreamDataModule
from clipward.errors import InputError, first_line, shorten
from clipward.evaluation.judges import Judges
from clipward.files import check_writable
from clipward.guidance.core import GuidanceError
from clipward.guidance.methods import METHODS
from clipward.guidance.models import GuidanceConfig, choose_method
from clipward.lightning_modules.reproducible import Reproducible
from clipward.sampling_config import SamplingConfig
from clipward.yaml_files import read_mapping

MENDABLE = (InputError, GuidanceError, MisconfigurationException)  # errors that are a person's to mend
LOGGER_ERROR = re.compile(  # what its constructor said, among what else the parser tried
    r"Subtypes: .*lightning\.pytorch\.loggers\.logger\.Logger'.*^  - (?!Expected a|Not a valid subclass)"
    r"(?:Problem with given class_path [^\n]*\n\s+)?(.*?)$",
    re.DOTALL | re.MULTILINE,
)
ENDINGS = {  # what the same command does after a signal has ended it
    "predict": "goes on where it stopped",
    "test": "starts again from the beginning, since it writes nothing before all pictures are drawn",
}
OF_THE_DISK = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
}


class ClipwardParser(OneLineParser, LightningArgumentParser):
    """LightningCLI's parser, with errors of one line."""


class LateSaveConfig(SaveConfigCallback):
    """Saves the config when the training begins, so that what fails before leaves nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")


class ClipwardCLI(LightningCLI):
    """LightningCLI, where predict and test read requests in place of ``data``, and common flags have short names."""

    again: Again
    command: str  # the only one whose settings are read
    signals: StopSignals
    requests: PromptDataModule
    callback: PredictionWriter | Evaluation | None = None

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        hidden = {"model", "dataloaders", "datamodule", "train_dataloaders", "val_dataloaders", "weights_only"}
        return {self.command: hidden | ({"return_predictions"} if self.command == "predict" else set())}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for name, flag in FLAGS[subcommand].items():
            add_flag(parser, name, flag)
        parser.set_defaults(DEFAULTS.get(subcommand, {}))
        return parser

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise InputError(f"seed_everything: {error}") from error

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        for name in (AGAIN, VARY):
            if config.get(name) is not None:
                raise InputError(f"{name}: got {shorten(config[name])} in a config, expected --{name} as a flag")
        self._check_model(config.model)
        check_trainer(config.trainer)
        config.trainer.inference_mode = False
        self._set_precision(config)
        self._check_strategy(config.trainer)
        self._find_checkpoint(config)
        self._check_places(config)
        for name, flag in MODEL_FLAGS.items():
            self._set_argument(name, flag.sets or name)
        if self.subcommand in ("predict", "test"):
            config.trainer.logger = False
            logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        # Requests, and a fit draws samples too, carry their own indices, and know how they are dealt.
        for beside_the_point in (
            *("Couldn't infer the batch indices", "Your `IterableDataset` has `__len__`"),
            r"`isinstance\(treespec, LeafSpec\)` is deprecated",
        ):
            warnings.filterwarnings("ignore", beside_the_point)

    def _check_model(self, model: Namespace) -> None:
        name, arguments = model.class_path.rpartition(".")[2], model.get("init_args") or Namespace()
        if self.subcommand in ("predict", "test") and "sampling" not in arguments:
            raise InputError(f"model: got {name}, expected one that draws pictures; use -c faces or -c celebahq")
        with suppress(AttributeError, NameError, TypeError):  # a stranger's class may have no types
            check_groups(get_type_hints(import_class(model.class_path).__init__), arguments, "model")

    @staticmethod
    def _set_precision(config: Any) -> None:
        """Set the Trainer's precision by the short flag; ``auto`` says what it took."""
        given, named = config.precision, config.trainer.precision
        if given is None:
            return
        if given == AUTO:
            if named is not None:
                raise InputError(f"precision: got {AUTO} beside trainer.precision {named}, expected one of the two")
            given, reason = choose_precision(str(config.trainer.accelerator))
            if first_process():
                print(f"precision: {given}, since {reason}")
        elif given not in PRECISIONS:
            raise InputError(f"precision: got {shorten(given)}, expected {AUTO} or one of {', '.join(PRECISIONS)}")
        config.trainer.precision, config.precision = given, None

    def _check_strategy(self, trainer: Any) -> None:
        if trainer.strategy is None:
            raise InputError("trainer.strategy: got null, expected a name such as auto or ddp")
        name = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.class_path
        if "fsdp" in name.lower():
            raise InputError(f"trainer.strategy: got {name}, expected another; use -c fsdp, which shards by FSDP2")
        if name.endswith("Sharded") and str(trainer.precision) == "16-mixed":
            raise InputError("trainer.precision: got 16-mixed, which Lightning doesn't shard; use bf16-mixed")

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
            if first_process():
                print(f"ckpt_path: {found or f'no checkpoint below {root} yet; starting at the beginning'}")
            config.ckpt_path = None if found is None else str(found)
        elif not os.path.lexists(path):
            raise InputError(f"ckpt_path: there is no file {path}")
        else:
            check(Path(path), root)
        if config.ckpt_path is not None:
            drawn = ("architecture", "current_model_state") if "sampling" in config.model.init_args else ()
            trained = TO_TRAIN if self.subcommand == "fit" else ()
            check_content(Path(config.ckpt_path), (*NEEDED, *drawn, *trained))
            if drawn and self.subcommand != "fit":  # it says itself which network it is of
                if config.get("weights") is not None:
                    raise InputError(
                        f"weights: got {shorten(config.weights)} beside ckpt_path, expected one of the two"
                    )
                config.model.init_args.weights, config.ckpt_path = config.ckpt_path, None

    def _check_places(self, config: Any) -> None:
        """All that will be written can be, and is not there yet, before anything is drawn or trained."""
        if self.subcommand in ("predict", "test"):
            if config.save_dir in (None, "", "null"):
                raise InputError(f"save_dir: got {config.save_dir or 'none'}, expected a folder")
            if "://" in config.save_dir:
                raise InputError(f"save_dir: got {shorten(config.save_dir)}, expected a folder of this machine")
            check_writable(Path(config.save_dir), "save_dir", folder=True)
        if self.subcommand != "fit":
            return
        arguments = config.model.get("init_args") or Namespace()
        if arguments.get("save_path"):
            check_writable(Path(arguments.save_path), "model.save_path")
            if os.path.lexists(arguments.save_path):
                raise InputError(f"model.save_path: {arguments.save_path} exists; choose another name")
        if arguments.get("save_dir"):
            check_writable(Path(arguments.save_dir), "model.save_dir", folder=True)
            if Path(arguments.save_dir).exists() and any(Path(arguments.save_dir).iterdir()):
                raise InputError(f"model.save_dir: {arguments.save_dir} is not empty; choose another folder")
        trainer = config.trainer
        places = {"trainer.default_root_dir": trainer.default_root_dir}
        for name in ("logger", "callbacks"):
            parts = trainer.get(name)
            for part in parts if isinstance(parts, list) else [parts]:
                given = (part.get("init_args") or {}) if isinstance(part, Namespace) else {}
                for setting in ("save_dir", "dirpath"):
                    if given.get(setting):
                        places[f"trainer.{name}.{setting}"] = given[setting]
                if name == "logger" and given.get("save_dir"):
                    folders = [given["save_dir"], *(str(given.get(each) or "") for each in ("name", "version"))]
                    places["trainer.logger.name"] = os.path.join(*folders)
        samples = (config.get("data.init_args") or {}).get("samples_dir")
        places["data.samples_dir"] = samples if not config.get("data.init_args.path") else None
        for field, place in places.items():
            if place and "://" not in str(place):
                check_writable(Path(place), field, folder=True)

    def _set_argument(self, name: str, argument: str) -> None:
        """Set an argument of the model by its short flag; other models than DDPMModule have some without a group."""
        config = self.config[self.subcommand]
        value = config.get(name)
        if value is None:
            return
        known = config.model.get("init_args") or Namespace()
        if argument not in known and name in known:
            argument = name
            if isinstance(value, list):
                if len(value) > 1:
                    raise InputError(f"{name}: got {len(value)} values, expected one")
                value = value[0]
        if argument not in known:
            raise InputError(f"{name}: {config.model.class_path.rpartition('.')[2]} has no such setting")
        known[argument], config[name] = value, None

    def instantiate_classes(self) -> None:
        if self.subcommand in ("predict", "test"):
            config = self.config[self.subcommand]
            if config.guidance_weight is None:
                arguments = config.model.init_args
                method = choose_method(arguments.sampling.method, GuidanceConfig(**arguments.guidance.as_dict()))
                config.guidance_weight = [METHODS[method].weight]
            given = REQUEST_FLAGS | (EDIT_FLAGS | NUMBER_FLAGS if self.subcommand == "predict" else {})
            for name, flag in (given | OUTPUT_FLAGS).items():
                if flag.default is not None and name in config and config[name] is None:
                    raise InputError(f"{name}: got null, expected a value such as {flag.default}, its default")
            self.requests = PromptDataModule(**{name: config[name] for name in given})
            negative = config.model.init_args.get("guidance.negative_text")
            if negative and not self.again.hashes and next(self.requests.guiding_texts(), None) is None:
                raise InputError(
                    f"negative_text: got {shorten(negative)}, but no picture is guided; expected --text beside it"
                )
            if self.subcommand == "predict":
                text = self._parser("predict").dump(config, skip_unset=False)
                self.callback = PredictionWriter(
                    config.save_dir,
                    text,
                    config.overwrite,
                    config.output,
                    config.shard_size,
                    self.again.hashes,
                    bool(config.save_progress),
                )
                self.requests.done = self.callback.check(self.requests.requests)
            else:
                judges = Judges(config.judge, (r.text for r in self.requests.requests), config.features)
                self.callback = Evaluation(judges, config.save_dir, config.overwrite)
            self.callback.signals = self.signals  # one for the whole command, so that none that Python swallows is lost
            self.config_dump: dict[str, Any] = {}  # for checkpoints, of which these two write none
        try:
            super().instantiate_classes()
        except ValueError as error:  # the parser wraps what a constructor raises
            found = mendable(error)
            if said := LOGGER_ERROR.search(str(error)):
                found = InputError(f"trainer.logger: {said[1]}")
            if found is None or found is error:
                raise
            raise found from None
        if isinstance(self.callback, Evaluation):
            data = self.datamodule
            lacks_pictures = isinstance(data, CelebAHQDataModule | StreamDataModule) and data.path is None
            self.callback.data = None if lacks_pictures else data

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        if self.subcommand == "fit" and self._get(self.config_init, "trainer.logger") is not False:
            self.save_config_callback = LateSaveConfig
            self.save_config_kwargs = {"config_filename": BEGUN}
        plugins = self._get(self.config_init, "trainer.plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        try:
            trainer: Any = super().instantiate_trainer(**kwargs)
        except (
            MisconfigurationException,
            ImportError,
            TypeError,
            ValueError,
            RuntimeError,
        ) as error:  # such as a strategy that doesn't exist, or settings of SLURM that Lightning can't follow
            raise InputError(f"trainer: {error}") from error
        if self.callback is not None:
            trainer.callbacks.append(self.callback)
        if self.subcommand == "predict":
            standard = (RichProgressBar, TQDMProgressBar)  # Lightning takes the first where rich is installed
            bars = [each for each in trainer.callbacks if type(each) in standard]
            trainer.callbacks = [each for each in trainer.callbacks if each not in bars]
            trainer.callbacks.append(PredictionProgress(self.config.predict.save_dir, bool(bars)))
        elif trainer.max_epochs in (None, -1):  # where rich is installed, its bar would say "Epoch 0/-2"
            trainer.callbacks = [
                TQDMProgressBar() if type(each) is RichProgressBar else each for each in trainer.callbacks
            ]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with removing_unbegun(self.trainer.loggers if self.trainer.is_global_zero else ()):
                super()._run_subcommand(subcommand)
        except (*MENDABLE, OSError, Stopped) as error:
            if isinstance(error, OSError) and error.filename is None:  # a full disk doesn't say where
                error.filename = self.config[subcommand].get("save_dir")
            if self.trainer.progress_bar_callback is not None and first_process():
                print(file=sys.stderr)  # the bar has left its line open
            raise
        except RuntimeError as error:
            if str(error).startswith("Early stopping conditioned on metric"):  # one that no step of the training has
                raise InputError(f"trainer.callbacks: {first_line(error)}") from error
            if not str(error).startswith("Error(s) in loading state_dict"):
                raise
            name = self.config[subcommand].model.class_path.rpartition(".")[2]
            raise InputError(f"ckpt_path: got a checkpoint of other tensors than {name} has; use its own") from error

    def before_validate(self) -> None:
        self._check_data()

    def _check_data(self) -> None:
        """What can be known before a logger writes: whether the data has what the model learns from."""
        if isinstance(self.model, Reproducible):
            self.model.check_data(self.datamodule)

    def before_fit(self) -> None:
        self._check_data()
        logs = self._get(self.config_init, "trainer.logger.init_args.save_dir")
        if logs and Path(logs).is_dir() and self.trainer.is_global_zero:
            remove_unfinished(Path(logs))
        trainer: Any = self.trainer  # whose callbacks have no type
        for callback in trainer.callbacks:
            if isinstance(callback, GuidedSamples):
                callback.prepare(self.model, self.datamodule)
        if isinstance(self.datamodule, OwnSamplesDataModule) and self.datamodule.draws:
            draw_own_samples(self.trainer, self.model.weights, self.datamodule)

    def before_predict(self) -> None:
        self.datamodule = self.requests
        if self.again.hashes.get("clip_hash"):  # the picture is made again with all that its record says
            self.model.models.load(None)

    def before_test(self) -> None:
        self.datamodule = self.requests

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs | ({"return_predictions": False} if subcommand == "predict" else {})

    def _parse_ckpt_path(self) -> None:
        """A checkpoint's hyper-parameters must not override the command line."""


class Help(ClipwardCLI):
    """Prints all flags of a command, and those of the models and the data that configs have."""

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self._parser(args[0]).print_help()
        configs = [read_mapping(path) for path in shipped().values()]
        for part in ("model", "data"):
            for class_path in sorted({config[part]["class_path"] for config in configs if part in config}):
                print()
                with suppress(SystemExit):
                    parser.parse_args([args[0], f"--{part}.help={class_path}"])
        raise SystemExit(0)


def add_flag(parser: LightningArgumentParser, name: str, flag: Flag) -> None:
    types = {"output": Output} | {name: kind | None for name, kind in get_type_hints(SamplingConfig).items()}
    text = flag.help if flag.sets is None else f"{flag.help}; short for --model.{flag.sets}"
    if not flag.value:
        parser.add_argument(f"--{name}", action="store_true", default=None, help=text)
        return
    options: dict[str, Any] = {"required": True} if flag.required else {"default": flag.default}
    options |= {"nargs": "+"} if flag.several else {}
    parser.add_argument(f"--{name}", type=flag.type or types[name], help=text, **options)


def import_class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def check_groups(kinds: dict[str, Any], settings: Namespace, where: str) -> None:
    """Raise :class:`InputError` for what the parser lets pass: null, and a value in place of a group of settings."""
    for name, kind in kinds.items():
        value = settings.get(name, "")
        if value is None and kind is not None and type(None) not in get_args(kind) and kind is not Any:
            raise InputError(f"{where}.{name}: got null, expected a value")
        if not is_dataclass(kind) or name not in settings:
            continue
        if not isinstance(value, Namespace):
            known = ", ".join(each.name for each in fields(kind))
            raise InputError(f"{where}.{name}: got {shorten(value)}, expected settings: {known}")
        check_groups(get_type_hints(kind), value, f"{where}.{name}")


def mendable(error: BaseException | None) -> InputError | None:
    """The error that a person can mend among what an error was raised from."""
    while error is not None and not isinstance(error, MENDABLE):
        error = error.__cause__
    return error if error is None or isinstance(error, InputError) else InputError(str(error))


def run(command: str, args: Sequence[str]) -> None:
    """Run a command that needs a Trainer."""
    lists_all, again = "--help.all" in args, Again([])
    if command == "predict" and not lists_all:
        again = Again(args)
        args = again.args
        if first_process():
            print(*again.notes, sep="\n", end="\n" if again.notes else "")
    kind = Help if lists_all else ClipwardCLI
    signals = StopSignals(PATIENCE)
    cli: type[ClipwardCLI] = type(kind.__name__, (kind,), {"command": command, "again": again, "signals": signals})
    arguments = [command, *(args if lists_all else prepare(command, args, with_default=not again.hashes))]
    end_with_main()
    logging.basicConfig(format="%(message)s")  # before a library does so, with its names in front of each line
    if command in ENDINGS:
        signals.install()
    if command == "predict":
        logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    try:
        with quiet_after_main(MENDABLE):
            cli(
                args=arguments,
                save_config_callback=None,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                parser_class=ClipwardParser,
                parser_kwargs={command: {"description": COMMANDS[command].does}},
            )
    except GuidanceError as error:
        kept = "; pictures that are finished stay" if command == "predict" else ""
        raise InputError(f"guidance: {error}; use a smaller weight, or another text or method{kept}") from error
    except MisconfigurationException as error:
        raise InputError(str(error)) from error
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        raise InputError(f"{error.filename or 'the disk'}: {error.strerror}") from error
    except SIGTERMException:  # raised when all is saved
        sys.exit(128 + signal.SIGTERM)
    except Stopped as stopped:
        if first_process():
            print(f"{stopped}; the same command {ENDINGS[command]}", file=sys.stderr)
        wait_for_main()
        if stopped.timer is not None:
            stopped.timer.cancel()
        sys.exit(stopped.status)
    finally:
        signals.restore()
        if not is_launched():
            os.environ.pop(MAIN, None)
