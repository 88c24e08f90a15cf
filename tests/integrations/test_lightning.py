"""The documentation's LightningModule is trained by Lightning's own loop, at attacked images."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")  # of the development's extra

from robust_accel.integrations.in_place import robust_training

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "lightning.md"
CODE = PAGE.read_text().split("```python\n")[1].split("```")[0]


def digits() -> DataLoader:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(64, 1, 8, 8), torch.arange(64) % 10), batch_size=16)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def trainer(page: dict[str, Any], folder: Path, **options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return page["L"].Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=folder, **quiet, **options
    )


def test_its_own_loop_trains_on_attacked_images(tmp_path: Path) -> None:
    page: dict[str, Any] = {}
    exec(CODE.partition("trainer =")[0], page)
    module = page["Classifier"](network())
    trainer(page, tmp_path, devices=1).fit(module, digits())
    training = robust_training(module.network)
    assert training is not None and training.min_max.calls == 4
    assert training.min_max.applied is not None  # what the first batch's attack has done
    assert not module.network[1].weight.equal(network()[1].weight)


TWO = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {own!r}]
from test_lightning import CODE, digits, network, trainer
page = {{}}
exec(CODE.partition("trainer =")[0], page)
module = page["Classifier"](network())
class Sent(page["Compress"]):
    def on_train_start(self, trainer, module):
        sent.append(page["compress_gradients"](trainer.strategy.model, page["QSGD"](bits=8)))
sent = []
fitted = trainer(page, Path({folder!r}), strategy="ddp", devices=2, callbacks=[Sent()])
fitted.fit(module, digits())
from torch import save
found = [module.network[1].weight, sent[0].meter.bytes_sent]
save(found, Path({folder!r}, f"{{fitted.global_rank}}.pt"))
"""


@pytest.mark.long
def test_two_processes_send_eight_bits_and_keep_one_model(tmp_path: Path) -> None:
    own = Path(__file__).parent
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=str(own.parent), own=str(own), folder=str(tmp_path)))
    subprocess.run([sys.executable, str(script)], check=True, timeout=300)
    (one, sent), (other, _) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert one.equal(other)
    assert not one.equal(network()[1].weight)
    assert 0 < sent < 2 * 4 * 650  # of two steps in fp32
