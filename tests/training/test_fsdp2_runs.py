"""Training in pieces (FSDP2), by two real processes."""

import json
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import (
    CPU,
    FSDP2,
    LAUNCHER_OF_FSDP2,
    SMALL,
    Forked,
    counts,
    kill_at,
    refused,
    weights,
)
from sharded_runs import PLAIN, VIT, losses, trained
from torch.distributed.checkpoint import metadata

from robust_accel import load_model
from robust_accel.comm.fsdp2 import has_hooks
from robust_accel.run_folder import RunFolder
from robust_accel.training.shard_files import ShardReader
from robust_accel.training.shards import OPTIMIZERS

pytestmark = pytest.mark.skipif(not has_hooks(), reason="refused before torch 2.9")
RUN = ("train", "quickstart", *SMALL, VIT, "train.ema_decay=0.9", "train.max_grad_norm=1")
RUN += ("train.gradient_accumulation=2", "train.precision=bf16", "data.train_size=464")
RUN += ("communication.weight_bits=8", "objective.name=trades")  # several forwards a backward


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return trained(tmp_path_factory.mktemp("runs") / "run", *RUN)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process is one of two, as the launcher starts them."""
    for name, value in (LAUNCHER_OF_FSDP2 | {"WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_optimizer_takes_the_steps_of_ddp(name: str, tmp_path: Path) -> None:
    run = (*PLAIN, "train.log_every=1", "train.max_steps=4", "evaluate.pgd=null")
    run += (f"optimizer={{name: {name}, lr: 0.01, weight_decay: 0.01}}",)
    found = [
        losses(trained(tmp_path / way, *run, environment=environment))
        for way, environment in {"ddp": CPU, "pieces": FSDP2}.items()
    ]
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_what_is_left_is_a_whole_model_and_what_was_measured(finished: RunFolder) -> None:
    report = finished.read_report()
    assert report["num_processes"] == 2
    assert report["precision"] == "bf16"
    applied = report["applied"]
    assert applied["processes_with_pieces"] == 2
    assert "processes_with_equal_parameters" not in applied
    assert 0 < applied["bytes_sent"] == pytest.approx(report["bytes_sent_per_step"])
    model = load_model(finished.path)
    tensors = weights(finished.path)
    assert {name: w.shape for name, w in model.model.state_dict().items()} == {
        name: w.shape for name, w in tensors.items()
    }
    assert all(w.dtype == torch.float32 for w in tensors.values())


def test_one_that_is_killed_ends_as_it_would_have_without_a_common_disk(
    finished: RunFolder, tmp_path: Path
) -> None:
    disks = [tmp_path / "one", tmp_path / "two"]
    for disk in disks:
        disk.mkdir()
    start = partial(Forked, *RUN, "output=run", environment=FSDP2, folders=disks)
    folder = RunFolder(disks[0] / "run")
    kill_at(start(), lambda: bool(folder.steps()))
    assert not folder.report.exists()
    code, output = start("--resume").wait()
    assert code == 0, output
    assert "continuing run at step" in output
    before, after = weights(finished.path), weights(folder.path)
    assert all(before[key].equal(after[key]) for key in before | after)
    assert counts(folder) == counts(finished)
    assert not list(disks[1].rglob("*.distcp"))


TWO_COPIES = FSDP2 | {
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
}


@pytest.mark.long
def test_copies_in_pieces_train_as_by_ddp_and_go_on(tmp_path: Path) -> None:
    """On four processes: two hold a copy together, and two copies are averaged."""
    run = (*PLAIN, "train.log_every=1", "evaluate.pgd=null")
    found = []
    for way, environment in {"ddp": CPU, "copies": TWO_COPIES}.items():
        short = (*run, "train.max_steps=4", f"output={tmp_path / way}")
        code, output = Forked(*short, environment=environment, num_processes=4).wait()
        assert code == 0, output
        found.append(losses(RunFolder(tmp_path / way)))
    assert "in pieces on 4 processes, 2 copies" in output
    assert len(found[0]) == 4
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    folder = RunFolder(tmp_path / "copies")
    assert folder.read_report()["applied"]["copies_of_pieces"] == 2
    # one copy is written
    (step,) = folder.steps()
    described = ShardReader(step / "shards").read_metadata().storage_data
    written = sum(path.stat().st_size for path in (step / "shards").glob("*.distcp"))
    assert written == sum(piece.length for piece in described.values())
    before = weights(folder.path)
    folder.model.joinpath("model.safetensors").unlink()
    resumed = (*run, "train.max_steps=4", f"output={folder.path}", "--resume")
    code, output = Forked(*resumed, environment=FSDP2, num_processes=4).wait()
    assert code == 0, output
    assert "perhaps not bit for bit: replicas 2, now 1" in output
    assert weights(folder.path).keys() == before.keys()
    assert all(weights(folder.path)[key].equal(before[key]) for key in before)


NOT_IN_PIECES = {
    "train.awp={gamma: 0.005}": "train.awp: not possible with FSDP2",
    "train.compile=true": "train.compile: true is not possible",
    "optimizer={name: lars, lr: 0.1}": "optimizer.name: lars is not known to be exact on FSDP2's",
    "objective.grad_align={eps: 0.2}": "objective.grad_align: not possible with FSDP2",
}


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("override", NOT_IN_PIECES)
def test_what_pieces_cannot_is_refused(
    override: str,
    command: str,
    launched: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    launched.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "PreActBlock")
    said = refused(capsys, tmp_path / "run", override, command=command)
    assert NOT_IN_PIECES[override] in said


@pytest.mark.usefixtures("launched")
def test_weights_of_as_many_bits_as_they_have_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    half = ("train.precision=bf16", "communication={name: qsgd, weight_bits: 16}")
    said = refused(capsys, tmp_path / "run", *half)
    assert "communication.weight_bits: 16 sends more than the weights themselves" in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.log_every=10", "Block is no module of WideResNet (did you mean PreActBlock?)"),
        ("train.precision=bf16", "stages.0.0.norm1 is a BatchNorm"),
    ],
)
def test_a_network_that_cannot_be_cut_so_is_refused(
    override: str, said: str, tmp_path: Path
) -> None:
    run = ("quickstart", override, f"output={tmp_path / 'run'}")
    for command in ("check", "train"):
        code, output = Forked(command, *run, environment=FSDP2).wait()
        assert code == 2
        assert said in output


@pytest.mark.parametrize(
    "override", ["train.keep_gathered=true", "communication={name: qsgd, weight_bits: 8}"]
)
def test_weights_are_gathered_in_pieces_alone(
    override: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refused(capsys, tmp_path / "run", override)
    assert re.search("(keep_gathered|weight_bits): weights are gathered under FSDP2 alone", said)


# ------------------------------------------------------------------------ a stranger's pieces


class Runs:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("executed"),)


def described(**changes: Any) -> metadata.Metadata:
    """Of one tensor, whose piece lies in ``a``."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    size = torch.Size([2])
    chunk = metadata.ChunkStorageMetadata(torch.Size([0]), size)
    properties = metadata.TensorProperties(dtype=torch.float32)
    one = metadata.TensorStorageMetadata(properties, size, [chunk])
    place = _StorageInfo(changes.get("file", "a"), 0, 1)
    kinds = {"x": changes.get("kind", one)}
    return metadata.Metadata(kinds, storage_data={metadata.MetadataIndex("x"): place})


HOSTILE: dict[str, Any] = {
    "a function": Runs(),
    "within": described(kind=Runs()),
    "bytes, which torch unpickles": described(kind=metadata.BytesStorageMetadata()),
    "another folder": described(file="../b"),
    "a mapping": {"x": 1},
    "a text": "x",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_strangers_description_is_refused_and_executes_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shards"
    folder.mkdir()
    for name in ("a", "../b"):
        (folder / name).write_bytes(b"")
    (folder / ".metadata").write_bytes(pickle.dumps(described()))
    assert ShardReader(folder).kinds() == {"x": (torch.Size([2]), torch.float32)}
    (folder / ".metadata").write_bytes(pickle.dumps(HOSTILE[kind]))
    with pytest.raises(ValueError, match=r"\.metadata: cannot be read: "):
        ShardReader(folder).kinds()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"cos\nsystem\n(S'true'\ntR.", b"\xff" * 40])
def test_a_description_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError, match=r"\.metadata: cannot be read: "):
        ShardReader(tmp_path).kinds()


def test_a_real_description_names_nothing_else(finished: RunFolder) -> None:
    (step, *_) = finished.steps()
    kinds = ShardReader(step / "shards").kinds()
    assert "model.model.blocks.0.attn.proj.bias" in json.dumps(sorted(kinds))
