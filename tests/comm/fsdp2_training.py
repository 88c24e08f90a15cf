"""Small networks, sharded by FSDP2 or copied by DDP, and their training."""

import torch
import torch.distributed as dist
from ddp_training import get
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

from robust_accel.comm import Meter, compress_gradients

CLASSES = 7  # in no number of processes here

__all__ = ["get"]


def vit():
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=CLASSES
    )


def resnet():
    torch.manual_seed(0)
    down = nn.Sequential(nn.Conv2d(6, 10, 1, 2, bias=False), nn.BatchNorm2d(10))
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        BasicBlock(6, 6),
        BasicBlock(6, 10, stride=2, downsample=down),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, CLASSES),
    )


MODELS = {"vit": vit, "resnet": resnet}


def mesh_of(*sizes, names=None):
    return init_device_mesh("cpu", sizes or (dist.get_world_size(),), mesh_dim_names=names)


def sharded(model, mesh=None, **options):
    """Blocks by themselves, then the rest."""
    mesh = mesh_of() if mesh is None else mesh
    for module in model.modules():
        if type(module).__name__ in ("Block", "BasicBlock"):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def full(tensor):
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().flatten().clone()


def params(model):
    return torch.cat([full(p) for p in model.parameters()])


def grads(model):
    return torch.cat([full(p.grad) for p in model.parameters()])


def backward(model, rank, step):
    g = torch.Generator().manual_seed(1000 * rank + step)
    x, labels = torch.rand(6, 3, 8, 8, generator=g), torch.randint(CLASSES, (6,), generator=g)
    cross_entropy(model(x), labels).backward()


def train(model, optimizer, steps, rank):
    for step in steps:
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()
    return params(model)


def in_parts(rank, protocol, *parts):
    """Training whose steps are in so many parts, each a new model that goes on from the last."""
    state, weights = {"steps": 0}, vit().state_dict()
    for steps in parts:
        model = vit()
        model.load_state_dict(weights)
        model = sharded(model)
        compression = compress_gradients(model, protocol)
        compression.load_state_dict(state)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), steps, rank)
        compression.close()
        state = compression.state_dict()
        weights = {k: full(v).view(v.shape) for k, v in model.state_dict().items()}
    return params(model), state


def mean_gradient(make, world_size, step):
    """By hand: of every rank's batch on a model of its own."""
    every = []
    for rank in range(world_size):
        model = make()
        backward(model, rank, step)
        every.append(grads(model))
    return torch.stack(every).double().mean(0)


class Recorder:
    """Passes on to a protocol; keeps rows, tensors and bytes of each call."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def exchanges(self, *arguments):
        return self.inner.exchanges(*arguments)

    def scatter(self, rows, chunks, step, workers, meter, out):
        own, before = Meter(), rows.clone()
        self.inner.scatter(rows, chunks, step, workers, own, out)
        meter.sent(own.bytes_sent - own.bytes_inside_machine)
        meter.sent(own.bytes_inside_machine, inside_machine=True)
        self.calls.append(
            {"rows": before, "chunks": chunks, "out": out.clone(), "bytes": own.bytes_sent}
        )


def refusal(work):
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was refused"
