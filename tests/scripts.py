"""Training scripts as users have them, none of which knows of this package.

    python scripts.py outside FOLDER     images normalised and the loss computed outside the model
    python scripts.py batch FOLDER       transformers' way: model(**batch), its loss
    python scripts.py two FOLDER         a student and a teacher, both trained
    python scripts.py nothing FOLDER     it does nothing
    python scripts.py unprepared FOLDER  no Accelerator.prepare
    python scripts.py eval FOLDER        it forgets model.train()
    python scripts.py parts FOLDER       it calls the layers one by one
    python scripts.py broken FOLDER      it fails
    python scripts.py fsdp2 FOLDER       "outside" by Accelerate's FSDP2, on CPUs

Each that trains leaves its weights in FOLDER.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import ResNetConfig, ResNetForImageClassification

MEAN, STD = 0.3, 0.4


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 10)
    )


def residual_network() -> ResNetForImageClassification:
    shape = {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **shape))


class Batches(torch.utils.data.Dataset):
    """Digits as dictionaries."""

    def __init__(self, mean: float, std: float) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)
        self.images, self.labels = (images - mean) / std, torch.tensor(digits.target)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def main(kind: str, folder: str) -> None:
    if kind == "nothing":
        return
    if kind == "broken":
        raise ValueError("the script's own fault")
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model: nn.Module = residual_network() if kind == "batch" else network()
    if kind == "fsdp2":
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT"
        )
    loader = torch.utils.data.DataLoader(Batches(MEAN, STD), batch_size=64, shuffle=True)
    # plain SGD and one seed, so that weights can be compared
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if kind != "unprepared":
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if kind == "two":
        accelerator.prepare(network())
    model.train(kind != "eval")
    for _ in range(4):
        for batch in loader:
            if kind == "batch":
                loss = model(**batch).loss
            else:
                x = batch["pixel_values"]
                logits = model[1:](model[0](x)) if kind == "parts" else model(x)
                loss = cross_entropy(logits, batch["labels"])
            steps = Path(folder, "steps")
            steps.write_text(steps.read_text() + "." if steps.exists() else ".")
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    state = accelerator.unwrap_model(model).state_dict()
    if kind == "fsdp2":
        state = {key: value.full_tensor() for key, value in state.items()}
    if accelerator.is_main_process:
        torch.save(state, Path(folder) / "weights.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
