"""Scripts that know nothing of attacks train robust models; what cannot be wrapped is refused."""

import logging
import shutil
import sys
from pathlib import Path

import pytest
import scripts
import torch
from accelerate import Accelerator
from launching import Forked
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.functional import cross_entropy

from robust_accel import PGD
from robust_accel.__main__ import main
from robust_accel.commands.wrap import NotWrapped, _Wrapping
from robust_accel.recipe import load_recipe

SCRIPT = str(Path(scripts.__file__))
RECIPE = ("quickstart", "attack.eps=0.15", "attack.step_size=0.1", "attack.num_steps=3")
NORMALISED = ("--mean", str(scripts.MEAN), "--std", str(scripts.STD))


def wrap(kind: str, folder: Path, *settings: str, flags: tuple[str, ...] = NORMALISED) -> int:
    recipe, *rest = RECIPE
    return main(["wrap", "--recipe", recipe, *flags, *rest, *settings, SCRIPT, kind, str(folder)])


def robust_accuracy(folder: Path, model: nn.Module | None = None) -> float:
    """Of the weights that a script has left, on the digits themselves."""
    model = scripts.network() if model is None else model
    model.load_state_dict(torch.load(folder / "weights.pt"))
    model.eval()
    data = scripts.Batches(0, 1)

    def logits(x: Tensor) -> Tensor:
        out = model((x - scripts.MEAN) / scripts.STD)
        return out if isinstance(out, Tensor) else out.logits

    attack = PGD(eps=0.15, step_size=0.05, num_steps=10)
    x_adv = attack(lambda x: cross_entropy(logits(x), data.labels, reduction="none"), data.images)
    with torch.no_grad():
        return (logits(x_adv).argmax(dim=1) == data.labels).float().mean().item()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> float:
    folder = tmp_path_factory.mktemp("plain")
    scripts.main("outside", str(folder))
    return robust_accuracy(folder)


def test_a_script_that_computes_its_loss(
    plain: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, arguments = Accelerator.prepare, sys.argv[:]
    assert wrap("outside", tmp_path) == 0
    assert (Accelerator.prepare, sys.argv) == (prepare, arguments)
    assert robust_accuracy(tmp_path) > plain + 0.2
    output = capsys.readouterr().out
    assert "wrapped Sequential (20,810 parameters to train) of scripts.py" in output
    assert "attack: PGD(norm='linf', eps=0.15" in output
    assert "the script's own, not the recipe's: model, data, optimizer, schedule" in output
    assert "attacked 64 of 64 images, linf perturbation of eps 0.15: median 0.15" in output
    assert "attacked 116 batches a process" in output  # 4 epochs of 29


def test_a_script_that_calls_its_model_with_the_batch(tmp_path: Path) -> None:
    for name in ("plain", "robust"):
        (tmp_path / name).mkdir()
    scripts.main("batch", str(tmp_path / "plain"))
    assert wrap("batch", tmp_path / "robust") == 0
    model = scripts.residual_network()
    robust, plain = (robust_accuracy(tmp_path / name, model) for name in ("robust", "plain"))
    assert robust > plain + 0.1


@pytest.mark.launch
@pytest.mark.parametrize("kind", ["outside", "fsdp2"])
def test_two_processes(kind: str, plain: float, tmp_path: Path) -> None:
    if kind == "fsdp2" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch has FSDP2 on GPUs alone")
    recipe, *settings = RECIPE
    if kind == "outside" or hasattr(FSDPModule, "set_custom_reduce_scatter"):
        settings += ["communication={name: qsgd, compile: false}"]
    command = ("wrap", "--recipe", recipe, *NORMALISED, *settings)
    code, output = Forked(*command, SCRIPT, kind, tmp_path).wait()
    assert code == 0, output
    assert output.count("wrapped") == 1
    assert "attacked 60 batches a process" in output
    assert robust_accuracy(tmp_path) > plain + 0.2


REFUSED = {
    "nothing": "gave no module with parameters to train to Accelerator.prepare",
    "unprepared": "gave no module with parameters to train to Accelerator.prepare",
    "two": "scripts.py prepares several models to train, Sequential and Sequential",
    "eval": "scripts.py: Sequential is trained in eval mode, in which it attacks nothing",
    "parts": "scripts.py: Sequential is trained past its forward",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_wrapped_is_refused_at_its_first_step(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wrap(kind, tmp_path) == 2
    assert REFUSED[kind] in capsys.readouterr().err
    steps = tmp_path / "steps"
    assert not steps.exists() or steps.read_text() == "."


SHARDED = """
import sys
import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
import scripts

accelerator = Accelerator(cpu=True)
model = scripts.network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = accelerator.prepare(model, optimizer)
inner = optimizer.optimizer
inner.param_groups[0]["params"] = [torch.zeros(9, requires_grad=True)]  # as ZeRO does
data = scripts.Batches(scripts.MEAN, scripts.STD)
model.eval()
accelerator.backward(cross_entropy(model(data.images[:8]), data.labels[:8]))
optimizer.step()
open(sys.argv[1] + "/stepped", "w").close()
"""


def test_an_optimizer_whose_parameters_were_replaced_is_the_models_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SHARDED)
    recipe, *settings = RECIPE
    command = ["wrap", "--recipe", recipe, *NORMALISED, *settings, str(script), str(tmp_path)]
    assert main(command) == 2
    assert "is trained in eval mode" in capsys.readouterr().err
    assert not (tmp_path / "stepped").exists()


def test_the_optimizer_of_deepspeeds_configuration_is_the_models_too() -> None:
    """It steps on parameters that are none of the model's, and is a stand-in until prepared."""
    model, elsewhere = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    engine = nn.Sequential(model)
    engine.basic_optimizer = torch.optim.SGD([elsewhere], lr=0.1)
    wrapping = _Wrapping(load_recipe("quickstart"), "train.py", None, None)
    prepare = wrapping.around(lambda accelerator, *given: (engine, *given[1:]))
    prepare(Accelerator(cpu=True), model, object())
    with pytest.raises(NotWrapped, match="never called in training mode"):
        wrapping.before_step(engine.basic_optimizer, (), {})
    wrapping.before_step(torch.optim.SGD([elsewhere], lr=0.1), (), {})  # of something else


OWN = """
import datasets, queue, statistics, sys
from pathlib import Path

import scripts

assert [m.whose for m in (datasets, queue, statistics)] == ["mine"] * 3
scripts.main("outside", sys.argv[1])
"""


def test_a_script_sees_its_own_modules_whatever_is_loaded(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(OWN)
    for name in ("datasets", "statistics", "queue"):
        (tmp_path / f"{name}.py").write_text("whose = 'mine'\nfrom _queue import *\n")
    shutil.copy(SCRIPT, tmp_path)
    before = dict(sys.modules)
    recipe, *settings = RECIPE
    command = ["wrap", "--recipe", recipe, *NORMALISED, *settings, str(script), str(tmp_path)]
    assert main(command) == 0
    assert {name: sys.modules[name] for name in before} == before


RESUMED = """
import sys
import torch
from pathlib import Path
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
import scripts

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model = scripts.network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
model, optimizer = accelerator.prepare(model, optimizer)
data = scripts.Batches(scripts.MEAN, scripts.STD)
folder, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if first:
    accelerator.load_state(folder / str(first))
for step in range(first, last):
    torch.manual_seed(step)
    rows = slice(64 * step, 64 * step + 64)
    accelerator.backward(cross_entropy(model(data.images[rows]), data.labels[rows]))
    optimizer.step()
    optimizer.zero_grad()
    if step == 1:
        accelerator.save_state(folder / "2")
if accelerator.is_main_process:
    torch.save(accelerator.unwrap_model(model).state_dict(), folder / f"{first}-{last}.pt")
accelerator.end_training()
"""


@pytest.mark.long
@pytest.mark.launch
def test_rounding_goes_on_where_a_checkpoint_left_it(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(RESUMED)
    recipe, *settings = RECIPE
    settings += ["communication={name: qsgd, bits: 4, compile: true}"]
    for first, last in ((0, 4), (2, 4)):
        command = ("wrap", "--recipe", recipe, *NORMALISED, *settings, script, tmp_path)
        code, output = Forked(*command, first, last).wait()
        assert code == 0, output
    whole, resumed = (torch.load(tmp_path / f"{first}-4.pt") for first in (0, 2))
    assert all(whole[key].equal(resumed[key]) for key in whole)


def test_a_scripts_own_errors_keep_their_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wrap("broken", tmp_path) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors and "the script's own fault" in errors
    # a normalisation that nobody has told of, at the first batch
    assert wrap("outside", tmp_path, flags=()) == 1
    assert "wrap: --mean, --std" in capsys.readouterr().err
    assert not (tmp_path / "weights.pt").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.name=trades"], "needs labels"),
        (["train.eps_warmup_epochs=2"], "train.eps_warmup_epochs: epochs are the script's"),
        (["train.eps_schedule={shape: sine}"], "train.eps_schedule: epochs are the script's"),
        (["train.awp.warmup_epochs=1"], "train.awp.warmup_epochs: epochs are the script's"),
        (["attack.eps=2"], "attack.eps"),
        (["train.ema_decay=0.9"], "command line: train.ema_decay: wrap does not apply it"),
        (["optimizer.lr=0.5", "output=x"], "command line: output: wrap does not apply it"),
        (["evaluate.pgd=null"], "evaluate.pgd: wrap does not apply it, it is the script's"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(
    settings: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert wrap("outside", tmp_path, *settings) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "weights.pt").exists()


KEEPING = {
    "attack={name: fgsm-pgi, eps: 8/255}": "attack.name: fgsm-pgi keeps the perturbation of each",
    "objective.name=ikl": "objective.name: ikl keeps the mean prediction of each class",
    "objective={name: ikl, weights: image}": "",
}


@pytest.mark.parametrize("setting", KEEPING)
def test_what_only_our_own_loop_can_feed_is_refused_before_the_script_runs(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text("import sys; open(sys.argv[1], 'w').close()")
    recipe, *settings = RECIPE
    ran = tmp_path / "ran"
    command = ["wrap", "--recipe", recipe, *settings, setting, str(script), str(ran)]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert ran.exists() == (KEEPING[setting] == "") == ("keeps" not in said)
    assert f"command line: {KEEPING[setting]}" in said or ran.exists()


def test_what_of_a_shared_recipe_is_not_applied_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "own.yaml"
    settings = "{ema_decay: 0.9, deterministic: true, keep: 2, attack_mode: train}"
    recipe.write_text(f"base: quickstart\ntrain: {settings}\n")
    command = ["wrap", "--recipe", str(recipe), *NORMALISED, "train.eps_warmup_epochs=0"]
    assert main([*command, SCRIPT, "eval", str(tmp_path)]) == 2  # at its first step
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "not the recipe's" in line]
    named = said.partition(": ")[2].split(", ")
    assert named[:4] == ["model", "data", "optimizer", "schedule"]
    assert {"train.epochs", "train.ema_decay", "train.deterministic", "evaluate"} <= {*named}
    assert not {"train.keep", "train.attack_mode", "attack", "output", "certify"} & {*named}


@pytest.mark.parametrize(("flags", "lines"), [((), 1), (("--quiet",), 0)])
def test_what_is_said_is_said_once_whatever_the_script_does_with_logging(
    flags: tuple[str, ...], lines: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "logging_script.py"
    script.write_text(
        "import logging, scripts, sys\n"
        "logging.root.addHandler(logging.StreamHandler(sys.stdout))\n"
        f"scripts.main('eval', {str(tmp_path)!r})\n"  # is refused at its first step
    )
    handlers = logging.root.handlers[:]
    try:
        assert main(["wrap", *flags, "--recipe", "quickstart", *NORMALISED, str(script)]) == 2
    finally:
        logging.root.handlers = handlers
    said = capfd.readouterr()
    assert said.out.count("wrapped Sequential") == lines
    assert "is trained in eval mode" in said.err


def test_commands_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["attack.eps=0.1"], "no script given"),
        (["nowhere.py"], "nowhere.py: no such script"),
        (["--mean", "0.5", SCRIPT], "--mean and --std go together"),
    ):
        flags = arguments[:2] if arguments[0] == "--mean" else []
        rest = arguments[len(flags) :]
        assert main(["wrap", "--recipe", "quickstart", *flags, *rest]) == 2
        assert message in capsys.readouterr().err
