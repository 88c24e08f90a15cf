"""The picture of the README: two models under the same attack, which is made for each of them.

    make quickstart
    python docs/picture.py runs/quickstart_standard runs/quickstart docs/attack.png

The images are the first test digits, one of each class, that both models know.
"""

import sys

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import robust_accel
from robust_accel.data import DataSettings, load_test
from robust_accel.objectives import cross_entropy_of, predicted

NUMBER = 8
ATTACK = robust_accel.PGD(eps=0.2, num_steps=20)


def main() -> None:
    standard, robust = (robust_accel.load_model(path).cpu().eval() for path in sys.argv[1:3])
    test = load_test(DataSettings(path="sklearn:digits")).images
    ((x, labels),) = test.batches([torch.arange(len(test))], torch.device("cpu"))
    with torch.no_grad():
        known = (predicted(standard(x)) == labels) & (predicted(robust(x)) == labels)
    classes = [torch.nonzero(known & (labels == label))[0].item() for label in range(NUMBER)]
    x, labels = x[classes], labels[classes]
    rows = [("test image", x, labels)]
    for name, model in (("trained normally", standard), ("trained robustly", robust)):
        attacked = ATTACK(cross_entropy_of(model, labels), x, generator=torch.Generator())
        with torch.no_grad():
            rows.append((f"attacked,\n{name}", attacked, predicted(model(attacked))))
    figure, axes = plt.subplots(len(rows), NUMBER, figsize=(NUMBER * 1.15, len(rows) * 1.45))
    for line, (name, images, found) in zip(axes, rows, strict=True):
        for axis, image, label, seen in zip(line, images, labels, found, strict=True):
            draw(axis, image, label, seen)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
    figure.tight_layout(pad=0.4)
    figure.savefig(sys.argv[3], dpi=110)


def draw(axis: plt.Axes, image: Tensor, label: Tensor, seen: Tensor) -> None:
    """One image, and below it the class that the model sees."""
    axis.imshow(image[0], cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    right = bool(label == seen)
    colour = "#1a7f37" if right else "#cf222e"
    axis.set_xlabel(f"sees {int(seen)}", color=colour, fontsize=10, labelpad=3)
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=2)


if __name__ == "__main__":
    main()
