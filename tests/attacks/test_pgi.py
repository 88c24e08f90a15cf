"""An image's attack starts where its last one has ended, and no other image's does."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from robust_accel.attacks import FGSMPGI, FGSMRS
from robust_accel.attacks.pgi import Priors
from robust_accel.attacks.strength import scaled
from robust_accel.integrations.in_place import make_robust
from robust_accel.min_max import MinMax
from robust_accel.objectives import AWP
from robust_accel.robust_model import RobustModel

EPS, SHAPE, NUM = 0.1, (1, 3, 4), 6
LEVEL = EPS / 127 / 2  # what rounding may take


def draws(epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(100 + epoch)


def priors(images: Tensor | None = None, **settings: float) -> tuple[FGSMPGI, Priors]:
    attack = FGSMPGI(eps=EPS, **settings)
    kept = attack.remembering(
        torch.arange(NUM) if images is None else images, SHAPE, torch.device("cpu")
    )
    kept.begin(0, draws)
    return attack, kept


def linear(seed: int) -> Callable[[Tensor], Tensor]:
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    return lambda x: (weights * x).sum((1, 2, 3))


def test_the_next_attack_starts_where_the_last_has_ended() -> None:
    attack, kept = priors(momentum_decay=0)
    x = torch.rand(NUM, *SHAPE)
    ids = torch.tensor([4, 1])
    first = kept.visit(attack, ids)
    before = kept.share.clone()
    x_adv = first(linear(1), x[ids])
    assert first.start is not None
    corner = (x[ids] + EPS * before[ids] / 127).clamp(0, 1)
    torch.testing.assert_close(first.start, corner)
    assert before.abs().eq(127).all() and before.float().mean().abs() < 60  # corners, drawn
    second = kept.visit(attack, torch.tensor([1, 4]))
    second(linear(2), x[ids.flip(0)])
    torch.testing.assert_close(second.start, x_adv.flip(0), rtol=0, atol=LEVEL)
    others = torch.tensor([0, 2, 3, 5])
    assert kept.share[others].equal(before[others])


def test_a_step_is_fgsm_from_there() -> None:
    attack, kept = priors(momentum_decay=0)
    x = torch.full((NUM, *SHAPE), 0.5)
    visit = kept.visit(attack, torch.arange(NUM))
    x_adv = visit(linear(1), x)
    grad = torch.autograd.grad(linear(1)(z := x.clone().requires_grad_()).sum(), z)[0]
    expected = (visit.start + EPS * grad.sign()).clamp(0.5 - EPS, 0.5 + EPS)
    torch.testing.assert_close(x_adv, expected)


def test_momentum_adds_up_an_images_gradients_each_of_the_same_size() -> None:
    attack, kept = priors(momentum_decay=0.3)
    x, ids = torch.full((NUM, *SHAPE), 0.5), torch.arange(NUM)
    total = torch.zeros(SHAPE)
    start = x + EPS * kept.share / 127
    for seed in range(5):
        loss_fn = linear(seed)
        visit = kept.visit(attack, ids)
        visit(lambda z, f=loss_fn, s=10.0**seed: s * f(z), x)
        torch.testing.assert_close(visit.start, start, rtol=0, atol=2 * LEVEL)
        grad = torch.autograd.grad(loss_fn(z := x[:1].clone().requires_grad_()).sum(), z)[0][0]
        total = grad / grad.abs().mean() + 0.3 * total
        start = (visit.start + EPS * total.sign()).clamp(0.5 - EPS, 0.5 + EPS)
        assert kept.momentum is not None
        torch.testing.assert_close(kept.momentum[0].float(), total, rtol=0.02, atol=0.02)


def test_all_start_anew_every_so_many_epochs_by_the_epochs_draw() -> None:
    attack, kept = priors(reset_epochs=3)
    corners = kept.share.clone()
    x, ids = torch.rand(NUM, *SHAPE), torch.arange(NUM)
    kept.visit(attack, ids)(linear(1), x)
    moved = kept.share.clone()
    assert not moved.equal(corners)
    for epoch in (1, 2):
        kept.begin(epoch, draws)
        assert kept.share.equal(moved)
    kept.begin(3, draws)
    assert not kept.share.equal(moved) and not kept.share.equal(corners)
    assert kept.momentum is not None and not kept.momentum.any()
    anew = kept.share.clone()
    kept.begin(3, draws)
    assert kept.share.equal(anew)


def test_a_perturbation_follows_eps_and_stays_in_its_ball() -> None:
    attack, kept = priors()
    x, ids = torch.rand(NUM, *SHAPE), torch.arange(NUM)
    for share in (0.1, 1.0, 0.5):
        weaker = scaled(attack, share)
        visit = kept.visit(weaker, ids)
        x_adv = visit(linear(3), x)
        assert visit.eps == pytest.approx(share * EPS)
        assert (x_adv - x).abs().max() <= share * EPS + 1e-6
        assert (visit.start - x).abs().max() <= share * EPS + 1e-6


@pytest.mark.parametrize("momentum_decay", [0, 0.3])
def test_another_number_of_processes_finds_each_images_own(tmp_path, momentum_decay) -> None:
    parts = [torch.tensor([3, 0, 5]), torch.tensor([1, 4, 2])]
    kept = [priors(part, momentum_decay=momentum_decay) for part in parts]
    x = torch.rand(NUM, *SHAPE)
    for (attack, part), ids in zip(kept, parts, strict=True):
        part.visit(attack, ids)(linear(1), x[ids])
    for rank, (_, part) in enumerate(kept):
        save_file(part.state(), tmp_path / str(rank))
    states = [load_file(tmp_path / str(rank)) for rank in range(2)]
    _, whole = priors(momentum_decay=momentum_decay)
    whole.load(states)
    for (_, part), ids in zip(kept, parts, strict=True):
        assert whole.share[ids].equal(part.share)
        assert momentum_decay == 0 or whole.momentum[ids].equal(part.momentum)
    with pytest.raises(ValueError, match="3 images have no perturbation"):
        priors(momentum_decay=momentum_decay)[1].load(states[:1])


@pytest.mark.parametrize("awp", [None, AWP(gamma=0.1)])
def test_the_outer_loss_holds_the_logits_to_those_at_the_start(awp: AWP | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    attack, kept = priors(prior_weight=7.0)
    x, labels = torch.rand(NUM, *SHAPE).double(), torch.arange(NUM) % 3
    min_max = MinMax(kept.visit(attack, torch.arange(NUM)), weight_perturbation=awp)
    out = min_max.loss(model, x, labels)
    assert out["prior_distance"] > 0
    torch.testing.assert_close(
        out["loss"].detach(), (out["adv_loss"] + 7 * out["prior_distance"]).detach()
    )
    if awp is not None:  # both terms are of the moved weights
        assert not out["logits"].equal(model(x))
        return
    start = min_max.attack.start
    distance = mse_loss(out["logits"], model(start))
    expected = cross_entropy(out["logits"], labels) + 7 * distance
    torch.testing.assert_close(out["prior_distance"].double(), distance, rtol=1e-5, atol=1e-7)
    of_both = [
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        for loss in (out["loss"], expected)
    ]
    for own, grad in zip(*of_both, strict=True):
        torch.testing.assert_close(own, grad, rtol=1e-4, atol=1e-6)


def test_loops_that_cannot_tell_images_are_refused_and_others_are_not() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    for wrap in (RobustModel, make_robust):
        with pytest.raises(ValueError, match="keeps the perturbation of each image"):
            wrap(model, FGSMPGI())
    RobustModel(model, FGSMRS())
