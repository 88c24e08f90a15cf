"""Any module on [0, 1] pixels, a RobustBench model for example: accuracy under attack, and radii.

python examples/measure_a_model.py
accelerate launch examples/measure_a_model.py      # the attacks are shared among the processes
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from robust_accel import CertifySettings, EvaluateSettings, certify, evaluate


def train_a_model(x: torch.Tensor, labels: torch.Tensor, noise: float) -> nn.Module:
    """Stands for a model that is there already: images in, logits out, its own normalisation."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(200):
        loss = nn.functional.cross_entropy(model(x + noise * torch.randn_like(x)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> dict[str, float]:
    torch.manual_seed(0)  # the same model on each process
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)  # [N, 1, 8, 8]
    labels = torch.tensor(digits.target)
    model = train_a_model(x[:1400], labels[:1400], noise=0.25)

    test = x[1400:1500], labels[1400:1500]
    found = evaluate(model, *test, EvaluateSettings(eps=0.05, autoattack="quick"))
    print(found)

    few = x[1400:1410], labels[1400:1410]
    certified = certify(model, *few, CertifySettings(sigma=0.25, n=10_000, radii=(0.1, 0.5)))
    print(certified.certificate)
    accuracies = {"clean": found.clean, "autoattack": found.autoattack}
    at = {f"radius {p['radius']}": p["accuracy"] for p in certified.certificate.record["radii"]}
    return {name: one.accuracy for name, one in accuracies.items()} | at


if __name__ == "__main__":
    main()
