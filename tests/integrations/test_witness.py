"""Training that no attack has seen is noticed at its first backward, and nothing else is."""

import copy
import pickle

import pytest
import timm
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from test_in_place import LABELS, images, recorded
from timm.task import FeatureDistillationTask
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robust_accel import PGD, make_robust
from robust_accel.integrations.in_place import robust_training
from robust_accel.integrations.witness import NotAttacked, Witness

ATTACK = PGD(num_steps=2)


def small(name: str = "wide_resnet10_1") -> nn.Module:
    return timm.create_model(name, num_classes=10)


def by_parts(model: nn.Module, x: Tensor) -> Tensor:
    return model.forward_head(model.forward_features(x))


class Lightning(nn.Module):
    """As a LightningModule is: its loop calls training_step."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, x: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(self.model(x), labels)


def feature_distillation(model: nn.Module) -> Tensor:
    task = FeatureDistillationTask(
        student_model=model, teacher_model=small().eval(), criterion=nn.CrossEntropyLoss()
    )
    return task(images(), LABELS)["loss"]


def small_vit() -> nn.Module:
    """Its class token and positions are parameters of the model itself."""
    return timm.create_model("test_vit", num_classes=10, img_size=16)


def by_its_parts_of_a_vit(_: nn.Module) -> Tensor:
    return by_parts(make_robust(small_vit(), ATTACK), images()).sum()


PAST_FORWARD = {
    "a ViT's parts": by_its_parts_of_a_vit,
    "timm's parts": lambda m: by_parts(m, images()).sum(),
    "timm's feature distillation": feature_distillation,
    "one stage": lambda m: m.forward_features(images()).sum(),
    "a slice": lambda m: nn.Sequential(*m.children())[:1](images()).sum(),
}


@pytest.mark.parametrize("how", PAST_FORWARD)
def test_a_model_that_is_trained_by_its_parts_is_refused_at_the_first_backward(how):
    model = make_robust(small(), ATTACK)
    loss = PAST_FORWARD[how](model)
    with pytest.raises(NotAttacked, match=r"trained past its forward.* \(0 batches were, so far\)"):
        loss.backward()


def test_a_slice_of_a_robust_sequence_is_no_robust_model():
    model = make_robust(nn.Sequential(nn.Flatten(), nn.Linear(768, 10), nn.ReLU()), ATTACK)
    assert copy.deepcopy(model[:2])(images()).shape == (6, 10)
    with pytest.raises(NotAttacked):
        model[:2](images()).sum().backward()


def test_a_lightning_module_whose_step_calls_the_model_inside():
    module = make_robust(Lightning(), ATTACK)
    with pytest.raises(NotAttacked, match="make_robust what the loop calls"):
        module.training_step(images(), LABELS).backward()
    module = Lightning()
    make_robust(module.model, ATTACK)
    module.training_step(images(), LABELS).backward()
    assert robust_training(module.model).min_max.calls == 1


def test_a_part_beside_attacked_calls_is_said_once(caplog):
    model = make_robust(small(), ATTACK)
    for _ in range(2):
        (model(images()).sum() + by_parts(model, images()).sum()).backward()
    said = [r for r in caplog.records if "trained past its forward" in r.message]
    assert len(said) == 1 and "1 batches were" in said[0].message


def test_a_model_that_is_left_in_eval_mode_is_told_at_the_first_backward(caplog):
    model = make_robust(small(), ATTACK).eval()
    for _ in range(2):
        cross_entropy(model(images()), LABELS).backward()
    assert [r.message[:49] for r in caplog.records] == [
        "WideResNet is trained in eval mode, in which it a"
    ]
    (witness,) = Witness.of(model)
    assert "call model.train() before training" in witness.accusation
    pickle.dumps(copy.deepcopy(model))  # nothing of the backward is left in it
    model.train()(images()).sum().backward()
    assert witness.accusation is None  # what is stepped on now was attacked


def evaluated(model: nn.Module) -> None:
    """With gradients on, but no backward; and then a step of training."""
    model.eval()(images())
    model.train()(images()).sum().backward()


def saliency(model: nn.Module) -> None:
    x = images().requires_grad_()
    torch.autograd.grad(model.eval()(x).sum(), x)
    model.train()(images()).sum().backward()


def by_checkpoint(model: nn.Module) -> None:
    model.set_grad_checkpointing(True)
    model(images()).sum().backward()


def statistics_only(model: nn.Module) -> None:
    with torch.no_grad():
        by_parts(model, images())


INNOCENT = [evaluated, saliency, by_checkpoint, statistics_only]


@pytest.mark.parametrize("make", [small, small_vit])
@pytest.mark.parametrize("use", INNOCENT)
def test_nothing_else_is_taken_for_training(use, make, caplog):
    model = small("resnet18") if use is by_checkpoint and make is small else make()
    make_robust(model, ATTACK)
    use(model)
    assert not caplog.records
    (witness,) = Witness.of(model)
    assert witness.accusation is None


class Alone(nn.Module):
    """A model whose only parameter is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 768))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.t()


def test_a_model_without_layers_is_watched_in_eval_mode(caplog):
    model = make_robust(Alone(), ATTACK)
    model(images()).sum().backward()
    assert not caplog.records
    model.eval()(images()).sum().backward()
    assert "is trained in eval mode" in caplog.text


def test_accelerates_unwrapping_leaves_the_attack():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = make_robust(small(), ATTACK)
    prepared = accelerator.prepare(model)
    prepared(images())
    again = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    again(images())
    assert robust_training(model).min_max.calls == 2


def test_a_scripted_model_is_the_plain_one_in_eval_mode_and_refused_in_training():
    model = make_robust(small(), ATTACK)
    with pytest.raises(RuntimeError, match="what is scripted attacks nothing"):
        torch.jit.script(model)
    scripted = torch.jit.script(model.eval())
    torch.testing.assert_close(scripted(images()), model(images()))
    model.train()(images())
    assert robust_training(model).min_max.calls == 1


def test_where_the_last_layer_alone_is_trained_it_is_said(caplog):
    model = small()
    model.requires_grad_(False).get_classifier().requires_grad_(True)
    make_robust(model, ATTACK)
    assert "only its last layer (Linear) is trained" in caplog.text
    caplog.clear()
    make_robust(small(), ATTACK)
    assert not caplog.records


# Ways to call a model that work


def test_models_of_peft():
    config = LoraConfig(target_modules=["fc1", "qkv"], r=2, modules_to_save=["head"])
    base = timm.create_model("test_vit", num_classes=10, img_size=16)
    model = make_robust(get_peft_model(base, config), ATTACK)
    seen = recorded(base)
    model(images()).sum().backward()
    assert len(seen) == 4
    assert (seen[-1] - images()).abs().max() > 0.9 * 8 / 255
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    x = images()
    assert model.eval()(x).equal(copy.deepcopy(model)(x))


def test_what_was_made_robust_before_peft_took_it_is_attacked_too():
    config = LoraConfig(target_modules=["fc1"], r=2)
    base = make_robust(timm.create_model("test_vit", num_classes=10, img_size=16), ATTACK)
    get_peft_model(base, config)(images()).sum().backward()
    assert robust_training(base).min_max.calls == 1


def test_it_can_be_exported_in_eval_mode():
    model = make_robust(small(), ATTACK).eval()
    exported = torch.export.export(model, (images(),))
    torch.testing.assert_close(exported.module()(images()), model(images()))


@pytest.mark.long
def test_compiled_checkpointed_bf16():
    torch.compiler.reset()
    model = timm.create_model("test_vit", num_classes=10, img_size=16)
    model.set_grad_checkpointing(True)
    make_robust(model, ATTACK.model_copy(update={"random_start": False}))
    compiled = torch.compile(model, backend="aot_eager")
    for call in (model, compiled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(call(images()).float(), LABELS)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
