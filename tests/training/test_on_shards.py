"""Training on WebDataset's shards: killed and resumed, on two processes, and when shards change."""

import functools
import json
import os
from pathlib import Path

import pytest
from launching import Forked, killed_and_resumed
from shard_files import write_shard

from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.run import train

SMALL = (
    "data.in_memory=false",
    "data.image_size=8",
    "data.num_workers=1",
    "data.augment=timm",
    "data.test_split=validation",
    "data.validation_size=0",
    "data.label_column=cls",
    "evaluate.train_images=null",
    "evaluate.autoattack=null",
    "evaluate.pgd.num_steps=1",
    "train.epochs=2",
    "train.batch_size=16",
    "train.select=last",
    "train.checkpoint_every=2",
    "attack.num_steps=1",
    "attack.step_size=0.2",
)


def shards(folder: Path, number: int = 4, each: int = 20) -> Path:
    for i in range(number):
        write_shard(folder / f"train-{i:03}.tar", range(each * i, each * i + each))
    write_shard(folder / "val-000.tar", range(500, 520))
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.long
@pytest.mark.usefixtures("cache")
def test_a_run_goes_on_only_with_the_shards_it_began_with(tmp_path: Path) -> None:
    data = shards(tmp_path / "data")
    own = (*SMALL, f"output={tmp_path / 'run'}", f"data.path={data}", "data.num_workers=0")

    def resumed(*more: str) -> dict:
        recipe = load_recipe("quickstart", (*own, "train.max_steps=2", *more))
        return train(recipe, resume=True)

    assert resumed()["steps"] == 2
    third, aside = data / "train-002.tar", data / "aside"
    third.rename(aside)
    with pytest.raises(
        ValueError, match=r"data\.path: shard train-002\.tar is missing; the run has trained on 80"
    ):
        resumed()
    with pytest.raises(ValueError, match=r"data\.path: there is no shard .*train-002\.tar"):
        resumed(f"data.path={data}/train-{{000..003}}.tar", f"output={tmp_path / 'other'}")
    aside.rename(third)
    about = third.stat()
    write_shard(third, range(40, 60), cls45=b"0")
    os.utime(third, ns=(about.st_atime_ns + 1, about.st_mtime_ns + 1))
    with pytest.raises(
        ValueError, match=r"shard train-002\.tar has other images or labels; the run has trained"
    ):
        resumed()
    write_shard(third, range(40, 60))
    assert resumed()["steps"] == 2


@pytest.mark.launch
@pytest.mark.long
def test_a_run_on_shards_is_killed_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    data = shards(tmp_path / "data", each=24)
    own = (*SMALL, f"data.path={data}")
    whole = tmp_path / "whole"
    start = functools.partial(Forked, "train", "quickstart", *own)
    code, output = start(f"output={whole}").wait()
    assert code == 0, output
    killed_and_resumed(whole, tmp_path / "killed", start)
    manifest = (RunFolder(whole).steps()[-1] / "manifest.json").read_text()
    assert json.loads(manifest)["about"]["data"]["train"]["shards"].keys() == {
        f"train-{i:03}.tar" for i in range(4)
    }
