"""Any module on pixels: accuracy under attack, certified radii."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import one_hot

from robust_accel import PixelClassifier
from robust_accel.data import MemoryImages
from robust_accel.evaluation import EvaluateSettings, any_module, evaluate
from robust_accel.evaluation.arrays import as_labels
from robust_accel.evaluation.certify_images import CertifySettings

SETTINGS = {"eps": 0.03, "pgd": {"num_steps": 5}, "autoattack": "quick", "batch_size": 10}


def measure(model: nn.Module, x: Any, labels: Any, **given: Any) -> dict[str, Any]:
    """The call, by settings and the rest in one."""
    names = given.keys() & {"other", *any_module.How.__annotations__}
    how = {name: given.pop(name) for name in names}
    return any_module.measure(model, x, labels, EvaluateSettings(**given), **how)


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
    for key in ("clean_accuracy", "pgd_accuracy", "autoattack_accuracy"):
        assert found[key]["outcomes"] == expected[key]["outcomes"]
        assert found[key]["key"] == expected[key]["key"]
    assert found["clean_accuracy"]["accuracy"] == 0.8
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["accuracy"] for row in report["measurements"]] == [
        expected[f"{name}_accuracy"]["accuracy"] for name in ("clean", "pgd", "autoattack")
    ]
    (tmp_path / "recipe.yaml").write_text("{}")
    with pytest.raises(ValueError, match="holds a training run"):
        measure(model, pixels / 255, labels, folder=tmp_path, **SETTINGS)


def test_a_model_is_measured_as_it_is_and_what_was_done_is_said() -> None:
    """A timm network that was trained on [0, 1], whatever its pretrained_cfg says."""
    x = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = timm.create_model("wide_resnet10_1", num_classes=5).eval()
        network.train()(x)  # BatchNorm statistics of [0, 1]
    mean, std, size = (0.4, 0.5, 0.6), (0.2, 0.3, 0.2), 12
    for given in ({}, {"mean": mean, "std": std}, {"mean": mean, "std": std, "size": size}):
        reads = PixelClassifier(network, **given).eval()
        with torch.no_grad():
            labels = reads(x).argmax(dim=1)
        found = measure(network, x, labels, eps=0.01, pgd=None, **given)
        assert found["clean_accuracy"]["accuracy"] == 1
        about = found["model"]
        torch.testing.assert_close(torch.tensor(about["mean"]), reads.mean.flatten())
        torch.testing.assert_close(torch.tensor(about["std"]), reads.std.flatten())
        assert about["size"] == (list(reads.size) if reads.size else None)
        assert about["said"] == reads.statistics_source
        assert ("the module reads [0, 1]" in about["said"]) == (not given)
        assert measure(reads, x, labels, eps=0.01, pgd=None)["model"] == about
        with pytest.raises(ValueError, match="PixelClassifier's own"):
            measure(reads, x, labels, eps=0.01, pgd=None, mean=0.5, std=0.5)


class OwnNoise(nn.Module):
    """A defence by noise; keeps what it adds, and what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Tensor] = []
        self.added: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.clone())
        self.added.append(torch.randn_like(x))
        brightness = (x - 0.5).flatten(1).sum(1)
        return torch.stack([-brightness, brightness], dim=1)


@pytest.mark.parametrize("method", ["cohen", "sequential"])
def test_a_models_own_noise_is_not_that_of_its_certificate(method: str) -> None:
    model, x = OwnNoise(), torch.full((1, 1, 4, 4), 0.5)
    settings = CertifySettings(sigma=0.25, n=200, n0=50, method=method)
    any_module.certify(model, x, [1], settings)
    pairs = zip(model.given[1:], model.added[1:], strict=True)  # the first forward counts classes
    added = [torch.stack([(given - x).flatten(), own.flatten()]) for given, own in pairs]
    both = torch.cat(added, dim=1)
    assert both.shape[1] >= 50 * 16
    assert abs(torch.corrcoef(both)[0, 1].item()) < 5 / both.shape[1] ** 0.5


def test_a_sequential_certificate_says_what_was_decided() -> None:
    """Nothing below its smallest radius, unless that is asked for."""
    model, x = OwnNoise(), torch.full((4, 1, 4, 4), 0.5)
    x[0] += 0.2  # certified; the others are on the border
    about: dict[str, Any] = {"sigma": 0.25, "n": 400, "n0": 20, "alpha": 0.01}
    for method, radii in (
        ("sequential", (0.1, 0.2)),
        ("cohen", (0.1, 0.2)),
        ("sequential", (0, 0.1)),
    ):
        settings = CertifySettings(method=method, radii=radii, **about)
        record = any_module.certify(model, x, [1] * 4, settings)["certificate"]
        known = method == "cohen" or 0 in radii
        assert ("abstained" in record) == known
        assert record["curve"]["radius"][0] == (0 if known else 0.1)
        assert record["threat_model"] == {"norm": "l2", "eps": radii[0]}
        assert record["accuracy"] == record["radii"][0]["accuracy"] == 0.25
    far = any_module.certify(model, x, [1] * 4, CertifySettings(radii=(2.0,), **about))
    assert far["certificate"].keys().isdisjoint({"accuracy", "interval"})


def test_timms_statistics_that_are_not_applied_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    network = timm.create_model("wide_resnet10_1", num_classes=5)
    measure(network, torch.rand(4, 3, 8, 8), [0, 1, 2, 3], eps=0.01, pgd=None)
    assert "pretrained_cfg is not applied: mean (0.4914" in caplog.text


IMAGES = {
    "tensor": lambda x: x,
    "double": lambda x: x.double(),
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "array": lambda x: x.numpy(),
    "permuted": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "flipped array": lambda x: np.flip(x.numpy()[..., ::-1].copy(), -1),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "list of tensors": list,
    "list of arrays": lambda x: list(x.numpy()),
    "nested list": lambda x: x.tolist(),
}
LABELS = {
    "tensor": lambda y: y,
    "int32": lambda y: y.int(),
    "whole floats": lambda y: y.float(),
    "list": lambda y: y.tolist(),
    "array": lambda y: y.numpy(),
    "list of tensors": list,
    "column": lambda y: y[:, None],
    "one-hot": lambda y: one_hot(y, 5),
    "one-hot floats": lambda y: one_hot(y, 5).float().numpy(),
    "one-hot booleans": lambda y: one_hot(y, 5).bool(),
}


@pytest.mark.parametrize(
    ("images", "labels"),
    [*((kind, "tensor") for kind in IMAGES), *(("tensor", kind) for kind in LABELS)],
)
def test_images_and_labels_of_any_kind_give_the_same_numbers(
    images: str, labels: str, problem: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, pixels, y = problem
    x = pixels / 255
    settings = SETTINGS | {"autoattack": None}
    expected = measure(model, x, y, **settings)
    found = measure(model, IMAGES[images](x), LABELS[labels](y), **settings)
    for key in ("clean_accuracy", "pgd_accuracy"):
        for about in ("key", "outcomes", "accuracy"):
            assert found[key][about] == expected[key][about]


class Elsewhere(Tensor):
    """On another device, until it is brought to the CPU."""

    def cpu(self) -> Tensor:
        return self.as_subclass(Tensor)


@pytest.mark.parametrize("labels", [torch.tensor([1, 2]), torch.eye(3), torch.ones(2, 1)])
def test_labels_come_to_the_cpu(labels: Tensor) -> None:
    assert type(as_labels(labels.as_subclass(Elsewhere))) is Tensor


def test_autoattack_takes_permuted_images() -> None:
    """Whose memory its targeted attack refuses to look at."""
    x = torch.rand(2, 5, 5, 3, generator=torch.Generator().manual_seed(2)).permute(0, 3, 1, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    labels = model(x).argmax(dim=1)
    found = measure(model, x, labels, eps=1e-6, pgd=None, autoattack="quick")
    assert found["autoattack_accuracy"]["accuracy"] == 1


def test_the_call_of_the_readme(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, pixels, labels = problem
    x, labels = pixels[:4] / 255, labels[:4]
    found = measure(model, x, labels, eps="8/255", autoattack="standard", sanity=True)
    assert found["pgd_accuracy"]["threat_model"] == {"norm": "linf", "eps": 8 / 255}
    assert {"clean_accuracy", "pgd_accuracy", "autoattack_accuracy", "sanity"} <= found.keys()


def test_another_models_images_are_tried_and_no_setting_is_passed_over(
    problem: tuple[nn.Module, Tensor, Tensor],
) -> None:
    model, pixels, labels = problem
    x = pixels / 255
    other = RobustBenchStyle().train()
    found = measure(model, x, labels, eps=0.03, sanity={"images": 10}, other=other)
    assert other.training and other.net[1].num_batches_tracked == 0
    assert "no other model" not in str(found["sanity"])
    assert "no other model" in str(measure(model, x, labels, eps=0.03, sanity={"images": 10}))
    with pytest.raises(ValueError, match=r"other=load_model"):
        measure(model, x, labels, eps=0.03, sanity={"transfer_from": "resnet18"})
    with pytest.raises(ValueError, match="add sanity=True"):
        measure(model, x, labels, eps=0.03, other=other)


def test_what_is_not_as_said_is_refused(problem: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, pixels, labels = problem
    x = pixels / 255
    cases = [
        ((pixels, labels), SETTINGS, r"floating point.*uint8.*divide by 255"),
        ((pixels.float(), labels), SETTINGS, r"lie in \[0, 1\], .*divide by 255"),
        ((2 * x - 1, labels), SETTINGS, r"lie in \[0, 1\], .*undo the normalisation"),
        ((x * torch.nan, labels), SETTINGS, r"lie in \[0, 1\].*NaN"),
        ((x[:0], labels[:0]), SETTINGS, r"images \[N, C, H, W\]"),
        ((x[0], labels[:1]), SETTINGS, r"x\[None\]"),
        ((torch.rand(2, 8, 8, 3), labels[:2]), SETTINGS, r"x.permute\(0, 3, 1, 2\)"),
        (([x[0], x[0, :, :2]], labels[:2]), SETTINGS, "x must be .* of one shape"),
        ((["a"], labels[:1]), SETTINGS, "x must be a tensor"),
        ((torch.rand(2, 3, 4, 5), labels[:2]), SETTINGS, "does not take images of 3x4x5.*size="),
        ((x, labels[:3]), SETTINGS, "one an image, got 3 for 30"),
        ((x, labels + 3), SETTINGS, "labels must be 0 to 4.*got 3 to 6"),
        ((x, labels - 1), SETTINGS, "labels must be 0 to 4.*got -1 to 2"),
        ((x, labels + 0.5), SETTINGS, r"class indices, got \d.5"),
        ((x, labels * torch.nan), SETTINGS, "class indices, got nan"),
        ((x, one_hot(labels, 6)), SETTINGS, "one-hot of 6 classes, the model has 5"),
        ((x, torch.full((30, 5), 0.2)), SETTINGS, "probabilities"),
        ((x, torch.eye(5)[labels] * 2), SETTINGS, "probabilities"),
        ((x, torch.zeros(30, 5)), SETTINGS, "probabilities"),
        ((x, torch.zeros(30, 5, 1)), SETTINGS, "labels must be"),
        ((x, ["cat"] * 30), SETTINGS, "labels must be a tensor"),
        ((x, None), SETTINGS, "labels must be"),
        ((x, labels), {}, "eps is missing"),
        ((x, labels), {"esp": "8/255"}, r"esp: unknown key \(did you mean eps\?\); allowed: norm,"),
        ((x, labels), SETTINGS | {"autoatack": "quick"}, r"autoatack.*did you mean autoattack"),
        ((x, labels), {"eps": 0.1, "pgd": {"num_step": 5}}, r"pgd.num_step: unknown .*num_steps"),
        ((x, labels), {"eps": 0.1, "pgd": {"num_steps": 0}}, "pgd.num_steps: 0 is not allowed"),
        ((x, labels), {"eps": 0.1, "sanity": {"image": 3}}, r"sanity.image: unknown .*images"),
        ((x, labels), {"eps": 8}, "eps: 8.0 is not allowed.*8/255"),
        ((x, labels), SETTINGS | {"mean": 0.5}, "mean and std go together"),
    ]
    for arguments, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            measure(model, *arguments, **settings)
    for no_model in ("resnet50", lambda x: x):
        with pytest.raises(ValueError, match=r"must be a module.*load_model"):
            measure(no_model, x, labels, **SETTINGS)  # type: ignore[arg-type]
    part = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    part[1].weight.ds_id = 0  # ZeRO 3's mark
    whole = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    engine = type("DeepSpeedEngine", (nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})(
        whole
    )
    for foreign in (part, PixelClassifier(part), engine, torch.compile(engine)):
        with pytest.raises(ValueError, match=r"DeepSpeed's or sharded by FSDP: .*get_state_dict"):
            measure(foreign, x, labels, **SETTINGS)
    one = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    with pytest.raises(ValueError, match="two at least"):
        measure(one, x, labels * 0, **SETTINGS)
