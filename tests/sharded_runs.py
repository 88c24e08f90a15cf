"""Small runs in pieces, and by DDP beside them."""

from collections.abc import Mapping
from pathlib import Path

from launching import FSDP2, SMALL, Forked

from robust_accel.run_folder import RunFolder

VIT = "model={name: vit_tiny_patch16_224, options: {img_size: 8, patch_size: 4, depth: 2, "
VIT += "embed_dim: 24}}"
PLAIN = ("train", "quickstart", *SMALL, VIT, "communication={name: allreduce}", "train.epochs=1")


def trained(
    folder: Path, *arguments: str, environment: Mapping[str, str] = FSDP2, num_processes: int = 2
) -> RunFolder:
    run = Forked(
        *arguments, f"output={folder}", environment=environment, num_processes=num_processes
    )
    code, output = run.wait()
    assert code == 0, output
    return RunFolder(folder)


def losses(folder: RunFolder) -> list[float]:
    return [line["loss"] for line in folder.read_metrics() if "loss" in line]
