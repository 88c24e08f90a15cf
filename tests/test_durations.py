"""Durations of recipes: 3h50m, 90m, 45s, or seconds."""

import pytest

from robust_accel.recipe import RecipeError, load_recipe


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("3h50m", 13800),
        ("90m", 5400),
        ("2h", 7200),
        ("45s", 45),
        ("1d1s", 86401),
        ("12.5", 12.5),
        ("'9'", 9),
    ],
)
def test_a_duration_is_seconds(text: str, seconds: float) -> None:
    recipe = load_recipe("quickstart", [f"train.max_time={text}"])
    assert recipe.train is not None
    assert recipe.train.max_time == seconds
    assert recipe.settings["train"]["max_time"] == seconds


@pytest.mark.parametrize(
    "text",
    ["soon", "3 hours", "0", "-5", "50m3h", "3h50", "h", "true", "[1]", ".inf", ".nan", "1e30"],
)
def test_anything_else_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe("quickstart", [f"train.max_time={text}"])
    said = str(refused.value)
    assert said.startswith("command line: train.max_time: ")
    assert "write 3h50m, 90m, 45s or a number of seconds" in said


def test_a_time_limit_shorter_than_heartbeats_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"train\.timeout: .*greater than or equal to 5"):
        load_recipe("quickstart", ["train.timeout=1s"])
