"""The support matrix: models, engines and objectives on two ranks, each compared with by hand.

python -m pytest tests/integrations/test_matrix.py -s      prints the table of docs/support.md
"""

from pathlib import Path

import engines
import processes
import pytest
import torch
from engines import IN_PLACE, OBJECTIVES, PLAIN, WRAPPED, Trained

ENGINES = (
    "DDP", "DDP, static_graph", "DDP, find_unused", "DDP, bucket_view", "DDP, no broadcast",
    "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "FSDP2, root", "FSDP2, nested", "FSDP2, inner",
    "DataParallel", "spawn",
)  # fmt: skip
KINDS = (PLAIN, WRAPPED, IN_PLACE)
SHARDED = ("ZeRO 3", "FSDP2, nested", "FSDP2, inner")
SUPPORT = Path(__file__).parent.parent.parent / "docs" / "support.md"


def cells() -> list[tuple[str, str, str]]:
    """(kind, engine, objective); a plain model has no objective, only the script's loss."""
    return [
        (kind, engine, objective)
        for engine in ENGINES
        for kind in KINDS
        for objective in OBJECTIVES
        if (kind != PLAIN or objective == "AT, own loss")
        # sharded inside of RobustModel: otherwise the same as the root
        and (engine != "FSDP2, inner" or kind == WRAPPED)
    ]


def refusal(kind: str, engine: str, objective: str) -> str | None:
    """The sentence with which a cell is refused; None where it must be right."""
    if kind == WRAPPED and engine in ("FSDP2, root", "FSDP2, nested"):
        return "under FSDP2 the model itself must be what is sharded: make_robust"
    if objective == "AWP" and engine in SHARDED:
        return "adversarial weight perturbation needs whole weights, got shards"
    if objective == "AWP" and engine == "DataParallel":
        return "does not support torch.nn.DataParallel, whose replicas have no parameters"
    return None


def matrix(rank: int, world_size: int) -> dict[tuple[str, str, str], float | str]:
    """Of each cell the relative distance from by hand, or what it was refused with."""
    results: dict[tuple[str, str, str], float | str] = {}
    for kind, engine, objective in cells():
        try:
            cell = Trained(kind, objective, engine, rank)
            start, found = cell.found(), cell.parameters()
        except (ValueError, TypeError) as error:
            results[kind, engine, objective] = str(error)
            continue
        expected = engines.by_hand(kind, objective, world_size, engine)
        distance = (found - expected).norm() / (expected - start).norm()
        results[kind, engine, objective] = distance.item()
    return results


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    ranks = processes.run([matrix], 2, tmp_path_factory.mktemp("matrix"))
    for rank in ranks:
        assert "matrix" in rank, rank.get("error")
    return [rank["matrix"] for rank in ranks]


@pytest.mark.launch
@pytest.mark.parametrize("cell", cells(), ids=" | ".join)
def test_a_cell_is_right_or_refused(cell: tuple[str, str, str], found: list[dict]) -> None:
    for results in found:
        said = refusal(*cell)
        if said is None:
            assert isinstance(results[cell], float), results[cell]
            assert results[cell] < 1e-5
        else:
            assert said in str(results[cell])


def table() -> str:
    """Engines against objectives; a cell names the kinds of model that work there."""
    lines = ["| engine | " + " | ".join(OBJECTIVES) + " |"]
    lines += ["|---" * (len(OBJECTIVES) + 1) + "|"]
    for engine in ENGINES:
        row = []
        for objective in OBJECTIVES:
            works = [
                kind
                for kind in KINDS
                if (kind, engine, objective) in cells() and refusal(kind, engine, objective) is None
            ]
            row.append(", ".join(works) or "refused")
        lines.append(f"| {engine} | " + " | ".join(row) + " |")
    return "\n".join(lines)


@pytest.mark.launch
def test_the_documentation_says_what_is_supported(found: list[dict]) -> None:
    print(f"\n{table()}\n")
    assert table() in SUPPORT.read_text()


@pytest.mark.launch
def test_by_hand_attacks(found: list[dict]) -> None:
    """The comparison can fail: objectives end elsewhere, and so does no attack."""
    ends = [engines.by_hand(IN_PLACE, o, 2, "DDP") for o in OBJECTIVES if o != "AT, own loss"]
    ends.append(engines.by_hand(PLAIN, "AT, own loss", 2, "DDP"))
    for i, one in enumerate(ends):
        for other in ends[i + 1 :]:
            assert not torch.allclose(one, other, rtol=1e-3, atol=1e-3)
