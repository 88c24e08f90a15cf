"""An attack inside training leaves BatchNorm, modes, gradients and DDP as they were."""

import copy
from collections import Counter

import pytest
import torch
from attacked_network import (
    CLASSES,
    FROM_X,
    MODES,
    PGD_3,
    Broken,
    Spy,
    assert_same,
    batch,
    buffers,
    flags,
    network,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from robust_accel import Adversarial, RobustModel
from robust_accel.attacks import NoAttack

FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["batchnorm", "frozen-batchnorm"])


# What the attack leaves behind: nothing


@MODES
@FROZEN
def test_the_attack_changes_no_buffer_and_no_mode(mode, frozen):
    x, y = batch()
    model = RobustModel(network(frozen), PGD_3, attack_mode=mode)
    before, modes = buffers(model), flags(model)
    model.perturb(x, y)
    model.predict(x)
    assert_same(buffers(model), before)
    assert flags(model) == modes


@MODES
@FROZEN
@pytest.mark.parametrize("labelled", [True, False])
def test_all_is_restored_when_the_attack_raises(mode, frozen, labelled):
    x, y = batch()
    model = RobustModel(network(frozen), Broken(), attack_mode=mode)
    before, modes = buffers(model), flags(model)
    with pytest.raises(RuntimeError, match="broken attack"):
        model(x, y if labelled else None)
    assert_same(buffers(model), before)
    assert flags(model) == modes


@MODES
@FROZEN
@pytest.mark.parametrize("clean_weight", [0.0, 1.0])
def test_a_step_updates_batchnorm_as_its_outer_forwards_alone_do(mode, frozen, clean_weight):
    x, y = batch()
    spy = Spy(PGD_3)
    objective = Adversarial(clean_weight=clean_weight)
    model = RobustModel(network(frozen), spy, objective, attack_mode=mode)
    plain = copy.deepcopy(model.classifier)
    modes = flags(model)
    torch.manual_seed(5)
    model(x, y)
    assert flags(model) == modes  # what a user froze is still frozen

    plain.model[3].p = model.classifier.model[3].p = 0.0
    reference = copy.deepcopy(plain)
    model = RobustModel(copy.deepcopy(plain), spy, objective, attack_mode=mode)
    model(x, y)
    reference(spy.x_adv)
    if clean_weight:
        reference(x)
    assert_same(buffers(model.classifier), buffers(reference))
    tracked = model.classifier.model[1].num_batches_tracked
    assert tracked == (0 if frozen else 1 + (clean_weight > 0))


@MODES
def test_the_attack_touches_no_parameter_gradient(mode):
    x, y = batch()
    model = RobustModel(network(), PGD_3, attack_mode=mode)
    fired = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(fired.append)
    model.perturb(x, y)
    assert all(p.grad is None for p in model.parameters())
    output = model(x, y)
    assert all(p.grad is None for p in model.parameters())
    assert not fired
    output["loss"].backward()
    assert len(fired) == len(list(model.parameters()))  # once each


@MODES
def test_a_gradient_that_is_there_already_is_not_added_to(mode):
    x, y = batch()
    model = RobustModel(network(), PGD_3, attack_mode=mode)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    model(x, y)
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())


# In which mode the attack sees the model


def attacked_through(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """FROM_X on the model as it is, without the wrapper."""
    return FROM_X(lambda x: cross_entropy(model(x), y, reduction="none"), x)


def test_eval_mode_uses_running_statistics_and_no_dropout():
    x, y = batch()
    model = RobustModel(network(), FROM_X)
    expected = attacked_through(copy.deepcopy(model.classifier).eval(), x, y)
    assert model.training
    assert torch.equal(model.perturb(x, y), expected)


def test_train_mode_uses_the_batchs_statistics():
    x, y = batch()
    model = RobustModel(network(), FROM_X, attack_mode="train")
    model.classifier.model[3].p = 0.0
    expected = attacked_through(copy.deepcopy(model.classifier), x, y)
    found = model.perturb(x, y)
    assert torch.equal(found, expected)
    assert not torch.equal(found, RobustModel(model.classifier, FROM_X).perturb(x, y))


def test_train_mode_leaves_a_frozen_batchnorm_its_running_statistics():
    x, y = batch()
    model = RobustModel(network(frozen=True), FROM_X, attack_mode="train")
    model.classifier.model[3].p = 0.0
    expected = attacked_through(copy.deepcopy(model.classifier).eval(), x, y)
    assert torch.equal(model.perturb(x, y), expected)


def test_train_mode_leaves_a_frozen_instancenorm_its_running_statistics():
    x, y = batch()
    inner = nn.Sequential(
        nn.InstanceNorm2d(3, track_running_stats=True).eval(),
        nn.Flatten(),
        nn.Linear(192, CLASSES),
    )
    inner[0].running_mean.fill_(0.3)
    expected = attacked_through(copy.deepcopy(inner).eval(), x, y)
    model = RobustModel(inner, FROM_X, attack_mode="train")
    assert torch.equal(model.perturb(x, y), expected)
    assert torch.equal(inner[0].running_mean, torch.full((3,), 0.3))


def instance_norm() -> nn.Module:
    return nn.InstanceNorm2d(3, track_running_stats=True)


def spectral_norm() -> nn.Module:
    return nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 3))


class Counting(nn.Module):
    """A module of a user's, that counts its calls in whatever mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Replacing(nn.Module):
    """It puts another tensor in place of its buffer, and has one that repeats an element."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("repeated", torch.zeros(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x


@MODES
@pytest.mark.parametrize("layer", [instance_norm, spectral_norm, Counting, Replacing])
def test_no_buffer_of_any_layer_is_moved(mode, layer):
    x, y = batch()
    inner = nn.Sequential(layer(), nn.Flatten(), nn.LazyLinear(CLASSES))
    inner(x)
    model = RobustModel(inner, FROM_X, attack_mode=mode)
    before = buffers(model)
    model.perturb(x, y)
    model.predict(x)
    assert_same(buffers(model), before)
    model(x, y)["loss"].backward()
    assert not all(torch.equal(b, before[name]) for name, b in model.named_buffers())


@MODES
def test_graphs_that_are_there_already_can_still_be_run_backward(mode):
    # as when a script adds up several forwards: BatchNorm has saved its buffers for each
    x, y = batch()
    model = RobustModel(network(frozen=True), FROM_X, attack_mode=mode)
    losses = [model(x, y)["loss"] for _ in range(2)]
    sum(losses).backward()


@MODES
def test_parameters_require_no_gradient_during_the_attack_and_their_own_after_it(mode):
    x, y = batch()
    inner = network()
    inner[0].weight.requires_grad_(False)
    seen = []

    def spy(loss_fn, x, *, generator=None):
        seen.extend(p.requires_grad for p in inner.parameters())
        return FROM_X(loss_fn, x, generator=generator)

    model = RobustModel(inner, spy, attack_mode=mode)
    model(x, y)["loss"].backward()
    assert seen and not any(seen)
    assert [p.requires_grad for p in inner.parameters()] == [False] + [True] * 9
    model.min_max.attack = Broken()
    with pytest.raises(RuntimeError):
        model(x, y)
    assert [p.requires_grad for p in inner.parameters()] == [False] + [True] * 9


def test_weights_that_are_no_leaves_are_attacked_too():
    x, y = batch()
    model = RobustModel(network(), FROM_X)
    weights = {name: 1.0 * p for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, weights, (x, y))
    out["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_train_mode_with_a_batchnorm_that_never_tracks():
    x, y = batch()
    untracked = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )
    untracked(x)
    model = RobustModel(untracked, PGD_3, attack_mode="train")
    modes = flags(model)
    model(x, y)["loss"].backward()
    assert flags(model) == modes


# No collective runs in the attack


@pytest.fixture
def process_group():
    """A group of one process: DDP reduces in it as in a larger one."""
    if torch.distributed.is_initialized():
        pytest.skip("another test's process group is open")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def collectives(step) -> Counter:
    """The collectives that run in a step, by the name under which the profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    names = [event.name for event in profiler.events()]
    return Counter(n for n in names if n.startswith(("c10d::", "gloo:")))


@MODES
def test_ddp_communicates_as_often_as_without_an_attack(process_group, mode):
    x, y = batch()

    def count(attack, *, backward: bool = True) -> Counter:
        model = RobustModel(network(), attack, attack_mode=mode)
        # several buckets, so that a count is not one by accident
        parallel = DistributedDataParallel(model, bucket_cap_mb=1e-3)

        def step() -> None:
            loss = parallel(x, y)["loss"]
            if backward:
                loss.backward()

        step()  # DDP rebuilds its buckets after the first step
        return collectives(step)

    standard, adversarial = count(NoAttack()), count(PGD_3)
    assert sum(n for name, n in standard.items() if "allreduce" in name) > 1
    assert adversarial == standard
    # and before the backward nothing but DDP's broadcast of the buffers runs
    only_forward = count(PGD_3, backward=False)
    assert not [name for name in only_forward if "reduce" in name]
