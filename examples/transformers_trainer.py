"""Adversarial training by transformers' Trainer: one call before it, callbacks if you like.

python examples/transformers_trainer.py
accelerate launch examples/transformers_trainer.py
"""

import torch
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from robust_accel import PGD, QSGD, make_robust
from robust_accel.trainer import QuantizedGradients, RobustAccuracy


def main(output: str = "runs/trainer", epochs: int = 6) -> dict[str, float]:
    """Train on scikit-learn's digits, normalised as processors do; returns the test metrics."""
    digits = load_digits()
    images = (torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1) - 0.5) / 0.5
    rows = [
        {"pixel_values": image, "labels": int(label)}
        for image, label in zip(images, digits.target, strict=True)
    ]
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[32, 64],
            depths=[1, 1],
            layer_type="basic",
            downsample_in_first_stage=False,
            num_labels=10,
        )
    )
    make_robust(model, PGD(eps=0.1, step_size=0.05, num_steps=3), mean=0.5, std=0.5)
    trainer = Trainer(
        model,
        TrainingArguments(
            output,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            eval_strategy="epoch",
            save_strategy="epoch",
            metric_for_best_model="robust_accuracy",
            load_best_model_at_end=True,
            report_to="none",
        ),
        train_dataset=rows[:1200],
        eval_dataset=rows[1200:1400],  # the best epoch is chosen by these
    )
    trainer.add_callback(RobustAccuracy(trainer, images=200))
    trainer.add_callback(QuantizedGradients(trainer, QSGD(bits=8)))
    trainer.train()
    trainer.save_model()  # an ordinary transformers folder
    return trainer.evaluate(rows[1400:], metric_key_prefix="test")


if __name__ == "__main__":
    print(main())
