"""AWP: where the loss is taken, what its gradient reaches, and what stays as it was."""

from contextlib import nullcontext

import pytest
import timm
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from robust_accel import PGD, RobustModel, Smoothing
from robust_accel.attacks import NoAttack
from robust_accel.objectives import AWP


def small_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


X, LABELS = torch.rand(8, 3, 8, 8), torch.arange(8) % 5


def test_gradient_is_that_of_the_loss_at_the_moved_weights():
    """By hand: move each weight by gamma |w| g / |g|, take the gradient there."""
    model, gamma = small_model(), 0.05
    robust = RobustModel(model, NoAttack(), weight_perturbation=AWP(gamma=gamma)).train()
    weights = [model[0].weight, model[4].weight]
    grads = torch.autograd.grad(cross_entropy(model(X), LABELS), weights)
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, grads, strict=True):
            w += gamma * w.norm() * g / g.norm()
    loss = cross_entropy(model(X), LABELS)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for w, old in zip(weights, before, strict=True):
            w.copy_(old)

    out = robust(X, LABELS)
    out["loss"].backward()
    torch.testing.assert_close(out["loss"], loss)
    for param, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, grad, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(w, old) for w, old in zip(weights, before, strict=True))
    assert loss > cross_entropy(model(X), LABELS)  # it climbed


def test_batchnorm_counts_one_batch_and_off_means_off():
    # no attack: running statistics, which it would use, move with each forward
    robust = RobustModel(small_model(), NoAttack(), weight_perturbation=AWP()).train()
    norm = robust.classifier.model[1]
    robust(X, LABELS)["loss"].backward()
    assert norm.num_batches_tracked == 1
    assert all(module.training for module in robust.modules())
    on = robust(X, LABELS)["loss"]
    robust.min_max.perturb_weights = False
    off = robust(X, LABELS)["loss"]
    plain = RobustModel(robust.classifier, NoAttack()).train()
    assert torch.equal(off, plain(X, LABELS)["loss"])
    assert on > off


def test_a_weight_without_gradient_stays():
    model = small_model()
    model[4].weight.data.zero_()  # then no gradient reaches the convolution
    robust = RobustModel(model, NoAttack(), weight_perturbation=AWP()).train()
    out = robust(X, LABELS)
    out["loss"].backward()
    assert torch.isfinite(out["loss"])
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_what_it_moved_is_counted():
    robust = RobustModel(small_model(), PGD(num_steps=1), weight_perturbation=AWP())
    robust(X, LABELS)
    assert robust.min_max.applied.weights_moved == 2


def test_weights_that_get_no_gradient_are_an_error():
    model = small_model().requires_grad_(False)
    model[1].requires_grad_(True)
    robust = RobustModel(model, NoAttack(), weight_perturbation=AWP())
    with pytest.raises(RuntimeError, match="none of the 0 weights with two dimensions"):
        robust(X, LABELS)


def test_without_labels_it_is_refused():
    with pytest.raises(ValueError, match=r"AWP\(gamma=0\.005.*needs labels"):
        RobustModel(small_model(), NoAttack(), weight_perturbation=AWP())(X)


def test_weights_of_zero_3_are_refused():
    model = small_model()
    model[0].weight.ds_id = 0  # DeepSpeed's mark
    with pytest.raises(ValueError, match="needs whole weights, got shards"):
        RobustModel(model, NoAttack(), weight_perturbation=AWP())(X, LABELS)


def test_batchnorm_counts_copies_that_are_computed_twice_once():
    smoothing = Smoothing(sigma=0.1, num_noise=4, copies_at_a_time=2)
    counts = []
    for awp in (None, AWP()):
        robust = RobustModel(small_model(), NoAttack(), smoothing, weight_perturbation=awp)
        robust(X, LABELS)["loss"].backward()
        counts.append(robust.classifier.model[1].num_batches_tracked.item())
    assert counts == [2, 2]


def test_checkpointed_blocks_are_refused():
    """They would be run again with the weights where they were: another gradient, and no error."""
    model = timm.create_model("test_vit", num_classes=5)
    robust = RobustModel(model, NoAttack(), weight_perturbation=AWP())
    x = torch.rand(2, 3, 160, 160)
    robust(x, LABELS[:2])
    for checkpointed in (True, False):
        model.set_grad_checkpointing(checkpointed)
        said = pytest.raises(ValueError, match="does not go with gradient checkpointing")
        with said if checkpointed else nullcontext():
            robust(x, LABELS[:2])


def test_in_fp16_the_direction_is_that_of_fp32():
    """Of a mean loss so small that its gradient in the activations underflows."""
    model, found = small_model().eval(), []

    def loss() -> torch.Tensor:
        return 1e-7 * cross_entropy(model(X).float(), LABELS)

    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            moved = AWP(gamma=0.1)(model, loss).moved
        own = dict(model.named_parameters())
        found.append(torch.cat([(w - own[n]).detach().flatten() for n, w in moved.items()]))
    assert found[1].norm() == pytest.approx(found[0].norm().item(), rel=1e-2)
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.95


@pytest.mark.parametrize("settings", [{"gamma": 0}, {"warmup_epochs": -1}])
def test_impossible_settings_are_refused_by_name(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        AWP(**settings)
