"""What every attack keeps to, whatever its norm and number of steps."""

import pytest
import torch
from torch import Tensor, nn

from robust_accel.attacks import (
    APGD,
    ATTACKS,
    DDN,
    FGSMPGI,
    FGSMRS,
    NFGSM,
    PGD,
    MultiNorm,
    NoAttack,
)
from robust_accel.attacks.base import gradients_seen, input_gradient
from robust_accel.attacks.norms import lengths
from robust_accel.objectives import cross_entropy_of

EPS = 8 / 255
BALL_ATTACKS = {
    "pgd-linf": PGD(eps=EPS, num_steps=4),
    "pgd-linf-from-x": PGD(eps=EPS, num_steps=4, random_start=False),
    "pgd-l2": PGD(norm="l2", eps=0.5, step_size=0.2, num_steps=4),
    "pgd-l2-from-x": PGD(norm="l2", eps=0.5, step_size=0.2, num_steps=4, random_start=False),
    "fgsm-rs": FGSMRS(eps=EPS),
    "fgsm-pgi": FGSMPGI(eps=EPS),
    "apgd-linf": APGD(eps=EPS, num_steps=5),
    "apgd-l2": APGD(norm="l2", eps=0.5, num_steps=5),
    "pgd-l1": PGD(norm="l1", eps=2.0, num_steps=4),
    "pgd-l1-from-x": PGD(norm="l1", eps=2.0, num_steps=4, random_start=False),
    "apgd-l1": APGD(norm="l1", eps=2.0, num_steps=5),
}
BALLS = ({"norm": "linf", "eps": EPS}, {"norm": "l2", "eps": 0.5}, {"norm": "l1", "eps": 0.5})
MOVING = BALL_ATTACKS | {
    "n-fgsm": NFGSM(eps=EPS),
    "max": MultiNorm(balls=BALLS, strategy="max", num_steps=4),
    "random": MultiNorm(balls=BALLS, strategy="random", by="pgd", num_steps=4),
}
EVERY = MOVING | {"none": NoAttack(), "ddn": DDN(eps=0.5, num_steps=2)}


def params(attacks: dict) -> list:
    return [pytest.param(attack, id=name) for name, attack in attacks.items()]


def classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
    )


def problem(num_images: int = 6, dtype: torch.dtype = torch.float32):
    """Images with a third of their pixels at 0, a third at 1; a network in eval mode."""
    x = torch.rand(num_images, 3, 6, 6, dtype=dtype)
    x = torch.where(x < 1 / 3, 0.0, torch.where(x > 2 / 3, 1.0, x)).to(dtype)
    labels = torch.arange(num_images) % 5
    model = classifier()
    model(x.float())
    return x, labels, model.to(dtype).eval()


def excess(attack: object, x_adv: Tensor, x: Tensor) -> float:
    """By how much the furthest image lies outside its ball; of several, the one it suits best."""
    balls = getattr(attack, "balls", None) or [attack]
    found = [lengths(x_adv - x, getattr(ball, "norm", "linf")) - ball.eps for ball in balls]
    return torch.stack(found).amin(dim=0).max().item()


def test_every_named_attack_is_tested_here():
    assert set(ATTACKS.values()) == {type(attack) for attack in EVERY.values()}


@pytest.mark.parametrize("attack", params(BALL_ATTACKS))
@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0], ids=["corner", "border", "anywhere"])
def test_result_lies_in_the_ball_and_in_the_box(attack, spread):
    x, labels, model = problem()
    x = (x.round() + spread * (torch.rand_like(x) - 0.5)).clamp(0, 1)
    x_adv = attack(cross_entropy_of(model, labels), x)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert excess(attack, x_adv, x) <= 1e-6


@pytest.mark.parametrize("attack", params(BALL_ATTACKS))
def test_the_budget_is_used(attack):
    # inside the box and along one gradient, the whole radius is reached
    x = torch.full((3, 3, 6, 6), 0.5)
    w = torch.rand(3, 6, 6) + 0.5
    attack = attack.model_copy(update={"num_steps": 20}) if isinstance(attack, PGD) else attack
    x_adv = attack(lambda x: (w * x).sum((1, 2, 3)), x)
    assert abs(excess(attack, x_adv, x)) < 1e-5


@pytest.mark.parametrize("attack", params(MOVING))
def test_raises_the_loss_of_each_image(attack):
    x, labels, model = problem(24)
    loss_fn = cross_entropy_of(model, labels)
    with torch.no_grad():
        gain = loss_fn(attack(loss_fn, x)) - loss_fn(x)
    assert (gain > 0).all()


@pytest.mark.parametrize("attack", params(EVERY))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_is_detached_and_like_the_input(attack, dtype):
    x, labels, model = problem(dtype=dtype)
    x_adv = attack(cross_entropy_of(model, labels), x.clone().requires_grad_())
    assert not x_adv.requires_grad
    assert x_adv.grad_fn is None
    assert (x_adv.shape, x_adv.dtype, x_adv.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("attack", params(EVERY))
def test_the_images_are_left_as_they_were(attack):
    x, labels, model = problem()
    before = x.clone()
    attack(cross_entropy_of(model, labels), x)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert x.grad is None


@pytest.mark.parametrize("attack", params(EVERY))
def test_a_generator_decides_everything_and_the_global_one_is_left_alone(attack):
    x, labels, model = problem()
    loss_fn = cross_entropy_of(model, labels)
    state = torch.get_rng_state()
    first, second = (
        attack(loss_fn, x, generator=torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["pgd-linf", "pgd-l2", "pgd-l1", "fgsm-rs", "n-fgsm", "fgsm-pgi"])
def test_without_a_generator_the_global_one_is_used(name):
    x, labels, model = problem()
    loss_fn = cross_entropy_of(model, labels)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return MOVING[name](loss_fn, x)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@pytest.mark.parametrize("name", ["pgd-linf-from-x", "pgd-l2-from-x", "pgd-l1-from-x"])
def test_an_image_does_not_depend_on_the_others_in_its_batch(name):
    # double precision: sums of another order must not flip a sign
    x, labels, model = problem(dtype=torch.float64)
    together = MOVING[name](cross_entropy_of(model, labels), x)
    for i in range(len(x)):
        alone = MOVING[name](cross_entropy_of(model, labels[i : i + 1]), x[i : i + 1])
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("attack", params(MOVING))
@pytest.mark.parametrize("scale", [1e-12, 1e-25, 1e-38, 1e25])
def test_the_scale_of_the_loss_does_not_matter(attack, scale):
    x, _, _ = problem()
    w = torch.randn(3, 6, 6)
    results = [
        attack(
            lambda x, s=s: (s * w * x).sum((1, 2, 3)), x, generator=torch.Generator().manual_seed(3)
        )
        for s in (1.0, scale)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("attack", params(MOVING))
def test_no_gradient_leaves_an_image_at_its_start(attack):
    x, _, _ = problem()
    flat = attack(lambda x: 0 * x.sum((1, 2, 3)), x)
    assert flat.isfinite().all()
    if getattr(attack, "random_start", True) is False:
        assert torch.equal(flat, x)
    else:
        # N-FGSM's noise is twice as long as its step
        assert excess(attack, flat, x) <= (EPS if isinstance(attack, NFGSM) else 0) + 1e-6


@pytest.mark.parametrize("attack", params(MOVING))
def test_one_image_without_gradient_does_not_disturb_the_others(attack):
    x, _, _ = problem()
    w = torch.randn_like(x)
    full, part = (
        attack(
            lambda x, m=m: (m * w * x).sum((1, 2, 3)), x, generator=torch.Generator().manual_seed(3)
        )
        for m in (torch.ones(6, 1, 1, 1), torch.tensor([0.0, 1, 1, 1, 1, 1]).view(6, 1, 1, 1))
    )
    assert torch.equal(full[1:], part[1:])


@pytest.mark.parametrize("attack", params(MOVING))
def test_works_where_gradients_are_switched_off(attack):
    x, labels, model = problem()
    loss_fn = cross_entropy_of(model, labels)
    expected = attack(loss_fn, x, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found = attack(loss_fn, x, generator=torch.Generator().manual_seed(7))
        assert not torch.is_grad_enabled()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("attack", params(MOVING))
def test_bf16_autocast_keeps_the_images_and_the_ball_in_fp32(attack):
    x, labels, model = problem(24)
    loss_fn = cross_entropy_of(model, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        x_adv = attack(loss_fn, x)
    assert x_adv.dtype == torch.float32
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    if not isinstance(attack, NFGSM):
        assert excess(attack, x_adv, x) <= 1e-6
    with torch.no_grad():
        assert loss_fn(x_adv).mean() > loss_fn(x).mean()


@pytest.mark.parametrize("attack", params(EVERY))
def test_no_parameter_is_given_a_gradient(attack):
    x, labels, model = problem()
    attack(cross_entropy_of(model, labels), x)
    assert all(p.grad is None for p in model.parameters())


class Root(nn.Module):
    """A network whose gradient is infinite at black pixels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.sqrt())


@pytest.mark.parametrize("attack", params(EVERY))
def test_gradients_that_are_not_finite_hold_no_other_pixel_and_no_other_image(attack):
    x, labels, model = problem(dtype=torch.float64)
    loss_fn = cross_entropy_of(Root(model), labels)
    x = x.clamp(0.6, 1)  # no attack reaches black from here
    is_l1 = getattr(attack, "norm", "") == "l1"
    attack = attack.model_copy(update={"eps": 0.5}) if is_l1 else attack
    is_l1 = is_l1 or isinstance(attack, MultiNorm)
    clean = attack(loss_fn, x, generator=torch.Generator().manual_seed(7))
    spoilt = x.clone()
    spoilt[:3, :, :3] = 0
    with gradients_seen() as seen:
        x_adv = attack(loss_fn, spoilt, generator=torch.Generator().manual_seed(7))
    assert x_adv.isfinite().all()
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    torch.testing.assert_close(x_adv[3:], clean[3:], rtol=0, atol=1e-12)
    if isinstance(attack, NoAttack):
        return
    # a step of L1 follows the largest entries alone, which are those that were infinite
    others = slice(0 if is_l1 else 3, None)
    assert not torch.equal(x_adv[:3, :, others], spoilt[:3, :, others]) or isinstance(attack, DDN)
    assert seen.non_finite(6).tolist() == [True] * 3 + [False] * 3
    if not isinstance(attack, NFGSM):
        assert excess(attack, x_adv, spoilt) <= 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_infinite_gradient_is_a_direction_and_nan_is_none(norm):
    weight = torch.tensor([2.0, -2.0, 0.0, 1.0, -1.0, 0.0]).view(1, 1, 1, 6)  # 0 * inf is NaN
    x = torch.tensor([0.0, 0.0, 0.0, 0.25, 0.25, 0.25]).view(1, 1, 1, 6)
    step = PGD(norm=norm, eps=0.1, num_steps=1, random_start=False)(
        lambda z: (weight * z.sqrt()).sum((1, 2, 3)), x
    )
    pixel = 0.1 if norm == "linf" else 0.1 / 4**0.5
    expected = torch.tensor([pixel, 0, 0, pixel, -pixel, 0]).view(1, 1, 1, 6)
    torch.testing.assert_close(step - x, expected)


def test_of_several_calls_each_image_is_told_apart_and_of_parts_none_is():
    def loss_fn(x: Tensor) -> Tensor:
        return x.sqrt().sum((1, 2, 3))

    x = torch.ones(4, 1, 2, 2)
    with gradients_seen() as seen:
        assert not seen.any_nonzero
        for black in (0, 2):
            spoilt = x.clone()
            spoilt[black, 0, 0, 0] = 0
            grad = input_gradient(loss_fn, spoilt)
            assert grad[black].flatten().tolist() == [0.5, 0.5, 0.5, 0.5]
    assert seen.any_nonzero and seen.calls == 2
    assert seen.non_finite(4).tolist() == [True, False, True, False]
    with gradients_seen() as seen:
        input_gradient(loss_fn, x)
        input_gradient(loss_fn, x[:2])
        assert not seen.non_finite(4).any()
        input_gradient(loss_fn, 0 * x[:2])
    assert seen.non_finite(4).all()  # of which two of the four it was cannot be told
    with gradients_seen() as seen:
        input_gradient(lambda x: x.sum((1, 2, 3)) + torch.tensor([0, torch.inf, torch.nan, 0]), x)
    assert seen.non_finite(4).tolist() == [False, True, True, False]
    assert gradients_are_forgotten(x)


def gradients_are_forgotten(x: Tensor) -> bool:
    with gradients_seen() as seen:
        pass
    input_gradient(lambda x: x.sum((1, 2, 3)), x)
    return seen.calls == 0


def test_input_gradient_is_that_of_the_summed_loss():
    x, w = torch.rand(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    grad = input_gradient(lambda x: (w * x**2).sum((1, 2, 3)), x)
    torch.testing.assert_close(grad, 2 * w * x)


def test_no_attack_returns_the_images():
    x, labels, model = problem()
    assert torch.equal(NoAttack()(cross_entropy_of(model, labels), x), x)


BAD = [
    (PGD, {"eps": -1}, "eps"),
    (PGD, {"eps": 0}, "eps"),
    (PGD, {"eps": "0/255"}, "eps"),
    (PGD, {"eps": "8/0"}, "eps"),
    (PGD, {"eps": "much"}, "eps"),
    (PGD, {"eps": float("nan")}, "eps"),
    (PGD, {"eps": 8}, "pixel units"),
    (PGD, {"step_size": 0}, "step_size"),
    (PGD, {"num_steps": 0}, "num_steps"),
    (PGD, {"num_steps": 1.5}, "num_steps"),
    (PGD, {"norm": "l3"}, "linf"),
    (PGD, {"steps": 10}, "steps"),
    (FGSMRS, {"eps": -1}, "eps"),
    (FGSMRS, {"eps": 8}, "eps"),
    (FGSMRS, {"num_steps": 10}, "num_steps"),
    (NFGSM, {"eps": 8}, "eps"),
    (FGSMPGI, {"eps": 8}, "eps"),
    (FGSMPGI, {"momentum_decay": 1}, "momentum_decay"),
    (FGSMPGI, {"reset_epochs": 0}, "reset_epochs"),
    (FGSMPGI, {"prior_weight": -1}, "prior_weight"),
    (NFGSM, {"noise_scale": 0}, "noise_scale"),
    (NoAttack, {"eps": 0.1}, "eps"),
]


@pytest.mark.parametrize(("family", "settings", "named"), BAD)
def test_impossible_settings_are_refused_by_name(family, settings, named):
    with pytest.raises(ValueError, match=named):
        family(**settings)


def test_fractions_are_numbers():
    attack = PGD(eps="8/255", step_size="2 / 255")
    assert (attack.eps, attack.step_size) == (8 / 255, 2 / 255)
    assert FGSMRS(eps="4/255", step_size="5/255").step_size == 5 / 255
    assert PGD(norm="l2", eps="128/255").eps == 128 / 255
    assert PGD(norm="l2", eps=3).eps == 3  # images of ImageNet's size


def test_settings_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        PGD().eps = 0.1
