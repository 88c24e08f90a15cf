"""RobustModel: attacks first and returns the outer loss; images out of range are refused."""

import copy

import pytest
import torch
from attacked_network import (
    CLASSES,
    EPS,
    FROM_X,
    PGD_3,
    Broken,
    Spy,
    assert_same,
    batch,
    buffers,
    network,
)
from sklearn.datasets import load_digits
from timm.data.random_erasing import RandomErasing
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from transformers import BatchFeature

from robust_accel import PGD, Adversarial, PixelClassifier, RobustModel

# What training computes


@pytest.mark.parametrize("clean_weight", [0.0, 1.0])
def test_training_returns_the_outer_loss_at_the_attacked_images(clean_weight):
    x, y = batch()
    spy = Spy(PGD_3)
    model = RobustModel(network(frozen=True), spy, Adversarial(clean_weight=clean_weight))
    model.classifier.model[3].p = 0.0
    output = model(x, y)
    logits = model.classifier(spy.x_adv)
    expected = cross_entropy(logits, y) + clean_weight * cross_entropy(model.classifier(x), y)
    torch.testing.assert_close(output["loss"], expected)
    torch.testing.assert_close(output["logits"], logits)
    output["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_attack_climbs_the_objectives_inner_loss_and_does_raise_it():
    x, y = batch()
    spy = Spy(PGD(eps=EPS))
    model = RobustModel(network(), spy)
    model(x, y)
    model.eval()
    torch.testing.assert_close(
        spy.loss_fn(x), cross_entropy(model.classifier(x), y, reduction="none")
    )
    assert (spy.loss_fn(spy.x_adv) > spy.loss_fn(x)).all()
    assert (spy.x_adv - x).abs().max() <= EPS + 1e-6


def test_x_adv_is_detached():
    x, y = batch()
    x_adv = RobustModel(network(), PGD_3).perturb(x, y)
    assert not x_adv.requires_grad


def test_evaluation_predicts_and_does_not_attack():
    x, y = batch()
    model = RobustModel(network(), Broken()).eval()
    before = buffers(model)
    expected = model.classifier(x)
    assert model(x).keys() == {"logits"}
    output = model(pixel_values=x, labels=y)
    assert output.keys() == {"logits", "loss"}
    torch.testing.assert_close(output["logits"], expected)
    torch.testing.assert_close(output["loss"], cross_entropy(expected, y))
    assert_same(buffers(model), before)


def test_training_without_labels_attacks_the_models_own_predictions():
    x, _ = batch()
    spy = Spy(FROM_X)
    model = RobustModel(network(frozen=True), spy)
    model.classifier.model[3].p = 0.0
    output = model(x)
    assert output.keys() == {"logits"}
    torch.testing.assert_close(output["logits"], model.classifier(spy.x_adv))
    predicted = model.classifier(x).argmax(1)
    assert torch.equal(spy.x_adv, model.perturb(x, predicted))
    assert not torch.equal(spy.x_adv, model.perturb(x, (predicted + 1) % CLASSES))
    output["logits"].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_labels_may_be_probabilities():
    x, y = batch()
    hard, soft = (
        RobustModel(network(frozen=True).eval(), FROM_X)(x, labels)["loss"]
        for labels in (y, nn.functional.one_hot(y, CLASSES).float())
    )
    torch.testing.assert_close(hard, soft)


def test_gradients_of_micro_batches_add_up_to_those_of_the_batch():
    x, y = batch()
    whole = RobustModel(network(frozen=True), FROM_X)
    whole.classifier.model[3].p = 0.0
    parts = copy.deepcopy(whole)
    whole(x, y)["loss"].backward()
    for half in (slice(0, 4), slice(4, 8)):
        (parts(x[half], y[half])["loss"] / 2).backward()
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_works_where_gradients_are_switched_off():
    x, y = batch()
    model = RobustModel(network(), PGD_3)
    with torch.no_grad():
        assert not model(x, y)["loss"].requires_grad


# What may come in

GOOD = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NORMALISED = (GOOD - 0.45) / 0.25
REFUSED = {
    "uint8": ((GOOD * 255).byte(), r"divide uint8 images by 255.*torch\.uint8"),
    "0 to 255": (GOOD * 255, r"\[0, 1\].*input_space='normalized'"),
    "normalised": (NORMALISED, r"\[0, 1\].*input_space='normalized'"),
    "too dark": (GOOD - 0.6, r"\[-0\.59.*58.*% of them outside"),
    "too bright": (GOOD + 0.6, r"1\.\d+\]"),
    "nan": (torch.full_like(GOOD, float("nan")), "nan"),
    "one nan": (GOOD.where(torch.arange(384).view(2, 3, 8, 8) > 0, float("nan")), "nan"),
    "inf": (GOOD / 0, "inf"),
    "a batch": (BatchFeature({"pixel_values": GOOD}), r"BatchFeature with pixel_values: pass its"),
    "one image": (GOOD[0], r"\[B, C, H, W\].*\[3, 8, 8\]"),
    "channels last": (GOOD.permute(0, 2, 3, 1), r"C = 3.*permute\(0, 3, 1, 2\)"),
    "four channels": (GOOD[:, [0, 1, 2, 0]], "C = 3"),
    "a list": (GOOD.tolist(), "floating point tensor.*list"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_images_out_of_their_declared_range_are_refused(case, training):
    images, message = REFUSED[case]
    model = RobustModel(network(), PGD_3, mean=(0.5,) * 3, std=(0.2,) * 3).train(training)
    with pytest.raises(ValueError, match=message):
        model(images, torch.tensor([0, 1]))


def test_rounding_at_the_borders_is_forgiven_and_clipped():
    x = GOOD.round() + 1e-3 * (GOOD - 0.5)
    spy = Spy(PGD_3)
    RobustModel(network(), spy)(x, torch.tensor([0, 1]))
    assert torch.equal(spy.x, x.clamp(0, 1))


def patches_of_noise(x):
    """timm's RandomErasing, by its own code, on images that are normalised as scripts do."""
    return RandomErasing(probability=1.0, mode="pixel", device="cpu")(x.clone())


def patches_of_colour(x):
    return RandomErasing(probability=1.0, mode="rand", device="cpu")(x.clone())


def bicubic():
    """Real images, enlarged: their edges overshoot."""
    digits = torch.tensor(load_digits().images[:8] / 16, dtype=torch.float32)
    return interpolate(digits[:, None].repeat(1, 3, 1, 1), (32, 32), mode="bicubic")


STATISTICS = {
    "input_space": "normalized", "input_mean": (0.485, 0.456, 0.406),
    "input_std": (0.229, 0.224, 0.225),
}  # fmt: skip


@pytest.mark.parametrize("augment", [patches_of_noise, patches_of_colour, bicubic])
def test_a_few_pixels_outside_are_clipped_and_it_is_said_once(augment, caplog):
    model, spy = None, Spy(PGD_3)
    x = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    if augment is not bicubic:
        model = RobustModel(network(), spy, **STATISTICS)
        mean, std = model.input_space.mean, model.input_space.std
        given = augment((x - mean) / std)
        expected = (given * std + mean).clamp(0, 1)
    else:
        model, given = RobustModel(network(), spy), augment()
        expected = given.clamp(0, 1)
    assert not torch.equal(given.clamp(0, 1), given)
    for _ in range(2):
        model(given, torch.arange(len(given)) % CLASSES)
    torch.testing.assert_close(spy.x, expected)
    assert len([r for r in caplog.records if "lie outside [0, 1]" in r.message]) == 1


def test_channels_last_are_refused_without_statistics_too():
    with pytest.raises(ValueError, match=r"pass x\.permute\(0, 3, 1, 2\)"):
        RobustModel(network(), PGD_3)(GOOD.permute(0, 2, 3, 1), torch.tensor([0, 1]))


def test_a_model_that_a_script_feeds_normalised_images_goes_on_to_see_these():
    spy = nn.Sequential(nn.Identity(), network(frozen=True).eval())
    spy.pretrained_cfg = {"mean": (0.1,) * 3, "std": (0.9,) * 3}
    seen = []
    spy[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model = RobustModel(
        spy, PGD_3, input_space="normalized", input_mean=(0.45,) * 3, input_std=(0.25,) * 3
    )
    model.eval()(NORMALISED)
    torch.testing.assert_close(seen[0], NORMALISED, rtol=0, atol=1e-5)


def test_grey_images_may_be_given_to_a_model_of_colours():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    RobustModel(model, PGD_3, mean=(0.5,) * 3, std=1.0)(GOOD[:, :1], torch.tensor([0, 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalised_images_are_attacked_in_pixel_units(dtype):
    # white, black, and all between, as a script's own transform would give them
    x = torch.cat([GOOD, GOOD.round()])
    y = torch.tensor([0, 1, 2, 3])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    given = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    spies = Spy(FROM_X), Spy(FROM_X)
    pixel = RobustModel(network(frozen=True).eval(), spies[0], mean=mean, std=std)
    normalized = RobustModel(
        network(frozen=True).eval(),
        spies[1],
        mean=mean,
        std=std,
        input_space="normalized",
        input_mean=mean,
        input_std=std,
    )
    losses = [pixel(x, y)["loss"], normalized(given.to(dtype), y)["loss"]]
    exact = dtype == torch.float32
    atol = 1e-6 if exact else 4e-3
    torch.testing.assert_close(spies[1].x, x, rtol=0, atol=atol)
    assert (spies[1].x_adv - spies[1].x).abs().max() == pytest.approx(EPS, rel=1e-5)
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5 if exact else 0.02)
    with pytest.raises(ValueError, match="after undoing the normalisation"):
        normalized(given * 3, y)


BAD = [
    ({"attack_mode": "off"}, "attack_mode"),
    ({"input_space": "lab"}, "input_space"),
    ({"input_space": "normalized"}, "input_mean and input_std"),
    ({"input_space": "normalized", "input_mean": 0.5}, "both"),
    ({"input_mean": 0.5, "input_std": 0.5}, "input_space"),
    ({"input_mean": 0.5}, "neither"),
    ({"input_std": 0.5}, "neither"),
    ({"input_space": "normalized", "input_mean": 0.5, "input_std": 0.0}, "input_std"),
    ({"input_space": "normalized", "input_mean": 0.5, "input_std": (0.2, 0, 0.2)}, "input_std"),
    ({"mean": 0.5, "std": 0.0}, "std must be > 0"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD)
def test_impossible_arguments_are_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        RobustModel(network(), PGD_3, **arguments)


def test_statistics_belong_to_the_pixel_classifier():
    classifier = PixelClassifier(network(), mean=0.5, std=0.5)
    assert RobustModel(classifier, PGD_3).classifier is classifier
    for argument in ("mean", "std", "size"):
        with pytest.raises(ValueError, match="PixelClassifier"):
            RobustModel(classifier, PGD_3, **{argument: 8})


def test_statistics_may_be_tensors():
    statistics = torch.tensor([0.5, 0.4, 0.3])
    model = RobustModel(
        network(),
        PGD_3,
        mean=statistics,
        std=statistics,
        input_space="normalized",
        input_mean=statistics,
        input_std=statistics,
    )
    assert torch.equal(model.input_space.mean, statistics.view(1, 3, 1, 1))


# Precision


def test_bf16_autocast_trains_every_weight():
    x, y = batch()
    for labels in (y, None):  # unlabelled: the clean prediction comes first, without gradients
        spy = Spy(PGD_3)
        model = RobustModel(network(), spy)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x, labels)
        (output["logits"].sum() if labels is None else output["loss"]).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        assert spy.x_adv.dtype == torch.float32
        assert (spy.x_adv - x).abs().max() <= EPS + 1e-6


@pytest.mark.parametrize("images", [torch.float32, torch.bfloat16])
def test_a_bf16_model_is_attacked_in_fp32(images):
    # DeepSpeed casts the whole module; the ball must not be rounded to bf16's 1/256 near white
    x, y = batch()
    x = x.to(images)
    spy = Spy(PGD_3)
    model = RobustModel(network(), spy).bfloat16()
    output = model(x, y)
    output["loss"].backward()
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters())
    assert output["loss"].dtype == torch.float32
    assert spy.x_adv.dtype == torch.float32
    assert (spy.x_adv - x).abs().max() <= EPS + 1e-6
    assert ((spy.x_adv - x).abs() > 0.99 * EPS).float().mean() > 0.3
