"""RobustModel: attacks first, returns the outer loss, and leaves no other trace."""

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from transformers import BatchFeature

from robust_accel import PGD, Adversarial, PixelClassifier, RobustModel
from robust_accel.attacks import NoAttack

EPS = 8 / 255
PGD_3 = PGD(eps=EPS, step_size=EPS / 2, num_steps=3)
FROM_X = PGD_3.model_copy(update={"random_start": False})
MODES = pytest.mark.parametrize("mode", ["eval", "train"])
FROZEN = pytest.mark.parametrize("frozen", [False, True], ids=["batchnorm", "frozen-batchnorm"])
CLASSES = 4


class Spy:
    """An attack that remembers what it was given and what it answered."""

    def __init__(self, attack) -> None:
        self.attack = attack
        self.x, self.x_adv = None, None

    def __call__(self, loss_fn, x, *, generator=None):
        self.loss_fn, self.x = loss_fn, x
        self.x_adv = self.attack(loss_fn, x, generator=generator)
        return self.x_adv


class Broken:
    """An attack that fails after it has used the model."""

    def __call__(self, loss_fn, x, *, generator=None):
        loss_fn(x)
        raise RuntimeError("broken attack")


def network(frozen: bool = False) -> nn.Sequential:
    """Two BatchNorms whose statistics are not those of any batch, and dropout; in train mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 2)
            m.train(not frozen)
    return model


def batch(num_images: int = 8, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(num_images, 3, size, size, generator=generator)
    return x, torch.arange(num_images) % CLASSES


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in model.named_buffers()}


def flags(model: nn.Module) -> list:
    return [(m.training, getattr(m, "track_running_stats", None)) for m in model.modules()]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(found[name], expected[name]), name


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


# What the attack leaves behind: nothing


@MODES
@FROZEN
def test_the_attack_changes_no_buffer_and_no_mode(mode, frozen):
    x, y = batch()
    model = RobustModel(network(frozen), PGD_3, attack_mode=mode)
    before, modes = buffers(model), flags(model)
    model.perturb(x, y)
    model.predict(x)
    assert_same(buffers(model), before)
    assert flags(model) == modes


@MODES
@FROZEN
@pytest.mark.parametrize("labelled", [True, False])
def test_all_is_restored_when_the_attack_raises(mode, frozen, labelled):
    x, y = batch()
    model = RobustModel(network(frozen), Broken(), attack_mode=mode)
    before, modes = buffers(model), flags(model)
    with pytest.raises(RuntimeError, match="broken attack"):
        model(x, y if labelled else None)
    assert_same(buffers(model), before)
    assert flags(model) == modes


@MODES
@FROZEN
@pytest.mark.parametrize("clean_weight", [0.0, 1.0])
def test_a_step_updates_batchnorm_as_its_outer_forwards_alone_do(mode, frozen, clean_weight):
    x, y = batch()
    spy = Spy(PGD_3)
    objective = Adversarial(clean_weight=clean_weight)
    model = RobustModel(network(frozen), spy, objective, attack_mode=mode)
    plain = copy.deepcopy(model.classifier)
    modes = flags(model)
    torch.manual_seed(5)
    model(x, y)
    assert flags(model) == modes  # what a user froze is still frozen

    plain.model[3].p = model.classifier.model[3].p = 0.0
    reference = copy.deepcopy(plain)
    model = RobustModel(copy.deepcopy(plain), spy, objective, attack_mode=mode)
    model(x, y)
    reference(spy.x_adv)
    if clean_weight:
        reference(x)
    assert_same(buffers(model.classifier), buffers(reference))
    tracked = model.classifier.model[1].num_batches_tracked
    assert tracked == (0 if frozen else 1 + (clean_weight > 0))


@MODES
def test_the_attack_touches_no_parameter_gradient(mode):
    x, y = batch()
    model = RobustModel(network(), PGD_3, attack_mode=mode)
    fired = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(fired.append)
    model.perturb(x, y)
    assert all(p.grad is None for p in model.parameters())
    output = model(x, y)
    assert all(p.grad is None for p in model.parameters())
    assert not fired
    output["loss"].backward()
    assert len(fired) == len(list(model.parameters()))  # once each


@MODES
def test_a_gradient_that_is_there_already_is_not_added_to(mode):
    x, y = batch()
    model = RobustModel(network(), PGD_3, attack_mode=mode)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    model(x, y)
    assert all(torch.equal(p.grad, torch.full_like(p, 3.0)) for p in model.parameters())


# In which mode the attack sees the model


def attacked_through(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """FROM_X on the model as it is, without the wrapper."""
    return FROM_X(lambda x: cross_entropy(model(x), y, reduction="none"), x)


def test_eval_mode_uses_running_statistics_and_no_dropout():
    x, y = batch()
    model = RobustModel(network(), FROM_X)
    expected = attacked_through(copy.deepcopy(model.classifier).eval(), x, y)
    assert model.training
    assert torch.equal(model.perturb(x, y), expected)


def test_train_mode_uses_the_batchs_statistics():
    x, y = batch()
    model = RobustModel(network(), FROM_X, attack_mode="train")
    model.classifier.model[3].p = 0.0
    expected = attacked_through(copy.deepcopy(model.classifier), x, y)
    found = model.perturb(x, y)
    assert torch.equal(found, expected)
    assert not torch.equal(found, RobustModel(model.classifier, FROM_X).perturb(x, y))


def test_train_mode_leaves_a_frozen_batchnorm_its_running_statistics():
    x, y = batch()
    model = RobustModel(network(frozen=True), FROM_X, attack_mode="train")
    model.classifier.model[3].p = 0.0
    expected = attacked_through(copy.deepcopy(model.classifier).eval(), x, y)
    assert torch.equal(model.perturb(x, y), expected)


def test_train_mode_leaves_a_frozen_instancenorm_its_running_statistics():
    x, y = batch()
    inner = nn.Sequential(
        nn.InstanceNorm2d(3, track_running_stats=True).eval(),
        nn.Flatten(),
        nn.Linear(192, CLASSES),
    )
    inner[0].running_mean.fill_(0.3)
    expected = attacked_through(copy.deepcopy(inner).eval(), x, y)
    model = RobustModel(inner, FROM_X, attack_mode="train")
    assert torch.equal(model.perturb(x, y), expected)
    assert torch.equal(inner[0].running_mean, torch.full((3,), 0.3))


def test_train_mode_with_a_batchnorm_that_never_tracks():
    x, y = batch()
    untracked = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )
    untracked(x)
    model = RobustModel(untracked, PGD_3, attack_mode="train")
    modes = flags(model)
    model(x, y)["loss"].backward()
    assert flags(model) == modes


# No collective runs in the attack


@pytest.fixture
def process_group():
    """A group of one process: DDP reduces in it as in a larger one."""
    if torch.distributed.is_initialized():
        pytest.skip("another test's process group is open")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def collectives(step) -> Counter:
    """The collectives that run in a step, by the name under which the profiler sees them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    names = [event.name for event in profiler.events()]
    return Counter(n for n in names if n.startswith(("c10d::", "gloo:")))


@MODES
def test_ddp_communicates_as_often_as_without_an_attack(process_group, mode):
    x, y = batch()

    def count(attack, *, backward: bool = True) -> Counter:
        model = RobustModel(network(), attack, attack_mode=mode)
        # several buckets, so that a count is not one by accident
        parallel = DistributedDataParallel(model, bucket_cap_mb=1e-3)

        def step() -> None:
            loss = parallel(x, y)["loss"]
            if backward:
                loss.backward()

        step()  # DDP rebuilds its buckets after the first step
        return collectives(step)

    standard, adversarial = count(NoAttack()), count(PGD_3)
    assert sum(n for name, n in standard.items() if "allreduce" in name) > 1
    assert adversarial == standard
    # and before the backward nothing but DDP's broadcast of the buffers runs
    only_forward = count(PGD_3, backward=False)
    assert not [name for name in only_forward if "reduce" in name]


# What may come in

GOOD = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
NORMALISED = (GOOD - 0.45) / 0.25
REFUSED = {
    "uint8": ((GOOD * 255).byte(), r"divide uint8 images by 255.*torch\.uint8"),
    "0 to 255": (GOOD * 255, r"\[0, 1\].*input_space='normalized'"),
    "normalised": (NORMALISED, r"\[0, 1\].*input_space='normalized'"),
    "a little dark": (GOOD - GOOD.min() - 0.01, r"\[-0\.01"),
    "a little bright": (GOOD - GOOD.max() + 1.01, r"1\.01\]"),
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
    RobustModel(model, PGD_3, mean=(0.5,) * 3)(GOOD[:, :1], torch.tensor([0, 1]))


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
    ({"std": 0.0}, "std must be > 0"),
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
    assert torch.equal(model.input_mean, statistics.view(1, 3, 1, 1))


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


# Which models


ZOO = {
    "resnet18": {},
    "vit_tiny_patch16_224": {"img_size": 32},
    "convnext_atto": {},
}


@pytest.mark.parametrize("name", ZOO)
def test_timm_models_train_and_keep_their_keys(name):
    x, y = batch(4, 32)
    inner = timm.create_model(name, num_classes=CLASSES, **ZOO[name])
    keys = list(inner.state_dict())
    spy = Spy(PGD(eps=EPS, step_size=EPS, num_steps=1))
    model = RobustModel(inner, spy)
    assert model.classifier.mean.flatten().tolist() == pytest.approx(
        list(inner.pretrained_cfg["mean"])
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    output = model(x, y)
    output["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    before = inner.state_dict()[keys[0]].clone()
    optimizer.step()
    assert not torch.equal(inner.state_dict()[keys[0]], before)
    assert output["logits"].shape == (4, CLASSES)
    assert (spy.x_adv - x).abs().max() <= EPS + 1e-6
    assert list(inner.state_dict()) == keys
    assert list(model.state_dict()) == [f"classifier.model.{key}" for key in keys]


def test_a_timm_models_name_is_enough():
    model = RobustModel("test_resnet", NoAttack())
    assert model(torch.rand(2, 3, 32, 32), torch.tensor([0, 999]))["logits"].shape == (2, 1000)
    with pytest.raises(ValueError, match="close names"):
        RobustModel("resnet19", NoAttack())


def test_an_output_with_logits_can_be_wrapped():
    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, pixel_values):
            return SimpleNamespace(loss=None, logits=self.inner(pixel_values))

    x, y = batch()
    plain = RobustModel(network().eval(), FROM_X)
    wrapped = RobustModel(Transformer().eval(), FROM_X)
    torch.testing.assert_close(wrapped(x, y)["loss"], plain(x, y)["loss"])


def test_a_transformers_image_classifier_can_be_wrapped():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
    )
    x, y = batch()
    model = RobustModel(transformers.ViTForImageClassification(config), PGD_3, mean=0.5, std=0.5)
    output = model(pixel_values=x, labels=y)
    output["loss"].backward()
    assert output["logits"].shape == (8, CLASSES)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_ball_is_measured_before_resizing(norm):
    x, y = batch()
    spy = Spy(PGD(norm=norm, eps=0.1, step_size=0.1, num_steps=3))
    model = RobustModel(network(), spy, size=16)
    sizes = []
    model.classifier.model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape))
    model(x, y)
    assert set(sizes) == {(8, 3, 16, 16)}
    assert spy.x_adv.shape == x.shape
    delta = (spy.x_adv - x).flatten(1)
    lengths = delta.norm(float("inf") if norm == "linf" else 2, dim=1)
    torch.testing.assert_close(lengths, torch.full((8,), 0.1), rtol=0.02, atol=0)
    if norm == "l2":  # and that differs from the length that the model sees
        seen = [interpolate(v, (16, 16), mode="bilinear") for v in (spy.x_adv, x)]
        assert ((seen[0] - seen[1]).flatten(1).norm(dim=1) > 0.11).all()


@MODES
def test_compiling_the_inner_model_changes_nothing(mode):
    # dynamo traces and guards as with a compiler; which code it generates is not ours to test
    torch.compiler.reset()
    x, y = batch()
    plain = network()
    plain[3].p = 0.0
    compiled = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    models = [RobustModel(m, FROM_X, attack_mode=mode) for m in (plain, compiled)]
    for _ in range(2):  # the second time from the cache, with the mode as a guard
        losses = [model(x, y)["loss"] for model in models]
        torch.testing.assert_close(losses[0], losses[1])
        for loss in losses:
            loss.backward()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    for b, c in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(b, c)
    outputs = [model.eval()(x)["logits"] for model in models]
    torch.testing.assert_close(outputs[0], outputs[1])


def test_activation_checkpointing_changes_nothing():
    x, y = batch(4, 32)
    plain = timm.create_model("test_vit", num_classes=CLASSES, img_size=32)
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing(True)
    losses = []
    for inner in (plain, saving):
        loss = RobustModel(inner, FROM_X)(x, y)["loss"]
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1])
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_a_copy_is_equal_and_apart():
    x, y = batch()
    model = RobustModel(network(frozen=True).eval(), FROM_X)
    model(x, y)["loss"].backward()
    ema = copy.deepcopy(model)
    assert torch.equal(ema(x, y)["loss"], model(x, y)["loss"])
    shared = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not shared & {t.data_ptr() for t in (*ema.parameters(), *ema.buffers())}
    modes = flags(ema)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert not torch.equal(ema(x, y)["loss"], model(x, y)["loss"])
    assert flags(ema) == modes


def test_a_copy_may_be_made_by_torchs_own_averaging():
    x, y = batch()
    model = RobustModel(network(), FROM_X)
    ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    model(x, y)["loss"].backward()
    ema.update_parameters(model)
    assert ema(x, y)["loss"].isfinite()
