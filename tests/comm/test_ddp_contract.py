"""compress_gradients on DDP: what it tells, what it refuses, and what it gives back when closed."""

import gc
import logging
import weakref
from datetime import timedelta

import psutil
import torch
from ddp_training import batch, get, make_model, train, wrap
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from robust_accel.comm import QSGD, Meter, Workers, compress_gradients


def closed(rank, world_size):
    """Threads and file descriptors before and after ten models that were compressed and closed."""
    process, counts = psutil.Process(), []
    for i in range(11):
        model = wrap(make_model())
        compression = compress_gradients(model, QSGD())
        model(batch(rank, i)).square().mean().backward()
        compression.close()
        del model, compression
        counts.append((process.num_threads(), process.num_fds()))
    return counts


def seconds_by_parts(rank, world_size):
    model = wrap(make_model())
    compression = compress_gradients(model, QSGD())
    train(model, range(6), rank, delay=True)
    compression.close()
    return compression.meter.seconds, compression.meter.exposed_seconds


class PerRank(QSGD):
    """A protocol with a fault: every rank keeps its own gradient."""

    def exchanges(self, flat, segments, step, workers, meter):
        return []


def told(rank, world_size):
    """What a right and a faulty protocol lead to at the first optimizer step."""
    said = []
    for protocol in (QSGD(bits=4), PerRank()):
        records = []
        handler = logging.Handler()
        handler.emit = lambda record, records=records: records.append(record.getMessage())
        log = logging.getLogger("robust_accel.comm.ddp")
        log.addHandler(handler)
        log.setLevel("INFO")
        model = wrap(make_model())
        compression = compress_gradients(model, protocol)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            for step in range(2):
                optimizer.zero_grad()
                model(batch(rank, step)).square().mean().backward()
                optimizer.step()
        except RuntimeError as error:
            records.append(str(error))
        compression.close()
        log.removeHandler(handler)
        said.append(records)
    return said


def limits(rank, world_size):
    """Time limits of groups that are made beside a model's, however its backend is called."""
    found = {}
    for backend in ("gloo", "cpu:gloo"):
        parent = torch.distributed.new_group(backend=backend, timeout=timedelta(seconds=33))
        workers = Workers.of(None, parent=parent, replies=True)
        cpu = torch.device("cpu")
        found[backend] = [g._get_backend(cpu).options._timeout for g in workers.made]
        workers.close()
    return found


def never_synchronised(rank, world_size):
    """As under Accelerate's LocalSGD."""
    model = wrap(make_model())
    compression = compress_gradients(model, QSGD())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    elsewhere = torch.optim.SGD(make_model().parameters(), lr=0.1)
    said = None
    try:
        with model.no_sync():
            model(batch(rank, 0)).square().mean().backward()
        elsewhere.step()  # another model's optimizer
        optimizer.step()
    except RuntimeError as error:
        said = str(error)
    # accumulated micro-batches end with one that is sent
    model(batch(rank, 1)).square().mean().backward()
    optimizer.step()
    compression.close()
    return said


def by_closure(rank, world_size):
    """As Lightning accumulates: the last micro-batch's backward is in the optimizer's step."""
    model = wrap(make_model())
    compression = compress_gradients(model, QSGD())
    optimizer, said = torch.optim.SGD(model.parameters(), lr=0.1), None

    def closure(step):
        loss = model(batch(rank, step)).square().mean()
        loss.backward()
        return loss

    for step in (0, 2):
        optimizer.zero_grad()
        with model.no_sync():
            closure(step)
        optimizer.step(lambda step=step: closure(step + 1))
    try:
        with model.no_sync():
            optimizer.step(closure=lambda: closure(4))
    except RuntimeError as error:
        said = str(error)
    told = compression._told
    compression.close()
    return said, told


def other_groups(rank, world_size):
    alone = [torch.distributed.new_group([r]) for r in range(world_size)][rank]
    try:
        compress_gradients(wrap(make_model()), QSGD(), group=alone)
    except ValueError as error:
        return str(error)


def hooked_already(rank, world_size):
    model = wrap(make_model())
    model.register_comm_hook(None, fp16_compress_hook)
    try:
        compress_gradients(model, QSGD())
    except ValueError as error:
        return str(error)


def not_ddp(rank, world_size):
    try:
        compress_gradients(make_model(), QSGD())
    except ValueError as error:
        return str(error)


def evaluated_in_between(rank, world_size):
    """What is no local step, and a local step behind a forward without gradients."""
    model = wrap(make_model())
    compression = compress_gradients(model, QSGD())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(rank, 0)).square().mean().backward()
    with model.no_sync():  # an attack, say
        torch.autograd.grad(model(batch(rank, 1)).sum(), next(model.parameters()))
    optimizer.step()
    with model.no_sync():
        model(batch(rank, 2)).square().mean().backward()
    with torch.no_grad():
        model(batch(rank, 3))
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    finally:
        compression.close()


def left_behind(rank, world_size):
    """A model that is gone without close() does not disturb the next one."""
    for step in range(2):
        model = wrap(make_model())
        compress_gradients(model, QSGD())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(batch(rank, step)).square().mean().backward()
        optimizer.step()
        reference = weakref.ref(model)
        del model, optimizer
        gc.collect()
    return reference() is None


def ignored(rank, world_size):
    """Parameters that DDP is told to leave alone differ between ranks, rightly."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        model, ["1.weight", "1.bias"]
    )
    parallel = DistributedDataParallel(model)
    compression = compress_gradients(parallel, QSGD())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()  # without a gradient anywhere
    parallel(torch.full((2, 8), 1.0 + rank)).square().mean().backward()
    optimizer.step()
    compression.close()
    return model[0].weight.grad.clone(), model[1].weight.grad.clone()


TWO = [
    closed,
    seconds_by_parts,
    told,
    limits,
    never_synchronised,
    by_closure,
    other_groups,
    hooked_already,
    not_ddp,
    evaluated_in_between,
    left_behind,
    ignored,
]


def test_the_first_exchange_is_told_and_a_faulty_one_is_an_error(two):
    for right, faulty in get(two, told):
        (line,) = right
        assert "exchanged by QSGD(bits=4" in line and "equal on 2 ranks" in line
        assert "gradients differ between ranks" in faulty[-1]


def test_groups_keep_the_models_time_limit(two):
    for found in get(two, limits):
        assert all(limit == timedelta(seconds=33) for made in found.values() for limit in made)
        assert [len(made) for made in found.values()] == [2, 2]


def test_closing_releases_threads_and_descriptors(two):
    for counts in get(two, closed):
        (first_threads, first_files), (threads, files) = counts[0], counts[-1]
        assert threads <= first_threads + 1
        assert files <= first_files + 2


def test_exposed_seconds_are_a_part_of_all(two):
    for seconds, exposed in get(two, seconds_by_parts):
        assert 0 < exposed <= seconds


def test_a_step_on_gradients_that_were_not_sent_is_refused(two):
    for said in get(two, never_synchronised):
        assert "its forward ran in no_sync(), as under Accelerate's LocalSGD" in said


def test_a_step_by_a_closure_is_judged_after_it(two):
    for said, told in get(two, by_closure):
        assert "its forward ran in no_sync()" in said and told


def test_a_group_of_other_ranks_is_refused(two):
    for rank, said in enumerate(get(two, other_groups)):
        assert f"group: its ranks are [{rank}], and the model's [0, 1]" in said


def test_a_second_hook_is_refused(two):
    for said in get(two, hooked_already):
        assert "have a communication hook already (fp16_compress_hook)" in said


def test_model_that_is_not_ddp_is_refused(two):
    for message in get(two, not_ddp):
        assert "DistributedDataParallel" in message
        assert "prepare" in message


def test_only_local_steps_are_refused(two):
    for said in get(two, evaluated_in_between):
        assert "its forward ran in no_sync()" in said


def test_models_that_are_gone_disturb_no_other(two):
    assert get(two, left_behind) == [True, True]


def test_parameters_that_ddp_ignores_are_not_compared(two):
    (sent, kept), (sent_there, kept_there) = get(two, ignored)
    assert sent.equal(sent_there) and not kept.equal(kept_there)


def test_a_copy_with_other_settings_quantises_by_them():
    protocol = QSGD(bits=8)
    assert protocol.quantizer.bits == 8
    assert protocol.model_copy(update={"bits": 4}).quantizer.bits == 4
    assert protocol == QSGD(bits=8)


def test_seconds_hold_the_exposed_ones():
    meter = Meter()
    for _ in range(200):
        with meter.timed(exposed=True):
            pass
    assert 0 < meter.exposed_seconds <= meter.seconds
