"""Flags are exact, and do not depend on how images are dealt to processes."""

import multiprocessing
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_accel.attacks import PGD, NoAttack
from robust_accel.data import MemoryImages
from robust_accel.evaluation import EvaluateSettings, bench, evaluate, under_attack
from robust_accel.evaluation.accuracy import predictions
from robust_accel.evaluation.autoattack import AutoAttackEvaluation
from robust_accel.evaluation.bench import Attacker, Bench
from robust_accel.evaluation.ledger import Ledger
from robust_accel.models import PixelClassifier

CPU = torch.device("cpu")
EPS = 0.1
SETTINGS = EvaluateSettings(norm="linf", eps=EPS, batch_size=7, pgd={"num_steps": 5})  # type: ignore[arg-type]


@dataclass
class Process:
    """What a ``Bench`` asks of an accelerator."""

    process_index: int = 0
    num_processes: int = 1
    is_main_process: bool = True
    is_local_main_process: bool = False
    device: torch.device = CPU


class Threshold(nn.Module):
    """One pixel, class 1 above 0.5: an image is robust if it is further than eps from 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        pixel = x.flatten(1)[:, :1]
        return torch.cat([0.5 - pixel, pixel - 0.5], dim=1)


def grey(values: list[int], labels: list[int]) -> MemoryImages:
    return MemoryImages(
        torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1), torch.tensor(labels)
    )


def tiny() -> tuple[PixelClassifier, MemoryImages]:
    """A small convolutional network fitted to a part of its labels, and 40 images in 5 classes."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (40, 3, 5, 5), generator=generator, dtype=torch.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.ReLU(),
            nn.Flatten(), nn.Linear(54, 5),
        )  # fmt: skip
        classifier = PixelClassifier(model, mean=0.5, std=0.25)
        classifier.train()(pictures.float() / 255)  # BatchNorm statistics that are not 0 and 1
        labels = classifier.eval()(pictures.float() / 255).argmax(dim=1)
    labels[::4] = (labels[::4] + 1) % 5  # a quarter is wrong
    return classifier, MemoryImages(pictures, labels)


def correct_flags(
    classifier: PixelClassifier,
    images: MemoryImages,
    attacker: Attacker | None,
    settings: EvaluateSettings,
    process: Any,
    num_images: int | None = None,
) -> Tensor:
    on = bench.Bench(
        classifier, images, process, batch_size=settings.batch_size, seed=settings.seed
    )
    clean = on.clean(num_images)
    return (clean if attacker is None else on.attacked(attacker, clean)).right


def flags_of(
    attacker: Attacker | None, settings: EvaluateSettings, process: Any, **options: Any
) -> Tensor:
    classifier, images = tiny()
    return correct_flags(classifier, images, attacker, settings, process, **options)


def by(perturb: Any) -> Attacker:
    return Attacker({"name": "test"}, perturb)


PGD_ATTACK = PGD(eps=0.02, step_size=0.008, num_steps=4)


# ---- exact -------------------------------------------------------------------------------------


def test_flags_are_those_computed_by_hand() -> None:
    values = [0, 60, 101, 103, 127, 128, 152, 154, 255] * 2
    labels = [0] * 9 + [1] * 9
    classifier, images = PixelClassifier(Threshold()), grey(values, labels)
    right = [(v / 255 > 0.5) == bool(label) for v, label in zip(values, labels, strict=True)]
    robust = [r and abs(v / 255 - 0.5) > EPS for r, v in zip(right, values, strict=True)]
    assert correct_flags(classifier, images, None, SETTINGS, Process()).tolist() == right
    attack = under_attack(PGD(eps=EPS, step_size=0.05, num_steps=5))
    assert correct_flags(classifier, images, attack, SETTINGS, Process()).tolist() == robust
    assert 0 < sum(robust) < sum(right) < len(values)


def test_an_image_counts_only_if_it_is_right_before_and_after() -> None:
    """This perturbation mends what is wrong and breaks what is close."""

    def helpful(classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        seen.append((x, labels))
        return torch.where(x > 0.6, x, 1 - x)

    seen: list[tuple[Tensor, Tensor]] = []
    images = grey([0, 51, 204, 255, 140], [1, 0, 1, 0, 1])  # wrong, right, right, wrong, right
    flags = correct_flags(PixelClassifier(Threshold()), images, by(helpful), SETTINGS, Process())
    assert flags.tolist() == [False, False, True, False, False]
    ((x, labels),) = seen  # only what was right is attacked
    assert (x.flatten() * 255).round().tolist() == [51, 204, 140]
    assert labels.tolist() == [0, 1, 1]


def test_nothing_is_attacked_where_nothing_is_right() -> None:
    def forbidden(*_: Any) -> Tensor:
        raise AssertionError("attacked")

    images = grey([0, 255], [1, 0])
    flags = correct_flags(PixelClassifier(Threshold()), images, by(forbidden), SETTINGS, Process())
    assert flags.tolist() == [False, False]


def test_a_limit_takes_the_first_images() -> None:
    whole = flags_of(None, SETTINGS, Process())
    assert flags_of(None, SETTINGS, Process(), num_images=16).equal(whole[:16])
    assert flags_of(None, SETTINGS, Process(), num_images=1000).equal(whole)
    assert whole.tolist() == [i % 4 != 0 for i in range(40)]


# ---- nothing is left behind --------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_classifier_and_the_random_streams_stay_as_they_were(fails: bool) -> None:
    def perturb(classifier: PixelClassifier, x: Tensor, labels: Tensor, seed: int) -> Tensor:
        assert not any(m.training for m in classifier.modules())
        x_adv = under_attack(PGD_ATTACK).perturb(classifier, x, labels, seed)
        x_in = x.clone().requires_grad_()
        classifier(x_in).sum().backward()  # as FAB does
        assert x_in.grad is not None
        if fails:
            raise RuntimeError("out of memory")
        return x_adv

    classifier, images = tiny()
    classifier.train()
    frozen = classifier.model[0].weight  # type: ignore[index]
    frozen.requires_grad_(False)
    classifier.model[5].bias.grad = torch.ones(5)  # type: ignore[index]
    classifier.model[1].eval()  # type: ignore[index]
    modes = [m.training for m in classifier.modules()]
    wanted = [p.requires_grad for p in classifier.parameters()]
    state = {k: v.clone() for k, v in classifier.state_dict().items()}
    rng = torch.get_rng_state()
    try:
        correct_flags(classifier, images, by(perturb), SETTINGS, Process())  # type: ignore[arg-type]
    except RuntimeError:
        assert fails
    else:
        assert not fails
    assert [m.training for m in classifier.modules()] == modes
    assert [p.requires_grad for p in classifier.parameters()] == wanted
    grads = [name for name, p in classifier.named_parameters() if p.grad is not None]
    assert grads == ["model.5.bias"]
    assert classifier.model[5].bias.grad.equal(torch.ones(5))  # type: ignore[index]
    assert all(v.equal(state[k]) for k, v in classifier.state_dict().items())
    assert torch.get_rng_state().equal(rng)


# ---- dealing -----------------------------------------------------------------------------------


def adversarial_images(seed: int, batch_size: int, process: Process) -> dict[int, Tensor]:
    """Perturbed images by the seed that their unit was given."""

    def perturb(classifier: PixelClassifier, x: Tensor, labels: Tensor, unit_seed: int) -> Tensor:
        x_adv = under_attack(PGD_ATTACK).perturb(classifier, x, labels, unit_seed)
        found[unit_seed] = x_adv
        return x_adv

    found: dict[int, Tensor] = {}
    settings = SETTINGS.model_copy(update={"seed": seed, "batch_size": batch_size})
    flags_of(by(perturb), settings, process)
    return found


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_each_unit_is_one_processs_and_meets_the_same_attack_there(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank by itself, the others' outcomes told to it as one process has found them."""
    told: list[Any] = []
    monkeypatch.setattr(bench, "told_to_all", lambda items, _: told.append(items) or items)
    alone, outcomes = adversarial_images(3, 7, Process()), told
    assert len(alone) == 6  # 40 images in units of 7; no two units share a seed
    together: dict[int, Tensor] = {}
    own: list[list[Any]] = [[] for _ in outcomes]
    for rank in range(world_size):
        calls = iter(zip(outcomes, own, strict=True))

        def tell(items: list[Any], _: Any, calls: Any = calls) -> list[Any]:
            everyones, mine = next(calls)
            mine += items
            return everyones

        monkeypatch.setattr(bench, "told_to_all", tell)
        found = adversarial_images(3, 7, Process(rank, world_size))
        assert not found.keys() & together.keys()
        together |= found
    assert together.keys() == alone.keys()
    assert all(together[seed].equal(alone[seed]) for seed in alone)
    for parts, whole in zip(own, outcomes, strict=True):
        verdicts = [{i: o["prediction"] for i, o in found} for found in (parts, whole)]
        assert verdicts[0] == verdicts[1]


def test_attacks_repeat_by_seed() -> None:
    one, again, other = (adversarial_images(seed, 40, Process()) for seed in (3, 3, 4))
    assert one[3].equal(again[3])
    assert not one[3].equal(other[4])


AUTOATTACK = SETTINGS.model_copy(update={"autoattack": "quick", "eps": 0.02, "batch_size": 6})


def flags_on_two_processes(rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, not used
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timeout=timedelta(seconds=50), rank=rank, world_size=2
    )
    accelerator = Accelerator(cpu=True)
    assert (accelerator.num_processes, accelerator.process_index) == (2, rank)
    torch.save(measured(accelerator, folder), folder / f"{rank}.pt")


def measured(process: Any, folder: Path | None = None) -> dict[str, list[bool]]:
    on = Bench(*tiny(), process, batch_size=6, ledger=Ledger(folder, process))
    clean = on.clean()
    return {
        "clean": clean.right.tolist(),
        "pgd": on.attacked(under_attack(PGD_ATTACK), clean).right.tolist(),
        "autoattack": AutoAttackEvaluation(AUTOATTACK, 5).run(on, clean)[0].right.tolist(),
    }


def test_two_real_processes_agree_with_one(tmp_path: Path) -> None:
    # forked, not spawned: imports take longer than the work; not from here, where threads may run
    context = multiprocessing.get_context("forkserver")
    workers = [
        context.Process(target=flags_on_two_processes, args=(rank, tmp_path), daemon=True)
        for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    alone = measured(Process())
    for worker in workers:
        worker.join(timeout=60)
    exits = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert exits == [0, 0]
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt") == alone
    # what both wrote, less the last line of each, is where one process goes on
    logs = sorted((tmp_path / "measurements").glob("process-*"))
    assert [log.name for log in logs] == ["process-0.jsonl", "process-1.jsonl"]
    kept = [log.read_text().splitlines(keepends=True)[:-1] for log in logs]
    assert all(kept)
    for log, lines in zip(logs, kept, strict=True):
        log.write_text("".join(lines))
    assert measured(Process(), tmp_path) == alone
    assert len(logs[0].read_text().splitlines()) == len(kept[0]) + 2
    assert 0 < sum(alone["autoattack"]) <= sum(alone["pgd"]) < sum(alone["clean"]) == 30


# ---- evaluate ----------------------------------------------------------------------------------


def test_evaluate_reports_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    classifier, images = tiny()
    settings = EvaluateSettings(
        norm="linf",
        eps=0.02,
        pgd={"num_steps": 3},  # type: ignore[arg-type]
        autoattack="quick",
        images=20,
        autoattack_images=4,
        batch_size=5,
        seed=4,
    )
    result = evaluate(classifier, images, settings, Process(), num_classes=5)  # type: ignore[arg-type]
    clean, pgd, autoattack = (result[f"{n}_accuracy"] for n in ("clean", "pgd", "autoattack"))
    assert (clean["accuracy"], clean["images"]["n"], clean["threat_model"]) == (0.75, 20, None)
    assert clean["interval"][0] < 0.75 < clean["interval"][1]
    assert pgd["threat_model"] == {"norm": "linf", "eps": 0.02}
    assert (pgd["images"]["n"], pgd["seed"], pgd["clean_accuracy"]) == (20, 4, 0.75)
    assert (pgd["attack"]["num_steps"], pgd["attack"]["step_size"]) == (3, 0.02 * 2.5 / 3)
    expected = correct_flags(
        classifier, images, under_attack(PGD(eps=0.02, num_steps=3)),
        settings, Process(), num_images=20,
    )  # fmt: skip
    assert pgd["accuracy"] == expected.double().mean().item()
    labels, predictions = (torch.tensor(pgd["outcomes"][k]) for k in ("label", "prediction"))
    assert (labels == predictions).equal(expected)
    assert sum(map(sum, pgd["confusion"])) == 20
    assert sum(pgd["confusion"][k][k] for k in range(5)) == expected.sum()
    by_class = sum(row["n"] * row["accuracy"] for row in pgd["per_class"])
    assert by_class == pytest.approx(expected.sum().item())
    assert (autoattack["images"]["n"], autoattack["attack"]["version"]) == (4, "quick")
    assert [row["attack"] for row in autoattack["after"]] == ["apgd-ce", "apgd-t"]
    assert autoattack["after"][-1]["accuracy"] == autoattack["accuracy"]
    assert autoattack["forward_passes"] > 100 * 4 * autoattack["accuracy"]
    assert [text.split(":")[0] for text in caplog.messages] == [
        "clean_accuracy", "pgd_accuracy", "after apgd-ce", "after apgd-t", "autoattack_accuracy",
    ]  # fmt: skip


def test_what_is_not_asked_for_is_not_measured() -> None:
    classifier, images = tiny()
    settings = EvaluateSettings(norm="linf", eps=0.02, pgd=None)
    result = evaluate(classifier, images, settings, Process(), num_classes=5)  # type: ignore[arg-type]
    assert result["clean_accuracy"]["images"]["n"] == 40
    assert "pgd_accuracy" not in result and "autoattack_accuracy" not in result


def test_no_attack_is_clean_accuracy() -> None:
    one, other = (flags_of(a, SETTINGS, Process()) for a in (None, under_attack(NoAttack())))
    assert one.equal(other)


def test_nan_is_no_pseudo_label() -> None:
    class Network(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) / x.flatten(1)  # NaN where a pixel is 0

    images = MemoryImages(
        torch.ones(3, 1, 1, 2).index_fill(0, torch.tensor([1]), 0), torch.zeros(3)
    )
    with pytest.raises(ValueError, match="answers 1 of 3 images with NaN"):
        predictions(PixelClassifier(Network()), images, 2, Accelerator(cpu=True))
