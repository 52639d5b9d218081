"""The small parts of training: order, schedules, settings, the log, checkpoints, random states, progress."""

from __future__ import annotations

import io
import json
import math
import random
import re
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import save_file

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.tasks import random_state
from epitaxy.train import progress as showing
from epitaxy.train.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint, write_checkpoint
from epitaxy.train.config import TrainConfig, count_steps, evaluation_interval
from epitaxy.train.metrics_log import MetricsLog, read_metrics
from epitaxy.train.order import Order
from epitaxy.train.schedule import learning_rate


@given(
    rows=st.integers(1, 40),
    share=st.integers(1, 5),
    processes=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    steps=st.integers(1, 12),
    data=st.data(),
)
def test_the_order_is_exact(
    rows: int, share: int, processes: int, accumulate: int, steps: int, data: st.DataObject
) -> None:
    batch = share * processes
    shared = [list(Order(rows, batch, accumulate, 7, 0, steps, rank, processes)) for rank in range(processes)]
    alone = list(Order(rows, batch, accumulate, 7, 0, steps))
    joined = [list(chain(*parts)) for parts in zip(*shared, strict=True)]
    assert joined == alone, "processes together see what one sees"
    seen = list(chain(*alone))
    for start in range(0, len(seen) - rows + 1, rows):
        assert sorted(seen[start : start + rows]) == list(range(rows)), "every epoch is a permutation"
    first = data.draw(st.integers(0, steps))
    assert list(Order(rows, batch, accumulate, 7, first, steps)) == alone[first * accumulate :]
    assert len(Order(rows, batch, accumulate, 7, first, steps)) == len(alone[first * accumulate :])


def test_epochs_and_seeds_differ() -> None:
    seen = list(chain(*Order(20, 20, 1, 0, 0, 2)))
    assert seen[:20] != seen[20:]
    assert seen[:20] != list(chain(*Order(20, 20, 1, 1, 0, 1)))


def test_schedules() -> None:
    def rates(steps: int = 10, **settings: Any) -> list[float]:
        config = TrainConfig(learning_rate=2.0, **settings)
        return [learning_rate(config, step, steps) for step in range(steps)]

    assert rates() == pytest.approx([1 + math.cos(math.pi * step / 10) for step in range(10)])
    assert rates(schedule="linear") == pytest.approx([2 - 0.2 * step for step in range(10)])
    assert rates(schedule="constant") == [2.0] * 10
    assert rates(schedule="constant", warmup=3)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates(schedule="constant", warmup=0.3) == rates(schedule="constant", warmup=3)
    assert rates(warmup=3)[3] == 2.0
    assert rates(warmup=50) == pytest.approx([2 * (step + 1) / 51 for step in range(10)])
    assert learning_rate(TrainConfig(learning_rate=2.0), 0, 1) == 2.0


def test_lengths() -> None:
    assert count_steps(TrainConfig(batch=8, accumulate=2), 100) == math.ceil(10 * 100 / 16)
    assert count_steps(TrainConfig(epochs=0.5, batch=8), 100) == 7
    assert count_steps(TrainConfig(epochs=0.001, batch=8), 100) == 1
    assert count_steps(TrainConfig(steps=5), 100) == 5
    assert evaluation_interval(TrainConfig(batch=8), 100) == 13
    assert evaluation_interval(TrainConfig(batch=8, evaluate_every=4), 100) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5, "epochs": 1.0}, r"train.steps and train.epochs both say how long"),
        ({"steps": 0}, r"train.steps must be at least 1, got 0"),
        ({"batch": -1}, r"train.batch must be at least 1"),
        ({"log_every": 0}, r"train.log_every must be at least 1"),
        ({"learning_rate": 0.0}, r"train.learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, r"train.learning_rate must be above 0"),
        ({"clip": 0.0}, r"train.clip must be above 0"),
        ({"epochs": -1.0}, r"train.epochs must be above 0"),
        ({"weight_decay": -0.1}, r"train.weight_decay must not be negative"),
        ({"weight_decay": float("inf")}, r"train.weight_decay must not be negative and must be finite"),
        ({"clip": float("inf")}, r"train.clip must be above 0 and finite"),
        ({"warmup": 2.5}, r"train.warmup is a whole number of steps or a fraction below 1"),
        (
            {"schedule": "cosin"},
            r"train.schedule is one of cosine, linear, constant, got 'cosin'; did you mean 'cosine'",
        ),
        ({"precision": "fp8"}, r"train.precision is one of no, bf16, fp16"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(EpitaxyError, match=message):
        TrainConfig(**settings)


def test_the_log_is_cut_where_a_checkpoint_stood_and_at_torn_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    log = MetricsLog(path)
    log.write({"step": 1})
    position = log.position()
    log.write({"step": 2})
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    with path.open("ab") as stream:
        stream.write(b'{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    log = MetricsLog(path, position)
    log.write({"step": 20})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 20}\n'
    log = MetricsLog(path, 10_000)  # somebody shortened the file
    log.write({"step": 21})
    log.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 20, 21]
    path.write_bytes(b'{"step": 1}\n{"ste')
    MetricsLog(path, 17).close()
    assert path.read_bytes() == b'{"step": 1}\n'
    assert read_metrics(tmp_path / "none") == []


def test_a_checkpoint_holds_bits_and_facts(tmp_path: Path) -> None:
    tensors = {"a/x": torch.randn(3, 2), "a/y": torch.randn(4).to(torch.bfloat16), "b": torch.tensor(5)}
    facts = {"loss": 0.1 + 0.2, "nested": {"list": [1, None, "é"]}}
    path = write_checkpoint(tmp_path, Checkpoint(12, tensors, facts))
    found = read_checkpoint(path)
    assert found.step == 12
    assert found.facts["loss"] == 0.1 + 0.2
    assert found.facts["nested"] == facts["nested"]
    assert all(torch.equal(found.tensors[key], tensor) for key, tensor in tensors.items())
    assert found.group("a").keys() == {"x", "y"}


def test_the_newest_checkpoint_wins_and_drafts_are_cleared(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    nine = write_checkpoint(tmp_path, Checkpoint(9, {"a": torch.zeros(1)}, {}))
    held = nine.read_bytes()
    ten = write_checkpoint(tmp_path, Checkpoint(10, {"a": torch.zeros(1)}, {}))
    assert not nine.exists()
    nine.write_bytes(held)  # as after a kill between the two
    draft = tmp_path / ".step-00000011.safetensors.x.draft"
    draft.write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == ten
    assert not draft.exists()


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_checkpoint(tmp_path, Checkpoint(1, {"a": torch.ones(1)}, {}))

    def full(*args: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path, Checkpoint(2, {"a": torch.ones(1)}, {}))
    assert [path.name for path in tmp_path.iterdir()] == [old.name]
    assert read_checkpoint(old).step == 1


def test_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(FormatError, match=rf"{path.name}: not a checkpoint of epitaxy"):
        read_checkpoint(path)
    save_file({"a": torch.zeros(1)}, path, {"facts": json.dumps({"schema": 99, "step": 1})})
    with pytest.raises(FormatError, match="a checkpoint of schema 99, this version reads up to 1"):
        read_checkpoint(path)


def test_random_states_come_back_exactly() -> None:
    device = torch.device("cpu")
    random_state.seed_everything(4)
    random.gauss(0, 1)  # leaves a second value waiting
    np.random.standard_normal()
    torch.randn(3)
    tensors, facts = random_state.capture(device)
    facts = json.loads(json.dumps(facts))

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), *np.random.standard_normal(3), *torch.randn(3).tolist()]

    expected = draw()
    random_state.seed_everything(5)
    assert draw() != expected
    random_state.restore(tensors, facts, device)
    assert draw() == expected


def test_a_terminal_gets_a_bar_with_rate_and_remaining_time(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()

    def terminal(**settings: Any) -> Console:
        return Console(file=screen, force_terminal=True, force_interactive=True, width=120)

    monkeypatch.setattr(showing, "Console", terminal)
    bar = showing.Progress(50, 10, True)
    for step in range(11, 31):
        record = {"step": step, "loss": 0.25, "validation_accuracy": 0.5} if step % 5 == 0 else None
        bar.update(step, record)
        time.sleep(0.02)
    assert bar._bar is not None
    bar._bar.refresh()
    bar.close()
    shown = screen.getvalue()
    assert "going on at step 10 of 50" in shown
    assert "30/50" in shown
    assert "steps/s" in shown
    assert "loss 0.2500  validation: accuracy 0.5000" in shown
    assert re.search(r"\d:\d\d:\d\d", shown), "the remaining time"


def test_nothing_is_shown_when_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    bar = showing.Progress(5, 2, False)
    bar.update(3, {"step": 3, "loss": 1.0, "validation_loss": 1.0})
    bar.close()
    assert capsys.readouterr() == ("", "")


def test_a_pass_over_data_tells_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(showing.counted(range(4), 4, "reading", True)) == [0, 1, 2, 3]
    assert capsys.readouterr() == ("", ""), "a short pass says nothing"
    monkeypatch.setattr(showing, "PLAIN_INTERVAL", 0.0)
    assert list(showing.counted(range(3), 3, "reading", False)) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    assert list(showing.counted(range(3), 3, "reading", True)) == [0, 1, 2]
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert [re.sub(r"[\d.]+/s", "#/s", line) for line in lines] == [
        "reading: 1/3  #/s  0:00 left",
        "reading: 2/3  #/s  0:00 left",
        "reading: 3 in 0:00",
    ]


def test_a_pass_over_data_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()

    def terminal(**settings: Any) -> Console:
        return Console(file=screen, force_terminal=True, force_interactive=True, width=120)

    monkeypatch.setattr(showing, "Console", terminal)

    def items() -> Iterator[int]:
        for number in range(8):
            time.sleep(0.05)
            yield number

    assert sum(showing.counted(items(), 8, "statistics", True)) == 28
    shown = screen.getvalue()
    assert "statistics" in shown
    assert re.search(r"[4-8]/8", shown)
    with pytest.raises(ValueError, match="bad"):  # the bar goes away with the error
        for _ in showing.counted(_failing(), 8, "statistics", True):
            pass
    assert list(showing.counted(range(2), 2, "another", True)) == [0, 1]


def _failing() -> Iterator[int]:
    yield 1
    raise ValueError("bad")
