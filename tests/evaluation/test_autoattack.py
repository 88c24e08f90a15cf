"""AutoAttack is the reference's, and leaves no trace."""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from robust_accel.data import MemoryImages
from robust_accel.evaluation import EvaluateSettings, evaluate
from robust_accel.evaluation.any_module import measure
from robust_accel.evaluation.autoattack import AutoAttackEvaluation
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.ledger import Ledger
from robust_accel.evaluation.outcomes import Outcomes
from robust_accel.models import PixelClassifier


def fitted(num_classes: int = 5, num_images: int = 24) -> tuple[PixelClassifier, MemoryImages]:
    """A linear classifier of noisy class means: some images are close to the border, some far."""
    generator = torch.Generator().manual_seed(5)
    means = torch.rand(num_classes, 1, 4, 4, generator=generator)
    labels = torch.arange(num_images) % num_classes
    noise = 0.5 * torch.randn(num_images, 1, 4, 4, generator=generator)
    pictures = (255 * (0.3 + 0.4 * means[labels] + 0.4 * noise).clamp(0, 1)).to(torch.uint8)
    linear = nn.Linear(16, num_classes)
    centres = 0.3 + 0.4 * means.flatten(1)
    with torch.no_grad():  # the nearest centre wins
        linear.weight.copy_(8 * centres)
        linear.bias.copy_(-4 * (centres**2).sum(dim=1))
    model = nn.Sequential(nn.Flatten(), linear)
    return PixelClassifier(model), MemoryImages(pictures, labels)


def settings(**options: Any) -> EvaluateSettings:
    given: dict[str, Any] = {"norm": "linf", "eps": 0.03, "autoattack": "quick", "batch_size": 24}
    return EvaluateSettings(**given | options)


def bench_of(
    classifier: PixelClassifier,
    images: MemoryImages,
    given: EvaluateSettings,
    folder: Path | None = None,
) -> Bench:
    accelerator = Accelerator(cpu=True)
    ledger = Ledger(folder, accelerator)
    return Bench(
        classifier,
        images,
        accelerator,
        batch_size=given.batch_size,
        seed=given.seed,
        ledger=ledger,
    )


def everything(images: MemoryImages, number: int | None = None) -> Outcomes:
    """As if all of the first images were right."""
    labels = images.labels[:number]
    ones = torch.ones(len(labels)).double()
    return Outcomes(torch.arange(len(labels)), labels, labels, ones, ones)


def flags(given: EvaluateSettings, num_classes: int = 5) -> tuple[list[bool], list[bool]]:
    """(clean, robust)"""
    bench = bench_of(*fitted(num_classes), given)
    clean = bench.clean()
    after, _ = AutoAttackEvaluation(given, num_classes).run(bench, clean)
    return clean.right.tolist(), after.right.tolist()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_attacks_are_set_as_in_the_reference(norm: str) -> None:
    given = settings(norm=norm, eps=0.1, autoattack="standard", seed=3)
    model: Any = nn.Identity()
    ours = AutoAttackEvaluation(given, num_classes=11)
    theirs = AutoAttack(model, norm=norm.capitalize(), eps=0.1, seed=3, version="standard")
    parts = {"apgd-ce": theirs.apgd, "apgd-t": theirs.apgd_targeted, "fab-t": theirs.fab}
    for name, part in (parts | {"square": theirs.square}).items():
        own, reference = vars(ours._attack(model, name, 3, torch.device("cpu"))), vars(part)
        left_out = ("logger", "loss", "targeted", "device")  # set when it is run
        assert type(own) is type(reference)
        for key in reference.keys() - set(left_out):
            assert own[key] == reference[key], (name, key)
    assert ours.about["num_targets"] == (5 if norm == "l1" else 9)


@pytest.mark.parametrize("norm", ["linf", "l2", pytest.param("l1", marks=pytest.mark.long)])
def test_flags_are_the_references(norm: str) -> None:
    eps = {"linf": 0.03, "l2": 0.1, "l1": 0.35}[norm]
    before, after = flags(settings(norm=norm, eps=eps, seed=3))
    assert 0 < sum(after) < sum(before) < len(before)
    assert all(b for b, a in zip(before, after, strict=True) if a)
    classifier, images = fitted()
    x, labels = images.images.float() / 255, images.labels
    right = torch.tensor(before)
    # straight from the reference, which attacks the images that are right
    reference = AutoAttack(
        classifier.eval(), norm=norm.capitalize(), eps=eps, seed=3, version="standard"
    )  # fmt: skip
    reference.attacks_to_run = ["apgd-ce", "apgd-t"]
    reference.apgd_targeted.n_target_classes = 4
    with torch.random.fork_rng():
        x_ref, _ = reference.run_standard_evaluation(x[right], labels[right], batch_size=24)
    robust = right.clone()
    robust[right] = classifier(x_ref).argmax(dim=1) == labels[right]
    assert after == robust.tolist()
    torch.rand(7), random.random(), np.random.rand(3)  # noqa: NPY002  (must not matter)
    assert flags(settings(norm=norm, eps=eps, seed=3))[1] == after


def test_breaks_what_a_linear_model_must_lose() -> None:
    """A linear model's L-inf margin is known: AutoAttack may not do better, nor much worse."""
    classifier, images = fitted()
    x, labels = images.images.float() / 255, images.labels
    weight, logits = classifier.model[1].weight, classifier(x)  # type: ignore[index]
    gaps = logits.gather(1, labels[:, None]) - logits  # [B, K]
    slopes = (weight[labels][:, None] - weight[None]).abs().sum(dim=2)  # change of the gap per eps
    slopes[torch.arange(24), labels] = 1
    margins = (gaps / slopes).scatter(1, labels[:, None], torch.inf).amin(dim=1)  # without [0, 1]
    before, after = flags(settings())
    assert before == (margins > 0).tolist()
    for margin, robust in zip(margins.tolist(), after, strict=True):
        assert robust or margin < 0.03 + 1e-6  # within the ball nothing else can be broken
    right = torch.tensor(before)
    # where the clamp to [0, 1] cannot help the image, it is lost
    free = ((x > 0.03) & (x < 0.97)).flatten(1).all(dim=1)
    lost = free & right & (margins < 0.0299)
    assert lost.any()
    assert not any(robust for robust, gone in zip(after, lost.tolist(), strict=True) if gone)


def test_standard_leaves_parameters_random_streams_and_tracing_alone() -> None:
    classifier, images = fitted(num_classes=4)
    given = settings(autoattack="standard", eps=0.05)
    evaluation = AutoAttackEvaluation(given, 4)
    assert [s.attack for s in evaluation.stages] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert evaluation.stages.pop().attack == "square"  # its 5,000 queries would say nothing new
    bench = bench_of(classifier, images, given)
    clean = bench.clean()
    classifier.model[1].weight.requires_grad_(False)  # type: ignore[index]
    torch_before, python_before = torch.get_rng_state(), random.getstate()
    numpy_before = np.random.get_state()  # noqa: NPY002
    traced: list[str] = []

    def tracer(frame: Any, event: str, argument: Any) -> None:
        traced.append(event)

    previous = sys.gettrace()
    sys.settrace(tracer)
    try:
        robust = evaluation.run(bench, clean)[0].right
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(previous)
    assert 0 < robust.sum() < 24
    wanted = [p.requires_grad for p in classifier.model.parameters()]
    assert wanted == [False, True]
    assert all(p.grad is None for p in classifier.parameters())
    assert torch.get_rng_state().equal(torch_before)
    assert random.getstate() == python_before
    numpy_after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(numpy_before, numpy_after, strict=True))


def test_streams_that_an_attack_reseeds_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square reseeds numpy's too, but takes 5,000 queries to say so."""

    def reseed(self: APGDAttack, x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(1), random.seed(1), np.random.seed(1)  # noqa: NPY002
        return x

    monkeypatch.setattr(APGDAttack, "perturb", reseed)
    monkeypatch.setattr(APGDAttack_targeted, "perturb", reseed)
    classifier, images = fitted()
    right, bench = everything(images), bench_of(classifier, images, settings())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]  # noqa: NPY002
    AutoAttackEvaluation(settings(), 5).run(bench, right)
    assert torch.get_rng_state().equal(states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[index,union-attr]  # noqa: NPY002


def test_one_image_a_unit_works() -> None:
    """A unit may hold a single right image: shapes must not collapse."""
    classifier, images = fitted()
    given = settings(batch_size=1, eps=1.0)
    bench = bench_of(classifier, images, given)
    found, _ = AutoAttackEvaluation(given, 5).run(bench, everything(images, 2))
    assert found.right.tolist() == [False, False]


class Killed(Exception):
    pass


KILLED = settings(autoattack="standard", batch_size=4, eps=0.05)


def survivors(folder: Path) -> tuple[Tensor, float]:
    """Flags of the standard sequence on a few images, Square and FAB cut short; and its seconds."""
    bench = bench_of(*fitted(), KILLED, folder)
    outcomes, about = AutoAttackEvaluation(KILLED, 5).run(bench, bench.clean(12))
    return outcomes.right, about["wall_seconds"]


@pytest.fixture(scope="module")
def short() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SquareAttack, "perturb", cut_short(SquareAttack.perturb, "n_queries", 20))
        patch.setattr(FABAttack_PT, "perturb", cut_short(FABAttack_PT.perturb, "n_iter", 5))
        yield


@pytest.fixture(scope="module")
def undisturbed(short: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, list[str]]:
    folder = tmp_path_factory.mktemp("autoattack")
    return survivors(folder)[0], lines(folder)


@pytest.mark.parametrize("fatal", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_killed_in_any_attack_it_goes_on_and_ends_with_the_same_flags(
    fatal: str | None,
    undisturbed: tuple[Tensor, list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, units = undisturbed
    attack, done = AutoAttackEvaluation._attack, []

    def deadly(self: Any, classifier: Any, name: str, *rest: Any) -> Any:
        done.append(name)
        if fatal is not None and done.count(fatal) == 2:
            raise Killed
        return attack(self, classifier, name, *rest)

    monkeypatch.setattr(AutoAttackEvaluation, "_attack", deadly)
    with pytest.raises(Killed):
        survivors(tmp_path)
    (file,) = (tmp_path / "measurements").glob("process-*")
    with file.open("a") as log:
        log.write('{"key": "x", "prediction"')  # killed while it wrote a line
    finished_before = len(done) - 1
    done.clear()
    fatal = None
    assert survivors(tmp_path)[0].equal(whole)
    assert 0 < whole.sum() < 12
    assert len(lines(tmp_path)) == len(units) + 1  # each once, and the broken line
    others = len(units) - len(done) - finished_before
    assert others == 3 + 1  # units of clean images and the checks
    done.clear()
    flags, seconds = survivors(tmp_path)
    assert flags.equal(whole)
    assert not done  # a third time nothing is left to do
    spent = [json.loads(line)["seconds"] for line in lines(tmp_path) if line.endswith("}")]
    assert seconds >= sum(sorted(spent)[3:])  # of clean images are three units


def cut_short(perturb: Any, limit: str, value: int) -> Any:
    def shorter(self: Any, x: Tensor, y: Tensor) -> Tensor:
        setattr(self, limit, value)
        return perturb(self, x, y)

    return shorter


def lines(folder: Path) -> list[str]:
    files = sorted((folder / "measurements").glob("process-*"))
    return [line for path in files for line in path.read_text().splitlines()]


def test_nothing_right_is_an_accuracy_of_0() -> None:
    classifier, images = fitted()
    images.labels = (classifier(images.images.float() / 255).argmax(dim=1) + 1) % 5
    given = settings(autoattack="standard", pgd=None)
    result = evaluate(classifier, images, given, Accelerator(cpu=True), num_classes=5)
    assert result["clean_accuracy"]["accuracy"] == result["autoattack_accuracy"]["accuracy"] == 0


def test_images_in_any_memory_layout_are_attacked() -> None:
    classifier, images = fitted()
    plain = flags(settings(batch_size=6))
    images.images = images.images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    bench = bench_of(classifier, images, settings(batch_size=6))
    found, _ = AutoAttackEvaluation(settings(batch_size=6), 5).run(bench, bench.clean())
    assert found.right.tolist() == plain[1]


def test_a_search_in_bf16_ends_with_a_verdict_in_fp32() -> None:
    plain, searched = flags(settings()), flags(settings(search="bf16"))
    assert searched[0] == plain[0]
    # this model is linear: both find what there is to find
    assert searched[1] == plain[1]
    stages = AutoAttackEvaluation(settings(search="bf16"), 5).stages
    assert [(s.attack, s.bf16) for s in stages] == [
        ("apgd-ce", True), ("apgd-t", True), ("apgd-ce", False), ("apgd-t", False),
    ]  # fmt: skip


def test_rand_averages_gradients_of_a_randomised_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []

    def record(self: APGDAttack, x: Tensor, y: Tensor) -> Tensor:
        seen.append((self.loss, self.eot_iter))
        return x

    monkeypatch.setattr(APGDAttack, "perturb", record)
    flags(settings(autoattack="rand"))
    assert seen == [("ce", 20), ("dlr", 20)]


@pytest.mark.parametrize(
    ("num_classes", "given", "said"),
    [
        (2, {}, r"evaluate\.autoattack: quick needs at least 4 classes .* the model has 2;"),
        (3, {}, r"evaluate\.autoattack: quick needs at least 4 classes .* the model has 3;"),
        (2, {"autoattack": "rand"}, r"evaluate\.autoattack: rand needs at least 3 classes"),
        (
            2,
            {"autoattack": None, "pgd": {"loss": "dlr"}},
            r"evaluate\.pgd\.loss: dlr ranks three classes, the model has 2",
        ),
    ],
)
def test_too_few_classes_are_refused_before_anything_is_spent(
    num_classes: int, given: dict[str, Any], said: str
) -> None:
    class Untouchable(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("something was spent")

    classifier, (_, images) = PixelClassifier(Untouchable()), fitted(4)
    with pytest.raises(ValueError, match=said):
        evaluate(
            classifier,
            images,
            settings(**given),
            Accelerator(cpu=True),
            num_classes=num_classes,
        )


class Probabilities(nn.Module):
    """Two classes by the first pixel, as shares."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :1].mul(torch.tensor([[1.0, 0, 0, -1]])).softmax(dim=1)


def test_alarms_of_the_reference_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.linspace(0.4, 0.6, 8).reshape(8, 1, 1, 1)
    given = settings(pgd=None)
    found = measure(Probabilities(), x, torch.zeros(8, dtype=torch.int64), given)
    (said,) = found["autoattack_accuracy"]["warnings"]
    assert "probability distribution" in said
    logged = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert logged == [f"autoattack: {said}"]


def test_what_autoattack_alone_reads_is_said_without_it(caplog: pytest.LogCaptureFixture) -> None:
    classifier, images = fitted()
    plain = settings(autoattack=None, pgd=None)
    for more in ({}, {"search": "bf16"}):
        caplog.clear()
        given = plain.model_copy(update=more)
        evaluate(classifier, images, given, Accelerator(cpu=True), num_classes=5)
        said = [text for text in caplog.messages if "evaluate.autoattack is null" in text]
        assert [text.split(",")[0] for text in said] == [
            f"evaluate.{key}: {value}" for key, value in more.items()
        ]
