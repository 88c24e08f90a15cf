"""DDN: as short as a linear model allows, and as strong as the published algorithm."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robust_accel.attacks import DDN
from robust_accel.objectives import LogitLoss, Smoothing, Trades, cross_entropy_of


@pytest.fixture
def linear():
    """Two classes: the distance of an image to the border is known."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64)
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([-weight, weight]))
        model[1].bias.copy_(torch.stack([weight.sum(), torch.zeros(())]) * 1.0)
    distances = torch.tensor([0.05, 0.1, 0.2, 0.4], dtype=torch.float64)
    x = 0.5 + distances[:, None] * weight / weight.norm()
    model[1].bias.data[0] = 0.0  # weights sum to 0: the border goes through grey
    labels = torch.ones(4, dtype=torch.int64)
    return model, x.view(4, 3, 2, 2), labels, distances


@pytest.fixture(scope="module")
def digits():
    """A small network that gets most digits right, and 60 test images."""
    data = load_digits()
    x = torch.tensor(data.images / 16, dtype=torch.float64)[:, None]
    labels = torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    model.double()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x[:1400]), labels[:1400]).backward()
        optimizer.step()
    return model.requires_grad_(False), x[1400:1460], labels[1400:1460]


class Unsure(nn.Module):
    """The same predictions with less confidence in them: no loss is below log 2."""

    def __init__(self, model: nn.Module, share: float) -> None:
        super().__init__()
        self.model, self.share = model, share

    def forward(self, x: Tensor) -> Tensor:
        return self.share * self.model(x)


def shortest_by_the_paper(model: nn.Module, x: Tensor, label: Tensor, num_steps: int) -> float:
    """Algorithm 1 of Rony et al. 2019 for one image, without a ball: the best norm found."""
    delta, norm, best = torch.zeros_like(x), 1.0, math.inf
    for k in range(num_steps):
        x_adv = (x + delta).requires_grad_()
        logits = model(x_adv[None])
        (grad,) = torch.autograd.grad(cross_entropy(logits, label[None]), x_adv)
        step = 0.01 + 0.99 * (1 + math.cos(math.pi * k / num_steps)) / 2
        adversarial = logits.argmax().item() != label.item()
        if adversarial:
            best = min(best, delta.norm().item())
        delta = delta + step * grad / grad.norm()
        norm = norm * (0.95 if adversarial else 1.05)
        delta = (x + norm * delta / delta.norm()).clamp(0, 1) - x
    return best


def robust_accuracy(model: nn.Module, x: Tensor, labels: Tensor, eps: float) -> float:
    loss_fn = cross_entropy_of(model, labels)
    x_adv = DDN(eps=eps, num_steps=40)(loss_fn, x, generator=torch.Generator().manual_seed(0))
    assert (x_adv - x).flatten(1).norm(dim=1).max() <= eps + 1e-9
    return (model(x_adv).argmax(dim=1) == labels).double().mean().item()


@pytest.mark.parametrize("share", [1.0, 0.02])
def test_it_breaks_as_many_images_as_the_published_algorithm(digits, share):
    model, x, labels = digits
    model = Unsure(model, share)
    logits = model(x)
    right = logits.argmax(dim=1) == labels
    assert right.double().mean() > 0.85
    if share < 1:  # no image would be called broken by another line than the prediction
        assert (cross_entropy(logits, labels, reduction="none") > math.log(2)).all()
    lengths = torch.tensor(
        [
            shortest_by_the_paper(model, image, label, 40)
            for image, label in zip(x, labels, strict=True)
        ]
    )
    found = [robust_accuracy(model, x, labels, eps) for eps in (0.25, 0.5, 1.0)]
    expected = [(lengths > eps).double().mean().item() for eps in (0.25, 0.5, 1.0)]
    assert found == pytest.approx(expected, abs=3.1 / 60)
    clean = right.double().mean().item()
    assert clean - 0.02 > found[0] and found[0] - 0.1 > found[1] > found[2] + 0.1


def test_confidence_alone_changes_nothing(digits):
    model, x, labels = digits
    sure, unsure = (
        DDN(eps=0.5, num_steps=10)(cross_entropy_of(Unsure(model, share), labels), x)
        for share in (1.0, 0.5)
    )
    before = model(x).argmax(dim=1) == labels
    for x_adv in (sure, unsure):
        assert torch.equal(x_adv[~before], x[~before])  # wrong already: nothing is shorter
        assert not (x_adv == x).flatten(1).all(dim=1)[before].any()


def test_it_finds_the_shortest_perturbation_within_the_ball(linear):
    model, x, labels, distances = linear
    attack = DDN(eps=0.3, num_steps=100)
    x_adv = attack(cross_entropy_of(model, labels), x)
    length = (x_adv - x).flatten(1).norm(dim=1)
    broken = model(x_adv).argmax(dim=1) != labels
    assert broken.tolist() == [True, True, True, False]  # 0.4 is out of the ball
    assert (length[:3] >= distances[:3] - 1e-9).all()
    assert (length[:3] <= 1.1 * distances[:3]).all()
    assert length[3] == pytest.approx(0.3, rel=1e-6)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert not x_adv.requires_grad


def test_where_there_is_no_gradient_it_goes_in_a_random_direction():
    x = torch.full((4, 3, 2, 2), 0.5)
    flat = LogitLoss(lambda z: 0 * z.flatten(1), torch.zeros(4), lambda logits: logits.sum(dim=1))
    attack = DDN(eps=0.1)
    x_adv = attack(flat, x, generator=torch.Generator().manual_seed(0))
    lengths = (x_adv - x).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((4,), 0.1))
    assert not torch.equal(x_adv[0], x_adv[1])


def test_images_are_judged_by_the_prediction_of_what_is_attacked(digits):
    model, x, labels = digits
    # TRADES: moved away from the clean prediction, be it right or wrong, from where KL is flat
    unlabeled = torch.full_like(labels, -1)
    x_adv = DDN(eps=1.0)(Trades().inner_loss(model, x, unlabeled), x)
    assert (model(x_adv).argmax(dim=1) != model(x).argmax(dim=1)).double().mean() > 0.5
    # smoothing: the mean probability's class
    batch = Smoothing(sigma=0.5, num_noise=3).for_batch(x)
    _, wrong = batch.inner_loss(model, x, labels).judged(x)
    mean = torch.stack([model(x + noise).softmax(dim=1) for noise in batch.noise]).mean(dim=0)
    assert torch.equal(wrong, mean.argmax(dim=1) != labels)
    assert 0 < wrong.sum() < len(wrong)
    # soft labels: their largest; no prediction is wrong
    soft = torch.nn.functional.one_hot(labels, 10).double() * 0.9 + 0.01
    for own in (labels, soft):
        assert torch.equal(
            cross_entropy_of(model, own).judged(x)[1], model(x).argmax(dim=1) != labels
        )
    assert cross_entropy_of(lambda z: model(z) * torch.nan, labels).judged(x)[1].all()


def test_a_plain_function_is_refused_with_what_to_pass(digits):
    model, x, labels = digits
    with pytest.raises(ValueError, match=r"objectives.cross_entropy_of\(model, labels\)"):
        DDN(eps=0.1)(lambda z: cross_entropy(model(z), labels, reduction="none"), x)
    for shape, found in (((10,), r"\[60, 10\]"), ((), r"\[\]")):
        loss_fn = LogitLoss(model, labels, lambda logits, s=shape: logits if s else logits.sum())
        with pytest.raises(ValueError, match=f"one loss an image, .60., got {found}"):
            DDN(eps=0.1)(loss_fn, x)


def test_impossible_settings_are_refused_by_name():
    for settings in ({"eps": 0}, {"num_steps": 0}, {"gamma": 1}, {"init_norm": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            DDN(**{"eps": 0.1} | settings)
    assert DDN(eps="64/255").norm == "l2"


def test_a_length_that_never_becomes_eps_is_told():
    assert DDN(eps=3.0).fault is None
    assert DDN(eps=0.25, init_norm=1.0).fault is None
    short = DDN(eps=1.0, init_norm="64/255", num_steps=10)
    assert short.fault is not None
    assert short.fault.startswith("init_norm: from 0.251, 10 steps of gamma 0.05 get no further")
    x = torch.full((2, 3, 2, 2), 0.5)
    bias = torch.tensor([9.0, 0, 0])  # no image of the ball is of another class
    far = LogitLoss(lambda z: z.mean((2, 3)) + bias, torch.zeros(2), lambda logits: -logits[:, 0])
    lengths = (short(far, x) - x).flatten(1).norm(dim=1)
    assert lengths.max() == pytest.approx(64 / 255 * 1.05**10, rel=1e-4)
