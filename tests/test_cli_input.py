"""What a person may give the command line by mistake, and what helps: short helps, configs by name, one-line errors."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from conftest import ROOT
from lightning_utilities.core.imports import RequirementCache

from clipward.cli import app, main
from clipward.cli.help import COMMANDS, overview, short_help
from clipward.cli.messages import finish, one_line
from clipward.cli.renamed import RENAMED, find_renamed
from clipward.cli.settings import find_config, prepare, shipped, split_config_flags
from clipward.cli.trainer_values import check_trainer
from clipward.errors import InputError
from clipward.lightning_modules.ddpm import DDPMModule


def error_of(*args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    line = str(stopped.value.code)
    assert line.startswith("error: ")
    assert "\n" not in line
    return line.removeprefix("error: ")


def exits() -> pytest.RaisesExc:
    """A command that prints what was asked for and ends."""
    return pytest.raises(SystemExit, match=r"^0$")


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


# helps


def test_helps_and_the_version_need_no_heavy_import() -> None:
    code = """
import sys
from clipward.cli import main
for args in (["--version"], ["--help"], ["fit", "--help"], ["predict", "-c", "nowhere", "-h"], ["convert", "--help"]):
    main(args)
try:
    main(["perdict"])
except SystemExit as stopped:
    print(stopped.code)
print({"torch", "lightning", "jsonargparse"} & set(sys.modules))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert re.fullmatch(r"clipward \d+\.\d+\.\d+.*", said[0])
    assert said[-2:] == [f"error: command: got 'perdict', expected one of {', '.join(COMMANDS)}", "set()"]


@pytest.mark.parametrize(
    "program", [["cli.py"], ["-m", "clipward.cli"], [str(Path(sys.executable).parent / "clipward")]]
)
def test_all_ways_to_start_it_are_the_same_program(program: list[str]) -> None:
    said = subprocess.run([sys.executable, *program, "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout == overview() + "\n"


@pytest.mark.parametrize("page", [overview(), *map(short_help, COMMANDS)], ids=["clipward", *COMMANDS])
def test_a_short_help_fits_a_terminal(page: str) -> None:
    assert max(map(len, page.splitlines())) <= 80
    assert len(re.findall(r"^  clipward ", page, re.MULTILINE)) == 3
    assert re.match(r"[A-Z].*\.\n\n", page)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_long_help_has_every_flag_of_the_short_one(command: str, capsys: pytest.CaptureFixture) -> None:
    with exits():
        main([command, "--help.all"])
    long = capsys.readouterr().out
    assert long.startswith("usage: clipward")
    if command != "convert":
        assert COMMANDS[command].does in long
    known = set(re.findall(r"--?[\w.]+", long))
    flags = set(re.findall(r"^  (?:(-c), )?(--[\w.]+)", short_help(command), re.MULTILINE))
    assert {name for pair in flags for name in pair if name} - known <= {"--trainer.logger.save_dir"}  # of a subclass


def test_the_examples_of_the_helps_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pages = [overview(), *(short_help(command) for command in COMMANDS)]
    for example in re.findall(r"^  clipward (.*)$", "\n".join(pages), re.MULTILINE):
        arguments = shlex.split(example)
        if arguments[0] == "app":
            assert app.parse(arguments[1:]).keys() == signature(app.app).parameters.keys()
            continue
        with exits():
            main([*arguments, "--print_config"])


# configs


def test_a_config_is_found_by_its_name_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with exits():
        main(
            [
                "predict",
                "-c",
                "celebahq",
                "-cfigure",
                "--config=ddp",
                "-c",
                write(tmp_path, "seed: 7"),
                "--print_config",
            ]
        )
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["init_args"]["network"]["image_size"] == 256
    assert (printed["method"], printed["trainer"]["strategy"], printed["seed"]) == ("clip_guidance", "ddp", 7)
    known = ", ".join(sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")))
    assert error_of("predict", "-c", "nowhere") == f"config: got 'nowhere', expected a YAML file or one of {known}"
    for command in ("fit", "validate"):
        assert error_of(command) == f"config: got none, expected -c with a YAML file or one of {known}"
    (tmp_path / "faces").write_text("n_samples: 3")
    assert find_config("faces") == Path("faces")
    assert prepare("predict", [])[1] == str(shipped()["faces"])


@pytest.mark.parametrize("given", [["-c", "x"], ["-cx"], ["-c=x"], ["--config", "x"], ["--config=x"]])
def test_a_config_may_be_given_in_every_spelling(given: list[str]) -> None:
    assert split_config_flags(given) == ["--config", "x"]


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trainer:\n  max_steps: 1\n  max_steps: 2\n", r"trainer\.max_steps twice \(line 3\)"),
        ("seed: 1\nn_samples: 2\nseed: 1\n", r"seed twice \(line 3\)"),
        (LAUGHS, "more than 100000 values once its aliases are replaced"),
        ("a: &a [*a]\n", "more than 100000 values"),
        ("a: &a [" + "x, " * 2000 + "]\nb: [" + "*a, " * 2000 + "]\n", "more than 100000 values"),
        ("a: " + "[" * 200 + "]" * 200, "more than 100 levels"),
        ("a: " + "x" * 1_000_001, "more than 1 MB"),
        ("a: [b\n", r"is no YAML \(.*in line 2\)"),
        ("a: \x00\n", "is no YAML"),
        ("a: !!python/name:os.system\n", "is no YAML"),
        ("- a\n", "has no settings"),
        ("1: 2\n", "has the key 1, expected names of settings"),
        ("model: {~: 1}\n", "has the key None, expected names"),
        ("", "has no settings"),
    ],
)
def test_yaml_with_surprises_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    assert re.fullmatch(f"config: {path} (has )?{message}.*", error_of("predict", "-c", path))


def test_yaml_may_repeat_itself_by_aliases(tmp_path: Path) -> None:
    path = write(tmp_path, "text: &texts [a man]\nguidance_weight: [1]\nmodel: {init_args: {x: *texts}}\n")
    assert (
        error_of("predict", "-c", "faces", "-c", path)
        == "model.x: DDPMModule has no such setting; --help.all lists all"
    )


def test_a_part_of_a_config_may_be_a_file_which_is_checked_too(tmp_path: Path) -> None:
    part = tmp_path / "model.yaml"
    part.write_text("class_path: x\nclass_path: y\n")
    expected = f"config: {part} has class_path twice (line 2), expected it once"
    assert error_of("predict", "--model", str(part)) == expected
    assert error_of("predict", "-c", write(tmp_path, "model: model.yaml")) == expected


# names of earlier versions


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model.opposites", "[[old, young]]"], "model.opposites: renamed; use model.guidance.contrasts"),
        (["--opposites=[[old, young]]"], "model.opposites: renamed; use model.guidance.contrasts"),
        (["--model.init_args.neutral", "x"], "model.neutral: renamed; use model.guidance.neutral"),
        (["--model.unet.channels", "[8]"], "model.unet: renamed; use model.network.unet"),
        (["--method", "evidence"], "method evidence: renamed; use contrastive"),
        (["--model.sampling.method=evidence"], "method evidence: renamed; use contrastive"),
        (
            ["--model=lightning_modules.ddpm.DDPMModule"],
            "lightning_modules.ddpm.DDPMModule: renamed; use clipward.lightning_modules.ddpm.DDPMModule",
        ),
        (
            ["--trainer.callbacks+", "{class_path: callbacks.gallery.Gallery}"],
            "callbacks.gallery.Gallery: renamed; use clipward.callbacks.gallery.Gallery",
        ),
    ],
)
def test_an_old_flag_names_the_new_one(args: list[str], message: str) -> None:
    assert error_of("predict", *args) == message


@pytest.mark.parametrize(("old", "new"), RENAMED["argument"].items())
def test_every_old_argument_names_the_new_one_which_exists(old: str, new: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"model: {{init_args: {{{old}: null}}}}")
    assert error_of("fit", "-c", "faces", "-c", path) == f"model.{old}: renamed (in {path}); use model.{new}"
    group, argument = new.split(".")
    assert argument in {field.name for field in fields(get_type_hints(DDPMModule.__init__)[group])}


def test_an_old_config_names_all_that_is_new(tmp_path: Path) -> None:
    old = {
        "model": {"class_path": "lightning_modules.ddpm.DDPMModule", "init_args": {"ema_decay": 0.9, "clip": None}},
        "data": {"class_path": "datamodules.faces.FacesDataModule"},
        "trainer": {"callbacks": [{"class_path": "callbacks.guided_samples.GuidedSamples"}]},
        "method": "evidence",
    }
    path = write(tmp_path, yaml.safe_dump(old))
    line = error_of("predict", "-c", path)
    assert line.startswith(f"{path}: renamed; use ")
    for new in (
        "clipward.lightning_modules.ddpm.DDPMModule for lightning_modules.ddpm.DDPMModule",
        "clipward.datamodules.faces.FacesDataModule for datamodules.faces.FacesDataModule",
        "clipward.callbacks.guided_samples.GuidedSamples for callbacks.guided_samples.GuidedSamples",
        "model.optim.ema_decay for model.ema_decay",
        "model.guidance.clip for model.clip",
        "contrastive for method evidence",
    ):
        assert new in line


def test_other_modules_keep_their_names() -> None:
    assert find_renamed([("model.schedule", "cosine")]) == {"model.schedule": "model.network.schedule"}
    assert find_renamed([("model.schedule", "cosine"), ("model.clip", "x")], "ClipModule") == {}
    with exits():
        main(["fit", "-c", "faces_noisy_clip", "--model.clip", "x", "--model.schedule", "linear", "--print_config"])
    assert find_renamed([("trainer.callbacks.class_path", "lightning.pytorch.callbacks.Timer")]) == {}


# mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("perdict", f"command: got 'perdict', expected one of {', '.join(COMMANDS)}"),
        ("", f"command: got none, expected one of {', '.join(COMMANDS)}"),
        ("predict --txet a", "--txet: there is no such flag; use --text"),
        ("predict --n_sample 3", "--n_sample: there is no such flag; use --n_samples"),
        ("predict --bogus", "--bogus: there is no such flag; --help.all lists all"),
        ("fit -c faces --trainer.max_step 1", "--trainer.max_step: there is no such flag; use --trainer.max_steps"),
        ("predict --seed 1 2", "'2': got a value without a flag; put quotes around values with spaces"),
        ("predict --text", "text: got nothing, expected at least one value"),
        ("predict --seed one", "seed: got 'one', expected a whole number"),
        ("predict --guidance_weight 1 x", "guidance_weight: got 'x', expected a number"),
        ("predict --unguided maybe", "unguided: got 'maybe', expected true or false"),
        ("predict --micro_batch lots", "micro_batch: got 'lots', expected a whole number or auto"),
        (
            "predict --skip_type log",
            "skip_type: got 'log', expected one of uniform, uniform2, leading, quad, trailing, karras, logsnr",
        ),
        ("predict --seed_everything -1", "seed_everything: -1 is not in bounds, numpy accepts from 0 to 4294967295"),
        ("predict --save_dir null", "save_dir: got null, expected a folder"),
        ("predict --save_dir s3://b/x", "save_dir: got 's3://b/x', expected a folder of this machine"),
        ("test --text x --save_dir=null", "save_dir: got null, expected a folder"),
        ("predict --output zip", "output: got 'zip', expected one of files, webdataset, parquet"),
        (
            "predict --model.network.image_size x",
            "model.network.image_size: got 'x', expected a whole number or a list",
        ),
        ("predict --model.sampling.interval 0.2", "model.sampling.interval: got '0.2', expected a list"),
        ("predict --model.bogus x", "model.bogus: DDPMModule has no such setting; --help.all lists all"),
        (
            "predict --model.network.bogus x",
            "model.network.bogus: DDPMModule has no such setting; --help.all lists all",
        ),
        ("fit -c faces --data.path x", "data.path: FacesDataModule has no such setting; --help.all lists all"),
        ("predict --model Nonsense", "model: got 'Nonsense', expected a class path such as package.module.Class"),
        (
            "predict --model nowhere.Model",
            "model: got nowhere.Model, expected a class that takes these settings (No module named 'nowhere')",
        ),
        ("predict --model.optim 3", "model.optim: got '3', expected settings, or a file of them"),
        (
            "predict -c faces_clip",
            "model: got ClipModule, expected one that draws pictures; use -c faces or -c celebahq",
        ),
        ("predict -c ddp", "model: got none, expected -c with the config of a model, such as faces"),
        (
            "test -c faces --text x",
            "judge: got none, expected --judge with a classifier's safetensors or a CLIP's "
            "folder, such as clipward:faces64/judge.safetensors",
        ),
        ("fit -c faces_judge --clip x", "clip: ClassifierModule has no such setting"),
        ("fit -c faces_noisy_clip --clip x y", "clip: got 2 values, expected one"),
        ("predict --candidates 1025", "sampling.candidates: got 1025, expected 1 to 1024"),
        ("predict --model.sampling.repeats 1000000000", "sampling.repeats: got 1000000000, expected 1 to 1024"),
        ("predict --model.sampling.batch_multiple 99999", "sampling.batch_multiple: got 99999, expected 1 to 1024"),
        (
            "predict --first_index 1000000000000",
            "first_index: got 1000000000000, expected a whole number from 0 to 2147483647",
        ),
        ("predict --image_prompt", "image_prompt: got nothing, expected one value"),
        (
            "predict --negative_text hats",
            "negative_text: got 'hats', but no picture is guided; expected --text beside it",
        ),
        (
            "predict --guidance_weight 1e39 --text x",
            "guidance_weight: got 1e+39, expected a finite number from -1e38 to 1e38",
        ),
        (
            f"predict --text {'a|' * 100}a",
            f"text: '{'a|' * 18}a…{'|a' * 19}' has 101 parts, expected at most 100",
        ),
        (
            "fit -c faces --trainer.accumulate_grad_batches 0",
            "trainer.accumulate_grad_batches: got 0, expected a whole number from 1 to 2147483647",
        ),
        (
            "predict --trainer.limit_predict_batches 0",
            "trainer.limit_predict_batches: got 0, expected a whole number from 1 to 2147483647, or a share above 0 "
            "and up to 1.0",
        ),
        ("predict --ddim_eta 0.5", "ddim_eta: got 0.5 without DDIM's steps, expected --ddim beside it"),
        (
            f"predict --class_label {'9' * 5000}",
            f"class_label: got '{'9' * 37}…{'9' * 38}', expected a number below 1e308",
        ),
        (
            "predict --weight_schedule 0:1e7",
            "sampling.weight_schedule: got '0:1e7', expected pairs of t/T, rising from 0 to 1, and a factor from 0 to "
            "1e6, such as '0.0:0.5 0.4:1 0.8:0'",
        ),
        (
            "convert clipward:faces64 /proc/x",
            "target: got '/proc/x', expected a file that can be written (No such file or directory)",
        ),
        ("predict --seed 1:30", "seed: got '1:30', expected a plain number"),
        ("predict --seed 010", "seed: got '010', expected a plain number"),
        ("predict --text a --guidance_weight 5 01:30.5", "guidance_weight: got '01:30.5', expected a plain number"),
        (
            f"predict --text a --guidance_weight 5 {'9' * 309}",
            f"guidance_weight: got '{'9' * 37}…{'9' * 38}', expected a number below 1e308",
        ),
        ("predict --text a --guidance_weight 5 1:30", "guidance_weight: got '1:30', expected a plain number"),
        (
            "predict --model.sampling.skip_steps 1:30",
            "model.sampling.skip_steps: got '1:30', expected a plain number",
        ),
        ("predict --model.sampling.skip_steps=1:30", "model.sampling.skip_steps: got '1:30', expected a plain number"),
        ("convert clipward:faces64 x --head_channels 0", "head_channels: got 0, expected 1 or more"),
        ("convert clipward:faces64 x --head_channels -4", "head_channels: got -4, expected 1 or more"),
        ("convert", "source: got none, expected a value"),
        (f"predict --strength {'9' * 400}", f"strength: got '{'9' * 37}…{'9' * 38}', expected a number below 1e308"),
        (
            "predict --noisy_clip= --text x",
            "noisy_clip: got an empty name, expected a folder, a file or a name such as ViT-B-32/openai",
        ),
        ("fit -c faces_classifier --model.width 5", "model.width: got 5, expected a multiple of 8 from 8 to 4096"),
        ("fit -c faces_clip --model.embed_dim 0", "model.embed_dim: got 0, expected 1 to 65536"),
        ("fit -c faces_clip --model.max_noise -1", "model.max_noise: got -1.0, expected 0 to 10.0"),
        ("fit -c faces_clip --model.levels [5000]", "model.levels: got [5000], expected whole numbers from 0 to 999"),
        ("fit -c noisy_clip --model.levels [2]", "model.levels: got (2.0,), expected numbers from 0 to 1"),
        (
            "convert a b --to diffusers --half true",
            "half: got true beside --to diffusers, expected --to safetensors; diffusers' folder is float32",
        ),
        ("convert a hf://b/c", "target: got 'hf://b/c', expected a file or a folder of this machine"),
        ("convert a b --to zip", "to: got 'zip', expected one of safetensors, diffusers"),
    ],
)
def test_a_mistake_is_named_in_one_line(args: str, message: str) -> None:
    assert error_of(*args.split()) == message


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        ("accumulate_grad_batches check_val_every_n_epoch num_nodes", [0, -1, 10**20], "a whole number from 1 to {M}"),
        ("max_steps max_epochs", [0, -2], "a whole number from 1 to {M}, or -1 for no limit"),
        ("min_steps min_epochs log_every_n_steps", [-1], "a whole number from 0 to {M}"),
        ("num_sanity_val_steps", [-2], "a whole number from 0 to {M}, or -1 for no limit"),
        (
            "limit_train_batches val_check_interval",
            [0, -1, 0.0, 1.5, -0.5, float("nan")],
            "a whole number from 1 to {B}",
        ),
        ("limit_val_batches overfit_batches", [-1, 1.5, float("inf")], "a whole number from 0 to {B}"),
        ("gradient_clip_val", [-1, -0.5, float("nan"), float("inf")], "a number from 0 to {M}"),
    ],
)
def test_a_number_of_the_trainer_that_is_out_of_range_is_named(names: str, values: list[float], expected: str) -> None:
    most = 2**31 - 1
    words = expected.format(M=most, B=f"{most}, or a share above 0 and up to 1.0")
    for name in names.split():
        for value in values:
            with pytest.raises(InputError, match=f"^trainer.{name}: got {value}, expected {re.escape(words)}$"):
                check_trainer({name: value})


@pytest.mark.parametrize(
    "given", ["0", "00:00:00:00", "1:00", "", {"hours": -1}, {"years": 1}, {"days": 10**10}, timedelta(0)]
)
def test_a_time_of_the_trainer_that_is_none_is_named(given: object) -> None:
    with pytest.raises(InputError, match=r"^trainer.max_time: got .+, expected a time above 0, such as 00:12:00:00"):
        check_trainer({"max_time": given})


def test_more_processes_than_cores_are_refused() -> None:
    for devices in (0, 100_000, "100000"):
        with pytest.raises(InputError, match=r"^trainer.devices: got \D?\d+\D?, expected 1 to \d+ on the CPU of this "):
            check_trainer({"accelerator": "cpu", "devices": devices})


def test_numbers_of_the_trainer_that_are_in_range() -> None:
    for settings in (
        {"max_time": "00:00:00:01"},
        {"max_time": {"minutes": 1}},
        {"max_time": timedelta(seconds=1), "accelerator": "cpu", "devices": 8},
        {"accelerator": "cuda", "devices": 100},
        {},
        {"max_steps": -1, "max_epochs": -1, "num_sanity_val_steps": -1, "gradient_clip_val": 0.5},
        {"limit_val_batches": 0, "overfit_batches": 0.0, "val_check_interval": 0.25, "log_every_n_steps": 0},
        {"val_check_interval": "00:01:00:00", "check_val_every_n_epoch": None, "limit_train_batches": 1.0},
    ):
        check_trainer(settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo: 1", "foo: predict has no such setting; --help.all lists all"),
        ("trainer: {foo: 1}", "trainer.foo: predict has no such setting; --help.all lists all"),
        ("trainer: null", "trainer: got null, expected settings"),
        ("trainer: {strategy: null}", "trainer.strategy: got null, expected a name such as auto or ddp"),
        ("output: null", "output: got null, expected a value such as files, its default"),
        ("shard_size: null", "shard_size: got null, expected a value such as 1000, its default"),
        ("unguided: null", "unguided: got null, expected a value such as True, its default"),
        ("seed: 010", "config: FILE has '010', which YAML reads in base 8 or 60; expected a plain number, or quotes"),
        (
            "seed: 01:30.5",
            "config: FILE has '01:30.5', which YAML reads in base 8 or 60; expected a plain number, or quotes",
        ),
        ("seed: 1:30", "config: FILE has '1:30', which YAML reads in base 8 or 60; expected a plain number, or quotes"),
        ("seed: !!bool x", "config: FILE has a value that is not what its tag says"),
        ("seed: !!timestamp x", "config: FILE has a value that is not what its tag says"),
        ("trainer: 3", "trainer: got 3 in FILE, expected settings, or a file of them"),
        ("model: {init_args: {foo: 1}}", "model.foo: DDPMModule has no such setting; --help.all lists all"),
        (
            "model: {init_args: {optim: 3}}",
            "model.optim: got 3, expected settings: learning_rate, weight_decay, warmup_steps, cooldown_steps, "
            "ema_decay, min_snr_gamma, label_dropout",
        ),
        ("model: {class_path: 3}", "model.class_path: got 3 in FILE, expected a class path"),
        ("data: {init_args: [1]}", "data.init_args: got [1] in FILE, expected settings"),
        (
            "model: {init_args: {network: {num_timesteps: null}}}",
            "model.network.num_timesteps: got null, expected a value",
        ),
        (
            "model: {init_args: {guidance: {contrasts: [1]}}}",
            "model.guidance.contrasts: got [1], expected text or a list",
        ),
        ("ddim: 2", "ddim: got 2 in FILE, expected true or false"),
        ("n_samples: many", "n_samples: got 'many', expected a whole number"),
        ("text: a man", "text: got 'a man' in FILE, expected a list, such as ['a man']"),
        ("guidance_weight: [a]", "guidance_weight: got 'a', expected a number"),
    ],
)
def test_a_mistake_in_a_config_is_named_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    assert error_of("predict", "-c", "faces", "-c", path).replace(path, "FILE") == message


TEXTS = [
    "{a: 1, a: 2}",
    "a: b: c",
    "a: b",
    "[1, 2",
    "[x]",
    "&a [*a]",
    "3",
    "1e3",
    "true",
    "null",
    "~",
    "2020-01-01",
    "- a",
]


def printed(capsys: pytest.CaptureFixture, *args: str) -> dict:
    with exits():
        main([*args, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def test_texts_that_look_like_yaml_are_texts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with exits():
        main(["predict", "--text", *TEXTS, "--print_config"])
    as_config = write(tmp_path, capsys.readouterr().out)
    assert yaml.safe_load(Path(as_config).read_text())["text"] == TEXTS
    assert printed(capsys, "predict", "-c", as_config)["text"] == TEXTS


@pytest.mark.parametrize("text", ["a: b", "[x]", "1e3", "true", "{a: 1}", "- a", "None", "a #b", "a: b\nc: d", " "])
def test_a_text_inside_of_a_group_of_settings_stays_a_text(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with exits():
        main(["predict", "--model.guidance.neutral", text, f"--model.init_args.weights={text}", "--print_config"])
    as_config = capsys.readouterr().out
    again = printed(capsys, "predict", "-c", write(tmp_path, as_config))
    for config in (yaml.safe_load(as_config), again):
        arguments = config["model"]["init_args"]
        assert (arguments["guidance"]["neutral"], arguments["weights"]) == (text, text)


def test_lists_and_numbers_inside_of_a_group_of_settings_are_read(capsys: pytest.CaptureFixture) -> None:
    flags = {"network.unet.channels": "[8, 16]", "guidance.contrasts": "[[a, b]]", "sampling": "{skip_steps: 3}"}
    flags |= {"use_ema": "false", "optim.ema_decay": "5e-1"}
    given = [each for name, value in flags.items() for each in (f"--model.{name}", value)]
    arguments = printed(capsys, "predict", *given)["model"]["init_args"]
    assert arguments["network"]["unet"]["channels"] == [8, 16]
    assert arguments["sampling"]["skip_steps"] == 3
    assert (arguments["use_ema"], arguments["optim"]["ema_decay"]) == (False, 0.5)


def test_numbers_below_zero_may_have_an_exponent(capsys: pytest.CaptureFixture) -> None:
    assert printed(capsys, "predict", "--guidance_weight", "-1e3", "-2", "-.5")["guidance_weight"] == [-1000, -2, -0.5]


def test_null_takes_a_setting_away_at_any_depth(capsys: pytest.CaptureFixture) -> None:
    with exits():
        main(["predict", "--model.guidance.noisy_clip", "null", "--model.default_weights=null", "--print_config"])
    arguments = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert (arguments["guidance"]["noisy_clip"], arguments["default_weights"]) == (None, None)


@pytest.mark.parametrize("flags", [["--seed"], ["--clip", "a man " * 100, "--seed"], ["--model"], ["-c"], []])
def test_a_message_never_repeats_all_of_a_long_value(flags: list[str]) -> None:
    line = error_of("predict", *flags, "x" * 5000)
    assert "x" * 30 in line
    assert 0 < line.count("x" * 10) <= 8


def test_a_message_has_the_whole_path_of_a_file_that_exists(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 100) / "mine.yaml"
    path.parent.mkdir()
    path.write_text("[]")
    assert error_of("predict", "-c", str(path)).startswith(f"config: {path} has no settings")
    assert finish(f"got {'x' * 100} and\n\ty\x1b[0m") == f"got {'x' * 79}… and y?[0m"


def test_a_message_of_an_unknown_shape_is_still_one_line() -> None:
    assert one_line("something\n  else") == "something else"


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"])
def test_one_process_of_several_prints_an_error(rank: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for place, code in (("0", "error: .*"), ("1", "1")):
        monkeypatch.setenv(rank, place)
        with pytest.raises(SystemExit, match=f"^{code}$"):
            main(["perdict"])


def test_an_input_error_has_no_traceback_and_anything_else_has(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: list[str]) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("clipward.cli.run", broken)
    with pytest.raises(KeyError):
        main([])
    with pytest.raises(InputError):
        prepare("fit", [])


@pytest.mark.parametrize("several", [False, True])
def test_a_logger_without_its_package_is_named_in_one_line(
    several: bool, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", RequirementCache("nowhere>=1"))
    loggers = [f"lightning.pytorch.loggers.{name}" for name in ("CSVLogger", "WandbLogger")]
    logger = yaml.safe_dump({"trainer": {"logger": loggers if several else loggers[1]}})
    said = "trainer.logger: Requirement 'nowhere>=1' not met. HINT: Try running `pip install -U 'nowhere>=1'`"
    assert error_of("fit", "-c", config, "-c", write(tmp_path, logger)) == said


@pytest.mark.parametrize("several", [False, True])
def test_a_logger_that_does_not_start_is_named_in_one_line(
    several: bool, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("The store of runs can't be reached. Give another.\nMore lines")

    monkeypatch.setattr("lightning.pytorch.loggers.CSVLogger.__init__", refuse)
    loggers = [f"lightning.pytorch.loggers.{name}" for name in ("TensorBoardLogger", "CSVLogger")]
    logger = yaml.safe_dump({"trainer": {"logger": loggers if several else loggers[1]}})
    said = "trainer.logger: The store of runs can't be reached. Give another."
    assert error_of("fit", "-c", config, "-c", write(tmp_path, logger)) == said
