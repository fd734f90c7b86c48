import pytest
import torch

from clipward.lightning_modules.optim import OptimConfig, adamw


def test_the_rate_rises_stays_level_and_falls() -> None:
    config = OptimConfig(warmup_steps=10, cooldown_steps=20)
    assert [config.factor(step, 100) for step in (0, 4, 9, 50, 80, 90, 100)] == [0.1, 0.5, 1, 1, 1, 0.5, 0]
    assert config.factor(10**9, max_steps=-1) == 1
    assert OptimConfig().factor(99, 100) == 1


def test_gains_and_biases_do_not_decay() -> None:
    layer = torch.nn.Linear(3, 4)
    optimizer = adamw(layer.parameters(), OptimConfig(learning_rate=0.1, weight_decay=0.5), -1)["optimizer"]
    decays = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert decays[0.5][0] is layer.weight
    assert decays[0.0][0] is layer.bias
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
