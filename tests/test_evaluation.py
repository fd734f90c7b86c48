import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from clipward.datamodules.faces import FacesDataModule
from clipward.errors import InputError
from clipward.evaluation.judges import Judges, load_judge, obeys, seen
from clipward.evaluation.metrics import frechet, jackknife, kernel
from clipward.evaluation.reference import Reference
from clipward.evaluation.report import load_rows, markdown, save_rows, summarise
from clipward.guidance.models import Critics
from clipward.networks.classifier import Classifier, save_classifier
from clipward.networks.clip import Clip

PEAK = 7 * 2**30
JUDGE = Path(__file__).parent.parent / "configs/faces_judge.yaml"


def row(weight: float, seed: int, gender: bool, age: bool, other: bool = True, shift: float = 0.0) -> dict:
    return {
        "index": 10 * weight + seed,
        "text": "an old man",
        "seed": seed,
        "guidance_weight": weight,
        "seen": {"judge": {"gender": gender, "age": age}, "other": {"gender": other}},
        "clip_similarity": 0.5,
        "held_out_similarity": 0.25,
        "features": torch.tensor([seed + shift, 0.0]),
        "cost": {
            "network_forwards": 50.0,
            "network_backwards": 50.0,
            "critic_passes": 51,
            "seconds": 2.0,
            "peak_bytes": PEAK,
        },
    }


ROWS = [
    row(0, 1, True, False),
    row(0, 2, False, False, other=False),
    row(9, 1, True, True, shift=3.0),
    row(9, 2, True, False, shift=1.0),
]


def test_the_table_counts_what_obeys() -> None:
    plain, guided = summarise(ROWS)
    assert (plain["obey"], guided["obey"]) == (0.0, 0.5)
    assert (plain["single"], guided["single"]) == (0.25, 0.75)
    assert guided["attributes"] == {"gender": 1.0, "age": 0.5}
    assert plain["judges"] == {"judge": 0.0, "other": 0.5}
    assert guided["obey_std"] == pytest.approx(0.5**0.5)
    assert (plain["per_success"], guided["per_success"]) == (None, 200)
    assert "drift" not in plain
    assert guided["drift"] == 2.0
    assert guided["cost"]["peak_bytes"] == PEAK
    json.dumps([plain, guided])
    assert guided["obey_error"] == pytest.approx(0.5)
    assert (
        "| 9 | 2 | 50.0% ± 50.0% | 100.0% | 75.0% | 0.500 | 0.250 |  |  |  | 2.00 | 200 | 51 | 2.00 | 7.0 |"
        in markdown([guided])
    )


def test_an_unguided_picture_counts_once_though_it_is_asked_for_every_text() -> None:
    again = [{**each, "text": "an old woman", "seen": {"judge": {"gender": False}}} for each in ROWS[:2]]
    first = [{**each, "seen": {"judge": each["seen"]["judge"]}} for each in ROWS[:2]]
    far = torch.tensor([[0.0, 0.0], [1.0, 0.0], [9.0, 3.0]])
    (once,), (both,) = (summarise(rows, reference=All(far)) for rows in (first, first + again))
    assert (once["pictures"], both["pictures"]) == (2, 2)
    assert once["fid"] == both["fid"]
    assert (once["single"], both["single"]) == (0.25, pytest.approx(1 / 6))


def test_what_was_said_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [*ROWS, {**ROWS[0], "seen": {"judge": {"hair": True}, "other": {}}, "clip_similarity": None}]
    save_rows(tmp_path / "pictures.parquet", rows)
    found = load_rows(tmp_path / "pictures.parquet")
    for one, other in zip(rows, found, strict=True):
        torch.testing.assert_close(other.pop("features"), one["features"])
        assert other == {name: value for name, value in one.items() if name != "features"}
    assert [path.name for path in tmp_path.iterdir()] == ["pictures.parquet"]


class All(Reference):
    def __init__(self, features: torch.Tensor) -> None:
        self.features, self.labels = features, None


def test_the_jackknife_knows_the_error_of_a_mean() -> None:
    values = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    found = jackknife(lambda part: part[:, 0].mean().item(), values, list(range(40)))
    assert found == pytest.approx((values[:, 0].std() / 40**0.5).item(), rel=1e-4)
    assert jackknife(lambda part: 0.0, values, [1] * 40) is None


def test_the_distances_are_those_of_gaussians_and_of_cubic_kernels() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(200, 4), 1.5 * torch.randn(100, 4) + 0.3
    found = {"fid": frechet(a, b), "kid": kernel(a, b)}
    x, y = a.double().numpy(), b.double().numpy()
    root = _root(_cov(x))  # tr (Σ₁Σ₂)^½ = tr (Σ₁^½ Σ₂ Σ₁^½)^½
    fid = ((x.mean(0) - y.mean(0)) ** 2).sum() + (_cov(x) + _cov(y) - 2 * _root(root @ _cov(y) @ root)).trace()
    assert found["fid"] == pytest.approx(fid, rel=1e-4)
    cubic = {name: (p @ q.T / 4 + 1) ** 3 for name, p, q in (("xx", x, x), ("yy", y, y), ("xy", x, y))}
    off = {name: (k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for name, k in cubic.items() if name != "xy"}
    assert found["kid"] == pytest.approx(off["xx"] + off["yy"] - 2 * cubic["xy"].mean(), rel=0.25)
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)


def _cov(x: np.ndarray) -> np.ndarray:
    return np.cov(x, rowvar=False)


def _root(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    return vectors * np.sqrt(values.clip(min=0)) @ vectors.T


def test_a_clip_judges_by_the_nearest_sentence(tiny_clip: Path) -> None:
    entries = {
        "gender": {"woman": {"prompt": "a woman", "words": ["woman"]}, "man": {"prompt": "a man", "words": ["man"]}},
        "hair": {"red": {"prompt": "red hair", "words": ["red hair"]}, "grey": {"prompt": "grey", "words": ["grey"]}},
    }
    with pytest.raises(InputError, match=r"lacks judge\.json"):
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
    verdicts = [obeys(judge.vocabulary, saw, "a man with red hair") for saw in seen(judge, image)]
    assert [verdict["gender"] for verdict in verdicts] == (nearest == 1).tolist()
    assert set(verdicts[0]) == {"gender", "hair"}
    assert obeys(judge.vocabulary, {"gender": "man", "hair": "red"}, "a person") == {}


def test_judges_ask_an_unguided_picture_for_every_text(tiny_clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "judge.safetensors"
    vocabulary = yaml.safe_load(JUDGE.read_text())["model"]["init_args"]["vocabulary"]
    save_classifier(path, Classifier(vocabulary, 8))
    texts = ["an old man", "", "a girl", "a girl"]
    judges, critics = Judges([str(path)], texts), Critics([str(tiny_clip)])
    with pytest.raises(InputError, match="text: none given"):
        Judges([str(path)], [""])
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    requests = {"text": ["", "a girl", "a girl"], "valid": [True, True, False], "guidance_weight": [0.0, 9.0, 9.0]}
    rows = judges.rows(requests, image, {"seconds": 1.0}, critics)
    assert [(each["text"], each["guidance_weight"]) for each in rows] == [
        ("an old man", 0),
        ("a girl", 0),
        ("a girl", 9),
    ]
    clip = critics.clips[0]
    expected = (clip.encode_image(image) @ clip.encode_text(["an old man", "a girl"]).T).detach()
    found = torch.tensor([each["clip_similarity"] for each in rows])
    torch.testing.assert_close(found, torch.stack([expected[0, 0], expected[0, 1], expected[1, 1]]))
    saw = seen(judges.judges[str(path)], image)
    assert rows[0]["seen"][str(path)] == {"gender": saw[0]["gender"] == "man", "age": saw[0]["age"] == "old"}
    torch.testing.assert_close(rows[0]["features"], rows[1]["features"])


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
    with pytest.MonkeyPatch.context() as patch:  # a network of chance, for its real weights are a download
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *a, **k: {})
        network.__init__("inception", ["2048"])
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    judges = Judges([str(clip)], ["a man"], str(tmp_path / "inception.pth"))
    pixels = ((image + 1) * 127.5).round().to(torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(judges.features(image), network.eval()(pixels)[0])
    assert judges.features(image).shape == (2, 2048)
    with pytest.raises(InputError, match=r"features: .*nothing\.pth gives no weights of Inception"):
        Judges([str(clip)], ["a man"], str(tmp_path / "nothing.pth"))


def test_guided_pictures_are_compared_with_those_that_their_texts_are_true_of(tmp_path: Path) -> None:
    vocabulary = yaml.safe_load(JUDGE.read_text())["model"]["init_args"]["vocabulary"]
    classifier, data = Classifier(vocabulary, 8).eval(), FacesDataModule(size=16, val_count=200, batch_size=50)
    data.setup("validate")
    save_classifier(tmp_path / "judge.safetensors", classifier)
    judges = Judges([str(tmp_path / "judge.safetensors")], ["a man"])
    reference = Reference(data.val_dataloader(), judges, torch.device("cpu"))
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
    torch.testing.assert_close(reference.of(list(true)), expected, atol=1e-5, rtol=1e-5)
    thrice = reference.of(["a man"] * 3 * share + ["an old woman with red hair"] * share)
    assert len(thrice) == round(4 * min(len(matches["a man"]) / 3, share))
    torch.testing.assert_close(thrice[-share:], expected[-share:], atol=1e-5, rtol=1e-5)
    assert len(reference.features) == 200
    reference.labels = None
    assert len(reference.of(list(true))) == 200


def test_pictures_are_compared_with_those_that_show_the_same_whatever_was_asked() -> None:
    reference = All(torch.empty(0))
    reference.vocabulary = {"gender": {"woman": [], "man": []}, "hair": {"black": [], "red": [], "grey": []}}
    generator = torch.Generator().manual_seed(0)
    reference.labels = torch.stack([torch.randint(n, (300,), generator=generator) for n in (2, 3)], dim=1)
    shows = torch.cat([torch.eye(2)[reference.labels[:, 0]], torch.eye(3)[reference.labels[:, 1]]], dim=1)
    reference.features = torch.cat([shows + 0.1 * torch.randn(300, 5, generator=generator), torch.rand(300, 1)], dim=1)
    asked = [(0, 1)] * 3 + [(1, 2)]
    made = torch.tensor([[*torch.eye(2)[man].tolist(), *torch.eye(3)[hair].tolist(), 7.0] for man, hair in asked])
    like = reference.alike(made)
    kinds = reference._shown(like).tolist()
    assert kinds == sorted(kinds)
    women, men = kinds.count([0, 1]), kinds.count([1, 2])
    assert women + men == len(kinds)
    assert women == pytest.approx(3 * men, abs=1)
    red_women = (reference.labels == torch.tensor([0, 1])).all(dim=1).sum()
    assert women == red_women  # all there are
    few = All(reference.features[:6])
    few.vocabulary, few.labels = reference.vocabulary, reference.labels[:6]
    assert few.alike(made) is None  # than which a probe has more numbers
    reference.labels = None
    assert reference.alike(made) is None


def test_two_processes_judge_what_one_does(tmp_path: Path) -> None:
    root = JUDGE.parent.parent
    reports = []
    for processes in ("1", "2"):
        out = tmp_path / processes
        flags = ["--judge", "checkpoints/faces64/judge.safetensors", "--save_dir", str(out), "--micro_batch", "4"]
        flags += ["--text", "an old man", "a girl", "--guidance_weight", "0", "10", "--n_samples", "3"]
        flags += ["--skip_steps", "3", "--data.val_count", "60", "--trainer.accelerator", "cpu"]
        flags += ["--trainer.devices", processes, "--trainer.strategy", "auto" if processes == "1" else "ddp"]
        command = [sys.executable, "cli.py", "test", "-c", "configs/faces.yaml", *flags]
        ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr[-2000:]
        reports.append(json.loads((out / "report.json").read_text())["table"])
        anew = summarise(load_rows(out / "pictures.parquet"))
        assert [each["obey"] for each in anew] == [each["obey"] for each in reports[-1]]
    for one, two in zip(*reports, strict=True):
        assert one["pictures"] == two["pictures"] == (6 if one["guidance_weight"] else 3)
        assert (one["obey"], one["attributes"]) == (two["obey"], two["attributes"])
        assert one["fid"] == pytest.approx(two["fid"], rel=1e-4)
