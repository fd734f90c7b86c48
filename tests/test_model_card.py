"""``clipward convert --push_to_hub``: the card, the dry run, and what is sent; no test reaches the hub."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from conftest import TINY, TINY_UNET, checkpoint_of, randomise, tiny_faces, tiny_module, tiny_trainer
from diffusers import UNet2DModel
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from clipward.cli import main
from clipward.cli.model_card import hide_places, read_record
from clipward.networks.unet import UNet
from clipward.weights.architecture import Weights
from clipward.weights.load import save_weights


class Hub:
    """Stands for ``HfApi``, and keeps what it was asked."""

    def __init__(self, fails: str | None = None) -> None:
        self.fails, self.asked, self.private = fails, list[tuple[str, Any]](), False

    def __call__(self) -> "Hub":
        return self

    def __getattr__(self, name: str) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            if name == self.fails:
                raise OSError("403 Forbidden:\nno right to this repository")
            self.asked.append((name, kwargs))
            if name == "create_repo":
                self.private = self.private or kwargs["private"]
            return self if name == "repo_info" else "https://hub/commit/1"

        return ask


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a network that diffusers has too."""
    architecture = replace(TINY, unet=replace(TINY_UNET, patch=1))
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    save_weights(path, Weights(architecture, randomise(UNet(architecture.unet)).state_dict()))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> str:
    """A checkpoint of a short run, beside its config, scores and samples."""
    run = tmp_path_factory.mktemp("secret") / "runs"
    checkpoint = run / "checkpoints/last.ckpt"
    settings = {"path": "/home/somebody/photographs.parquet", "size": 16, "batch_size": 8}
    logger = TensorBoardLogger(run, name="", version="")
    trainer = tiny_trainer(run, logger=logger, max_steps=4, log_every_n_steps=1)
    trainer.fit(tiny_module(weights=str(weights), unet=replace(TINY_UNET, patch=1)), tiny_faces())
    trainer.save_checkpoint(checkpoint)
    data = {"class_path": "clipward.datamodules.celebahq.CelebAHQDataModule", "init_args": settings}
    (run / "config.fit.yaml").write_text(yaml.safe_dump({"data": data, "trainer": {"precision": "32-true"}}))
    (run / "samples").mkdir()
    for step, colour in ((2, "red"), (4, "green"), (9, "blue")):
        Image.new("RGB", (4, 4), colour).save(run / f"samples/{step:08d}.png")
    return str(checkpoint)


def test_a_dry_run_writes_the_folder_and_sends_nothing(
    trained: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "folder"
    main(["convert", trained, str(folder), "--to", "diffusers", "--push_to_hub", "me/faces", "--dry_run", "true"])
    assert hub.asked == []
    shown = capsys.readouterr().out
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert set(re.findall(r"^  (\S+) ", shown, re.MULTILINE)) == files
    assert {"README.md", "config.fit.yaml", "samples.png", "model_index.json", "unet/config.json"} < files
    assert re.search(r"^  README\.md  \d\.\d kB$", shown, re.MULTILINE)
    assert "nothing is uploaded" in shown
    UNet2DModel.from_pretrained(folder, subfolder="unet")
    card = (folder / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["library_name"] == "diffusers"
    assert "clipward" in head["tags"]
    assert 'DDPMPipeline.from_pretrained("me/faces")' in card
    assert "# faces\n" in card
    assert "Trained for 4 steps" in card
    assert "clipward fit -c config.fit.yaml" in card
    assert "| pictures | `photographs.parquet` |" in card
    assert re.search(r"\| `val/loss` \| [\d.e-]+ \| 3 \|", card)
    assert Image.open(folder / "samples.png").getpixel((0, 0)) == (0, 128, 0)  # of step 4, not of a later one
    assert "![samples of step 4](samples.png)" in card
    for file in ("README.md", "config.fit.yaml"):
        assert "somebody" not in (folder / file).read_text()
        assert "secret" not in (folder / file).read_text()


def test_the_folder_is_sent_after_the_login_is_known(
    trained: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "folder"
    arguments = ["convert", trained, str(folder), "--to", "diffusers", "--push_to_hub", "me/faces"]
    hub.fails = "whoami"
    with pytest.raises(SystemExit, match="error: push_to_hub: the hub knows no login; use hf auth login"):
        main(arguments)
    assert not folder.exists()
    hub.fails = "create_repo"
    with pytest.raises(SystemExit, match=r"error: push_to_hub: .* is written, but the hub did not take it \(403 .*\)$"):
        main(arguments)
    assert hub.asked == [("whoami", {})]
    hub.fails = None
    main([*arguments[:2], str(tmp_path / "again"), *arguments[3:]])
    assert [name for name, _ in hub.asked[1:]] == ["whoami", "create_repo", "upload_folder"]
    assert hub.asked[-1][1]["repo_id"] == "me/faces"
    assert (hub.asked[-1][1]["folder_path"] / "README.md").is_file()
    assert "uploaded: https://hub/commit/1" in capsys.readouterr().out
    assert not hub.private
    main([*arguments[:2], str(tmp_path / "private"), *arguments[3:], "--private", "true"])
    assert hub.private
    assert hub.asked[-1][0] == "upload_folder"


def test_a_private_upload_to_a_repository_that_everybody_sees_is_refused(
    weights: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "private", property(lambda self: False, lambda self, value: None), raising=False)
    flags = ["--to", "diffusers", "--push_to_hub", "me/x", "--private", "true"]
    with pytest.raises(SystemExit, match="error: private: everybody sees me/x, which was there; "):
        main(["convert", str(weights), str(tmp_path / "x"), *flags])
    assert [name for name, _ in hub.asked] == ["whoami", "create_repo", "repo_info"]


def test_weights_without_a_record_have_a_short_card(weights: Path, hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    flags = ["--to", "diffusers", "--push_to_hub", "me/x", "--dry_run", "true"]
    main(["convert", str(weights), str(folder), *flags])
    card = (folder / "README.md").read_text()
    assert "## Training" not in card
    assert "Converted from `random.safetensors` by Clipward" in card
    assert not (folder / "config.fit.yaml").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        *(
            (["--push_to_hub", name, "--to", "diffusers"], f"push_to_hub: got '{name}', expected USER/NAME")
            for name in ("faces", "../x", "me/..", "me/a--b", "me-/x", "me/x.git", "é/x", "me/x/y")
        ),
        (["--push_to_hub", "me/faces"], "push_to_hub: got --to safetensors beside it, expected --to diffusers"),
        (["--private", "true"], "private: got no --push_to_hub beside it"),
        (["--dry_run", "true"], "dry_run: got no --push_to_hub beside it"),
    ],
)
def test_flags_that_do_not_go_together_are_told(flags: list[str], message: str, weights: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main(["convert", str(weights), str(tmp_path / "x"), *flags])
    assert list(tmp_path.iterdir()) == []


def test_places_of_this_machine_are_not_told() -> None:
    told = hide_places({"a": ["/home/me/x.pt", "clipward:faces"], "b": {"c": "~/y", "d": 3, "e": "owner/name"}})
    assert told == {"a": ["x.pt", "clipward:faces"], "b": {"c": "y", "d": 3, "e": "owner/name"}}


def test_a_checkpoint_of_the_command_line_has_its_record(config: str, tmp_path: Path) -> None:
    main(["fit", "-c", config])
    record = read_record(checkpoint_of(tmp_path))
    assert record.step == 4
    assert record.config["data"]["class_path"].endswith("FacesDataModule")
    assert {"val/loss"} <= {name for name, _, _ in record.scores}
    assert record.samples is not None
