"""Engines that train a model on two ranks, and what they must end with: averaging by hand."""

import copy
import functools
import os
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from robust_accel import AWP, PGD, Adversarial, RobustModel, Smoothing, Trades, make_robust
from robust_accel.training.accelerator import deepspeed_without_gpu

ATTACK = PGD(eps=0.1, num_steps=2, random_start=False)
LR, STEPS = 0.5, 2
OBJECTIVES: dict[str, dict[str, Any]] = {
    "AT": {"objective": Adversarial()},
    "AT, clean term": {"objective": Adversarial(clean_weight=1.0)},
    "TRADES": {"objective": Trades()},
    "AWP": {"weight_perturbation": AWP(gamma=0.05)},
    "smoothing": {"objective": Smoothing(sigma=0.1, num_noise=2)},
    "AT, own loss": {},  # the script's: the model gets no labels
}
PLAIN, WRAPPED, IN_PLACE = "plain", "RobustModel", "make_robust"


class Tiny(nn.Module):
    """Convolution, BatchNorm, linear; as transformers' models it takes labels."""

    def __init__(self, unused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head = nn.Linear(4 * 16, 5)
        if unused:
            self.never = nn.Linear(2, 2)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.norm(self.conv(pixel_values)).relu().flatten(1))
        if labels is None:
            return logits
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    x = torch.rand(6, 3, 6, 6, generator=generator)
    return x, torch.randint(5, (6,), generator=generator)


def loss_of(model: Callable[..., Any], objective: str, rank: int, step: int) -> Tensor:
    """Of one rank's batch; what smoothing draws follows from rank and step."""
    x, labels = batch(rank, step)
    torch.manual_seed(1000 + 10 * step + rank)
    if objective == "AT, own loss":
        out = model(x)
        return cross_entropy(out["logits"] if isinstance(out, dict) else out, labels)
    return model(x, labels=labels)["loss"]


def flat(parameters: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters]).clone()


def by_hand(kind: str, objective: str, world_size: int, engine: str) -> Tensor:
    """A model a rank in this process; all go down the mean of their gradients."""
    broadcast = engine.startswith(("D", "spawn")) and engine != "DDP, no broadcast"
    return _by_hand(kind != PLAIN, objective, world_size, broadcast, engine == "DDP, find_unused")


@functools.cache
def _by_hand(
    robust: bool, objective: str, world_size: int, broadcast: bool, unused: bool
) -> Tensor:
    tiny = [Tiny(unused) for _ in range(world_size)]
    models: list[nn.Module] = list(tiny)
    if robust:
        models = [RobustModel(t, ATTACK, **OBJECTIVES[objective]) for t in tiny]
    for step in range(STEPS):
        if broadcast:
            for other in tiny[1:]:
                other.load_state_dict(dict(tiny[0].named_buffers()), strict=False)
        for rank, model in enumerate(models):
            model.zero_grad()
            loss_of(model, objective, rank, step).backward()
        with torch.no_grad():
            for same in zip(*(t.parameters() for t in tiny), strict=True):
                if same[0].grad is not None:
                    mean = sum(p.grad for p in same) / world_size
                    for p in same:
                        p -= LR * mean
    return flat(tiny[0].parameters())


class Trained:
    """One cell: a kind of model in an engine, trained by its own step."""

    def __init__(self, kind: str, objective: str, engine: str, rank: int) -> None:
        self.objective, self.rank = objective, rank
        self.tiny: Any = Tiny(unused=engine == "DDP, find_unused")
        model: nn.Module = self.tiny
        if kind == WRAPPED:
            model = RobustModel(self.tiny, ATTACK, **OBJECTIVES[objective])
        elif kind == IN_PLACE:
            make_robust(self.tiny, ATTACK, **OBJECTIVES[objective])
        getattr(self, f"_{engine.partition(',')[0].split()[0].lower()}")(model, engine)

    def parameters(self) -> Tensor:
        for step in range(STEPS):
            self.step(step)
        return self.found()

    def found(self) -> Tensor:
        return flat(self.tiny.parameters())

    def _ddp(self, model: nn.Module, engine: str) -> None:
        options = {
            "DDP": {},
            "DDP, static_graph": {"static_graph": True},
            "DDP, find_unused": {"find_unused_parameters": True},
            "DDP, bucket_view": {"gradient_as_bucket_view": True},
            "DDP, no broadcast": {"broadcast_buffers": False},
        }[engine]
        self._by_optimizer(DistributedDataParallel(model, **options))

    def _spawn(self, model: nn.Module, engine: str) -> None:
        sent = pickle.loads(bytes(ForkingPickler.dumps(model)))  # as torch.multiprocessing does
        self.tiny = sent.classifier.model if isinstance(sent, RobustModel) else sent
        self._by_optimizer(DistributedDataParallel(sent))

    def _fsdp2(self, model: nn.Module, engine: str) -> None:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        if engine == "FSDP2, nested":
            fully_shard(self.tiny.conv, mesh=mesh)
            fully_shard(self.tiny.head, mesh=mesh)
        fully_shard(self.tiny if engine == "FSDP2, inner" else model, mesh=mesh)
        if not hasattr(FSDPModule, "set_custom_reduce_scatter"):  # torch 2.8: gloo adds up
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_force_sum_reduction_for_comms(True)
        self.found = lambda: flat(p.full_tensor() for p in self.tiny.parameters())
        self._by_optimizer(model)

    def _by_optimizer(self, model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)

        def step(number: int) -> None:
            optimizer.zero_grad()
            loss_of(model, self.objective, self.rank, number).backward()
            optimizer.step()

        self.step = step

    def _zero(self, model: nn.Module, engine: str) -> None:
        import deepspeed

        rank, size = self.rank, torch.distributed.get_world_size()
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        deepspeed_without_gpu()
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        config = {
            "train_micro_batch_size_per_gpu": 6,
            "zero_optimization": {"stage": int(engine[-1])},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "zero_force_ds_cpu_optimizer": False,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

        def step(number: int) -> None:
            trained.backward(loss_of(trained, self.objective, rank, number))
            trained.step()

        def found() -> Tensor:
            parameters = list(self.tiny.parameters())
            with deepspeed.zero.GatheredParameters(parameters, enabled=engine == "ZeRO 3"):
                return flat(parameters)

        self.step, self.found = step, found

    def _dataparallel(self, model: nn.Module, engine: str) -> None:
        """Two replicas in this process, as torch makes them; the ranks' batches are theirs."""

        def step(number: int) -> None:
            model.zero_grad()
            twins = [replica(model, first=rank == 0) for rank in range(2)]
            losses = [loss_of(t, self.objective, rank, number) for rank, t in enumerate(twins)]
            (sum(losses) / 2).backward()
            with torch.no_grad():
                for p in self.tiny.parameters():
                    p -= LR * p.grad

        self.step = step


def replica(module: nn.Module, *, first: bool) -> Any:
    """torch.nn.parallel.replicate, which wants GPUs: parameters become plain tensors.

    The first one has the module's own buffers.
    """
    twin: Any = module._replicate_for_data_parallel()
    twin._former_parameters = {}
    for name, child in module.named_children():
        setattr(twin, name, replica(child, first=first))
    for name, parameter in module.named_parameters(recurse=False):
        setattr(twin, name, parameter.view_as(parameter))
    for name, buffer in module.named_buffers(recurse=False):
        twin._buffers[name] = buffer if first else buffer.clone()
    if isinstance(module, RobustModel):
        twin.min_max = copy.copy(module.min_max)
    return twin
