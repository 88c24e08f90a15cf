"""A recipe is read, inherited, overridden and checked: every fault names its origin and its key."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from bad_recipes import told
from torch import Tensor

from robust_accel.attacks import ATTACKS, FGSMRS, PGD, LossFn, NoAttack
from robust_accel.objectives import Adversarial
from robust_accel.recipe import Recipe, RecipeError, load_recipe
from robust_accel.recipe_file import packaged_recipes
from robust_accel.settings import Number, Settings

PACKAGED = packaged_recipes()
SMALL = """
model: {name: wide_resnet10_1}
data: {path: "sklearn:digits"}
attack: {name: pgd, eps: 8/255, num_steps: 3}
optimizer: {lr: 0.03, weight_decay: 1e-4}
train: {epochs: 2, batch_size: 64}
"""


class OwnAttack(Settings):
    """A user's attack whose fields are checked."""

    eps: Number = 0.1
    strength: int = 1

    def __call__(self, loss_fn: LossFn, x: Tensor, *, generator: object = None) -> Tensor:
        return x


@dataclasses.dataclass(frozen=True)
class PlainAttack:
    """A user's attack with no dependency on this package."""

    eps: float = 0.1
    window: tuple[int, int] = (1, 2)

    def __call__(self, loss_fn: LossFn, x: Tensor, *, generator: object = None) -> Tensor:
        return x


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write(tmp_path / "small.yaml", SMALL)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def only_fault(source: str | Path, *overrides: str) -> str:
    (fault,) = told(source, *overrides)
    return fault


# ---- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_recipes_load_and_survive_saving(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    recipe.save(tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert_same(recipe, again)
    assert recipe.output == Path("runs") / name


@pytest.mark.parametrize("name", ["cifar10/dat_pgd.yaml", "cifar10/dat_pgd"])
def test_a_base_may_be_a_packaged_recipe(name: str, tmp_path: Path) -> None:
    path = tmp_path / "dat_pgd.yaml"
    path.write_text(f"base: {name}\ntrain: {{log_every: 3}}\n")
    given = ["train.log_every=3", "output=runs/dat_pgd"]
    own, packaged = load_recipe(path), load_recipe("cifar10/dat_pgd", given)
    assert own.settings == packaged.settings
    (tmp_path / "cifar10").mkdir()  # what lies beside the file comes first
    (tmp_path / "cifar10/dat_pgd.yaml").write_text("train: {log_every: 7}\nbase: ../q.yaml\n")
    (tmp_path / "q.yaml").write_text("base: quickstart\n")
    assert load_recipe(path).settings["model"] == load_recipe("quickstart").settings["model"]


def test_there_are_packaged_recipes() -> None:
    assert {"quickstart", "cifar10/dat_pgd", "imagenet/dat_fgsm"} <= set(PACKAGED)


def assert_same(recipe: Recipe, again: Recipe) -> None:
    assert again.settings == recipe.settings
    for field in dataclasses.fields(Recipe):
        if field.name not in ("source", "origins"):
            assert getattr(again, field.name) == getattr(recipe, field.name), field.name


def test_resolved_settings_hold_every_default(small: Path) -> None:
    settings = load_recipe(small).settings
    assert settings["attack"] == {"name": "pgd"} | PGD(num_steps=3).model_dump()
    assert settings["communication"]["name"] == "allreduce"
    assert settings["train"]["select"] == "last"


def test_base_is_relative_to_its_file_and_the_nearest_setting_wins(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", SMALL)
    write(tmp_path / "sub" / "middle.yaml", "base: ../root.yaml\nattack: {num_steps: 4}")
    leaf = write(tmp_path / "sub" / "leaf.yaml", "base: middle.yaml\nattack: {step_size: 0.01}")
    attack = load_recipe(leaf).attack
    assert attack == PGD(eps=8 / 255, num_steps=4, step_size=0.01)


def test_a_cycle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml")
    write(tmp_path / "b.yaml", "base: a.yaml")
    assert "inherits from itself" in only_fault(tmp_path / "a.yaml")
    assert "inherits from itself" in only_fault(write(tmp_path / "self.yaml", "base: self.yaml"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("base: nowhere.yaml", "no such file"),
        ("base: .", "no such file"),
        ("base: [a.yaml, b.yaml]", "must be one file"),
        ("model: [1", "not YAML"),
        ("model: {name: a, size: *b}", "not YAML"),
        ("- model", "a mapping of sections"),
        ("", "a mapping of sections"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path / "broken.yaml", text)
    fault = "\n".join(told(path))
    assert fault.startswith(f"{path}: ")
    assert complaint in fault


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    assert told(path)[0].startswith(f"{path}: not YAML")


def test_a_missing_recipe_is_told_from_a_misspelt_one() -> None:
    said = "no such file, nor a packaged recipe"
    assert only_fault("nowhere/at_all.yaml") == (
        f"nowhere/at_all.yaml: {said}; robust-accel recipes lists them"
    )
    assert f"{said} (did you mean cifar10/trades" in only_fault("cifar10/trade")


# ---- where a fault comes from ------------------------------------------------------------------


def test_each_fault_names_the_file_or_the_command_line(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", SMALL.replace("batch_size: 64", "batch_size: 0"))
    leaf = write(tmp_path / "leaf.yaml", "base: base.yaml\nattack: {num_steps: 0}")
    found = told(leaf, "optimizer.lr=-1", "model.nmae=x")
    assert sorted(fault.split(" ")[0:2] for fault in found) == sorted(
        [
            [f"{tmp_path}/base.yaml:", "train.batch_size:"],
            [f"{leaf}:", "attack.num_steps:"],
            ["command", "line:"],
            ["command", "line:"],
        ]
    )
    assert base.exists()
    # replaced on the command line, the file's fault is gone and the command line's is named
    found = told(leaf, "attack.num_steps=-2", "train.batch_size=8")
    assert found == ["command line: attack.num_steps: -2 is not allowed: input should be greater "
                     "than or equal to 1"]  # fmt: skip


def test_all_faults_come_at_once(small: Path) -> None:
    found = told(
        small, "attack.eps=-1", "attack.num_steps=0", "trian.epochs=1", "train.batch_sise=2",
        "optimizer.betaz=[0.9,0.9]", "communication.name=qsgd", "communication.bits=7",
        "schedule.name=cosin", "data.augment=flop", "model.name=null", "evaluate.pgd.num_stepz=3",
    )  # fmt: skip
    assert [fault.split(": ")[1] for fault in sorted(found)] == sorted(
        [
            "attack.eps", "attack.num_steps", "trian", "train.batch_sise", "optimizer.betaz",
            "communication.bits", "schedule.name", "data.augment", "model.name",
            "evaluate.pgd.num_stepz",
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("trian.epochs=1", ("trian: unknown section", "did you mean train?", "allowed: model")),
        ("attack.num_step=1", ("attack.num_step: unknown key", "did you mean num_steps?")),
        ("evaluate.pgd.num_step=1", ("evaluate.pgd.num_step:", "allowed: attack, loss, num_steps")),
        ("optimizer.beta=1", ("optimizer.beta", "did you mean betas")),
        ("attack.name=pdg", ("attack.name: 'pdg' is unknown (did you mean pgd?)", "n-fgsm")),
        ("attack.name=[1]", ("attack.name: [1] is unknown",)),
        ("attack.eps=-1", ("attack.eps: -1 is not allowed", "greater than 0")),
        ("attack.eps=8", ("attack.eps: 8 is not allowed", "8/255")),
        ("attack.eps=8/0", ("attack.eps: '8/0' is not allowed",)),
        ("evaluate.eps=8", ("evaluate.eps: 8", "8/255")),
        ("train.batch_size=0", ("train.batch_size: 0 is not allowed",)),
        ("train.epochs=two", ("train.epochs: 'two' is not allowed",)),
        ("train=5", ("train: must be a mapping of settings, got 5",)),
        ("data.validation_size=-1", ("data.validation_size: -1 is not allowed",)),
        ("data.validation_size=2.5", ("data: validation_size: 2.5 is neither",)),
        ("data.augment=timm", ("data: augment: timm does not go with in_memory: true",)),
        ("data.in_memory=false", ("data: image_size",)),
        ("train.gradient_accumulation=3", ("train.gradient_accumulation: 3 does not divide",)),
        ("attack.name=none", ("evaluate.eps: missing",)),
        ("attack.name=no_such_module:A", ("attack.name: 'no_such_module:A' cannot be imported",)),
        ("attack.name=math:A", ("attack.name: 'math:A' cannot be imported",)),
        ("attack.name=:A", ("attack.name: ':A' cannot be imported",)),
        ("data=null", ("data: missing: this section is required",)),
        ("attack.eps", ("'attack.eps' is not of the form key.subkey=value",)),
        ("attack..eps=1", ("'attack..eps=1' is not of the form key.subkey=value",)),
        ("name=x", ("name: unknown section",)),
        ("5=3", ("5: unknown section",)),
    ],
)
def test_a_fault_on_the_command_line_is_one_line(
    small: Path, override: str, parts: tuple[str, ...]
) -> None:
    fault = only_fault(small, override)
    # a mode that the command line chose may make a key of the file wrong
    assert fault.startswith("command line: ") or "missing" in fault
    for part in parts:
        assert part in fault


@pytest.mark.parametrize("bits", [7, 3, 32, "many"])
def test_bits_that_do_not_exist_are_refused(small: Path, bits: object) -> None:
    fault = only_fault(small, f"communication.bits={bits}", "communication.name=qsgd")
    assert fault.startswith(f"command line: communication.bits: {bits!r} is not allowed: ")
    assert "16, 8, 4 or 2" in fault


def test_values_that_are_no_yaml_and_contradictions_are_refused(small: Path) -> None:
    assert "data.path: not YAML" in only_fault(small, "data.path=[")
    assert "train is set to 5" in only_fault(small, "train=5", "train.epochs=3")


def test_missing_sections_and_keys(tmp_path: Path) -> None:
    path = write(tmp_path / "poor.yaml", "train: {epochs: 1}\nmodel: {name: a}\nattack: {}")
    assert sorted(f.removeprefix(f"{path}: ") for f in told(path)) == sorted(
        [
            "data: missing: this section is required",
            "optimizer: missing: this section is required",
            "train.batch_size: missing: this key is required",
            f"attack.name: missing; allowed: {', '.join(ATTACKS)}, or package.module:Class",
        ]
    )
    assert len(told(path, required=("data",))) == 3


def test_empty_sections_are_as_good_as_left_out(small: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.yaml"
    write(empty, SMALL + "evaluate:\nschedule:\ncommunication:\nobjective:\noutput:\n")
    left_out, recipe = load_recipe(small), load_recipe(empty)
    assert recipe.settings | {"output": ""} == left_out.settings | {"output": ""}
    assert recipe.output == Path("runs/empty")


# ---- overrides ---------------------------------------------------------------------------------


def test_fractions_and_exponents_are_numbers(small: Path) -> None:
    recipe = load_recipe(small, ["optimizer.lr=1e-3", "optimizer.eps=1e-8", "evaluate.eps=4/255"])
    assert recipe.optimizer is not None
    assert recipe.optimizer.lr == 1e-3
    assert recipe.optimizer.weight_decay == 1e-4
    assert recipe.settings["optimizer"]["eps"] == 1e-8
    assert recipe.attack == PGD(eps=8 / 255, num_steps=3)
    assert recipe.evaluate.eps == 4 / 255


def test_overrides_work_in_any_order(small: Path) -> None:
    overrides = ["communication.bits=4", "communication.name=qsgd", "attack.step_size=4/255"]
    one, other = load_recipe(small, overrides), load_recipe(small, overrides[::-1])
    assert_same(one, other)
    assert one.settings["communication"]["bits"] == 4


def test_another_component_starts_its_section_afresh(small: Path) -> None:
    # PGD's num_steps would be an unknown key of FGSM-RS
    assert load_recipe(small, ["attack.name=fgsm-rs"]).attack == FGSMRS()
    recipe = load_recipe(small, ["attack.eps=0.3", "attack.name=fgsm-rs"])
    assert recipe.attack == FGSMRS(eps=0.3)
    # the same name again changes nothing
    assert load_recipe(small, ["attack.name=pgd"]).attack == PGD(num_steps=3)


def test_what_a_new_component_lacks_is_not_blamed_on_the_file(small: Path) -> None:
    fault = only_fault(small, "optimizer.name=sgd")
    assert fault == "command line: optimizer.lr: missing: this key is required"


def test_renaming_in_a_file_starts_afresh_too(tmp_path: Path, small: Path) -> None:
    leaf = write(
        tmp_path / "leaf.yaml", "base: small.yaml\nattack: {name: none}\nevaluate: {eps: 1/255}"
    )
    assert load_recipe(leaf).attack == NoAttack()


def test_the_threat_model_of_evaluation_is_the_attacks_unless_given(small: Path) -> None:
    overrides = ["attack.norm=l2", "attack.eps=1.5"]
    evaluate = load_recipe(small, overrides).evaluate
    assert (evaluate.norm, evaluate.eps) == ("l2", 1.5)
    overrides = [*overrides, "evaluate.norm=linf", "evaluate.eps=8/255"]
    evaluate = load_recipe(small, overrides).evaluate
    assert (evaluate.norm, evaluate.eps) == ("linf", 8 / 255)


@pytest.mark.parametrize("override", ["train.select=best", "train.early_stopping=3"])
def test_choosing_weights_needs_a_held_out_split(small: Path, override: str) -> None:
    assert "data.validation_size: 0, but train.select" in only_fault(small, override)
    train = load_recipe(small, [override, "data.validation_size=0.1"]).train
    assert train is not None
    assert (train.select == "best") != (train.early_stopping == 3)


# ---- a user's own components -------------------------------------------------------------------


def test_own_settings_class(small: Path, tmp_path: Path) -> None:
    own = f"{__name__}:OwnAttack"
    recipe = load_recipe(small, [f"attack.name={own}", "attack.eps=8/255", "attack.strength=2"])
    attack = recipe.attack
    assert type(attack).__name__ == "OwnAttack"
    assert attack.model_dump() == {"eps": 8 / 255, "strength": 2}  # type: ignore[union-attr]
    assert recipe.evaluate.eps == 8 / 255
    assert recipe.settings["attack"] == {"name": own, "eps": 8 / 255, "strength": 2}
    recipe.save(tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").settings == recipe.settings
    fault = only_fault(small, f"attack.name={own}", "attack.strenght=2")
    assert "attack.strenght: unknown key (did you mean strength?); allowed: eps, strength" in fault


def test_own_dataclass(small: Path, tmp_path: Path) -> None:
    own = f"{__name__}:PlainAttack"
    recipe = load_recipe(small, [f"attack.name={own}", "attack.eps=0.2"])
    assert type(recipe.attack).__name__ == "PlainAttack"
    assert dataclasses.asdict(recipe.attack) == {"eps": 0.2, "window": (1, 2)}  # type: ignore[call-overload]
    recipe.save(tmp_path / "saved.yaml")
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["attack"] == {
        "name": own, "eps": 0.2, "window": [1, 2],
    }  # fmt: skip
    fault = only_fault(small, f"attack.name={own}", "attack.windov=2")
    assert fault.startswith("command line: attack: ")
    assert "windov" in fault


def test_a_component_built_later_gets_file_and_key(small: Path) -> None:
    def refuse() -> None:
        raise ValueError("path: nothing there")

    with pytest.raises(RecipeError, match=f"^{re.escape(str(small))}: data.path: nothing there$"):
        load_recipe(small).checked("data", refuse)
    with pytest.raises(RecipeError, match=r"^command line: data.path: nothing there$"):
        load_recipe(small, ["data.path=x"]).checked("data", refuse)


def test_a_fault_inside_of_a_union_is_told_by_its_own_key() -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe("quickstart", ["evaluate.sanity.image=3"])
    assert str(error.value) == (
        "command line: evaluate.sanity.image: unknown key (did you mean images?); "
        "allowed: images, transfer_from"
    )


class OwnObjective(Adversarial):
    takes_soft_labels = False


def test_mixed_labels_are_refused_where_the_objective_takes_classes_alone(small: Path) -> None:
    mix = "data.mix={cutmix: 1.0}"
    for objective in ("mart", f"{__name__}:OwnObjective"):
        fault = only_fault(small, mix, f"objective.name={objective}")
        assert fault.startswith("command line: data.mix: makes labels of several classes, and this")
        assert "takes_soft_labels" in fault
    for objective in ("name=adversarial", "name=trades", "{name: smoothing, sigma: 0.1}"):
        key = "objective=" if objective.startswith("{") else "objective."
        assert load_recipe(small, [mix, f"{key}{objective}"]).data.mix is not None
    assert only_fault(small, "data.mix={cutmix: 0}").endswith(
        "neither mixup nor cutmix is above 0: nothing would be mixed"
    )
    assert "data.mix.cutmixx: unknown key" in only_fault(small, "data.mix={cutmixx: 1}")
    assert "data.policy: 'random' is not allowed" in only_fault(small, "data.policy=random")
