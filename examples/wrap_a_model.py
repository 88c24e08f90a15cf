"""Adversarial training in an Accelerate loop of one's own: wrap, prepare, train.

python examples/wrap_a_model.py
accelerate launch examples/wrap_a_model.py
"""

import timm
import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits

from robust_accel import LAMB, PGD, QSGD, RobustModel, compress_gradients


def main(epochs: int = 8) -> float:
    """Train on scikit-learn's digits; returns the last batch's accuracy under attack."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)  # [N, 1, 8, 8]
    data = torch.utils.data.TensorDataset(images, torch.tensor(digits.target))
    loader = torch.utils.data.DataLoader(data, batch_size=64, shuffle=True, drop_last=True)

    accelerator = Accelerator()
    inner = timm.create_model("wide_resnet10_1", num_classes=10, in_chans=1)
    attack = PGD(norm="linf", eps=0.2, step_size=0.1, num_steps=3)
    model = RobustModel(inner, attack, mean=0.0, std=1.0)
    model, optimizer, loader = accelerator.prepare(model, LAMB(model.parameters(), lr=0.02), loader)
    compress_gradients(model, QSGD(bits=8, sides=2))  # nothing to send on one process

    for epoch in range(epochs):
        for x, labels in loader:
            out = model(x, labels)  # attacks x, and returns the outer loss
            accelerator.backward(out["loss"])
            optimizer.step()
            optimizer.zero_grad()
        accuracy = (out["logits"].argmax(dim=1) == labels).float().mean().item()
        accelerator.print(f"epoch {epoch}: loss {out['loss']:.3f}, robust {100 * accuracy:.0f}%")
    return accuracy


if __name__ == "__main__":
    main()
