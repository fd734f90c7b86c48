"""FD, precision and recall, CMMD and the networks whose features they compare, against oracles of their own."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipward.errors import InputError
from clipward.evaluation.cost import Cost
from clipward.evaluation.features import load_extractor
from clipward.evaluation.judgements import Judgement, load_judgements, save_judgements
from clipward.evaluation.metrics import cmmd, fid, precision_recall
from clipward.evaluation.reference import Reference
from clipward.evaluation.scores import summarise


def gaussian(count: int, width: int, seed: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
    """Features whose mean and covariance are exactly ``mean`` and scale²·1."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    centred = drawn - drawn.mean(dim=0)
    whitened = centred @ torch.linalg.inv(torch.linalg.cholesky(centred.T.cov()).T)
    return mean + scale * whitened


def test_fd_of_gaussians_has_a_closed_form() -> None:
    made, real = gaussian(400, 6, 0, mean=0.5, scale=2.0), gaussian(500, 6, 1)
    assert fid(made, real) == pytest.approx(6 * 0.5**2 + 6 * (2.0 - 1.0) ** 2, rel=1e-6)


def brute_force(points: Tensor, members: Tensor, k: int) -> float:
    covered = 0
    for point in points.tolist():
        for member in members.tolist():
            near = sorted(sum((a - b) ** 2 for a, b in zip(member, other, strict=True)) for other in members.tolist())
            if sum((a - b) ** 2 for a, b in zip(member, point, strict=True)) <= near[k]:
                covered += 1
                break
    return covered / len(points)


def test_precision_and_recall_are_those_of_brute_force_and_of_torch_fidelity() -> None:
    generator = torch.Generator().manual_seed(0)
    made, real = torch.randn(40, 3, generator=generator) + 0.8, torch.randn(50, 3, generator=generator)
    precision, recall = precision_recall(made, real)
    assert 0.2 < recall < precision < 1 or 0.2 < precision < recall < 1
    assert (precision, recall) == (brute_force(made, real, 3), brute_force(real, made, 3))
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    theirs = prc.calculate_precision_recall_full(made.double(), real.double(), 3)
    assert (precision, recall) == pytest.approx(theirs, rel=1e-6)


def test_precision_and_recall_at_their_ends() -> None:
    real = torch.randn(30, 4)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real + 100, real) == (0.0, 0.0)
    assert precision_recall(real[:1].repeat(30, 1), real) == (1.0, 1 / 30)  # one real picture again and again


def test_cmmd_is_that_of_an_independent_transcription() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (F.normalize(torch.randn(n, 16, generator=generator, dtype=torch.float64), dim=-1) for n in (40, 30))
    gamma = 1 / (2 * 10.0**2)

    def kernel(a: Tensor, b: Tensor) -> float:
        squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
        return torch.exp(-gamma * squares).mean().item()

    assert cmmd(x, y) == pytest.approx(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y)), rel=1e-9)
    assert cmmd(x, x) == pytest.approx(0, abs=1e-9)
    one, other = torch.eye(2)[:1], torch.eye(2)[1:]
    assert cmmd(one, other) == pytest.approx(1000 * 2 * (1 - torch.exp(torch.tensor(-0.01)).item()), rel=1e-4)


def judgement(index: int, features: Tensor, clip_features: Tensor | None, weight: float = 1.0) -> Judgement:
    verdicts = {"judge": {"gender": True}}
    return Judgement(index, "a man", index, weight, verdicts, None, None, features, Cost(), clip_features)


def test_the_report_has_them_and_the_parquet_file_keeps_what_they_need(tmp_path: Path) -> None:
    made, real = torch.randn(12, 5), torch.randn(20, 5)
    seen, known = (F.normalize(torch.randn(n, 8), dim=-1) for n in (12, 20))
    judgements = [judgement(i, made[i], seen[i]) for i in range(12)]
    reference = Reference(real, None, {"gender": {"man": ["man"], "woman": ["woman"]}}, known)
    save_judgements(tmp_path / "a.parquet", judgements)
    for given in (judgements, load_judgements(tmp_path / "a.parquet")):
        scores = summarise(given, reference)[0]
        assert (scores.precision, scores.recall) == precision_recall(made, real)
        assert scores.cmmd == pytest.approx(cmmd(seen, known), rel=1e-6)
    few = summarise(judgements[:3], reference)[0]
    assert (few.precision, few.recall) == (None, None)
    save_judgements(tmp_path / "b.parquet", [replace(each, clip_features=None) for each in judgements])
    assert summarise(load_judgements(tmp_path / "b.parquet"), reference)[0].cmmd is None


# DINOv2


def dinov2_state(width: int = 384, depth: int = 12, grid: int = 37) -> dict[str, Tensor]:
    """Random weights by the names and shapes of facebookresearch/dinov2."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    state = {"cls_token": draw(1, 1, width), "pos_embed": draw(1, 1 + grid**2, width), "mask_token": draw(1, width)}
    state |= {"patch_embed.proj.weight": draw(width, 3, 14, 14), "patch_embed.proj.bias": draw(width)}
    linear = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(depth):
        for name in ("norm1", "norm2"):
            state |= {f"blocks.{i}.{name}.weight": 1 + draw(width), f"blocks.{i}.{name}.bias": draw(width)}
        for name, shape in linear.items():
            state |= {f"blocks.{i}.{name}.weight": draw(*shape), f"blocks.{i}.{name}.bias": draw(shape[0])}
        state |= {f"blocks.{i}.{name}.gamma": 1 + draw(width) for name in ("ls1", "ls2")}
    return state | {"norm.weight": 1 + draw(width), "norm.bias": draw(width)}


def run_dinov2(state: dict[str, Tensor], image: Tensor, heads: int = 6, depth: int = 12) -> Tensor:
    """The class token after the last norm, written from the description of the network."""

    def norm(h: Tensor, name: str) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(h: Tensor, name: str) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    pixels = F.interpolate(image, (224, 224), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (pixels / 255 - mean) / std
    patches = F.conv2d(pixels, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    h = torch.cat([state["cls_token"].expand(len(image), -1, -1), patches.flatten(2).mT], dim=1)
    grid = state["pos_embed"][:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic").flatten(2).mT
    h = h + torch.cat([state["pos_embed"][:, :1], grid], dim=1)
    for i in range(depth):
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in linear(norm(h, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").chunk(3, dim=-1)
        )
        weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(dim=-1)
        attended = (weights @ value).transpose(1, 2).flatten(2)
        h = h + state[f"blocks.{i}.ls1.gamma"] * linear(attended, f"blocks.{i}.attn.proj")
        wide = F.gelu(linear(norm(h, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        h = h + state[f"blocks.{i}.ls2.gamma"] * linear(wide, f"blocks.{i}.mlp.fc2")
    return norm(h, "norm")[:, 0]


def test_dinov2_from_a_file_is_the_network_of_its_authors(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    state = dinov2_state()
    torch.save(state, tmp_path / "dinov2_vits14_pretrain.pth")
    extractor = load_extractor(str(tmp_path / "dinov2_vits14_pretrain.pth"))
    pixels = torch.randint(0, 256, (2, 3, 224, 224))
    with torch.no_grad():
        found, expected = extractor(pixels / 127.5 - 1), run_dinov2(state, pixels.float())
        assert extractor(torch.zeros(1, 1, 32, 48)).shape == (1, 384)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_another_transformer_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    torch.save({"patch_embed.proj.weight": torch.zeros(10, 3, 14, 14)}, tmp_path / "a.pth")
    with pytest.raises(
        InputError, match="features: got a vision transformer with a width of 10, expected one of dinov2"
    ):
        load_extractor(str(tmp_path / "a.pth"))
    with pytest.raises(InputError, match=r"features: got .*, expected judge, inception, dinov2, "):
        load_extractor(str(tmp_path / "none.pth"))
