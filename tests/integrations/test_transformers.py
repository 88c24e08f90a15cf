"""transformers' Trainer trains, measures, saves and resumes a robust model as it does any other."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from scripts import MEAN, STD, Batches
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForImageClassification,
    EarlyStoppingCallback,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
)

from robust_accel import PGD, QSGD, Trades, make_robust
from robust_accel.attacks import NoAttack
from robust_accel.trainer import QuantizedGradients, RobustAccuracy

ATTACK = PGD(eps=0.1, step_size=0.05, num_steps=2, random_start=False)


def trainer_of(folder: Path, robust: bool = True, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(
            num_channels=1,
            embedding_size=16,
            hidden_sizes=[16, 32],
            depths=[1, 1],
            layer_type="basic",
            downsample_in_first_stage=False,
            num_labels=10,
        )
    )
    if robust:
        make_robust(model, ATTACK, mean=MEAN, std=STD)
    digits = Batches(MEAN, STD)
    defaults = {"num_train_epochs": 2, "per_device_train_batch_size": 64, "learning_rate": 3e-3}
    defaults |= {"save_strategy": "epoch", "eval_strategy": "epoch", "use_cpu": True}
    return Trainer(
        model,
        TrainingArguments(str(folder), report_to="none", **(defaults | options)),
        train_dataset=torch.utils.data.Subset(digits, range(640)),
        eval_dataset=torch.utils.data.Subset(digits, range(640, 840)),
    )


@pytest.mark.long
def test_it_trains_measures_chooses_and_saves(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path / "robust",
        num_train_epochs=3,
        metric_for_best_model="robust_accuracy",
        load_best_model_at_end=True,
    )
    trainer.add_callback(RobustAccuracy(trainer, images=150))
    trainer.add_callback(QuantizedGradients(trainer, QSGD(bits=8)))
    trainer.train()
    # at each evaluation, and the best of them is chosen
    key, best = "eval_robust_accuracy", trainer.state.best_metric
    history = [line[key] for line in trainer.state.log_history if key in line]
    assert len(history) == 3
    assert max(history) == best > 0.2
    assert trainer.evaluate()[key] == best

    # it is the accuracy of the first images, clean and under attack
    measure = RobustAccuracy(trainer, ATTACK, images=150)
    measure.training.min_max.objective = Trades()  # which attacks another loss
    found = measure.measure(trainer.get_eval_dataloader())
    rows = [trainer.eval_dataset[i] for i in range(150)]
    x, labels = (torch.stack([row[name] for row in rows]) for name in ("pixel_values", "labels"))
    model = trainer.model.eval()

    def logits(pixels: torch.Tensor) -> torch.Tensor:
        return model((pixels - MEAN) / STD).logits

    pixels = x * STD + MEAN
    x_adv = ATTACK(lambda z: cross_entropy(logits(z), labels, reduction="none"), pixels)
    for name, z in (("clean", pixels), ("robust", x_adv)):
        with torch.no_grad():
            right = (logits(z).argmax(dim=1) == labels).float().mean().item()
        assert found[f"eval_{name}_accuracy"] == pytest.approx(right, abs=0.01)

    # what it saves is an ordinary transformers folder
    trainer.save_model(str(tmp_path / "saved"))
    trainer.create_model_card()
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    assert type(again) is ResNetForImageClassification
    assert again(x).logits.equal(model(x).logits)

    # and more robust than without
    plain = trainer_of(tmp_path / "plain", robust=False, num_train_epochs=3)
    plain.train()
    make_robust(plain.model, ATTACK, mean=MEAN, std=STD)  # only to be measured
    accuracy = RobustAccuracy(plain, images=150).measure(plain.get_eval_dataloader())
    assert best > accuracy[key] + 0.1


def test_what_stops_by_the_metrics_sees_them(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path,
        num_train_epochs=4,
        metric_for_best_model="robust_accuracy",
        load_best_model_at_end=True,
    )
    trainer.add_callback(EarlyStoppingCallback(1, early_stopping_threshold=2.0))
    trainer.add_callback(RobustAccuracy(trainer, ATTACK, images=20))
    trainer.train()
    assert trainer.state.epoch == 2  # the first evaluation without a gain of 2


def test_fewer_images_than_processes_are_refused(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    none = torch.utils.data.DataLoader(torch.utils.data.Subset(trainer.eval_dataset, []))
    with pytest.raises(ValueError, match="an image for each of 1 processes, got 0"):
        RobustAccuracy(trainer, ATTACK).measure(none)


def test_each_of_several_sets_has_its_own_numbers(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, max_steps=1)
    rows = torch.utils.data.Subset(trainer.eval_dataset, range(40))
    others = torch.utils.data.Subset(trainer.eval_dataset, range(40, 80))
    trainer.eval_dataset = {"first": rows, "second": others}
    trainer.add_callback(RobustAccuracy(trainer, images=40))
    metrics = trainer.evaluate()
    names = ("robust_accuracy", "clean_accuracy", "loss")
    assert {f"eval_{s}_{n}" for s in ("first", "second") for n in names} <= set(metrics)
    assert "eval_robust_accuracy" not in metrics
    other = trainer.evaluate(rows, metric_key_prefix="held_out")
    assert other["held_out_robust_accuracy"] == metrics["eval_first_robust_accuracy"]


def test_it_resumes_from_a_checkpoint_exactly(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    trainer_of(whole, gradient_accumulation_steps=2).train()
    trainer_of(resumed, gradient_accumulation_steps=2).train(
        resume_from_checkpoint=str(whole / "checkpoint-5")
    )
    first, second = (load_file(f / "checkpoint-10" / "model.safetensors") for f in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(first[key].equal(second[key]) for key in first)


def test_rounding_goes_on_where_the_trainer_does(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.train()
    again = trainer_of(tmp_path, num_train_epochs=3)
    callback = QuantizedGradients(again, QSGD(bits=8))
    again.add_callback(callback)
    seen: list[int] = []
    make = callback.on_train_begin

    def noted(*args: Any, **kwargs: Any) -> None:
        make(*args, **kwargs)
        assert callback.compression is not None
        seen.append(callback.compression.steps)

    callback.on_train_begin = noted  # type: ignore[method-assign]
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert seen == [20]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"call make_robust on the model, before Trainer"):
        RobustAccuracy(trainer_of(tmp_path, robust=False))
    trainer = trainer_of(tmp_path, robust=False)
    make_robust(trainer.model, NoAttack())
    with pytest.raises(ValueError, match=r"attack is missing: NoAttack\(\) has no eps"):
        RobustAccuracy(trainer)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub's protocol as a push needs; keeps the files it is sent."""

    def do_POST(self) -> None:
        lines = self.rfile.read(int(self.headers["Content-Length"])).splitlines()
        reply: dict[str, Any] = {}
        url = f"http://{self.headers['Host']}/someone/robust"
        if self.path == "/api/repos/create":
            reply = {"url": url}
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(lines[0])["files"]]
            kind = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            reply = {"files": [{"path": path, **kind} for path in paths]}
        elif "/commit/" in self.path:
            for line in map(json.loads, lines):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    (self.server.folder / line["value"]["path"]).write_bytes(content)
            reply = {"commitOid": "0" * 40, "commitUrl": f"{url}/commit/{'0' * 40}"}
        self.answer(reply)

    def do_GET(self) -> None:
        """Of the repository; an older ``huggingface_hub`` asks."""
        self.answer({"id": "someone/robust"})

    def answer(self, reply: dict[str, Any]) -> None:
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_it_pushes_an_ordinary_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    hub.folder = tmp_path / "hub"
    hub.folder.mkdir()
    Thread(target=hub.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{hub.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", url)
    options = {"eval_strategy": "no", "save_strategy": "no", "max_steps": 1}
    trainer = trainer_of(
        tmp_path / "robust", hub_model_id="someone/robust", hub_token="hf_none", **options
    )
    trainer.train()
    trainer.push_to_hub()
    hub.shutdown()
    hub.server_close()
    assert "robust" in (hub.folder / "README.md").read_text()
    again = AutoModelForImageClassification.from_pretrained(hub.folder)
    assert type(again) is ResNetForImageClassification
    expected = trainer.model.state_dict()
    assert all(tensor.equal(expected[key]) for key, tensor in again.state_dict().items())
