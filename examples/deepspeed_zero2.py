"""A loop with a loss of its own under DeepSpeed, ZeRO 2: LAMB and quantised gradients.

accelerate launch --config_file recipes/accelerate/zero2.yaml examples/deepspeed_zero2.py
"""

import timm
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from robust_accel import LAMB, PGD, QSGD, compress_gradients, make_robust
from robust_accel.training.accelerator import deepspeed_without_gpu


def main(epochs: int = 4) -> float:
    """Train on scikit-learn's digits; returns the last batch's accuracy under attack."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)  # [N, 1, 8, 8]
    data = torch.utils.data.TensorDataset((images - 0.5) / 0.5, torch.tensor(digits.target))
    loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, drop_last=True)

    accelerator = Accelerator(kwargs_handlers=deepspeed_without_gpu())
    torch.manual_seed(0)
    model = timm.create_model("wide_resnet10_1", num_classes=10, in_chans=1)
    make_robust(model, PGD(eps=0.2, step_size=0.1, num_steps=3), mean=0.5, std=0.5)
    optimizer = LAMB(model.parameters(), lr=0.02)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    compression = compress_gradients(model, QSGD(bits=8))  # tells LAMB ZeRO's layers as well

    for epoch in range(epochs):
        model.train()
        for x, labels in loader:
            logits = model(x)  # at the attacked images
            loss = cross_entropy(logits, labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accuracy = (logits.argmax(dim=1) == labels).float().mean().item()
        accelerator.print(f"epoch {epoch}: loss {loss:.3f}, robust {100 * accuracy:.0f}%")
    accelerator.print(
        f"{accelerator.num_processes} processes, {accelerator.distributed_type.value}, "
        f"{compression.meter.bytes_sent:,} bytes sent by each"
    )
    accelerator.end_training()
    return accuracy


if __name__ == "__main__":
    main()
