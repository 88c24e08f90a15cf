"""Do our attacks find what the field's references find? Image by image, at equal settings.

Ours beside torchattacks, foolbox, ART, the authors' AutoAttack and RobustBench's benchmark(), on a
run's first test images, which all of them attack as one batch on the CPU in fp32. Everything that
draws gets seed 0, but for RobustBench, which seeds AutoAttack by the clock: "ours, seed 1" shows
what other draws alone change. Of PGD from a random start the numbers are means over the draws. A
peer that is not installed is left out, which is said. RobustBench takes its accuracies in one call:
its clean one takes as long as AutoAttack.

fgsm          one step of eps, no random start; pgd: 20 steps of eps / 4; ddn: 100 steps
ddn           ours, held within the ball; ddn-cut: ours within the whole cube, cut to the ball at
              the end, which is what foolbox does
apgd-ce, ...  each of AutoAttack's attacks alone; autoattack: all of them, one after another
robust        images that are right before and after the attack
differ        images that one side breaks and the other does not
same image    adversarial images that are equal to 1e-4 in every pixel, of those attacked

pip install --no-deps torchattacks foolbox eagerpy gitpython gitdb smmap \\
    adversarial-robustness-toolbox six robustbench torchdiffeq geotorch gdown beautifulsoup4 \\
    soupsieve PySocks git+https://github.com/fra31/auto-attack
(--no-deps keeps the versions of timm and requests that are here; RobustBench needs the authors'
package too, which is not on PyPI: its import name is `autoattack`)

python benchmarks/agreement.py runs/digits --l2 1
python benchmarks/agreement.py runs/digits --attacks ddn --l2 1
"""

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import CrossEntropyLoss

from robust_accel import DDN, PGD, PixelClassifier
from robust_accel.attacks.base import LossFn
from robust_accel.attacks.norms import project
from robust_accel.data import ImageSet, load_test
from robust_accel.evaluation import EvaluateSettings, under_attack
from robust_accel.evaluation.autoattack import ATTACKS_OF, AutoAttackEvaluation, Stage
from robust_accel.evaluation.bench import Bench
from robust_accel.reporting.tables import Table
from robust_accel.settings import Norm
from robust_accel.trained_model import load_model, recipe_of

AUTOATTACK = (*ATTACKS_OF["standard"], "autoattack")  # each alone, then all of them
ATTACKS = ("clean", "fgsm", "pgd", "pgd-random", "ddn", "ddn-cut", *AUTOATTACK)
PGD_STEPS, DDN_STEPS, DRAWS = 20, 100, 5
SAME = 1e-4
NORMS = {"linf": "Linf", "l2": "L2"}  # as RobustBench and AutoAttack write them
FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True, eq=False)
class Case:
    """A classifier, its first N test images and a threat model.

    Args:
        x, labels: [N, C, H, W] in [0, 1] and [N].
        right: [N], bool: those that the classifier gets right, which are attacked.
    """

    classifier: PixelClassifier
    images: ImageSet
    num_classes: int
    settings: EvaluateSettings
    x: Tensor
    labels: Tensor
    right: Tensor

    @property
    def norm(self) -> Norm:
        assert self.settings.norm is not None
        return self.settings.norm

    @property
    def eps(self) -> float:
        assert self.settings.eps is not None
        return self.settings.eps

    @property
    def attacked(self) -> tuple[Tensor, Tensor]:
        return self.x[self.right], self.labels[self.right]


@dataclass(frozen=True)
class Cut:
    """DDN that knows no ball but the whole cube, and its result cut to one: as foolbox does it."""

    ddn: DDN
    eps: float

    def __call__(
        self, loss_fn: LossFn, x: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor:
        return project(self.ddn(loss_fn, x, generator=generator), x, self.eps, "l2")


class Found(NamedTuple):
    """Which images survive, [N], bool; and the attacked ones afterwards, where one can see them."""

    robust: Tensor
    x_adv: Tensor | None = None


Peer = Callable[[Case, str, int], Found | None]
"""case, attack, seed -> what it finds; None if it has no such attack."""


def attack_of(case: Case, attack: str) -> Any:
    """Ours with the settings that all get; None for AutoAttack's and for clean images."""
    eps = case.eps
    if attack == "ddn":
        return DDN(eps=eps, num_steps=DDN_STEPS, gamma=0.05, init_norm=min(1.0, eps))
    if attack == "ddn-cut":
        cube = case.x[0].numel() ** 0.5
        return Cut(DDN(eps=cube, num_steps=DDN_STEPS, gamma=0.05, init_norm=1.0), eps)
    if attack == "fgsm":
        return PGD(norm=case.norm, eps=eps, num_steps=1, step_size=eps, random_start=False)
    if attack in ("pgd", "pgd-random"):
        start = attack == "pgd-random"
        about: dict[str, Any] = {"num_steps": PGD_STEPS, "step_size": eps / 4}
        return PGD(norm=case.norm, eps=eps, **about, random_start=start)
    return None


def survivors(case: Case, attack: str, seed: int) -> Tensor:
    """Which images our evaluation says survive: [N], bool. Nothing else here asks it."""
    images, number = case.images.subset(torch.arange(len(case.x))), len(case.x)
    bench = Bench(case.classifier, images, Accelerator(cpu=True), batch_size=number, seed=seed)
    outcomes = bench.clean()
    if attack in AUTOATTACK:
        evaluation = AutoAttackEvaluation(case.settings, case.num_classes)
        if attack != "autoattack":
            evaluation.stages = [Stage(attack, bf16=False)]
        outcomes, _ = evaluation.run(bench, outcomes)
    elif (made := attack_of(case, attack)) is not None:
        outcomes = bench.attacked(under_attack(made), outcomes)
    return outcomes.right


@cache
def ours(case: Case, attack: str, seed: int) -> Found:
    x_adv = None
    if (made := attack_of(case, attack)) is not None:
        x_adv = under_attack(made).perturb(case.classifier, *case.attacked, seed)
    return Found(survivors(case, attack, seed), x_adv)


def judged(case: Case, x_adv: Tensor) -> Found:
    """The verdict on a peer's images, by the classifier itself."""
    robust = case.right.clone()
    with torch.no_grad():
        robust[case.right] = case.classifier(x_adv).argmax(dim=1) == case.attacked[1]
    return Found(robust, x_adv)


def of_torchattacks(case: Case, attack: str, seed: int) -> Found | None:
    import torchattacks

    if attack not in ("fgsm", "pgd", "pgd-random"):
        return None
    wanted = attack_of(case, attack)
    if attack == "fgsm" and case.norm == "linf":
        theirs = torchattacks.FGSM(case.classifier, eps=case.eps)
    else:  # one step of PGDL2 where FGSM has no L2
        kind = {"linf": torchattacks.PGD, "l2": torchattacks.PGDL2}[case.norm]
        about = {"alpha": wanted.step_size, "steps": wanted.num_steps}
        start = wanted.random_start
        theirs = kind(case.classifier, eps=case.eps, **about, random_start=start)
    torch.manual_seed(seed)
    return judged(case, theirs(*case.attacked))


def of_foolbox(case: Case, attack: str, seed: int) -> Found | None:
    import foolbox.attacks as fa
    from foolbox import PyTorchModel

    model = PyTorchModel(case.classifier, bounds=(0, 1), device="cpu")
    if attack == "clean":
        return Found(model(case.x).argmax(dim=1) == case.labels)
    linf, wanted = case.norm == "linf", attack_of(case, attack)
    if attack == "fgsm":
        theirs = fa.LinfFastGradientAttack() if linf else fa.L2FastGradientAttack()
    elif attack in ("ddn", "ddn-cut") and not linf:
        ddn = wanted.ddn if attack == "ddn-cut" else wanted
        theirs = fa.DDNAttack(init_epsilon=ddn.init_norm, steps=ddn.num_steps, gamma=ddn.gamma)
    elif attack in ("pgd", "pgd-random"):
        kind = fa.LinfProjectedGradientDescentAttack if linf else fa.L2PGD
        start = wanted.random_start
        theirs = kind(abs_stepsize=wanted.step_size, steps=wanted.num_steps, random_start=start)
    else:
        return None
    torch.manual_seed(seed)
    return judged(case, theirs(model, *case.attacked, epsilons=case.eps)[1])


def of_art(case: Case, attack: str, seed: int) -> Found | None:
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(
        case.classifier,
        loss=CrossEntropyLoss(),
        input_shape=tuple(case.x.shape[1:]),
        nb_classes=case.num_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    if attack == "clean":
        logits = model.predict(case.x.numpy(), batch_size=len(case.x))
        return Found(torch.from_numpy(logits).argmax(dim=1) == case.labels)
    x, labels = case.attacked
    about = {"norm": {"linf": np.inf, "l2": 2}[case.norm], "eps": case.eps, "batch_size": len(x)}
    if attack == "fgsm":
        theirs = FastGradientMethod(model, **about)
    elif attack in ("pgd", "pgd-random"):
        wanted = attack_of(case, attack)
        about |= {"eps_step": wanted.step_size, "max_iter": wanted.num_steps, "verbose": False}
        starts = int(wanted.random_start)
        theirs = ProjectedGradientDescent(model, **about, num_random_init=starts)
    else:
        return None
    np.random.seed(seed)  # noqa: NPY002 - what ART draws from
    return judged(case, torch.from_numpy(theirs.generate(x.numpy(), labels.numpy())))


def of_autoattack(case: Case, attack: str, seed: int) -> Found | None:
    from autoattack import AutoAttack

    if attack not in AUTOATTACK:
        return None
    about = {"norm": NORMS[case.norm], "eps": case.eps, "version": "standard", "verbose": False}
    theirs = AutoAttack(case.classifier, **about, seed=seed, device="cpu")
    if attack != "autoattack":
        theirs.attacks_to_run = [attack]
    targets = min(9, case.num_classes - 1)
    theirs.apgd_targeted.n_target_classes = theirs.fab.n_target_classes = targets
    x, labels = case.attacked
    return judged(case, theirs.run_standard_evaluation(x, labels, bs=len(x)))


def of_robustbench(case: Case, attack: str, seed: int) -> Found | None:
    if attack not in ("clean", "autoattack") or case.num_classes < 10:
        return None
    return _benchmark(case)[attack]


@cache
def _benchmark(case: Case) -> dict[str, Found]:
    """RobustBench's benchmark() on our images, which it takes for CIFAR-10's.

    Only its loader of CIFAR-10 is replaced, which would download. It returns two accuracies: the
    verdicts are taken from the images whose accuracy it computes, first clean and then attacked.
    """
    import robustbench.eval
    from robustbench.data import BenchmarkDataset

    verdicts: list[Tensor] = []
    counted = robustbench.eval.clean_accuracy

    def clean_accuracy(model: PixelClassifier, x: Tensor, y: Tensor, **about: Any) -> float:
        with torch.no_grad():
            verdicts.append(model(x).argmax(dim=1) == y)
        return counted(model, x, y, **about)

    def load(n_examples: int, data_dir: str, prepr: Any) -> tuple[Tensor, Tensor]:
        return case.x[:n_examples].clone(), case.labels[:n_examples].clone()

    loaders = {BenchmarkDataset.cifar_10: load}
    with (
        patch("robustbench.data._clean_dataset_loaders", loaders),
        patch("robustbench.eval.clean_accuracy", clean_accuracy),
    ):
        accuracies = robustbench.eval.benchmark(
            case.classifier,
            n_examples=len(case.x),
            dataset="cifar10",
            threat_model=NORMS[case.norm],
            eps=case.eps,
            batch_size=len(case.x),
            device=torch.device("cpu"),
        )
    for verdict, accuracy in zip(verdicts, accuracies, strict=True):
        assert abs(verdict.float().mean().item() - accuracy) < 1e-6, "not what it has counted"
    return dict(zip(("clean", "autoattack"), map(Found, verdicts), strict=True))


def other_draws(case: Case, attack: str, seed: int) -> Found | None:
    """Ours again, where something is drawn."""
    return ours(case, attack, seed + 1) if attack in ("pgd-random", *AUTOATTACK) else None


PEERS: dict[str, tuple[str, str, Peer]] = {  # module, package
    "torchattacks": ("torchattacks", "torchattacks", of_torchattacks),
    "foolbox": ("foolbox", "foolbox", of_foolbox),
    "ART": ("art", "adversarial-robustness-toolbox", of_art),
    "AutoAttack": ("autoattack", "autoattack", of_autoattack),
    "RobustBench": ("robustbench", "robustbench", of_robustbench),
}


def compare(case: Case, attack: str, name: str, peer: Peer) -> list[str] | None:
    """A row of the table; None if the peer has no such attack."""
    draws = DRAWS if attack == "pgd-random" else 1
    robust, theirs, differ, same = [], [], [], ""
    for seed in range(draws):
        with redirect_stdout(sys.stderr):
            found = peer(case, attack, seed)
        if found is None:
            return None
        own = ours(case, attack, seed)
        robust.append(own.robust.sum().item())
        theirs.append(found.robust.sum().item())
        differ.append((own.robust != found.robust).sum().item())
        if draws == 1 and own.x_adv is not None and found.x_adv is not None:
            distance = (own.x_adv - found.x_adv).abs().flatten(1).amax(dim=1)
            same = f"{(distance <= SAME).sum().item()} of {len(distance)}"
    numbers = [f"{fmean(counts):.1f}".removesuffix(".0") for counts in (robust, theirs, differ)]
    title = f"{attack}, {draws} draws" if draws > 1 else attack
    return [f"{case.norm}, {case.eps:.4g}", title, name, *numbers, same]


def installed(names: Sequence[str]) -> dict[str, Peer]:
    """Those of the peers that are there; which, and which not, is printed."""
    peers = {}
    for name in names:
        module, package, peer = PEERS[name]
        if find_spec(module) is None:
            print(f"{name}: not installed, left out")
        else:
            peers[name] = peer
            print(f"{name}: {package} {version(package)}")
    return peers


def cases(args: argparse.Namespace) -> list[Case]:
    """The run under its own threat model, and under those that were asked for."""
    recipe = recipe_of(args.run, (), required=("model", "data", "evaluate"))
    test = load_test(recipe.data)
    images, num_classes = test.images, test.num_classes
    classifier = load_model(args.run).requires_grad_(False)
    first = torch.arange(min(args.images, len(images)))
    ((x, labels),) = images.batches([first], torch.device("cpu"))
    with torch.no_grad():
        right = classifier(x).argmax(dim=1) == labels
    asked: dict[Norm, Any] = {"linf": args.linf, "l2": args.l2}
    if args.linf is None and args.l2 is None:
        asked = {recipe.evaluate.norm or "linf": recipe.evaluate.eps}
    settings = [
        EvaluateSettings(norm=norm, eps=eps, autoattack="standard")
        for norm, eps in asked.items()
        if eps is not None
    ]
    return [Case(classifier, images, num_classes, s, x, labels, right) for s in settings]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a finished run folder")
    parser.add_argument("--images", type=int, default=200, help="the first so many test images")
    parser.add_argument("--linf", help="eps in pixel units, like 8/255; the run's own if no --l2")
    parser.add_argument("--l2", help="eps in pixel units; the run's own if no --linf")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=ATTACKS)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # there benchmarks/autoattack.py would be found for the authors' package
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != FOLDER]
    peers = installed(args.peers)
    print(f"torch {torch.__version__}, {args.threads} thread(s), {platform.machine()}\n")
    head = ["threat model", "attack", "peer", "robust, ours", "robust, theirs", "differ"]
    print(Table([*head, "same image"], []).markdown(), flush=True)
    for case in cases(args):
        for attack in args.attacks:
            for name, peer in {**peers, "ours, seed 1": other_draws}.items():
                row = compare(case, attack, name, peer)
                if row is not None:
                    print(Table(row, []).markdown().splitlines()[0], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
