"""The examples run and do what they say."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from launching import ZERO2, Forked

from robust_accel.recipe import load_recipe
from robust_accel.training.run import train

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.long
def test_wrap_a_model() -> None:
    assert load("wrap_a_model").main(epochs=4) > 0.3  # one in ten would be chance


def test_measure_a_model() -> None:
    found = load("measure_a_model").main()
    assert found["clean"] > 0.8
    assert 0.1 < found["autoattack"] < found["clean"]
    assert 1 >= found["radius 0.1"] >= found["radius 0.5"] > 0.2


def test_measure_a_model_has_the_same_model_on_each_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each process begins with a seed of its own; the measurement refuses different models."""
    example = load("measure_a_model")
    models: list[torch.nn.Module] = []

    class Enough(Exception): ...

    def evaluate(model: torch.nn.Module, *_: Any) -> None:
        models.append(model)
        raise Enough

    monkeypatch.setattr(example, "evaluate", evaluate)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with pytest.raises(Enough):
            example.main()
    one, other = (model.state_dict() for model in models)
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.long
def test_transformers_trainer(tmp_path: Path) -> None:
    found = load("transformers_trainer").main(str(tmp_path), epochs=1)
    assert found["test_clean_accuracy"] > 0.2  # one in ten would be chance
    assert found["test_clean_accuracy"] >= found["test_robust_accuracy"] > 0


def test_transformers_trainer_measures_images_that_nothing_was_chosen_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("transformers_trainer")
    images: dict[str, set[int]] = {}

    class Recorded(example.Trainer):  # type: ignore[name-defined, misc]
        def train(self) -> None:
            images["seen"] = {*map(id, self.train_dataset), *map(id, self.eval_dataset)}

        def save_model(self) -> None: ...

        def evaluate(self, rows: Any = None, **_: Any) -> dict[str, float]:
            images["measured"] = {*map(id, self.eval_dataset if rows is None else rows)}
            return {}

    monkeypatch.setattr(example, "Trainer", Recorded)
    example.main(str(tmp_path))
    assert images["measured"] and not images["measured"] & images["seen"]


@pytest.mark.launch
@pytest.mark.long
def test_deepspeed_zero2() -> None:
    script = EXAMPLES / "deepspeed_zero2.py"
    code, output = Forked(environment=ZERO2, script=script).wait()
    assert code == 0, output
    assert "2 processes, DEEPSPEED" in output
    robust = output.split("epoch 3: ")[1].split("robust ")[1].split("%")[0]
    assert int(robust) > 30  # one in ten would be chance


def test_custom_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    settings = ["objective.name=custom_objective:MarginLoss", "objective.margin=2.0"]
    settings += ["train.epochs=2", "attack.num_steps=2", "attack.step_size=0.1"]
    settings += ["evaluate.autoattack=null", "evaluate.pgd=null", f"output={tmp_path / 'run'}"]
    recipe = load_recipe("quickstart", settings)
    assert recipe.objective.margin == 2.0
    assert train(recipe)["clean_accuracy"]["accuracy"] > 0.5


def code_cells(name: str) -> list[dict[str, Any]]:
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.long
def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for cell in code_cells("robust_digits"):
        exec("".join(cell["source"]), names)
    normal, robust = (names["results"][name] for name in ("normal", "robust"))
    assert min(normal.clean.accuracy, robust.clean.accuracy) > 0.9
    assert robust.pgd.accuracy > normal.pgd.accuracy + 0.2
    assert len(names["figure"].axes) == 30 and names["broken"]


def test_the_notebook_renders_as_it_was_run_in_one_go() -> None:
    cells = code_cells("robust_digits")
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    kinds = [kind for cell in cells for out in cell["outputs"] for kind in out.get("data", {})]
    assert {"image/png", "text/html"} <= {*kinds}
    streams = [out["name"] for cell in cells for out in cell["outputs"] if "name" in out]
    assert {*streams} == {"stdout"}  # no progress bars, nor warnings with a machine's paths


@pytest.mark.long
def test_theorem1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    curves = load("theorem1").main(["--quick"])
    between = {  # of the slopes: (4) and (A25) have these
        "T": (-0.7, -0.3),  # -1/2
        "MB": (-1.2, -0.1),  # -1/2
        "b": (-2.2, -0.2),  # -1 and -2, or half of them
        "epsilon": (1.0, 2.5),  # 1, an upper bound
    }
    assert {curve.term for curve in curves} == set(between)
    for curve in curves:
        low, high = between[curve.term]
        assert low < curve.slope().mean < high, curve

    page = tmp_path / "theorem1.md"
    figure = load("theorem1_figure")
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"theorem1\.md must hold"):
        figure.write(curves, tmp_path)
    page.write_text(f"above\n{figure.BEGIN}\nold\n{figure.END}\nbelow\n")
    figure.write(curves, tmp_path)
    assert page.read_text().count("\n| ") == 1 + len(curves)
    assert page.read_text().startswith("above\n") and page.read_text().endswith("\nbelow\n")
    assert "old" not in page.read_text()
    assert (tmp_path / "theorem1.png").exists() and (tmp_path / "theorem1.svg").exists()


def test_theorem1_gradients_are_those_of_phi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = load("theorem1")
    problem = example.Problem(2, seed=3)
    theta = problem.normal(2, example.D).div(4).requires_grad_()
    delta = example.maximise(theta.detach(), problem.x, problem.y, 1e-3, 0.25).requires_grad_()
    margin = problem.y * example.forward(theta, problem.x + delta)
    ridge = example.RIDGE * (theta.square() / (1 + theta.square())).sum()
    price = example.GAMMA / 2 * delta.square().sum()
    loss = torch.nn.functional.softplus(-margin).sum()
    (inner,) = torch.autograd.grad(loss - price, delta, retain_graph=True)
    assert 5e-4 < inner.norm(dim=-1).max() <= 1e-3  # just under the tolerance
    (outer,) = torch.autograd.grad(loss / example.N + ridge, theta)
    found = example.gradient(theta.detach(), problem.x + delta.detach(), problem.y)
    torch.testing.assert_close(found, outer)


def test_theorem1_quick_is_not_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit):
        load("theorem1").main(["--quick", "--write", "docs"])
    assert "--quick is too small to be written" in capsys.readouterr().err
