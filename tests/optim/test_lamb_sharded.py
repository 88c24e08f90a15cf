"""LAMB on FSDP2's pieces, in real processes: one trajectory with whole tensors."""

import shutil
import tempfile

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from seeded_tensors import assert_equal
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from robust_accel.optim import LAMB

FORMS = {
    "default": {},
    "plain": {"fused": False, "foreach": False},
    "foreach": {"foreach": True},
    "without vectors": {"exclude_1d": True},
}
CLAMP = (0.0, 1.5)  # at work in some tensors


def network():
    """Tensors that two, three and four processes cut unevenly, or hold nothing of."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 33), nn.LayerNorm(33), nn.Tanh(), nn.Linear(33, 5), nn.Linear(5, 1)
    )
    nn.init.zeros_(model[3].bias)  # a tensor without a norm
    return model


def optimizer_of(model, **options):
    params = list(model.parameters())
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.02}]
    return LAMB(groups, lr=0.05, weight_decay=0.1, weight_norm_clamp=CLAMP, **options)


def step(model, optimizer, number, ranks):
    """On the batches of these ranks."""
    optimizer.zero_grad()
    x = [torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * number + r)) for r in ranks]
    model(torch.cat(x)).square().mean().backward()
    optimizer.step()


def found(model):
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return [p.detach().clone() for p in whole]


def sharded(mesh=None):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    model = network()
    for module in (model[3], model):
        fully_shard(module, mesh=mesh)
        module.set_force_sum_reduction_for_comms(True)  # torch 2.8: gloo sums for means
    return model


def trained(model, every, options, steps=4):
    optimizer = optimizer_of(model, **options)
    for number in range(steps):
        step(model, optimizer, number, every)
    return found(model), optimizer


# ------------------------------------------------------------------------------ scenarios


def trajectories(rank, world_size):
    results = {}
    for form, options in FORMS.items():
        results[form, "one"] = trained(network(), range(world_size), options)[0]
        ddp = DistributedDataParallel(network())
        results[form, "DDP"] = trained(ddp, [rank], options)[0]
        results[form, "FSDP2"] = trained(sharded(), [rank], options)[0]
    if world_size == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        results["default", "HSDP"] = trained(sharded(mesh), [rank], {})[0]
    return results


def sums(rank, world_size):
    """How often a step sends something, and what its state is."""
    model = sharded()
    optimizer = optimizer_of(model)
    model(torch.ones(2, 6)).sum().backward()
    with CommDebugMode() as counted:
        optimizer.step()
    state = optimizer.state[model[0].weight]
    return counted.get_total_counts(), [type(state[name]) for name in ("exp_avg", "exp_avg_sq")]


def checkpointed(rank, world_size):
    """Two steps, kept by torch's distributed checkpoint, and two more in what loads it."""
    straight, _ = trained(sharded(), [rank], {})
    model = sharded()
    _, optimizer = trained(model, [rank], {}, steps=2)
    names = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(names)
    kept = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(kept, checkpoint_id=names[0])
    model = sharded()
    for p in model.parameters():
        p.data.zero_()
    optimizer = optimizer_of(model)
    parts = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(parts, checkpoint_id=names[0])
    set_state_dict(
        model,
        optimizer,
        model_state_dict=parts["model"],
        optim_state_dict=parts["optimizer"],
    )
    for number in (2, 3):
        step(model, optimizer, number, [rank])
    dist.barrier()
    if rank == 0:
        shutil.rmtree(names[0])
    return straight, found(model)


# ------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return processes.run([trajectories, sums, checkpointed], 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return processes.run([trajectories, checkpointed], 4, tmp_path_factory.mktemp("four"))


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.long)])
def ranks(request):
    results = request.getfixturevalue({2: "two", 4: "four"}[request.param])
    for result in results:
        assert "error" not in result, result["error"]
    return results


@pytest.mark.parametrize("form", FORMS)
def test_one_process_ddp_and_fsdp2_have_one_trajectory(ranks, form):
    start = found(network())
    for result in ranks:
        one = result["trajectories"][form, "one"]
        for (what, engine), other in result["trajectories"].items():
            if what == form:
                for a, b, begin in zip(one, other, start, strict=True):
                    moved = (a - begin).norm()
                    assert moved > 0
                    assert (a - b).norm() < 1e-4 * moved, engine
        assert_equal(result["trajectories"][form, "FSDP2"], ranks[0]["trajectories"][form, "FSDP2"])


def test_a_step_sends_one_sum_for_all_norms_of_all_groups(two):
    assert [result["sums"] for result in two] == [(1, [DTensor, DTensor])] * 2


def test_state_goes_through_a_distributed_checkpoint(ranks):
    for straight, again in (result["checkpointed"] for result in ranks):
        assert_equal(again, straight, rtol=0, atol=0)
