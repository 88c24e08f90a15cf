"""A few images before and after the attack, kept to be looked at."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from robust_accel.attack_context import attack_context
from robust_accel.evaluation.accuracy import attacker_of
from robust_accel.evaluation.bench import Bench
from robust_accel.evaluation.outcomes import global_state_kept
from robust_accel.evaluation.settings import EvaluateSettings
from robust_accel.files import written_whole
from robust_accel.objectives import predicted

NUMBER = 8


def keep_examples(bench: Bench, settings: EvaluateSettings, path: Path) -> None:
    """Attack the first images, right or not, and write them as safetensors.

    ``x`` and ``x_adv`` [n, C, H, W] in [0, 1], ``labels``, ``clean_predictions`` and
    ``adversarial_predictions`` [n]; the metadata say of which model and source they are, and by
    which attack.
    """
    function = bench.function
    if not bench.accelerator.is_main_process:
        return
    attacker = attacker_of(settings, restarts=1)
    indices = torch.arange(min(NUMBER, len(bench.images)))
    ((x, labels),) = bench.images.batches([indices], bench.accelerator.device)
    with attack_context(bench.classifier, "eval"), global_state_kept(settings.seed):
        x_adv = attacker.perturb(bench.classifier, x, labels, settings.seed)
        with torch.no_grad():
            clean, adversarial = (predicted(bench.classifier(z)) for z in (x, x_adv))
    found = {
        "x": x,
        "x_adv": x_adv,
        "labels": labels,
        "clean_predictions": clean,
        "adversarial_predictions": adversarial,
    }
    attack = dict(attacker.about)
    threat_model = {key: attack.pop(key) for key in ("norm", "eps")}
    about = {"attack": attack, "threat_model": threat_model, "source": bench.source}
    metadata = {name: json.dumps(value) for name, value in about.items()}
    of = "" if bench.kind == "all" else f" of {bench.kind}"
    metadata |= {"function": function, "selection": f"first {len(indices)}{of}"}
    with written_whole(path) as temporary:
        save_file({n: v.contiguous().cpu() for n, v in found.items()}, temporary, metadata)
