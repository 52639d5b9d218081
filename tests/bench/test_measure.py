"""The measuring itself: what is called when, what is counted, what is computed from it.  No test depends on speed."""

from __future__ import annotations

import sys
import time
from collections import Counter

import pytest
import torch
from torch import nn

from epitaxy.bench.measure import (
    Case,
    Quartiles,
    forget_peak,
    interleave,
    kept_for_backward,
    machine,
    memory,
    most_kept,
    peak_of,
    quartiles,
    ratios,
)
from epitaxy.bench.tables import cell, seconds, size, table


def test_every_round_runs_every_case_in_an_order_of_its_own() -> None:
    calls: list[str] = []
    cases = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    spent = interleave(cases, rounds=20, warmup=3, repeat=2)
    assert Counter(calls) == dict.fromkeys("abc", 46)
    assert {name: len(values) for name, values in spent.items()} == dict.fromkeys("abc", 20)
    rounds = [tuple(calls[start : start + 6]) for start in range(0, len(calls), 6)]
    assert all(sorted(one) == list("aabbcc") and one[0] == one[1] for one in rounds)
    assert len(set(rounds)) > 3
    again: list[str] = []
    interleave({name: (lambda name=name: again.append(name)) for name in "abc"}, rounds=20, warmup=3, repeat=2)
    assert again == calls


def test_preparation_is_not_timed_and_always_undone() -> None:
    events: list[str] = []

    def slow() -> None:
        events.append("prepare")
        time.sleep(0.05)

    spent = interleave({"x": Case(lambda: events.append("run"), slow, lambda: events.append("restore"))}, 2, warmup=0)
    assert events == ["prepare", "run", "restore"] * 2
    assert max(spent["x"]) < 0.04

    def fail() -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        interleave({"x": Case(fail, restore=lambda: events.append("after failure"))}, 1)
    assert events[-1] == "after failure"


def test_quartiles_and_paired_ratios() -> None:
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == Quartiles(2.0, 3.0, 4.0)
    assert quartiles([7.0]) == Quartiles(7.0, 7.0, 7.0)
    assert ratios([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == Quartiles(2.0, 2.0, 2.0)  # whatever the rounds' own pace
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_bytes_kept_for_the_backward_pass_are_exact() -> None:
    x = torch.zeros(1000, requires_grad=True)
    nothing = nn.Identity()
    assert kept_for_backward(lambda: x + 1, nothing) == 0
    assert kept_for_backward(lambda: x.exp(), nothing) == 4000  # its result
    assert kept_for_backward(lambda: (x.exp(), x.exp()), nothing) == 8000
    y = torch.ones(1000)
    assert kept_for_backward(lambda: (x * y, x * y), nothing) == 4000  # one storage, counted once
    layer = nn.Linear(8, 8).requires_grad_(False)
    rows = torch.ones(5, 8, requires_grad=True)
    assert kept_for_backward(lambda: layer(rows), layer) == 0  # only the frozen weight is kept
    assert kept_for_backward(lambda: layer.requires_grad_(True)(rows), layer) == 5 * 8 * 4


def test_what_a_backward_pass_lets_go_of_counts_no_more() -> None:
    x = torch.zeros(1000, requires_grad=True)
    nothing = nn.Identity()

    def after_one_another() -> None:
        x.exp().sum().backward()
        x.exp().exp().sum().backward()

    assert most_kept(after_one_another, nothing) == 8000
    assert most_kept(lambda: (x.exp().sum() + x.exp().exp().sum()).backward(), nothing) == 12000
    assert most_kept(lambda: x + 1, nothing) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_what_is_gone_again() -> None:
    forget_peak()
    before = memory("VmHWM")
    block = torch.ones(50_000_000)
    del block
    assert 150e6 < memory("VmHWM") - before < 300e6
    forget_peak()
    assert memory("VmHWM") < before + 100e6


def test_a_process_of_its_own() -> None:
    code = "print('peak 12'); print('a line of words that is no result')"
    assert peak_of(["-c", code]) == {"peak": 12.0}
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        peak_of(["-c", "1 / 0"])


def test_tables() -> None:
    rows = [{"a": 1234567, "b": Quartiles(0.5, 0.98765, 2)}, {"a": "x", "c": 1.23456}]
    assert table(rows).splitlines() == ["| a | b |", "|---|---|", "| 1,234,567 | 0.988 [0.5, 2] |", "| x |  |"]
    assert table(rows, ["c", "a"]).splitlines()[2:] == ["|  | 1,234,567 |", "| 1.23 | x |"]
    assert table([]) == ""
    assert cell(True) == "True"
    assert seconds(Quartiles(0.001, 0.002, 0.5)) == "2 [1, 500] ms"
    assert seconds(Quartiles(1e-6, 2e-6, 3e-6)) == "2 [1, 3] µs"
    assert [size(value) for value in (12, 2048, 3 * 1024**2, 5 * 1024**3)] == ["12 B", "2 KiB", "3 MiB", "5 GiB"]


def test_the_machine_is_described_in_general_words() -> None:
    facts = machine()
    assert {"cores", "threads", "torch", "peft", "transformers"} <= facts.keys()
    assert not any("/" in str(value) for value in facts.values())
