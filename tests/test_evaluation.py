import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import to_scores

from clipward.cli import main
from clipward.datamodules.faces import FacesDataModule
from clipward.errors import InputError
from clipward.evaluation.cost import Cost, average_costs
from clipward.evaluation.features import load_extractor
from clipward.evaluation.judgements import Judgement, load_judgements, save_judgements
from clipward.evaluation.judges import Judges, check_prompt, load_judge, predict_attributes
from clipward.evaluation.metrics import fid, jackknife, kid
from clipward.evaluation.reference import Reference, predict_labels
from clipward.evaluation.report import Report, format_methods, format_table, format_texts, save_report
from clipward.evaluation.scores import Scores, summarise
from clipward.guidance.models import GuidanceConfig, GuidanceModels
from clipward.networks.classifier import Classifier, save_classifier
from clipward.networks.clip import Clip
from clipward.networks.vocabulary import load_vocabulary

PEAK = 7 * 2**30
ROOT = Path(__file__).parent.parent
VOCABULARY, _ = load_vocabulary("faces")


def judgement(weight: float, seed: int, gender: bool, age: bool, other: bool = True, shift: float = 0.0) -> Judgement:
    return Judgement(
        index=int(10 * weight + seed),
        text="an old man",
        seed=seed,
        guidance_weight=weight,
        verdicts={"judge": {"gender": gender, "age": age}, "other": {"gender": other}},
        clip_similarity=0.5,
        held_out_similarity=0.25,
        features=torch.tensor([seed + shift, 0.0]),
        cost=Cost(50.0, 50.0, 51.0, 2.0, PEAK),
    )


JUDGEMENTS = [
    judgement(0, 1, True, False),
    judgement(0, 2, False, False, other=False),
    judgement(9, 1, True, True, shift=3.0),
    judgement(9, 2, True, False, shift=1.0),
]


def scores_of(*judgements: Judgement, **kwargs) -> Scores:
    (scores,) = summarise(judgements, **kwargs)
    return scores


def test_the_scores_are_shares_of_correct_pictures_and_attributes() -> None:
    unguided, guided = summarise(JUDGEMENTS)
    assert (unguided.prompt_accuracy, guided.prompt_accuracy) == (0.0, 0.5)
    assert (unguided.attribute_accuracy, guided.attribute_accuracy) == (0.25, 0.75)
    assert guided.attributes == {"gender": 1.0, "age": 0.5}
    assert unguided.judges == {"judge": 0.0, "other": 0.5}
    assert guided.prompt_accuracy_std == pytest.approx(0.5**0.5)
    assert guided.prompt_accuracy_error == pytest.approx(0.5)
    assert (unguided.passes_per_success, guided.passes_per_success) == (None, 200)
    assert (unguided.twin_distance, guided.twin_distance) == (None, 2.0)
    assert guided.cost.peak_bytes == PEAK
    row = "| 9 | 2 | 50.0% ± 50.0% | 100.0% | 75.0% | 0.500 | 0.250 |  |  |  |  |  |  | 2.00 | 200 | 51 | 2.00 | 7.0 |"
    assert format_table([guided]).splitlines()[-1] == row
    assert format_methods({"ours": [guided]}).splitlines()[-1] == f"| ours {row}"
    assert "| an old man | 9 | 2 | 50% | gender 100%, age 50% | 0.500 |" in format_texts({"an old man": [guided]})


def test_twins_may_come_from_another_run_and_may_be_missing() -> None:
    unguided, guided = JUDGEMENTS[:2], JUDGEMENTS[2:]
    assert scores_of(*guided).twin_distance is None
    assert scores_of(*guided, unguided=unguided).twin_distance == 2.0
    assert scores_of(*guided, unguided=unguided[:1]).twin_distance == 3.0


def test_an_average_cost_keeps_the_highest_peak() -> None:
    assert average_costs([Cost(1, 2, 3, 4, 10), Cost(3, 2, 1, 0, 20)]) == Cost(2, 2, 2, 2, 20)
    assert Cost(1, 2, 3, 4, 10).multiply(3) == Cost(3, 6, 9, 12, 10)


def test_an_unguided_picture_counts_once_though_it_is_judged_by_every_text() -> None:
    again = [replace(each, text="an old woman", verdicts={"judge": {"gender": False}}) for each in JUDGEMENTS[:2]]
    first = [replace(each, verdicts={"judge": each.verdicts["judge"]}) for each in JUDGEMENTS[:2]]
    far = unlabelled(torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 3.0]]))
    once, both = scores_of(*first, reference=far), scores_of(*first, *again, reference=far)
    assert (once.pictures, both.pictures) == (2, 2)
    assert once.fid == both.fid
    assert (once.attribute_accuracy, both.attribute_accuracy) == (0.25, pytest.approx(1 / 6))


def test_judgements_are_read_as_they_were_written(tmp_path: Path) -> None:
    odd = replace(JUDGEMENTS[0], verdicts={"judge": {"hair": True}, "other": {}}, clip_similarity=None)
    save_judgements(tmp_path / "pictures.parquet", [*JUDGEMENTS, odd])
    found = load_judgements(tmp_path / "pictures.parquet")
    for one, other in zip([*JUDGEMENTS, odd], found, strict=True):
        torch.testing.assert_close(other.features, one.features, rtol=0, atol=0)
        assert asdict(other) | {"features": None} == asdict(one) | {"features": None}
    assert [path.name for path in tmp_path.iterdir()] == ["pictures.parquet"]


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = summarise(JUDGEMENTS, unlabelled(torch.randn(9, 2, generator=torch.Generator().manual_seed(0))))
    report = Report({"method": "mpgd"}, table, {"a naïve girl": table, "a girl": table[:1]})
    save_report(tmp_path / "report.json", report)
    assert load_report(tmp_path / "report.json") == report
    content = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert content["texts"][2]["text"] == "a girl"
    assert content["table"][1]["cost"]["network_forwards"] == 50


def load_report(path: Path) -> Report:
    """What ``save_report`` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    texts: dict[str, list[Scores]] = {}
    for values in content["texts"]:
        texts.setdefault(values.pop("text"), []).append(to_scores(values))
    return Report(content["provenance"], [to_scores(values) for values in content["table"]], texts)


def unlabelled(features: torch.Tensor) -> Reference:
    return Reference(features, None, {})


def test_the_jackknife_knows_the_error_of_a_mean() -> None:
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    found = jackknife(lambda part: part[:, 0].mean().item(), values, list(range(40)))
    assert found == pytest.approx((values[:, 0].std() / 40**0.5).item(), rel=1e-4)
    assert jackknife(lambda part: 0.0, values, [1] * 40) is None


def test_the_distances_are_those_of_gaussians_and_of_cubic_kernels() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(200, 4), 1.5 * torch.randn(100, 4) + 0.3
    found = {"fid": fid(a, b), "kid": kid(a, b)}
    x, y = a.double().numpy(), b.double().numpy()
    root = _root(_cov(x))  # tr (Σ₁Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + (_cov(x) + _cov(y) - 2 * _root(root @ _cov(y) @ root)).trace()
    assert found["fid"] == pytest.approx(expected, rel=1e-4)
    cubic = {name: (p @ q.T / 4 + 1) ** 3 for name, p, q in (("xx", x, x), ("yy", y, y), ("xy", x, y))}
    off = {name: (k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for name, k in cubic.items() if name != "xy"}
    assert found["kid"] == pytest.approx(off["xx"] + off["yy"] - 2 * cubic["xy"].mean(), rel=0.25)
    assert fid(a, a) == pytest.approx(0, abs=1e-6)


def _cov(x: np.ndarray) -> np.ndarray:
    return np.cov(x, rowvar=False)


def _root(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return vectors * np.sqrt(values.clip(min=0)) @ vectors.T


def test_a_classifier_of_noisy_pictures_is_no_judge(classifier: str) -> None:
    with pytest.raises(InputError, match=r"^judge: got .*, which looks at noisy pictures and guides; expected one of"):
        load_judge(classifier)


def test_a_clip_judges_by_the_nearest_sentence(tiny_clip: Path) -> None:
    entries = {
        "gender": {"woman": {"prompt": "a woman", "words": ["woman"]}, "man": {"prompt": "a man", "words": ["man"]}},
        "hair": {"red": {"prompt": "red hair", "words": ["red hair"]}, "grey": {"prompt": "grey", "words": ["grey"]}},
    }
    with pytest.raises(InputError, match=r"has no judge\.json"):
        load_judge(tiny_clip)
    try:
        (tiny_clip / "judge.json").write_text(json.dumps(entries))
        judge, clip = load_judge(tiny_clip), Clip.load(str(tiny_clip))
        (tiny_clip / "judge.json").write_text('{"gender": ["man"]}')
        with pytest.raises(InputError, match=r"judge\.json can't be read"):
            load_judge(tiny_clip)
    finally:
        (tiny_clip / "judge.json").unlink()
    image = torch.rand(6, 3, 16, 16) * 2 - 1
    nearest = (clip.encode_image(image) @ clip.encode_text(["a woman", "a man"]).T).argmax(dim=1)
    verdicts = [
        check_prompt(judge.vocabulary, shown, "a man with red hair") for shown in predict_attributes(judge, image)
    ]
    assert [verdict["gender"] for verdict in verdicts] == (nearest == 1).tolist()
    assert set(verdicts[0]) == {"gender", "hair"}
    assert check_prompt(judge.vocabulary, {"gender": "man", "hair": "red"}, "a person") == {}


def test_an_unguided_picture_is_judged_by_every_text(tiny_clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    save_classifier(path, Classifier(VOCABULARY, 8))
    texts = ["an old man", "", "a girl", "a girl"]
    judges, models = Judges([str(path)], texts), GuidanceModels(GuidanceConfig(clip=str(tiny_clip)))
    with pytest.raises(InputError, match="text: got none"):
        Judges([str(path)], [""])
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    requests = {"index": [0, 1, 1], "seed": [5, 6, 6], "text": ["", "a girl", "a girl"]}
    requests |= {"valid": [True, True, False], "guidance_weight": [0.0, 9.0, 9.0]}
    found = judges.judge_pictures(requests, image, Cost(seconds=1.0), models)
    asked = [(each.index, each.seed, each.text, each.guidance_weight) for each in found]
    assert asked == [(0, 5, "an old man", 0), (0, 5, "a girl", 0), (1, 6, "a girl", 9)]
    clip = models.clips[0]
    expected = (clip.encode_image(image) @ clip.encode_text(["an old man", "a girl"]).T).detach()
    similarities = torch.tensor([each.clip_similarity for each in found])
    torch.testing.assert_close(similarities, torch.stack([expected[0, 0], expected[0, 1], expected[1, 1]]))
    shown = predict_attributes(judges.judges[str(path)], image)[0]
    assert found[0].verdicts == {str(path): {"gender": shown["gender"] == "man", "age": shown["age"] == "old"}}
    torch.testing.assert_close(found[0].features, found[1].features)


def test_features_tell_sets_apart_and_take_any_size() -> None:
    judge = Classifier({"age": {"young": ["young"], "old": ["old"]}}, 8).eval()
    assert judge.features(torch.randn(3, 3, 32, 48)).shape == (3, 32)


def test_features_are_the_classifiers_or_the_clips_or_inceptions(tiny_clip: Path, tmp_path: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    image = torch.rand(2, 3, 16, 16) * 2 - 1
    entries = {"gender": {who: {"prompt": who, "words": [who]} for who in ("woman", "man")}}
    clip = shutil.copytree(tiny_clip, tmp_path / "clip")
    (clip / "judge.json").write_text(json.dumps(entries))
    by_clip = Judges([str(clip)], ["a man"]).features(image)
    torch.testing.assert_close(by_clip.square().mean(dim=1), torch.ones(2))

    torch.manual_seed(0)
    network = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    with pytest.MonkeyPatch.context() as patch:  # random weights, because the real ones are a download
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        network.__init__("inception", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    judges = Judges([str(clip)], ["a man"], str(tmp_path / "inception.pth"))
    pixels = ((image + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(judges.features(image), network.eval()(pixels)[0])
    assert judges.features(image).shape == (2, 2048)
    with pytest.raises(InputError, match=r"features: got .*nothing\.pth', expected judge, inception"):
        Judges([str(clip)], ["a man"], str(tmp_path / "nothing.pth"))


def test_guided_pictures_are_compared_with_those_that_their_texts_are_true_of(tmp_path: Path) -> None:
    classifier, data = Classifier(VOCABULARY, 8).eval(), FacesDataModule(size=16, val_count=200, batch_size=50)
    data.setup("validate")
    save_classifier(tmp_path / "judge.safetensors", classifier)
    judges = Judges([str(tmp_path / "judge.safetensors")], ["a man"])
    reference = Reference.from_batches(data.val_dataloader(), judges, torch.device("cpu"))
    faces = [data.val_set[i] for i in range(200)]
    true = {"a man": {0: 1}, "an old woman with red hair": {0: 0, 1: 1, 2: 3}}
    matches = {
        text: [i for i, face in enumerate(faces) if all(face["labels"][c] == v for c, v in wanted.items())]
        for text, wanted in true.items()
    }
    share = min(map(len, matches.values()))
    picked = [faces[i]["image"] for text in true for i in matches[text][:share]]
    with torch.no_grad():
        expected = judges.features(torch.stack(picked))
    torch.testing.assert_close(reference.features[reference.find_matching(list(true))], expected, atol=1e-5, rtol=1e-5)
    thrice = reference.features[reference.find_matching(["a man"] * 3 * share + ["an old woman with red hair"] * share)]
    assert len(thrice) == round(4 * min(len(matches["a man"]) / 3, share))
    torch.testing.assert_close(thrice[-share:], expected[-share:], atol=1e-5, rtol=1e-5)
    assert len(reference.features) == 200
    assert len(replace(reference, labels=None).find_matching(list(true))) == 200


def test_labels_after_those_of_the_judge_are_left_out(tmp_path: Path) -> None:
    vocabulary = {name: VOCABULARY[name] for name in ("gender", "age")}
    save_classifier(tmp_path / "judge.safetensors", Classifier(vocabulary, 8))
    judges = Judges([str(tmp_path / "judge.safetensors")], ["a man"])
    data = FacesDataModule(size=16, val_count=50, batch_size=25)
    data.setup("validate")
    judges.check_data(data, "judge")
    reference = Reference.from_batches(data.val_dataloader(), judges, torch.device("cpu"))
    assert reference.labels.shape == (50, 2)
    assert reference.matching_attributes(reference.features) is not None


@pytest.mark.parametrize("count", [0, 1])
def test_without_pictures_to_compare_with_there_is_no_fid(tmp_path: Path, count: int) -> None:
    save_classifier(tmp_path / "judge.safetensors", Classifier(VOCABULARY, 8))
    judges = Judges([str(tmp_path / "judge.safetensors")], ["a man"])
    batches = [{"image": torch.zeros(1, 3, 16, 16)}] * count
    with pytest.warns(UserWarning, match=f"data: got {count} pictures to compare with, expected two or more"):
        assert Reference.from_batches(batches, judges, torch.device("cpu")) is None


def test_pictures_are_compared_with_those_that_have_the_same_attributes_whatever_was_asked() -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = {"gender": {"woman": [], "man": []}, "hair": {"black": [], "red": [], "grey": []}}
    labels = torch.stack([torch.randint(n, (300,), generator=generator) for n in (2, 3)], dim=1)
    one_hot = torch.cat([torch.eye(2)[labels[:, 0]], torch.eye(3)[labels[:, 1]]], dim=1)
    noisy = one_hot + 0.1 * torch.randn(300, 5, generator=generator)
    reference = Reference(torch.cat([noisy, torch.rand(300, 1)], dim=1), labels, vocabulary)
    asked = [(0, 1)] * 3 + [(1, 2)]
    made = torch.tensor([[*torch.eye(2)[man].tolist(), *torch.eye(3)[hair].tolist(), 7.0] for man, hair in asked])
    shown = predict_labels(reference._probes, reference.matching_attributes(made)[1]).tolist()
    assert shown == sorted(shown)
    women, men = shown.count([0, 1]), shown.count([1, 2])
    assert women + men == len(shown)
    assert women == pytest.approx(3 * men, abs=1)
    red_women = (labels == torch.tensor([0, 1])).all(dim=1).sum()
    assert women == red_women  # all there are
    assert Reference(reference.features[:6], labels[:6], vocabulary).matching_attributes(made) is None  # too few to fit
    partly = labels.clone()
    partly[::3, 1] = -1  # a label that is not known is what the probes see
    matching = Reference(reference.features, partly, vocabulary).matching_attributes(made)
    torch.testing.assert_close(matching, reference.matching_attributes(made))
    assert unlabelled(reference.features).matching_attributes(made) is None
    many, odd = made.repeat(10, 1), torch.tensor([[*torch.eye(2)[0].tolist(), *torch.eye(3)[0].tolist(), 7.0]])
    others = ~(labels == torch.tensor([0, 0])).all(dim=1)  # no woman with black hair
    without = Reference(reference.features[others], labels[others], vocabulary)
    kept, matched = without.matching_attributes(torch.cat([odd, many, odd]))
    assert torch.equal(kept, many)
    torch.testing.assert_close(matched, without.matching_attributes(many)[1])
    assert without.matching_attributes(torch.cat([odd, odd, many, odd])) is None  # more than a twentieth


def test_two_processes_judge_what_one_does(tmp_path: Path) -> None:
    reports = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        flags = ["--judge", "clipward:faces64/judge.safetensors", "--save_dir", str(out), "--micro_batch", "4"]
        flags += ["--text", "an old man", "a girl", "--guidance_weight", "0", "10", "--n_samples", "3"]
        flags += ["--skip_steps", "3", "--data.val_count", "60", "--trainer.accelerator", "cpu"]
        flags += ["--trainer.devices", processes, "--trainer.strategy", "auto" if processes == "1" else "ddp"]
        if processes == "1":
            main(["test", "-c", "faces", *flags])
        else:
            command = [sys.executable, "cli.py", "test", "-c", "configs/faces.yaml", *flags]
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr[-2000:]
        reports.append(load_report(out / "report.json").table)
        again = summarise(load_judgements(out / "pictures.parquet"))
        assert [each.prompt_accuracy for each in again] == [each.prompt_accuracy for each in reports[-1]]
    for one, two in zip(*reports, strict=True):
        assert one.pictures == two.pictures == (6 if one.guidance_weight else 3)
        assert (one.prompt_accuracy, one.attributes) == (two.prompt_accuracy, two.attributes)
        assert one.fid == pytest.approx(two.fid, rel=1e-4)


class Writes:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def test_a_file_of_features_never_runs_code(tmp_path: Path) -> None:
    torch.save({"weights": Writes(tmp_path / "written")}, tmp_path / "features.pt")
    with pytest.raises(InputError, match=r"features: got .*features.pt") as raised:
        load_extractor(str(tmp_path / "features.pt"))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "written").exists()
