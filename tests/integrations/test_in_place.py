"""make_robust: the same object, attacked while it trains, and the model as it was otherwise."""

import copy
import inspect
import io

import pytest
import timm
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from robust_accel import AWP, PGD, Adversarial, RobustModel, Smoothing, Trades, make_robust
from robust_accel.integrations.in_place import robust_training

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
ATTACK = PGD(eps=8 / 255, step_size=4 / 255, num_steps=3, random_start=False)
VIT = ViTConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=16,
    patch_size=8,
    num_labels=10,
)


def small(**options) -> nn.Module:
    return timm.create_model("wide_resnet10_1", num_classes=10, **options)


def images() -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(6)


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def recorded(model: nn.Module) -> list[Tensor]:
    """What the model's first layer has seen, call by call."""
    seen: list[Tensor] = []
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    return seen


def test_it_is_the_same_object_with_the_same_keys():
    model = small()
    keys, cls, signature = list(model.state_dict()), type(model), inspect.signature(model.forward)
    assert make_robust(model, ATTACK) is model
    assert list(model.state_dict()) == keys
    assert len(list(model.modules())) == len(list(small().modules()))
    assert isinstance(model, cls)
    assert type(model).__name__ == cls.__name__
    assert inspect.signature(model.forward) == signature


def test_in_eval_mode_it_is_the_model_as_it_was():
    model = small().eval()
    x = 5 * torch.randn(2, 3, 16, 16)  # which no attack would take for images
    expected = model(x)
    assert make_robust(model, ATTACK)(x).equal(expected)


def test_a_scripts_own_loss_is_taken_at_images_that_are_attacked_in_pixel_units():
    model = small()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
    x = images()
    expected = RobustModel(copy.deepcopy(model), ATTACK, mean=MEAN, std=STD)
    predicted = expected.predict(x)
    x_adv = expected.perturb(x, predicted)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    make_robust(model, ATTACK, mean=mean, std=std)
    seen = recorded(model)
    loss = cross_entropy(model(normalised(x)), LABELS)
    # one prediction, three steps, and the script's own forward
    assert len(seen) == 5
    torch.testing.assert_close(seen[-1], normalised(x_adv), rtol=0, atol=1e-5)
    assert (seen[-1] - seen[0]).abs().amax() > 1 * 8 / 255  # eps / std is more than eps
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    plain = cross_entropy(expected.classifier(x_adv), LABELS)
    torch.testing.assert_close(loss, plain)


def test_with_labels_the_objectives_loss_is_returned():
    torch.manual_seed(0)
    model = ViTForImageClassification(VIT)
    expected = RobustModel(copy.deepcopy(model), ATTACK, Adversarial(clean_weight=1.0))
    out = make_robust(model, ATTACK, Adversarial(clean_weight=1.0))(
        pixel_values=images(), labels=LABELS, output_attentions=False
    )
    reference = expected(images(), LABELS)
    assert set(out) == {"loss", "logits", "adv_loss", "clean_loss"}
    torch.testing.assert_close(out.loss, reference["loss"])
    torch.testing.assert_close(out["logits"], reference["logits"])
    with pytest.raises(AttributeError, match=r"hidden_states.*loss, logits"):
        _ = out.hidden_states
    assert (out[0], out[:2]) == (out.loss, (out.loss, out.logits))
    # the Trainer's mean over all images of an accumulated batch of 12
    half = model(images(), labels=LABELS, num_items_in_batch=torch.tensor(12)).loss
    torch.testing.assert_close(half, reference["loss"] / 2)


def test_mixed_labels_need_a_model_of_one_class_an_image():
    """By their type transformers would take them for several classes, by another loss."""
    model = make_robust(ViTForImageClassification(copy.deepcopy(VIT)), ATTACK)
    soft = torch.eye(10)[LABELS]
    with pytest.raises(ValueError, match=r"labels of torch.float32 mean several classes an image"):
        model(images(), labels=soft)
    model.config.problem_type = "single_label_classification"
    whole = model(images(), labels=soft).loss
    counted = model(images(), labels=soft, num_items_in_batch=soft.ne(-100).sum()).loss
    torch.testing.assert_close(counted, whole)


@pytest.mark.parametrize("objective", [Trades(), Smoothing(sigma=0.1, num_noise=2)])
def test_other_objectives_and_awp_train_the_model_itself(objective):
    model = ViTForImageClassification(VIT)
    make_robust(model, ATTACK, objective, weight_perturbation=AWP(gamma=0.01))
    out = model(images(), labels=LABELS)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match=r"objective .* needs labels: call the model with labels"):
        model(images())


def test_an_objective_that_needs_labels_says_so_where_forward_takes_none():
    model = make_robust(small(), ATTACK, Trades())
    with pytest.raises(
        ValueError,
        match=r"forward takes none: give it .* named labels, or train RobustModel.*Adversarial\(\)",
    ):
        model(images())


def test_what_transformers_gives_back_comes_back():
    model = make_robust(ViTForImageClassification(VIT), ATTACK)
    out = model(images(), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert out.logits.shape == (6, 10)


def test_what_is_pushed_is_the_plain_model_and_a_saved_object_the_robust_one(tmp_path):
    model = make_robust(ViTForImageClassification(VIT), ATTACK)
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is ViTForImageClassification
    assert again.eval()(images()).logits.equal(model.eval()(images()).logits)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    seen = recorded(twin := torch.load(file, weights_only=False))
    twin.train()(images())
    assert len(seen) == 5


def test_a_copy_attacks_with_its_own_weights():
    model = make_robust(small(), ATTACK)
    ema = ModelEmaV3(model, decay=0.5)
    twin = copy.deepcopy(model)
    training = robust_training(twin)
    assert training is not robust_training(model)
    assert training.classifier(twin, torch.device("cpu")).model.model is twin
    ema.update(model)
    assert not ema.module.training
    assert ema.module(images()).equal(model.eval()(images()))
    twin(images()).sum().backward()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.long
def test_compiled_it_computes_the_same():
    model = make_robust(small().to(memory_format=torch.channels_last), ATTACK)
    x = images().contiguous(memory_format=torch.channels_last)
    expected = copy.deepcopy(model)(x)  # a call moves BatchNorm's statistics
    compiled = torch.compile(model, backend="aot_eager")  # the code it makes is not ours to test
    torch.testing.assert_close(compiled(x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.long
def test_what_is_compiled_already_is_attacked():
    model = small()
    compiled = torch.compile(model, backend="eager")
    assert make_robust(compiled, ATTACK) is compiled
    assert robust_training(compiled) is robust_training(model) is not None
    seen = recorded(model)
    compiled(images())
    assert len(seen) == 5


def test_mixed_precision_of_accelerate_computes_the_network_and_not_the_ball():
    spies = []
    attack = ATTACK.model_copy()

    def spy(loss_fn, x, *, generator=None):
        spies.append((x, attack(loss_fn, x, generator=generator)))
        return spies[-1][1]

    model = make_robust(small(), spy, mean=MEAN, std=STD)
    outputs = []
    next(m for m in model.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(
        lambda module, args, output: outputs.append(output.dtype)
    )
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    prepared(normalised(images()).bfloat16().float())
    ((x, x_adv),) = spies
    assert set(outputs) == {torch.bfloat16}
    assert x.dtype == x_adv.dtype == torch.float32
    assert (x_adv - x).abs().max() == pytest.approx(8 / 255, rel=1e-4)


def test_the_attack_may_be_replaced_while_training():
    model = make_robust(small(), ATTACK)
    seen = recorded(model)
    robust_training(model).min_max.attack = ATTACK.model_copy(update={"num_steps": 1})
    model(images())
    assert len(seen) == 3


class TakesNothing(nn.Module):
    def forward(self, *images):
        return images


def test_what_cannot_be_made_robust_is_refused():
    model = make_robust(small(), ATTACK)
    with pytest.raises(ValueError, match="WideResNet attacks its images already"):
        make_robust(model, ATTACK)
    with pytest.raises(ValueError, match="RobustModel attacks"):
        make_robust(RobustModel(small(), ATTACK), ATTACK)
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(small())
    for wrapped in (nn.DataParallel(small()), prepared):
        with pytest.raises(ValueError, match="on the model itself, before"):
            make_robust(wrapped, ATTACK)
    with pytest.raises(ValueError, match="mean and std go together"):
        make_robust(small(), ATTACK, mean=0.5)
    with pytest.raises(ValueError, match="forward names no argument"):
        make_robust(TakesNothing(), ATTACK)
    several = ViTForImageClassification(copy.deepcopy(VIT))
    several.config.problem_type = "multi_label_classification"
    with pytest.raises(ValueError, match="no single-label classifier: multi_label"):
        make_robust(several, ATTACK)


BAD = {
    "normalised": (normalised(images()), r"say by which mean and std.*make_robust: mean, std"),
    "uint8": ((255 * images()).byte(), "divide uint8 images by 255"),
    "NHWC": (images().permute(0, 2, 3, 1), r"pass x\.permute\(0, 3, 1, 2\)"),
    "a processor's batch": ({"pixel_values": images()}, r"model\(\*\*batch\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_images_fail_at_the_first_batch_with_what_to_pass(case):
    given, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        make_robust(small(), ATTACK)(given)


def test_images_that_are_not_normalised_as_said_fail_at_the_first_batch():
    model = make_robust(small(), ATTACK, mean=0.5, std=0.1)
    with pytest.raises(ValueError, match=r"lie in \[.*, 1\], and normalised .* need neither"):
        model(images())
    model(normalised(images()))
    model(images().clamp(min=0.01))  # bright ones, once that is seen
    make_robust(small(), ATTACK, mean=0.0, std=0.5)(images() * 2)


def test_images_normalised_otherwise_than_said_fail_at_the_first_batch():
    model = make_robust(small(), ATTACK, mean=0.5, std=0.1)
    with pytest.raises(ValueError, match="other images than the mean and std given"):
        model(10 * normalised(images()))
