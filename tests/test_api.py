"""The commands as functions: typed settings in, tables out, the same records."""

import json
from pathlib import Path

import pytest
import torch

from robust_accel import (
    PGD,
    QSGD,
    CertifySettings,
    EvaluateSettings,
    Run,
    certify,
    evaluate,
    load_run,
    train,
)
from robust_accel.data import load_test
from robust_accel.recipe import load_recipe
from robust_accel.reporting.report import comparison_table
from robust_accel.reporting.tables import short_table

ATTACK = PGD(eps="0.1", num_steps=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(
        "quickstart",
        output=tmp_path_factory.mktemp("api") / "run",
        train={"max_steps": 8},
        attack=ATTACK,
        evaluate=EvaluateSettings(images=40, autoattack=None),
    )


def test_a_run_is_what_the_command_leaves(run: Run) -> None:
    recipe = run.report["recipe"]
    assert recipe["attack"] == {"name": "pgd"} | ATTACK.model_dump(mode="json")
    assert recipe["train"]["max_steps"] == 8 and recipe["evaluate"]["images"] == 40
    assert repr(run) == comparison_table([run.path])
    assert load_run(run.path) == run
    assert run.clean and run.pgd and run.clean.images == run.pgd.images == 40
    assert run.pgd.threat_model == {"norm": "linf", "eps": 0.1}
    assert run.autoattack is None and run.certificate is None
    assert run.metrics[-1]["step"] == 8
    cells = run._repr_html_().count("<td>")
    assert cells == repr(run).split("\n")[-1].count(" | ") + 1


def test_more_is_measured_and_nothing_twice(run: Run) -> None:
    given = EvaluateSettings(pgd={"num_steps": 3}, autoattack="quick", autoattack_images=40)
    more = run.evaluate(given)
    assert more.autoattack and more.autoattack.images == 40
    assert {one.attack.get("num_steps") for one in more.measurements} >= {3, 20}
    assert more.clean and run.clean and more.clean.record["time"] == run.clean.record["time"]
    certified = run.certify(CertifySettings(sigma="0.1", n=200, images=3)).certificate
    assert certified and certified.images == 3 and certified.attack["n"] == 200


def test_what_is_quoted_is_what_was_asked_for(run: Run) -> None:
    """Also what was measured before, and where others are of more images."""
    many, few = {"n": 60, "n0": 10, "images": 3}, {"n": 50, "n0": 10, "images": 2}
    asked = [("0.1", many, (0.05,)), ("0.2", few, (0.05,)), ("0.1", many, (0.07, 0))]
    for sigma, how, radii in [*asked, *asked[:2]]:
        found = run.certify(CertifySettings(sigma=sigma, radii=radii, **how)).certificate
        assert found and found.images == how["images"] and found.attack["sigma"] == float(sigma)
        assert [point["radius"] for point in found.record["radii"]] == sorted(radii)
        assert found.threat_model == {"norm": "l2", "eps": min(radii)}
    for eps, images in ((0.1, 9), (0.05, 5), (0.1, 9)):
        pgd = run.evaluate(EvaluateSettings(eps=eps, images=images, train_images=None)).pgd
        assert pgd and (pgd.threat_model or {})["eps"] == eps and pgd.images == images


def test_any_module_and_its_images_give_the_runs_own_verdicts(run: Run) -> None:
    recipe = load_recipe(run.path / "recipe.yaml")
    images = load_test(recipe.data, ids=None, num_classes=None).images.subset(torch.arange(40))
    ((x, labels),) = images.batches([torch.arange(40)], torch.device("cpu"))
    model = run.load()
    found = evaluate(model, x, labels, EvaluateSettings(eps="0.1"))
    assert found.clean and found.pgd and run.clean and run.pgd
    for own, other in ((found.clean, run.clean), (found.pgd, run.pgd)):
        assert own.accuracy == other.accuracy and own.attack == other.attack
    assert found.model["function"] == run.model["function"]
    assert f"| {100 * found.pgd.accuracy:.2f} [" in repr(found)
    radii = certify(model, x[:3], labels[:3], CertifySettings(sigma="0.1", n=200)).certificate
    of_run = run.certify(CertifySettings(sigma="0.1", n=200, images=3)).certificate
    assert radii and of_run and radii.record["radii"] == of_run.record["radii"]


def test_what_is_wrong_is_said_before_anything_is_spent(run: Run, tmp_path: Path) -> None:
    here = tmp_path / "run"
    cases = [
        (lambda: train("quickstart", output=run.path), "already holds a run"),
        (lambda: train("quickstrat"), "quickstart"),
        (lambda: train("quickstart", output=here, attack=QSGD()), "attack: a QSGD .*PGD.*Class"),
        (lambda: train("quickstart", output=here, evaluate=ATTACK), "evaluate: a PGD .*Evaluate"),
        (
            lambda: train("quickstart", output=here, train={"epoch": 3}),
            r"train\(\): train.epoch: unknown key \(did you mean epochs\?\)",
        ),
        (lambda: load_run(here), f"{here}: no such folder"),
        (lambda: run.evaluate(EvaluateSettings(norm="l2", eps=0.1, sweep={"eps": [-1]})), "sweep"),
    ]
    for call, said in cases:
        with pytest.raises(ValueError, match=said):
            call()
    assert not here.exists()


def test_of_images_at_hand_none_are_chosen_by_a_setting() -> None:
    for settings in ({"ids": [1]}, {"train_images": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))} are not taken here"):
            evaluate(torch.nn.Identity(), [], [], EvaluateSettings(eps=0.1, **settings))
    with pytest.raises(ValueError, match="sigma is missing"):
        certify(torch.nn.Identity(), [], [], CertifySettings())


def test_settings_say_their_faults_as_recipes_do() -> None:
    with pytest.raises(ValueError, match=r"^esp: unknown key \(did you mean eps\?\); allowed: "):
        PGD(esp=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^eps: -1 is not allowed: .*; num_steps: 0 is not"):
        PGD(eps=-1, num_steps=0)


def test_a_terminal_is_not_a_page(run: Run) -> None:
    """What a stranger's folder says is no markup, in neither."""
    report = json.loads((run.path / "report.json").read_text())
    report["measurements"][0]["purpose"] = "accuracy<script>"
    table = short_table(report["measurements"])
    assert "<script>" not in table.html() and "<script>" not in table.markdown()
