import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_faces, tiny_trainer
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from clipward.datamodules.faces import ATTRIBUTES, Faces, FacesDataModule, attributes, caption
from clipward.errors import InputError
from clipward.evaluation.judges import load_judge
from clipward.lightning_modules.classifier import ClassifierModule
from clipward.lightning_modules.optim import OptimConfig
from clipward.networks.classifier import FORMAT, Classifier, load_classifier
from clipward.networks.vocabulary import find_attributes, load_vocabulary

VOCABULARY = load_vocabulary("faces")[0]


def test_the_judges_vocabulary_is_that_of_the_faces() -> None:
    assert {name: tuple(values) for name, values in VOCABULARY.items()} == ATTRIBUTES


def test_it_reads_what_a_caption_names() -> None:
    judge = Classifier(VOCABULARY, 8)
    assert judge.find_attributes("an old man with a smile") == {"gender": "man", "age": "old", "smile": "smiling"}
    assert judge.find_attributes("A young girl with brown hair") == {"gender": "woman", "age": "young", "hair": "brown"}
    assert judge.find_attributes("a lady without glasses") == {"gender": "woman", "glasses": "without"}
    assert judge.find_attributes("a dog") == {}
    for i in range(1000):
        face = attributes(0, i)
        for name, value in judge.find_attributes(caption(0, i)).items():
            assert face[name] == value


def test_words_are_found_whatever_their_capitals() -> None:
    vocabulary = {"painter": {"van_gogh": ["Van Gogh"], "monet": ["monet"]}}
    for text in ("a painting by Van Gogh", "a painting by van gogh", "BY VAN GOGH"):
        assert find_attributes(vocabulary, text) == {"painter": "van_gogh"}
    assert find_attributes(vocabulary, "Monet's garden") == {"painter": "monet"}
    assert find_attributes(vocabulary, "Van Goghs") == {}


def faces(count: int) -> DataLoader:
    return DataLoader(Faces(seed=9, count=count, size=16), batch_size=count)


def test_it_learns_writes_and_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    torch.manual_seed(0)
    module, held_out = (
        ClassifierModule("faces", width=8, save_path=str(path), optim=OptimConfig(learning_rate=1e-3)),
        next(iter(faces(64))),
    )
    before = module.network.eval().loss(held_out["image"], held_out["labels"]).item()
    data = FacesDataModule(size=16, train_count=256, val_count=8, batch_size=32)
    tiny_trainer(tmp_path, max_steps=150).fit(module, data)
    assert module.network.eval().loss(held_out["image"], held_out["labels"]).item() < 0.9 * before
    judge = load_classifier(path)
    image = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        for name, logits in module.network.eval()(image).items():
            torch.testing.assert_close(judge(image)[name], logits, atol=0.02, rtol=0.02)
    with pytest.raises(InputError, match="exists"):
        tiny_trainer(tmp_path, max_steps=1).fit(ClassifierModule("faces", 8, str(path)), tiny_faces())


def test_a_file_that_is_no_judge_is_refused(tmp_path: Path, tiny_weights: Path) -> None:
    for path, message in ((tmp_path / "none", "there is no file"), (tiny_weights, "is no classifier")):
        with pytest.raises(InputError, match=message):
            load_classifier(path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="or no safetensors file"):
        load_classifier(tmp_path / "text")


@pytest.mark.parametrize(
    "vocabulary",
    [{}, {"a": {}}, {"a": "x"}, {"a": ["x"]}, {"a": {"b": 3}}, {"a": {"b": [3]}}, {"a": {"b": [""]}}, None],
)
def test_a_file_or_a_folder_without_words_is_no_judge(vocabulary: Any, tmp_path: Path) -> None:
    header = json.dumps({"vocabulary": vocabulary, "width": 8})
    save_file({"x": torch.zeros(1)}, tmp_path / "judge.safetensors", {"format": FORMAT, "classifier": header})
    with pytest.raises(InputError, match=r"judge: .* has a header of no classifier"):
        load_classifier(tmp_path / "judge.safetensors")
    entries: Any = vocabulary
    if isinstance(vocabulary, dict) and all(isinstance(values, dict) for values in vocabulary.values()):
        entries = {a: {b: {"prompt": "x", "words": w} for b, w in v.items()} for a, v in vocabulary.items()}
    (tmp_path / "judge.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match=r"judge: .* can't be read"):
        load_vocabulary(tmp_path / "judge.json", "judge")


@pytest.mark.parametrize("prompt", ["", " ", 3, None, ["a"]])
def test_a_folder_whose_sentences_are_none_is_no_judge(prompt: Any, tmp_path: Path) -> None:
    (tmp_path / "judge.json").write_text(json.dumps({"a": {"b": {"prompt": prompt, "words": ["x"]}}}))
    with pytest.raises(InputError, match=r"judge: .* can't be read"):
        load_vocabulary(tmp_path / "judge.json", "judge")


def test_a_folder_whose_sentence_is_too_long_is_no_judge(tmp_path: Path, tiny_clip: Path) -> None:
    folder = tmp_path / "judge"
    shutil.copytree(tiny_clip, folder)
    (folder / "judge.json").write_text(json.dumps({"a": {"b": {"prompt": "a very " * 90, "words": ["x"]}}}))
    with pytest.raises(InputError, match=r"^judge: .*judge.json' has a text: .* tokens too long"):
        load_judge(folder)


def test_a_noise_aware_one_learns_from_noise_and_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "classifier.safetensors"
    torch.manual_seed(0)
    module = ClassifierModule(
        "faces", width=8, save_path=str(path), optim=OptimConfig(learning_rate=1e-3), noise_aware=True
    )
    data = FacesDataModule(size=16, train_count=64, val_count=8, batch_size=32)
    tiny_trainer(tmp_path, max_steps=20).fit(module, data)
    classifier, x = load_classifier(path), torch.randn(2, 3, 16, 16)
    assert classifier.noise_aware
    with torch.no_grad():
        clean, noisy = (classifier(x, alpha_bar)["age"] for alpha_bar in (1.0, 0.1))
    assert not torch.equal(clean, noisy)


def test_labels_that_are_not_known_are_left_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier, image = Classifier(VOCABULARY, 8).eval(), torch.randn(4, 3, 16, 16)
    labels = torch.tensor([[0, 1, 2, 0, 1], [1, -1, 3, -1, 0], [-1, -1, 0, 1, 1], [1, -1, 1, -1, -1]])
    logits = classifier(image)
    expected = []
    for column, name in enumerate(VOCABULARY):
        known = labels[:, column] >= 0
        expected.append(F.cross_entropy(logits[name][known], labels[known, column]))
    torch.testing.assert_close(classifier.loss(image, labels), torch.stack(expected).mean())
    unknown = labels.clone()
    unknown[:, 2] = -1
    assert torch.isfinite(classifier.loss(image, unknown))
