"""Which exchange goes on when."""

from robust_accel.comm.base import Pipeline


class Work:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait(self):
        self.log.append(f"wait {self.name}")


def exchange(log, name, stages=2):
    for stage in range(stages):
        log.append(f"send {name}{stage}")
        yield Work(log, f"{name}{stage}")
    log.append(f"end {name}")


def test_nothing_is_waited_for_until_the_pipeline_is_full():
    log, pipeline = [], Pipeline(depth=3)
    for name in "abc":
        pipeline.add(exchange(log, name))
    assert log == ["send a0", "send b0", "send c0"]
    assert len(pipeline) == 3
    pipeline.add(exchange(log, "d"))
    # a's second message is on its way, and so is all of the others
    second = [entry for name in "abc" for entry in (f"wait {name}0", f"send {name}1")]
    assert log[3:] == [*second, "wait a1", "end a", "send d0"]


def test_each_stage_keeps_the_order_whenever_exchanges_come():
    for late in range(8):  # "c" comes after so many steps
        log, pipeline = [], Pipeline(depth=4)
        pipeline.add(exchange(log, "a"))
        pipeline.add(exchange(log, "b", stages=3))
        for _ in range(late):
            if pipeline:
                pipeline.advance()
        pipeline.add(exchange(log, "c"))
        pipeline.finish()
        assert not pipeline
        for stage in "01":
            sent = [entry[5] for entry in log if entry[:4] == "send" and entry[-1] == stage]
            assert sent == ["a", "b", "c"], (late, log)


def test_an_exchange_that_sends_nothing_takes_no_room():
    log, pipeline = [], Pipeline(depth=1)
    pipeline.add(exchange(log, "a", stages=0))
    assert log == ["end a"]
    assert not pipeline
