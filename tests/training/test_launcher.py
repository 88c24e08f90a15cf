"""What the launch configuration asks for is done or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from launching import LAUNCHER_OF_FSDP2, ZERO2, refused
from small_runs import quick_run

from robust_accel.comm.fsdp2 import has_hooks
from robust_accel.recipe import TrainSettings, load_recipe
from robust_accel.training.finite import Watch
from robust_accel.training.launcher import Sharding, as_launched, read_launcher
from robust_accel.training.parts import in_precision

with_fsdp2 = pytest.mark.skipif(not has_hooks(), reason="refused before torch 2.9")
TWO = {"WORLD_SIZE": "2"}
PARALLEL = TWO | LAUNCHER_OF_FSDP2 | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "compiled": ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_backend: INDUCTOR"),
    "Megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "use_megatron_lm: true"),
    "fp8": ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed_precision: fp8"),
    "other precision": (
        {"ACCELERATE_MIXED_PRECISION": "bf16"},
        "train.precision: fp32, and the launch configuration's mixed_precision is bf16: set",
    ),
    "accumulation": (
        TWO | ZERO2 | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        "gradient_accumulation_steps: 4, and by the recipe it is 1",
    ),
    "accumulation without DeepSpeed": (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        "gradient_accumulation_steps: 4, and by the recipe it is 1",
    ),
    "clipping": (
        TWO | ZERO2 | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
        "gradient_clipping: 0.5, and by the recipe it is 0.0",
    ),
    "ZeRO 3": (
        TWO | ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
        "ZeRO 3 is not possible with train",
    ),
    "weights elsewhere": (
        TWO | ZERO2 | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"},
        "offload_param: cpu is ZeRO 3's, and DeepSpeed would pass over it at ZeRO 2",
    ),
    "tensors in parallel": (
        PARALLEL | {"PARALLELISM_CONFIG_TP_SIZE": "2"},
        "parallelism_config_tp_size: 2",
    ),
    "parts of images": (
        PARALLEL | {"PARALLELISM_CONFIG_CP_SIZE": "2"},
        "parallelism_config_cp_size: 2",
    ),
    "classes without a policy": (
        {key: value for key, value in PARALLEL.items() if key != "FSDP_AUTO_WRAP_POLICY"},
        "fsdp_transformer_layer_cls_to_wrap: Block without fsdp_auto_wrap_policy: TRANSFORMER",
    ),
    "classes against the policy": (
        PARALLEL | {"FSDP_AUTO_WRAP_POLICY": "no_wrap"},
        "fsdp_transformer_layer_cls_to_wrap: Block without fsdp_auto_wrap_policy: TRANSFORMER",
    ),
    "a policy without classes": (
        PARALLEL | {"FSDP_TRANSFORMER_CLS_TO_WRAP": " "},
        "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP needs the classes of the layers",
    ),
    "without FSDP": (
        TWO | {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
        "parallelism_config cuts a model by FSDP2 alone",
    ),
}
REFUSED_OF_FSDP2 = {
    "FSDP_VERSION": ("1", "fsdp_version: 1 is not possible with train"),
    "FSDP_SHARDING_STRATEGY": ("HYBRID_SHARD", "FSDP2 asks for replicas by parallelism_config_dp"),
    "FSDP_OFFLOAD_PARAMS": ("true", "fsdp_offload_params: true"),
    "FSDP_AUTO_WRAP_POLICY": ("SIZE_BASED_WRAP", "allowed: NO_WRAP or TRANSFORMER_BASED_WRAP"),
    "FSDP_STATE_DICT_TYPE": ("FULL_STATE_DICT", "allowed: SHARDED_STATE_DICT"),
    "FSDP_FORWARD_PREFETCH": ("true", "fsdp_forward_prefetch: true"),
    "FSDP_IGNORED_MODULES": ("head", "fsdp_ignored_modules: head"),
    "WORLD_SIZE": ("1", "there is one"),
}
REFUSED |= {key: (PARALLEL | {key: value}, said) for key, (value, said) in REFUSED_OF_FSDP2.items()}
REPLICAS = {"no shards": (4, 1), "too many": (4, 2), "too few": (1, 2)}


def set_all(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_done_is_refused(
    case: str,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    environment, expected = REFUSED[case]
    set_all(monkeypatch, environment)
    assert expected in refused(capsys, tmp_path / "run", command=command)


IN_ITS_FILE = {
    "a number": ({"gradient_accumulation_steps": 2}, "accumulation_steps: 2, and by the recipe"),
    "a batch": ({"train_micro_batch_size_per_gpu": 8}, "by the recipe it is 32"),
    "no number": ({"gradient_clipping": [1]}, "gradient_clipping: [1], and by the recipe"),
    "half precision": ({"fp16": {"enabled": True}}, 'fp16: {"enabled": true} is not possible'),
    "an optimizer": ({"optimizer": {"type": "Adam"}}, 'optimizer: {"type": "Adam"}'),
    "its collectives": ({"communication_data_type": "fp16"}, 'communication_data_type: "fp16"'),
    "no mapping": ([1], "is a mapping, found [1]"),
    "ZeRO 3": ({"zero_optimization": {"stage": 3}}, "ZeRO 3 is not possible with train"),
    **{
        key: ({"zero_optimization": {"stage": 1, key: value}}, f"{key}: {said} is ZeRO 3's")
        for key, value, said in (
            ("zero_quantized_gradients", True, "True"),
            ("zero_quantized_weights", True, "True"),
            ("zero_quantized_nontrainable_weights", True, "True"),
            ("zero_hpz_partition_size", 2, "2"),
            ("offload_param", {"device": "cpu"}, "cpu"),
        )
    },
    "no ZeRO": ({"zero_optimization": "auto"}, "zero_optimization: missing, or no mapping"),
}


@pytest.mark.parametrize("case", IN_ITS_FILE)
def test_deepspeeds_own_file_is_read(
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    content, expected = IN_ITS_FILE[case]
    path = tmp_path / "ds.json"
    if isinstance(content, dict):
        fine = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}
        fine |= {"train_batch_size": "auto", "fp16": {"enabled": False}, "gradient_clipping": 0}
        content = fine | content
    path.write_text(json.dumps(content))
    set_all(monkeypatch, TWO | ZERO2 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    said = refused(capsys, tmp_path / "run")
    assert f"{path}: " in said
    assert expected in said


def test_a_file_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text("{")
    set_all(monkeypatch, TWO | ZERO2 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)})
    assert f"{path}: cannot be read as DeepSpeed's" in refused(capsys, tmp_path / "run")


def test_auto_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert as_launched("auto") == "auto"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert as_launched("auto") == "bf16"
    assert as_launched("bf16") == "bf16"


def test_auto_is_checked_as_what_the_launcher_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    auto = "train.precision=auto"
    recipe, precision = in_precision(load_recipe("quickstart", [auto]))
    assert recipe.train is not None
    assert recipe.train.precision == precision == "fp16"
    aligned = ("objective.grad_align={eps: 0.2}", "attack={name: fgsm-rs, eps: 0.2}")
    said = refused(capsys, tmp_path / "run", auto, *aligned)
    assert "objective.grad_align: its derivatives underflow in train.precision fp16" in said


def test_a_run_is_in_the_launchers_precision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All that goes by the precision sees it, as the report does."""
    seen: list[str] = []

    class Seen(Watch):
        def __init__(self, accelerator: Any, settings: TrainSettings, *rest: Any) -> None:
            seen.append(settings.precision)
            super().__init__(accelerator, settings, *rest)

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr("robust_accel.training.run.Watch", Seen)
    report = quick_run(tmp_path / "run", "train.precision=auto", "train.max_steps=1")
    assert [*seen, report["precision"]] == ["bf16", "bf16"]


@with_fsdp2
@pytest.mark.parametrize("policy", ["NO_WRAP", None])
def test_no_layers_need_no_policy(policy: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TWO | LAUNCHER_OF_FSDP2)
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    monkeypatch.delenv("FSDP_AUTO_WRAP_POLICY")
    if policy is not None:
        monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", policy)
    assert read_launcher() == Sharding((), True, False)


@with_fsdp2
def test_the_launcher_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TWO | LAUNCHER_OF_FSDP2)
    assert read_launcher() == Sharding(("Block",), True, False, replicas=1)
    assert read_launcher() is None  # and Accelerate sees plain processes


def parallel(monkeypatch: pytest.MonkeyPatch, replicas: int, shards: int) -> None:
    set_all(monkeypatch, PARALLEL | {"WORLD_SIZE": "4"})
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", str(replicas))
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", str(shards))


@with_fsdp2
def test_replicas_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parallel(monkeypatch, 2, 2)
    assert read_launcher() == Sharding(("Block",), True, False, replicas=2)
    assert read_launcher() is None


@with_fsdp2
@pytest.mark.parametrize("case", REPLICAS)
def test_replicas_that_are_not_the_processes_are_refused(
    case: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    parallel(monkeypatch, *REPLICAS[case])
    said = refused(capsys, tmp_path / "run")
    assert "must be the number of processes, 4, and a network is cut in two" in said
