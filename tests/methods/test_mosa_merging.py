"""What the parts of MoSA merge to, in evaluation, as a plain adapter and on LoRA."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import epitaxy
from epitaxy import Bottleneck, EpitaxyError, Head, MoSA, MoSALoRA
from epitaxy.core.host import hosted
from epitaxy.methods.draws import at_step, clocks
from tests.methods.drawing import modules_of, moved, step_that_draws
from tests.methods.mosa import network, on, partitions, pictures, split_of, tokens, vit


@partitions
def test_the_mean_of_all_parts_is_what_evaluation_computes(partition: Any) -> None:
    """With split `up`; and parts sum to the undivided adapter without its bias.  Kills merging by a plain sum."""
    module = network(partition=partition, bottleneck=10)
    x, outputs = tokens(), []
    (parts,) = split_of(module)
    for number in range(4):
        with at_step(module, step_that_draws({parts: number})):
            outputs.append(module(x))
    module.eval()
    torch.testing.assert_close(torch.stack(outputs).mean(0), module(x), atol=1e-6, rtol=1e-5)
    dense = F.linear(F.gelu(F.linear(x, module.down.weight, module.down.bias)), module.up.weight)
    torch.testing.assert_close(sum(output - module.up.bias for output in outputs), dense, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("split", ["down", "both"])
def test_with_a_split_down_the_mean_of_outputs_is_another(split: Any) -> None:
    module = network(split=split)
    x, outputs = tokens(), []
    for numbers in itertools.product(range(4), repeat=len(split_of(module))):
        with at_step(module, step_that_draws(dict(zip(split_of(module), numbers, strict=True)))):
            outputs.append(module(x))
    module.eval()
    assert float((torch.stack(outputs).mean(0) - module(x)).abs().max()) > 1e-4


def test_evaluation_is_never_of_an_earlier_state() -> None:
    """Kills a merged copy that is refreshed now and then."""
    module = network().eval()
    x = tokens()
    before = module(x)
    with torch.no_grad():
        module.up.weight.mul_(2)
    bias = module.up.bias
    torch.testing.assert_close(module(x) - bias, 2 * (before - bias))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"split": "both", "bias": "parts"},
        {"partition": "out_slice", "coefficients": True, "norm": "layer", "scale": "learned"},
        {"partition": "rank_slice", "parts": 8, "active": "bernoulli", "coefficients": True},
        {"merge": "union", "reads": "stream", "norm": "layer"},
        {"order": "sequential", "drop_path": 0.2, "noise": 0.3},
    ],
)
def test_parts_merge_into_a_plain_adapter(fields: dict[str, Any], tmp_path: Path) -> None:
    """Same outputs, same size and cost as a bottleneck, which a fresh model loads; no trace of parts is left."""
    model = vit(labels=3)
    method = MoSA(**{"bottleneck": 8, **fields})
    adapter = epitaxy.attach(model, method + Head(labels=3), name="a")
    adapter.provenance["classes"] = ["x", "y", "z"]
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    expected = model(pictures()).logits
    merged = epitaxy.merge_parts(model)
    assert float((model(pictures()).logits - expected).abs().max()) <= 1e-6
    assert [part["method"] for part in merged.config] == ["bottleneck", "head"]
    assert merged.name == "a"
    assert epitaxy.adapters(model) == {"a": merged}
    assert merged.provenance == {"classes": ["x", "y", "z"]}
    assert modules_of(model) == []
    assert clocks(model) == []
    plain = vit(labels=3)
    assert epitaxy.attach(plain, method.plain + Head(labels=3), name="a").size() == merged.size()
    epitaxy.detach(plain)
    epitaxy.load(plain, epitaxy.save(model, tmp_path / "merged"))
    assert torch.equal(plain(pictures()).logits, model(pictures()).logits)
    assert flops(plain) == flops(model)
    training = vit(labels=3)
    epitaxy.attach(training, method + Head(labels=3), name="a")
    assert flops(training) == flops(plain), "evaluation costs more than a plain adapter"


def flops(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pictures())
    return int(counter.get_total_flops())


def test_merging_parts_keeps_what_is_active_and_refuses_what_has_none() -> None:
    model = vit()
    epitaxy.attach(model, Bottleneck(bottleneck=4), name="plain")
    on(model)[0].trainable = False
    epitaxy.activate(model, ["plain", "a"])
    merged = epitaxy.merge_parts(model, "a")
    assert not merged.trainable
    assert list(epitaxy.adapters(model)) == ["plain", "a"]
    record = hosted(model)
    assert record is not None
    assert record.state.active == ("plain", "a")
    with pytest.raises(
        EpitaxyError, match="'plain' has no parts to merge: expected mosa or mosa_lora, found bottleneck"
    ):
        epitaxy.merge_parts(model, "plain")
    with pytest.raises(EpitaxyError, match="say which adapter"):
        epitaxy.merge_parts(model)


def test_a_lora_in_parts_merges_into_a_lora_and_into_weights(tmp_path: Path) -> None:
    model = vit()
    adapter = epitaxy.attach(model, MoSALoRA(rank=6, split="both", coefficients=True), name="a")
    moved(adapter_module := nn.ModuleList(edit for edit in adapter.edits))
    model.train()
    assert len({tuple(model(pictures()).last_hidden_state.flatten().tolist()) for _ in range(8)}) > 4
    assert adapter_module.training
    model.eval()
    expected = model(pictures()).last_hidden_state
    theirs = vit()
    epitaxy.load(theirs, epitaxy.save(model.train(), tmp_path / "peft", format="peft"))
    torch.testing.assert_close(theirs(pictures()).last_hidden_state, expected)
    report = epitaxy.merge(model.eval())
    assert report.drift < 1e-5
    torch.testing.assert_close(model(pictures()).last_hidden_state, expected, atol=2e-5, rtol=1e-4)
    epitaxy.unmerge(model)
    epitaxy.activate(model, "a")
    merged = epitaxy.merge_parts(model)
    assert merged.config[0]["method"] == "lora"
    torch.testing.assert_close(model(pictures()).last_hidden_state, expected)


def test_a_routed_batch_uses_a_lora_in_parts_as_it_is_merged() -> None:
    """Only `up` is split, so that `down` alone would pass for a plain LoRA."""
    model = vit()
    for name in ("a", "b"):
        moved(nn.ModuleList(epitaxy.attach(model, MoSALoRA(rank=4), name=name).edits), seed=ord(name))
    model.eval()
    alone = {}
    for name in ("a", "b"):
        epitaxy.activate(model, name)
        alone[name] = model(pictures()).last_hidden_state
    with epitaxy.route(model, ["a", "b", "a", "b"]):
        mixed = model(pictures()).last_hidden_state
    for row, name in enumerate("abab"):
        torch.testing.assert_close(mixed[row], alone[name][row])
