"""One call measures any module on pixels."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_accel import PixelClassifier, measure
from robust_accel.data import MemoryImages
from robust_accel.evaluation import EvaluateSettings, evaluate

SETTINGS = {"eps": 0.03, "pgd": {"num_steps": 5}, "autoattack": "quick", "batch_size": 10}


class RobustBenchStyle(nn.Module):
    """Images in [0, 1] in, logits out, its own normalisation inside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - 0.5)


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 1, 4, 4), generator=generator, dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RobustBenchStyle()
        labels = model.eval()(pixels / 255).argmax(dim=1)
    labels[::5] = (labels[::5] + 1) % 5
    return model, pixels, labels


def test_it_is_what_evaluate_measures(
    problem: tuple[nn.Module, Tensor, Tensor], tmp_path: Path
) -> None:
    model, pixels, labels = problem
    model.train()
    found = measure(model, pixels / 255, labels, folder=tmp_path, **SETTINGS)
    assert model.training and model.net[1].training
    assert model.net[1].num_batches_tracked == 0
    expected = evaluate(
        PixelClassifier(model).eval(),
        MemoryImages(pixels, labels),
        EvaluateSettings(norm="linf", **SETTINGS),
        Accelerator(cpu=True),
        num_classes=5,
    )
    for key in ("clean_accuracy", "pgd_accuracy"):
        assert found[key] == expected[key]
    key = "autoattack_accuracy"
    assert found[key]["accuracy"] == expected[key]["accuracy"]
    assert found["clean_accuracy"] == {"accuracy": 0.8, "n": 30}
    assert list((tmp_path / "autoattack").iterdir())


def test_what_is_not_as_said_is_refused(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, pixels, labels = problem
    x = pixels / 255
    cases = [
        ((pixels, labels), SETTINGS, "floating point"),
        ((x[:0], labels[:0]), SETTINGS, "floating point"),
        ((x, labels[:3]), SETTINGS, "one label an image"),
        ((2 * x, labels), SETTINGS, r"lie in \[0, 1\]"),
        ((x * torch.nan, labels), SETTINGS, r"lie in \[0, 1\]"),
        ((x, labels + 3), SETTINGS, "labels must be 0 to 4"),
        ((x, labels), {}, "eps is missing"),
        ((x, labels), SETTINGS | {"autoatack": "quick"}, "autoatack"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            measure(model, *arguments, **settings)
