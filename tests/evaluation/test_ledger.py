"""One thing changed, and nothing is taken from what was measured before."""

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robust_accel.data import MemoryImages
from robust_accel.evaluation import EvaluateSettings, bench, evaluate
from robust_accel.evaluation.autoattack import AutoAttackEvaluation
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.certify_images import CertifySettings, certify_images
from robust_accel.evaluation.identity import digest_of_function
from robust_accel.evaluation.ledger import Ledger, read_records, shown
from robust_accel.files import as_json
from robust_accel.models import PixelClassifier
from robust_accel.run_folder import RunFolder

VARYING = (
    "seconds",
    "wall_seconds",
    "time",
    "key",
    "function",
    "num_processes",
)  # between two runs of the same


SHAPE = (1, 6, 6)


class Scaled(nn.Module):
    """An option that no weight shows."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Scaled(3.0),
            nn.Flatten(), nn.Linear(96, 5),
        )  # fmt: skip


def pictures() -> MemoryImages:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(1, 255, (12, 1, 6, 6), generator=generator, dtype=torch.uint8)
    classifier = PixelClassifier(network(), mean=0.5, std=0.25).eval()
    return MemoryImages(images, classifier(images.float() / 255).argmax(dim=1))


def named(classifier: PixelClassifier) -> PixelClassifier:
    classifier.class_names = ("ant", "bee", "cat", "dog", "eel")
    return classifier


@dataclass
class Case:
    """All that decides a measurement."""

    classifier: PixelClassifier = field(
        default_factory=lambda: named(PixelClassifier(network(), mean=0.5, std=0.25))
    )
    images: MemoryImages = field(default_factory=pictures)
    settings: dict[str, Any] = field(
        default_factory=lambda: {
            "norm": "linf",
            "eps": 0.02,
            "pgd": {"num_steps": 3, "step_size": 0.01},
            "autoattack": "quick",
            "batch_size": 5,
            "seed": 0,
        }
    )
    certify: dict[str, Any] = field(
        default_factory=lambda: {"sigma": 0.1, "n0": 10, "n": 40, "alpha": 0.05, "radii": (0.05,)}
    )

    def measured(self, folder: Path) -> dict[str, Any]:
        accelerator = Accelerator(cpu=True)
        result = evaluate(
            self.classifier.eval(),
            self.images,
            EvaluateSettings(**self.settings),
            accelerator,
            num_classes=5,
            folder=RunFolder(folder),
        )
        on = Bench(
            self.classifier,
            self.images,
            accelerator,
            batch_size=1,
            seed=self.settings["seed"],
            ledger=Ledger(folder, accelerator),
        )
        given = CertifySettings(**self.certify | {"seed": self.settings["seed"]})
        result["certified"] = certify_images(on, torch.arange(len(self.images)), given)
        return as_json(result)


def flip_bit(tensor: Tensor) -> None:
    """The smallest change of one element."""
    flat = tensor.detach().view(-1)
    flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf))


def change_setting(**new: Any) -> Callable[[Case], None]:
    return lambda case: case.settings.update(new)


def change_certify(**new: Any) -> Callable[[Case], None]:
    return lambda case: case.certify.update(new)


def change_pgd(**new: Any) -> Callable[[Case], None]:
    return lambda case: case.settings.update(pgd=case.settings["pgd"] | new)


def change_pixel(case: Case) -> None:
    case.images.images[0, 0, 0, 0] += 1


def change_label(case: Case) -> None:
    case.images.labels[0] = (case.images.labels[0] + 1) % 5


def swap_images(case: Case) -> None:
    order = torch.tensor([1, 0, *range(2, 12)])
    case.images = case.images.subset(order)


def change_statistics(case: Case) -> None:
    case.classifier = named(PixelClassifier(network(), mean=0.5, std=0.250001))


def change_size(case: Case) -> None:
    case.classifier = named(PixelClassifier(network(), mean=0.5, std=0.25, size=(6, 6)))


def change_option(case: Case) -> None:
    case.classifier.model[3].scale = 3.1  # type: ignore[index]


def change_module(case: Case) -> None:
    case.classifier.model[2] = nn.LeakyReLU(1e-6)  # type: ignore[index]


def change_dtype(case: Case) -> None:
    case.classifier.model.double()


def change_hook(case: Case) -> None:
    case.classifier.model[4].register_forward_hook(lambda *_: None)  # type: ignore[index]


def reorder_classes(case: Case) -> None:
    first, *rest = case.classifier.class_names or ()
    case.classifier.class_names = (*rest, first)


ALL = {"clean_accuracy", "pgd_accuracy", "autoattack_accuracy", "certified"}
CHANGES: dict[str, tuple[Callable[[Case], None], set[str]]] = {
    "a weight by one bit": (lambda c: flip_bit(c.classifier.model[0].weight), ALL),  # type: ignore[index]
    "a buffer by one bit": (lambda c: flip_bit(c.classifier.model[1].running_var), ALL),  # type: ignore[index]
    "std": (change_statistics, ALL),
    "size": (change_size, ALL),
    "an option": (change_option, ALL),
    "a module": (change_module, ALL),
    "a hook": (change_hook, ALL),
    "dtype": (change_dtype, ALL),
    "a pixel by one": (change_pixel, ALL),
    "a label": (change_label, ALL),
    "the order of images": (swap_images, ALL),
    "the order of classes": (reorder_classes, ALL),
    "seed": (change_setting(seed=1), ALL),
    "eps": (change_setting(eps=0.021), {"pgd_accuracy", "autoattack_accuracy"}),
    "norm": (change_setting(norm="l2"), {"pgd_accuracy", "autoattack_accuracy"}),
    "steps": (change_pgd(num_steps=4), {"pgd_accuracy"}),
    "step size": (change_pgd(step_size=0.011), {"pgd_accuracy"}),
    "restarts": (change_pgd(restarts=2), {"pgd_accuracy"}),
    "version": (change_setting(autoattack="rand"), {"autoattack_accuracy"}),
    "sigma": (change_certify(sigma=0.11), {"certified"}),
    "samples": (change_certify(n=41), {"certified"}),
    "first samples": (change_certify(n0=11), {"certified"}),
    "alpha": (change_certify(alpha=0.04), {"certified"}),
    "method": (change_certify(method="sequential"), {"certified"}),
    "radii": (change_certify(radii=(0.05, 0.07)), {"certified"}),
}


# Whether what is measured is compared with what is measured from the start, too: in the default run
# of one change of each kind, of the others among the long tests.
EACH_KIND = (
    "a weight by one bit", "an option", "a pixel by one", "the order of classes", "seed", "eps",
    "steps", "version", "samples",
)  # fmt: skip
CASES = [pytest.param(name, True, id=name) for name in EACH_KIND]
for other in [name for name in CHANGES if name not in EACH_KIND]:
    CASES += [
        pytest.param(other, False, id=f"{other}, keys"),
        pytest.param(other, True, id=other, marks=pytest.mark.long),
    ]


# units of other images may be taken; a unit's images in another order are another unit, one is not
ONE_IMAGE = ("a pixel by one", "a label", "the order of images", "the order of classes")


def kept_units(folder: Path) -> int:
    return sum(len(p.read_text().splitlines()) for p in (folder / "measurements").glob("process-*"))


def comparable(record: dict[str, Any]) -> dict[str, Any]:
    found = {k: v for k, v in record.items() if k not in VARYING}
    return found | {"outcomes": {k: v for k, v in found["outcomes"].items() if k != "seconds"}}


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Five steps of APGD: what it finds is not the question here."""
    attack_of = AutoAttackEvaluation._attack

    def shorter(*arguments: Any) -> Any:
        attack = attack_of(*arguments)
        attack.n_iter = 5
        return attack

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoAttackEvaluation, "_attack", shorter)
        yield


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("before")
    return folder, Case().measured(folder)


@pytest.mark.parametrize(("name", "whole"), CASES)
def test_what_one_change_touches_is_measured_anew(
    name: str, whole: bool, before: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    change, touched = CHANGES[name]
    folder, base = before
    case = Case()
    change(case)
    used = shutil.copytree(folder, tmp_path / "used")
    result = case.measured(used)
    for key in ALL:
        assert (result[key]["key"] != base[key]["key"]) == (key in touched), key
    records = read_records(used)
    assert len(records) == 4 + len(touched)
    assert len({record["key"] for record in records}) == len(records)
    if not whole:
        return
    fresh = copy.deepcopy(case).measured(tmp_path / "fresh")
    for key in ALL:
        assert comparable(result[key]) == comparable(fresh[key]), key
    if touched == ALL and name not in ONE_IMAGE:
        new = kept_units(used) - kept_units(folder)
        assert new == kept_units(tmp_path / "fresh")  # no unit was taken either


def test_nothing_changed_is_not_measured_again(
    before: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, base = before
    used = shutil.copytree(folder, tmp_path / "used")

    def forbidden(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(Bench, "_judged", forbidden)
    again = Case().measured(used)
    assert all(again[key] == base[key] for key in ALL)
    assert kept_units(used) == kept_units(folder)
    assert len(read_records(used)) == 4


def test_layout_modes_and_compilation_are_no_other_function() -> None:
    one = digest_of_function(Case().classifier, SHAPE)
    other = Case().classifier.train().to(memory_format=torch.channels_last).requires_grad_(False)
    other.model.compile()
    assert digest_of_function(other, SHAPE) == one
    assert digest_of_function(copy.deepcopy(other), SHAPE) == one


def test_models_that_only_look_alike_are_told_apart_by_their_answers(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, Accelerator(cpu=True))
    one = [[1.0, -2.0], [0.5, 3.0]]
    assert ledger.function("d", one) == "d"
    other = ledger.function("d", [[1.0, -2.0], [0.5, 2.0]])
    assert other != "d"
    assert ledger.function("d", [[1.001, -2.001], [0.5, 3.0]]) == "d"  # rounded otherwise
    assert ledger.function("d", [[1.0, -2.0], [0.5, 2.0]]) == other
    assert ledger.function("e", one) == "e"


def test_more_images_begin_with_what_fewer_have_done(tmp_path: Path) -> None:
    few = Case()
    few.settings |= {"images": 5, "autoattack": None}
    few.measured(tmp_path)
    kept = kept_units(tmp_path)
    more = replace(few, settings=few.settings | {"images": 10})
    result = more.measured(tmp_path)
    assert kept_units(tmp_path) == kept + 2  # one unit of clean images and one of PGD
    fresh = replace(few, settings=more.settings).measured(tmp_path / "fresh")
    assert comparable(result["pgd_accuracy"]) == comparable(fresh["pgd_accuracy"])


def test_other_processes_may_not_hold_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    on = Bench(case.classifier, case.images, Accelerator(cpu=True), batch_size=5)
    monkeypatch.setattr(bench, "told_to_all", lambda items, _: [*items, "another"])
    with pytest.raises(ValueError, match="different models"):
        _ = on.function


# ---- views ---------------------------------------------------------------------------------------


def row(key: str, images: range, eps: float = 0.1, **more: Any) -> dict[str, Any]:
    about = {"key": key, "purpose": "accuracy", "function": "a", "attack": {"name": "pgd"}}
    about |= {"threat_model": {"norm": "linf", "eps": eps}, "versions": {"torch": "1"}}
    return about | {"outcomes": {"image": [str(i) for i in images]}} | more


def keys(records: list[dict[str, Any]]) -> list[str]:
    return [record["key"] for record in records]


def test_views_show_this_model_and_the_most_images() -> None:
    records = [
        row("large", range(100)),
        row("some of these", range(10)),
        row("other eps", range(10), eps=0.2),
        row("other model", range(1000), function="b"),
        row("the same later", range(10), eps=0.2),
        row("other images", range(200, 205)),
        row("other seed", range(10), seed=1),
        row("other code", range(20), versions={"torch": "2"}),
    ]
    expected = ["large", "the same later", "other images", "other seed", "other code"]
    assert keys(shown(records, "a")) == expected
    assert keys(shown(records, "b")) == ["other model"]
    every = keys(shown(records, "a", everything=True))
    assert every == [r["key"] for r in records if r["key"] != "other model"]
    assert all("outcomes" not in record for record in shown(records, "a"))
    later = [*records, row("more", range(150), versions={"torch": "2"})]
    assert keys(shown(later, "a")) == [*expected[1:-1], "more"]


def test_a_record_is_json_whatever_was_measured(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, Accelerator(cpu=True))
    kept = ledger.record("k", {"loss": float("nan"), "size": (1, 2), "high": float("inf")})
    assert (kept["loss"], kept["size"], kept["high"]) == (None, [1, 2], None)
    (line,) = (tmp_path / "measurements.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == kept
    assert ledger.record("k", {"loss": 1.0}) == kept  # appended once, and never changed
