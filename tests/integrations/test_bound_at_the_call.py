"""make_robust keeps no module: copies, replicas, other processes: each attacks by itself."""

import copy
import pickle
import weakref
from collections import namedtuple
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils import _pytree
from transformers import ViTConfig, ViTForImageClassification

from robust_accel import AWP, PGD, Adversarial, RobustModel, Trades, make_robust
from robust_accel.evaluation.any_module import measure
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.integrations.in_place import Output, robust_training

EPS = 8 / 255
ATTACK = PGD(eps=EPS, num_steps=2, random_start=False)
X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(4)


class Net(nn.Module):
    """A network that keeps what it was given last, and has an argument that is no label."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(5, 3 * 64, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, x: Tensor, target_size: int | None = None, scale: Tensor | None = None):
        self.seen = x.detach()
        logits = x.flatten(1) @ self.weight.t()
        return logits if scale is None else logits * scale


class Parts(Net):
    """It calls itself on the halves of a batch."""

    def forward(self, x: Tensor, target_size: int | None = None, scale: Tensor | None = None):
        if len(x) > 2:
            return torch.cat([self(half) for half in x.split(2)])
        return super().forward(x)


def attacked(model: nn.Module, x: Tensor = X) -> Tensor:
    """The images that a call in training mode ends with."""
    model.train()(x)
    return model.seen


def expected(model: nn.Module) -> Tensor:
    """By hand, with this model's weights."""
    weight = model.weight.detach()

    def logits(x: Tensor) -> Tensor:
        return x.flatten(1) @ weight.t()

    labels = logits(X).argmax(dim=1)
    return ATTACK(lambda x: cross_entropy(logits(x), labels, reduction="none"), X)


def other_weights(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.weight.copy_(model.weight.flip(0, 1))
    return model


def replica(model: nn.Module) -> nn.Module:
    """As DataParallel makes it: parameters are plain tensors."""
    twin = model._replicate_for_data_parallel()
    twin.weight = model.weight.flip(0, 1)
    return twin


TWINS = {
    "copy.copy": lambda m: copy.copy(m),
    "copy.deepcopy": lambda m: other_weights(copy.deepcopy(m)),
    "pickle": lambda m: other_weights(pickle.loads(pickle.dumps(m))),
    "DataParallel's replica": replica,
    "a copy of a copy": lambda m: copy.copy(other_weights(copy.deepcopy(copy.copy(m)))),
}


@pytest.mark.parametrize("kind", TWINS)
def test_a_twin_attacks_with_its_own_weights(kind):
    model = make_robust(Net(), ATTACK)
    before = expected(model)
    twin = TWINS[kind](model)
    assert attacked(twin).equal(expected(twin))
    if kind != "copy.copy":
        assert not expected(twin).equal(before)
    assert attacked(model).equal(before)


def spawned(rank: int, model: nn.Module, out) -> None:
    torch.set_num_threads(1)
    out.put(attacked(model).numpy().tobytes())


def test_a_model_that_is_sent_to_another_process_attacks_there():
    model = make_robust(Net(), ATTACK)
    context = mp.get_context("forkserver")
    out = context.SimpleQueue()
    mp.start_processes(spawned, (model, out), nprocs=1, start_method="forkserver")
    assert out.get() == expected(model).numpy().tobytes()


def test_a_traced_graph_can_be_copied():
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)))
    model = make_robust(graph, ATTACK)
    for twin in (copy.copy(model), copy.deepcopy(model), model):
        seen = []
        handle = twin.get_submodule("0").register_forward_pre_hook(lambda _, a: seen.append(a[0]))  # noqa: B023
        out = twin(X)
        handle.remove()
        assert len(seen) == 4  # one prediction, two steps, the script's own
        assert (seen[-1] - X).abs().max() == pytest.approx(EPS, rel=1e-4)
        out.sum().backward()


def test_ddp_finds_the_tensors_of_an_output():
    output = Output(loss=torch.tensor(1.0), logits=X)
    leaves, spec = _pytree.tree_flatten(output)
    assert [leaf is value for leaf, value in zip(leaves, output.values(), strict=True)] == [
        True
    ] * 2
    again = _pytree.tree_unflatten(leaves, spec)
    assert type(again) is Output and again.logits is X


def test_other_arguments_reach_each_call_and_are_not_kept():
    model = make_robust(Net(), ATTACK)
    scale = torch.tensor(2.0)
    out = model(X, target_size=7, scale=scale)
    assert out.equal(2 * model.seen.flatten(1) @ model.weight.t())
    alive = weakref.ref(scale)
    del scale, out
    assert alive() is None


def test_a_model_that_calls_itself_is_attacked_once():
    model = make_robust(Parts(), ATTACK)
    model(X)
    assert robust_training(model).min_max.calls == 1
    assert model.seen.equal(expected(model)[2:])


def test_replicas_on_several_devices_share_what_the_script_said():
    model = make_robust(Net(), ATTACK, mean=0.5, std=0.5)
    space = robust_training(model).space
    given = (X - 0.5) / 0.5
    for device in ("meta", "cpu", "meta"):  # in whatever order their threads come
        assert space.script_images(X.to(device), X.dtype).device.type == device
    torch.testing.assert_close(space.pixels(given), X)


def test_no_call_moves_the_model():
    model = make_robust(Net(), ATTACK)
    with pytest.raises(RuntimeError):
        model(X.to("meta"))
    assert model.weight.device.type == "cpu"


def test_after_the_first_batch_it_is_known_what_happened(caplog):
    caplog.set_level("INFO")
    model = make_robust(Net(), ATTACK)
    for _ in range(2):
        model(X)
    applied = robust_training(model).min_max.applied
    assert (applied.images, applied.moved, applied.weights_moved) == (4, 4, None)
    assert applied.largest == pytest.approx(EPS, rel=1e-4)
    assert 0 < applied.median <= applied.largest
    said = [r.message for r in caplog.records if "attacked 4 of 4 images, linf" in r.message]
    assert len(said) == 1


class Rounded(Net):
    def forward(self, x: Tensor, target_size: int | None = None, scale: Tensor | None = None):
        return super().forward((255 * x).round() / 255)


class Lazy:
    eps = 0.1

    def __call__(self, loss_fn, x, *, generator=None):
        return x.detach()


def test_a_head_of_zeros_is_attacked_from_its_second_batch_on():
    model = make_robust(Net(), ATTACK)
    weights = model.weight.detach().clone()
    model.weight.data.zero_()
    model(X)
    assert robust_training(model).min_max.applied is None
    model.weight.data.copy_(weights)
    model(X)
    assert robust_training(model).min_max.applied.moved == 4


def test_a_robust_model_inside_of_another_is_refused():
    inner = make_robust(Net(), ATTACK)
    for model in (inner, nn.Sequential(inner), RobustModel(Net(), ATTACK)):
        with pytest.raises(ValueError, match="attacks its images already"):
            make_robust(model, ATTACK)
        with pytest.raises(ValueError, match="attacks its images already"):
            RobustModel(model, ATTACK)


class TooFar:
    eps = 0.1

    def __call__(self, loss_fn, x, *, generator=None):
        return (x + 0.2).clamp(0, 1)


def test_an_attack_that_does_nothing_or_leaves_its_ball_is_an_error():
    for attack in (ATTACK, PGD(eps=EPS, num_steps=2)):  # from the image, and from a random start
        model = make_robust(Rounded(), attack)
        model(X)
        with pytest.raises(RuntimeError, match="attacks nothing: the gradient of the loss in"):
            model(X)
    with pytest.raises(RuntimeError, match="moved none of 4 images"):
        make_robust(Net(), Lazy())(X)
    with pytest.raises(RuntimeError, match=r"moved an image by 0\.2 .* promises 0\.1"):
        make_robust(Net(), TooFar())(X)


# What a classifier may return


class Returns(nn.Module):
    def __init__(self, how) -> None:
        super().__init__()
        self.net, self.how = Net(), how

    def forward(self, x: Tensor):
        return self.how(self.net(x))


KNOWN = {
    "mapping": lambda z: {"logits": z},
    "attribute": lambda z: SimpleNamespace(logits=z),
    "alone in a tuple": lambda z: (z,),
    "named with more": lambda z: namedtuple("Out", "logits aux")(z, -z),
}
UNKNOWN = {
    "two heads": (lambda z: (z, z), "returned tuple of Tensor, Tensor"),
    "tuple": (lambda z: (z, z, z), "returned tuple of Tensor, Tensor, Tensor"),
    "loss and logits": (lambda z: (z.sum(), z), "returned tuple of Tensor, Tensor"),
    "mapping without": (lambda z: {"out": z}, "returned dict"),
    "segmentation": (lambda z: z[:, :, None, None], r"logits of shape \[\d, 5, 1, 1\]"),
    "nothing": (lambda z: None, "returned NoneType"),
}


def outcomes_of(model):
    """What `evaluate` finds of each image, clean and attacked."""
    found = measure(model, X, LABELS, EvaluateSettings(eps=EPS, pgd={"num_steps": 2}))
    return [found[f"{name}_accuracy"]["outcomes"] for name in ("clean", "pgd")]


@pytest.mark.parametrize("how", KNOWN)
def test_known_outputs_are_attacked_everywhere(how):
    plain, model = Net(), Returns(KNOWN[how])
    assert RobustModel(model, ATTACK)(X, LABELS)["loss"].equal(
        RobustModel(plain, ATTACK)(X, LABELS)["loss"]
    )
    make_robust(model, ATTACK)(X)
    assert model.net.seen.equal(expected(plain))
    assert outcomes_of(model) == outcomes_of(plain)


@pytest.mark.parametrize("how", UNKNOWN)
def test_other_outputs_are_refused_by_name(how):
    function, message = UNKNOWN[how]
    for call in (
        lambda: RobustModel(Returns(function), ATTACK)(X, LABELS),
        lambda: make_robust(Returns(function), ATTACK)(X),
        lambda: measure(Returns(function), X, LABELS, EvaluateSettings(eps=EPS)),
    ):
        with pytest.raises(TypeError, match=f"Returns is no classifier.*{message}"):
            call()


def test_a_wrapped_model_can_be_measured():
    assert outcomes_of(RobustModel(Net(), ATTACK)) == outcomes_of(Net())


def test_a_wrapped_model_that_is_fed_normalised_images_is_measured_on_pixels():
    robust = RobustModel(Net(), ATTACK, input_space="normalized", input_mean=0.5, input_std=0.5)
    assert outcomes_of(robust) == outcomes_of(robust.classifier)


def test_distilled_models_of_timm():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, img_size=32)
    model.set_distilled_training(True)
    for mode in ("eval", "train"):
        out = make_robust(copy.deepcopy(model), ATTACK, attack_mode=mode)(torch.rand(2, 3, 32, 32))
        assert [o.shape for o in out] == [(2, 5), (2, 5)]


# What cannot be done is said


def vit() -> ViTForImageClassification:
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
    return ViTForImageClassification(
        ViTConfig(**size, intermediate_size=16, image_size=8, num_labels=5)
    )


def test_a_tuple_comes_where_one_is_asked_for():
    model = make_robust(vit(), ATTACK)
    loss, logits = model(X, labels=LABELS, return_dict=False)
    assert loss.ndim == 0 and logits.shape == (4, 5)
    (alone,) = model(X, return_dict=False)
    assert alone.shape == (4, 5)
    assert robust_training(model).min_max.calls == 2


@pytest.mark.parametrize(
    "options",
    [
        {"objective": Trades()},
        {"objective": Adversarial(label_smoothing=0.1)},
        {"weight_perturbation": AWP()},
    ],
)
def test_what_needs_labels_names_the_way_that_works(options):
    with pytest.raises(ValueError, match=r"label_smoothing_factor: say Adversarial\(label_smooth"):
        make_robust(vit(), ATTACK, **options)(X)
    with pytest.raises(ValueError, match=r"or train RobustModel\(Net, ...\)\(images, labels\)"):
        make_robust(Net(), ATTACK, **options)(X)
    with pytest.raises(ValueError, match="needs labels: call the model with labels"):
        RobustModel(Net(), ATTACK, **options)(X)


def test_inference_mode_is_refused_in_one_sentence():
    for model in (make_robust(Net(), ATTACK), RobustModel(Net(), ATTACK)):
        with (
            torch.inference_mode(),
            pytest.raises(RuntimeError, match=r"torch\.no_grad\(\) around"),
        ):
            model(X)
    with torch.inference_mode():
        made_there = X.clone()
    make_robust(Net(), ATTACK)(made_there)  # images that came from there are another thing
