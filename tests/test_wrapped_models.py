"""Models that RobustModel takes: timm's, transformers', resized, compiled, checkpointed, copied."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
from attacked_network import CLASSES, EPS, FROM_X, MODES, PGD_3, Spy, batch, flags, network
from torch import nn
from torch.nn.functional import interpolate

from robust_accel import PGD, RobustModel
from robust_accel.attacks import NoAttack

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
