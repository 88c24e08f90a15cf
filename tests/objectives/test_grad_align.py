"""GradAlign against a gradient known in closed form, and what it cannot work with."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from robust_accel import AWP, PGD, RobustModel, make_robust
from robust_accel.attacks import NoAttack
from robust_accel.attacks.strength import scaled
from robust_accel.min_max import MinMax
from robust_accel.objectives import Adversarial, GradAlign, Trades
from robust_accel.recipe import load_recipe
from robust_accel.recipe_builder import RecipeError

EPS = 0.4


class Bent(nn.Module):
    """Two logits, 0 and s(x) = a x + b x^2 / 2, whose gradient is a + b x."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a = nn.Parameter(torch.randn(12, generator=generator).double())
        self.b = nn.Parameter(5 * torch.randn(12, generator=generator).double())
        self.scale = scale

    def slope(self, x: Tensor) -> Tensor:
        return self.a + self.b * x.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        score = self.scale * (self.a * x + self.b * x.square() / 2).sum(1)
        return torch.stack([torch.zeros_like(score), score], dim=1)


def images(number: int = 6) -> Tensor:
    return torch.rand(number, 3, 2, 2, generator=torch.Generator().manual_seed(2)).double()


def drawn(x: Tensor) -> Tensor:
    """The points that a call draws after ``torch.manual_seed(0)``."""
    torch.manual_seed(0)
    point = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    torch.manual_seed(0)
    return point


def test_value_and_gradient_are_those_of_the_closed_form() -> None:
    model, x, labels = Bent(), images(), torch.tensor([0, 1, 0, 1, 1, 0])
    point = drawn(x)
    found = GradAlign(eps=EPS)(model, x, labels)
    # cross-entropy's slope is a number times the score's, of one sign at both points
    expected = cosine_similarity(model.slope(x), model.slope(point), dim=1).mean()
    assert 0.5 < expected < 0.97
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for own, by_hand in zip(
        torch.autograd.grad(found, [model.a, model.b]),
        torch.autograd.grad(expected, [model.a, model.b]),
        strict=True,
    ):
        torch.testing.assert_close(own, by_hand, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 20.0])
def test_the_size_of_a_gradient_does_not_matter(scale: float) -> None:
    x, labels = images(), torch.zeros(6, dtype=torch.int64)
    drawn(x)
    one = GradAlign(eps=EPS)(Bent(), x, labels)
    drawn(x)
    torch.testing.assert_close(GradAlign(eps=EPS)(Bent(scale), x, labels), one)


def test_an_image_without_a_gradient_takes_no_part() -> None:
    model, x, labels = Bent(), images(), torch.zeros(6, dtype=torch.int64)
    there = torch.tensor([1.0, 0, 1, 1, 0, 1]).double()

    def partly(z: Tensor) -> Tensor:
        return model(z) * there[:, None]

    point = drawn(x)
    found = GradAlign(eps=EPS)(partly, x, labels)
    cosines = cosine_similarity(model.slope(x), model.slope(point), dim=1)
    torch.testing.assert_close(found, cosines[there > 0].mean(), rtol=1e-5, atol=1e-6)
    grads = torch.autograd.grad(found, [model.a, model.b])
    assert all(grad.isfinite().all() for grad in grads)
    assert GradAlign(eps=EPS)(lambda z: 0 * model(z), x, labels) == 0


def test_the_objective_adds_what_is_lacking_to_one() -> None:
    model, x, labels = Bent(), images(), torch.ones(6, dtype=torch.int64)
    plain = Adversarial(clean_weight=0.5).loss(model, x, x + 0.1, labels)
    drawn(x)
    out = Adversarial(clean_weight=0.5, grad_align=GradAlign(eps=EPS, weight=0.3)).loss(
        model, x, x + 0.1, labels
    )
    lacking = 0.3 * (1 - out["grad_alignment"])
    torch.testing.assert_close(out["loss"], plain["loss"] + lacking)
    assert not out["grad_alignment"].requires_grad


def test_descending_it_makes_gradients_alike() -> None:
    model, x, labels = Bent(), images(), torch.ones(6, dtype=torch.int64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    align, met = GradAlign(eps=EPS), []
    for _ in range(60):
        cosine = align(model, x, labels)
        met.append(cosine.item())
        optimizer.zero_grad()
        (1 - cosine).backward()
        optimizer.step()
    assert met[-1] > 0.98 > met[0]


@pytest.mark.parametrize("name", ["test_vit", pytest.param("test_resnet", marks=pytest.mark.long)])
def test_attention_and_batchnorm_are_differentiated_twice(name: str) -> None:
    """And weight perturbation goes with it."""
    model = timm.create_model(name, num_classes=4)
    size = model.default_cfg["input_size"][-1]
    objective = Adversarial(grad_align=GradAlign())
    attack = PGD(num_steps=1, random_start=False)
    for perturbation in (None, AWP(gamma=0.01)):
        robust = RobustModel(model, attack, objective, weight_perturbation=perturbation)
        out = robust(torch.rand(2, 3, size, size), torch.tensor([0, 3]))
        out["loss"].backward()
        assert -1 <= out["grad_alignment"] <= 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_shards_are_refused() -> None:
    model: Any = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    model[1].weight.ds_id = 0  # as ZeRO 3 marks its own
    robust = RobustModel(model, PGD(num_steps=1), Adversarial(grad_align=GradAlign()))
    with pytest.raises(ValueError, match=r"GradAlign, .* needs whole weights, got shards"):
        robust(images().float(), torch.zeros(6, dtype=torch.int64))


BALLS = "[{norm: linf, eps: 0.2}, {norm: l1, eps: 2}]"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["train.compile=true"], r"grad_align: is differentiated twice, which train\.compile"),
        (["train.precision=fp16"], r"grad_align: its derivatives underflow in train\.precision"),
        (
            ["attack.eps=0.1"],
            r"grad_align\.eps: 0\.2 is of an L-inf ball, and the attack's is linf",
        ),
        (["attack.norm=l2"], r"grad_align\.eps: .* the attack's is l2, eps 0\.2"),
        (
            ["attack.norm=l2", "objective.grad_align.eps=null"],
            r"grad_align\.eps: null is of an L-inf ball, and the attack's is l2",
        ),
        (
            ["attack={name: none}", "objective.grad_align.eps=null"],
            r"grad_align\.eps: null is the attack's, which has none: give it",
        ),
        (["objective.grad_align.eps=2"], r"grad_align\.eps: 2 is not allowed: .* at most 1"),
        (
            ["attack={name: multi-norm, balls: " + BALLS + "}"],
            r"grad_align\.eps: is of one L-inf ball, and the attack has balls of other",
        ),
        (["objective.name=trades"], r"objective\.grad_align: unknown key"),
        (["objective.grad_align.weight=0"], r"grad_align\.weight: 0 is not allowed"),
    ],
)
def test_what_it_cannot_work_with_is_refused(settings: list[str], said: str) -> None:
    given = ["objective.grad_align={eps: 0.2}", *settings]
    with pytest.raises(RecipeError, match=said):
        load_recipe("quickstart", given)


def test_a_recipe_without_a_training_is_checked_too() -> None:
    given = ["objective.grad_align={eps: 0.2}", "attack.eps=0.1", "train=null"]
    with pytest.raises(RecipeError, match=r"objective\.grad_align\.eps: 0\.2 is of an L-inf ball"):
        load_recipe("quickstart", given, required=["attack"])


@pytest.mark.parametrize("name", ["grad_align", "cpu_grad_align"])
def test_recipes_that_say_the_default_are_what_they_were(name: str) -> None:
    """What a study knows a training by, and a run goes on by."""
    recipe = load_recipe(f"cifar10/{name}")
    assert recipe.settings["objective"]["grad_align"] == {"eps": 8 / 255, "weight": 0.2}
    assert recipe.chosen["objective"]["grad_align"] == {}


@pytest.mark.parametrize("wrap", [RobustModel, make_robust])
def test_a_script_aligns_in_the_attacks_ball_or_is_refused(wrap: Any) -> None:
    attack = PGD(eps="4/255", num_steps=1)
    for align in (GradAlign(), GradAlign(eps="16/255")):
        with pytest.raises(ValueError, match=r"grad_align\.eps: .*attack's is linf, eps 4/255"):
            wrap(Bent(), attack, Adversarial(grad_align=align))
    for align in (GradAlign(eps="4/255"), GradAlign(eps=None)):
        wrap(Bent(), attack, Adversarial(grad_align=align))
    with pytest.raises(ValueError, match=r"grad_align\.eps: null .* l2, eps 0\.5"):
        wrap(Bent(), PGD(norm="l2", eps=0.5), Adversarial(grad_align=GradAlign(eps=None)))


class Seen(Bent):
    """Keeps what it was shown last."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = x.detach()
        return super().forward(x)


@pytest.mark.parametrize("eps", [None, 0.2])
def test_null_is_the_attacks_eps_as_it_is_and_a_number_stays(
    eps: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    model, attack = Seen(), PGD(eps=0.2, num_steps=1, random_start=False)
    x, labels = torch.full((6, 3, 2, 2), 0.5).double(), torch.ones(6, dtype=torch.int64)
    min_max = MinMax(attack, Adversarial(grad_align=GradAlign(eps=eps)))
    for share in (0.1, 0.5, 1.0):
        min_max.attack = scaled(attack, share)
        min_max.loss(model, x, labels)["loss"].backward()
        moved = (model.last - x).abs().max()
        own = 0.2 * share if eps is None else eps
        assert 0.9 * own < moved <= own + 1e-9
    assert caplog.text.count("GradAlign stays at eps 0.2") == (eps is not None)


def test_without_an_attack_null_is_no_ball() -> None:
    with pytest.raises(ValueError, match=r"eps: null is the attack's, which is unknown"):
        GradAlign(eps=None)(Bent(), images(), torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"grad_align\.eps: null is the attack's, which has none"):
        MinMax(NoAttack(), Adversarial(grad_align=GradAlign(eps=None)))
    MinMax(NoAttack(), Adversarial(grad_align=GradAlign(eps=0.1)))


def test_it_is_no_attack_alone() -> None:
    robust = RobustModel(nn.Flatten(), PGD(), Adversarial(grad_align=GradAlign()))
    with pytest.raises(ValueError, match="computes the loss, and needs labels"):
        robust.min_max.adversarial(robust.classifier, images().float(), "pass labels")
    assert Adversarial() != Adversarial(grad_align=GradAlign())
    with pytest.raises(ValueError, match="grad_align"):
        Trades(grad_align=GradAlign())  # type: ignore[call-arg]
