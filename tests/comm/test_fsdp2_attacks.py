"""What micro-batches have accumulated is exchanged once a step, by no attack: in real processes."""

import pytest
import torch
from fsdp2_training import CLASSES, get, grads, sharded, vit
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.functional import cross_entropy

from robust_accel import PGD, RobustModel, make_robust
from robust_accel.comm import QSGD, AllReduce, compress_gradients
from robust_accel.comm.fsdp2 import has_hooks

pytestmark = pytest.mark.skipif(not has_hooks(), reason="this torch's FSDP2 takes no collectives")
ATTACK = PGD(eps=0.1, num_steps=2, random_start=False)
MICRO = 2
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES = {
    ("RobustModel", "fp32"): (AllReduce(), {}),
    ("RobustModel", "bf16"): (AllReduce(), {"mp_policy": HALF}),
    ("RobustModel", "weights of 8 bits"): (QSGD(bits=16, weight_bits=8), {}),
    ("make_robust", "fp32"): (AllReduce(), {}),
    ("make_robust", "weights of 8 bits"): (QSGD(bits=16, weight_bits=8), {}),
}

# ------------------------------------------------------------------------------ scenarios


def robust(kind, cut=lambda network: network):
    """A network, and what is called in its place."""
    network = vit()
    if kind == "make_robust":
        make_robust(network, ATTACK)
    network = cut(network)
    return network, network if kind == "make_robust" else RobustModel(network, ATTACK)


def loss_of(model, rank, number):
    g = torch.Generator().manual_seed(100 * rank + number)
    x, labels = torch.rand(6, 3, 8, 8, generator=g), torch.randint(CLASSES, (6,), generator=g)
    if isinstance(model, RobustModel):
        return model(x, labels)["loss"]
    return cross_entropy(model(x), labels)


def accumulated(rank, world_size):
    """A step of two micro-batches: exchanges of each unit, the mean, the weights of each pass."""
    results = {}
    for (kind, way), (protocol, options) in CASES.items():
        network, model = robust(kind, lambda network, o=options: sharded(network, **o))
        compression = compress_gradients(model, protocol)
        layer, weights, calls = network.blocks[0].mlp.fc1, [], []
        layer.register_forward_pre_hook(lambda m, _, w=weights: w.append(m.weight.detach().clone()))
        for number in range(MICRO):
            network.set_requires_gradient_sync(number == MICRO - 1)
            loss_of(model, rank, number).backward()
            calls.append(list(compression.calls))
        results[kind, way] = {"calls": calls, "mean": grads(network), "weights": weights}
    for kind in ("RobustModel", "make_robust"):
        results[kind, "by hand"] = by_hand(kind, world_size)
    return results


def by_hand(kind, world_size):
    """The mean over the ranks of the sum over micro-batches, on whole networks."""
    every = []
    for rank in range(world_size):
        network, model = robust(kind)
        for number in range(MICRO):
            loss_of(model, rank, number).backward()
        every.append(grads(network))
    return torch.stack(every).double().mean(0)


def broken(loss_fn, x, *, generator=None):
    raise RuntimeError("broken attack")


def after_a_broken_attack(rank, world_size):
    """Exchanges of a step after one whose attack has raised."""
    _, model = robust("RobustModel", sharded)
    compression = compress_gradients(model)
    model.min_max.attack = broken
    with pytest.raises(RuntimeError, match="broken attack"):
        loss_of(model, rank, 0)
    model.min_max.attack = ATTACK
    loss_of(model, rank, 0).backward()
    return compression.calls


# ------------------------------------------------------------------------------ tests

TWO = [accumulated, after_a_broken_attack]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_each_unit_exchanges_once_a_step(two, case):
    for result in get(two, accumulated):
        assert result[case]["calls"] == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_what_is_exchanged_is_the_mean_of_all_micro_batches(two, case):
    kind, way = case
    for result in get(two, accumulated):
        exact = result[kind, "by hand"]
        error = (result[case]["mean"] - exact).norm() / exact.norm()
        # where weights are rounded, so are the gradients in the pixels, and their signs
        assert error < (1e-5 if way == "fp32" else 0.5)


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_all_passes_of_a_step_are_by_the_same_weights(two, case):
    for result in get(two, accumulated):
        first, *others = result[case]["weights"]
        assert len(others) + 1 >= MICRO * (ATTACK.num_steps + 1)
        assert all(first.equal(other) for other in others)


def test_an_attack_that_raises_leaves_exchanges_as_they_were(two):
    assert get(two, after_a_broken_attack) == [[1, 1, 1]] * 2
