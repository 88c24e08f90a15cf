"""Several processes share the work on the same images, by the model that they train."""

import textwrap
from pathlib import Path

import pytest
from launching import Forked

pytestmark = pytest.mark.launch

SCRIPT = """
    import torch
    from accelerate import Accelerator
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    from robust_accel import EvaluateSettings, PGD, RobustModel, certify, evaluate
    from robust_accel.evaluation.certify_images import CertifySettings

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 5))
    x, y = torch.rand(10, 1, 4, 4), torch.arange(10) % 5
    settings = EvaluateSettings(eps=0.03, pgd={"num_steps": 2}, batch_size=4)

    def measured(model):
        return evaluate(model, x, y, settings, accelerator=accelerator)

    plain = measured(model)
    prepared = accelerator.prepare(model)
    assert type(prepared) is not type(model)
    of_loss = accelerator.prepare(RobustModel(model, PGD(eps=0.03)))
    for wrapped in (prepared, torch.compile(prepared, backend="eager"), of_loss):
        assert measured(wrapped) == plain
    own = (x[accelerator.process_index :: 2], y[accelerator.process_index :: 2])
    noise = CertifySettings(sigma=0.1, n=100)
    tries = [
        lambda: evaluate(model, *own, settings, accelerator=accelerator),
        lambda: evaluate(model, x, y + accelerator.process_index, settings),
        lambda: certify(model, *own, noise, accelerator=accelerator),
        lambda: measured(fully_shard(nn.Sequential(nn.Flatten(), nn.Linear(16, 5)))),
    ]
    for attempt in tries:
        try:
            attempt()
        except ValueError as error:
            print(error)
"""


def test_a_prepared_model_is_measured_and_other_images_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    code, said = Forked(script=script).wait()
    assert code == 0, said
    assert said.count("were given different images or labels") == 2 * 3
    assert said.count("sharded by FSDP") == 2
