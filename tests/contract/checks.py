"""What every method promises on every model; one function per promise.

A check raises ``AssertionError`` when the promise is broken, and lets an ``EpitaxyError`` through when the library
refuses.  Two special failures let the declared exceptions be told from mistakes: ``DifferenceError`` and ``BaseError``.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import epitaxy
from epitaxy.core.anatomy import base_modules
from epitaxy.core.host import hosted
from epitaxy.methods.draws import at_step
from tests.contract.families import FAMILIES, Family, enable_checkpointing
from tests.contract.methods import Variant
from tests.contract.tampering import tampered

Check = Callable[["Case"], None]
CHECKS: dict[str, Check] = {}
TITLES: dict[str, str] = {}


class DifferenceError(AssertionError):
    """A fresh adapter changes the output."""


class BaseError(AssertionError):
    """The bare base already cannot do this."""


@dataclass
class Case:
    """One method variant on one family; ``model`` is the one under test, ``scratch`` makes an empty directory."""

    method: Variant
    family: Family
    scratch: Callable[[], Path]
    model: nn.Module

    @classmethod
    def of(cls, method: Variant, family: Family, scratch: Callable[[], Path]) -> Case:
        return cls(method, family, scratch, family.model())

    def make(self) -> Any:
        """The method itself."""
        return self.method.make(self.family.kind)

    def attach(self, name: str = "a", model: nn.Module | None = None, seed: int | None = None) -> epitaxy.Adapter:
        """Attach the method; with ``seed`` its parameters are moved away from their start."""
        torch.manual_seed(0)
        adapter = epitaxy.attach(
            self.model if model is None else model, self.make(), name=name, layout=self.family.layout
        )
        if seed is not None:
            randomise(adapter, seed)
        return adapter

    @torch.no_grad()
    def run(self, model: nn.Module | None = None, batch: int = 3) -> Tensor:
        """Outputs without gradients; what a method draws in training is that of one fixed step."""
        model = self.model if model is None else model
        with at_step(model, 1):
            return self.family.run(model, batch)

    def learn(self, model: nn.Module | None = None, batch: int = 3) -> Tensor:
        """Backward of a fixed, uneven loss; returns the outputs."""
        model = self.model if model is None else model
        with at_step(model, 1):
            output = self.family.run(model, batch)
            weights = torch.linspace(-1, 1, output[0].numel(), dtype=output.dtype).view_as(output[0])
            (output * weights + 0.1 * output**2).sum().backward()
        return output.detach()


def check(title: str) -> Callable[[Check], Check]:
    """Register a check under its function's name; ``title`` heads its column."""

    def register(function: Check) -> Check:
        CHECKS[function.__name__] = function
        TITLES[function.__name__] = title
        return function

    return register


def randomise(adapter: epitaxy.Adapter, seed: int) -> None:
    """Move every parameter by reproducible noise."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of everything in the state dict."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_base(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Every key of the base is there with the same bits."""
    after = model.state_dict()
    assert [key for key in after if "epitaxy" not in key.split(".")] == list(before)
    for key, value in before.items():
        assert torch.equal(after[key], value), f"{key} changed"


def assert_close(actual: Tensor, expected: Tensor, what: str = "outputs") -> None:
    """Equal but for the order of float32 sums."""
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5, msg=lambda text: f"{what}: {text}")


def assert_close_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same parameters got the same gradients, measured against the largest of all."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key in actual.keys() | expected.keys():
        found, wanted = (side.get(key, torch.zeros(())) for side in (actual, expected))
        difference = float((found - wanted).abs().max()) / largest
        assert difference < 1e-4, f"the gradients of {key} differ by {difference:.1e} of the largest gradient"


def assert_moved(actual: Tensor, base: Tensor) -> None:
    """An adapter with parameters away from their start must show."""
    assert bool(torch.isfinite(actual).all())
    assert actual.shape != base.shape or float((actual - base).abs().max()) > 1e-4, "the adapter changes nothing"


@check("attaches")
def attaches(case: Case) -> None:
    base = case.run()
    adapter = case.attach()
    assert adapter.size() > 0
    assert epitaxy.adapters(case.model) == {"a": adapter}
    assert all(parameter.requires_grad for parameter in adapter.parameters())
    randomise(adapter, 1)
    assert_moved(case.run(), base)


@check("identity at start")
def identity(case: Case) -> None:
    base = case.run()
    case.attach()
    fresh = case.run()
    if not torch.equal(fresh, base):
        raise DifferenceError("a fresh adapter changes the output")


@check("base untouched")
def untouched(case: Case) -> None:
    before, kinds = snapshot(case.model), [(path, type(module)) for path, module in case.model.named_modules()]
    base = list(case.model.parameters())
    adapter = case.attach()
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        case.learn()
        optimiser.step()
    assert_same_base(case.model, before)
    now = [(path, type(module)) for path, module in case.model.named_modules() if "epitaxy" not in path.split(".")]
    assert now == kinds
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base)


@check("gradients reach all")
def gradients(case: Case) -> None:
    adapter = case.attach()
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    waiting = {name for name, _ in adapter.named_parameters()}
    for _ in range(2):
        optimiser.zero_grad()
        case.learn()
        for name, parameter in adapter.named_parameters():
            assert parameter.grad is not None, f"{name} gets no gradient"
            assert bool(torch.isfinite(parameter.grad).all()), f"the gradient of {name} is not finite"
            if bool(parameter.grad.any()):
                waiting.discard(name)
        optimiser.step()
    assert not waiting, f"no gradient reached {sorted(waiting)}"


@check("save and load")
def save_load(case: Case) -> None:
    adapter = case.attach(seed=1)
    expected = case.run()
    saved = epitaxy.save(case.model, case.scratch() / "a")
    fresh = case.family.model()
    again = epitaxy.load(fresh, saved)
    assert again.name == "a"
    assert again.method == adapter.method
    assert not any(parameter.requires_grad for parameter in again.parameters())
    theirs, ours = again.tensors(), adapter.tensors()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    assert torch.equal(case.run(fresh), expected)
    epitaxy.load(fresh, saved, name="other")
    assert torch.equal(case.run(fresh), expected)


@check("strict loading")
def strict_loading(case: Case) -> None:
    case.attach(seed=1)
    scratch = case.scratch()
    saved = epitaxy.save(case.model, scratch / "a")
    model = case.family.model()
    base, before = case.run(model), snapshot(model)
    for what, path in tampered(saved, scratch):
        assert_refused(model, path, what)
        assert hosted(model) is None, what
    assert_same_base(model, before)
    assert list(model.state_dict()) == list(before)
    assert torch.equal(case.run(model), base)
    names = list(FAMILIES)
    stranger = FAMILIES[names[names.index(case.family.kind) - 1]]
    other = stranger.model()
    assert_refused(other, saved, "other family")
    assert hosted(other) is None


def assert_refused(model: nn.Module, path: Path, what: str) -> None:
    message = ""
    try:
        epitaxy.load(model, path)
    except epitaxy.EpitaxyError as error:
        message = str(error)
    assert str(path) in message, f"{what}: {message or 'was loaded'}"


@check("detach bitwise")
def detach(case: Case) -> None:
    model = case.model
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    base, before = case.run(), snapshot(model)
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    hooks, attributes = hook_count(model), set(vars(model))
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    case.attach("a", seed=1)
    case.attach("b", seed=2)
    case.learn()
    epitaxy.detach(model, "a")
    epitaxy.detach(model, "b")
    assert torch.equal(case.run(), base)
    assert_same_base(model, before)
    assert list(model.state_dict()) == list(before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == asked
    assert hook_count(model) == hooks
    assert set(vars(model)) == attributes
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == implementation


def hook_count(model: nn.Module) -> int:
    """Hooks on all modules, with the side tables torch keeps for them."""
    return sum(
        len(table)
        for module in model.modules()
        for table in (
            module._forward_hooks,
            module._forward_hooks_with_kwargs,
            module._forward_pre_hooks,
            module._forward_pre_hooks_with_kwargs,
            module._backward_hooks,
        )
    )


@check("several adapters")
def several(case: Case) -> None:
    base = case.run()
    alone = {}
    for name, seed in (("a", 1), ("b", 2)):
        model = case.family.model()
        case.attach(name, model, seed)
        alone[name] = case.run(model)
    case.attach("a", seed=1)
    case.attach("b", seed=2)
    assert_moved(alone["a"], alone["b"])
    for name in ("a", "b", "a"):
        epitaxy.activate(case.model, name)
        assert torch.equal(case.run(), alone[name]), name
    epitaxy.activate(case.model, None)
    assert torch.equal(case.run(), base)
    epitaxy.detach(case.model, "a")
    epitaxy.activate(case.model, "b")
    assert torch.equal(case.run(), alone["b"])


@check("two at once")
def together(case: Case) -> None:
    case.attach("a", seed=1)
    first = case.run()
    case.attach("b", seed=2)
    second = case.run()
    epitaxy.activate(case.model, ["a", "b"])
    both = case.run()
    assert_moved(both, first)
    assert_moved(both, second)
    epitaxy.activate(case.model, "a")
    assert torch.equal(case.run(), first)


@check("composition")
def composition(case: Case) -> None:
    """One adapter of two methods is two adapters, one after the other."""
    other = epitaxy.LoRA(at="mlp.down", rank=2)
    composed = epitaxy.attach(case.model, case.make() + other, name="both", layout=case.family.layout)
    randomise(composed, 1)
    expected = case.run()
    model = case.family.model()
    parts = [case.attach("a", model), epitaxy.attach(model, other, name="other", layout=case.family.layout)]
    tensors = list(composed.tensors().values())
    places = [tensor for part in parts for tensor in part.tensors().values()]
    assert [tensor.shape for tensor in tensors] == [place.shape for place in places]
    for place, tensor in zip(places, tensors, strict=True):
        place.copy_(tensor)
    epitaxy.activate(model, ["a", "other"])
    assert_close(case.run(model), expected)
    epitaxy.activate(model, "a")
    assert_moved(case.run(model), expected)


def route_equals_separate_runs(case: Case, rows: list[str | None]) -> None:
    """Outputs and gradients of a routed batch against one run per adapter, on the rows that are its own."""
    pair = [case.attach("a", seed=1), case.attach("b", seed=2)]
    model, batch = case.model, len(rows)
    model.train()
    for module in base_modules(model).values():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # statistics of a batch, which the base itself would take, mix its rows
    separate: dict[int, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name in dict.fromkeys(rows):
        epitaxy.activate(model, name)
        members = [row for row, other in enumerate(rows) if other == name]
        alone = replace(case, family=rows_of(case.family, members, batch))
        separate.update(zip(members, alone.run(), strict=True))
        if name is not None:
            alone.learn()
            expected.update(take_gradients(pair))
    epitaxy.activate(model, "a")
    everywhere = case.run(batch=batch)
    with epitaxy.route(model, rows):
        mixed = case.run(batch=batch)
        learned = case.learn(batch=batch)
        found = take_gradients(pair)
    for row, name in enumerate(rows):
        assert_close(mixed[row], separate[row], f"row {row} ({name})")
        assert_close(learned[row], separate[row], f"row {row} ({name}) in training")
    assert_close_gradients(found, expected)
    assert torch.equal(case.run(batch=batch), everywhere), "the route is still on after its block"


def rows_of(family: Family, members: list[int], batch: int) -> Family:
    """The same family, fed with some rows of a batch."""

    def pick(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: pick(inner) for key, inner in value.items()}
        return value[members] if isinstance(value, Tensor) else value

    return family_with(family, pick(family.inputs(batch)))


def take_gradients(adapters: list[epitaxy.Adapter]) -> dict[str, Tensor]:
    """The gradients there are, by adapter and key; clears them."""
    found = {}
    for adapter in adapters:
        for key, parameter in adapter.named_parameters():
            if parameter.grad is not None and bool(parameter.grad.any()):
                found[f"{adapter.name}.{key}"] = parameter.grad
            parameter.grad = None
    return found


@check("rows by adapter")
def route(case: Case) -> None:
    route_equals_separate_runs(case, ["a", "b", "a"])


@check("rows by adapter or base")
def route_base(case: Case) -> None:
    route_equals_separate_runs(case, ["a", None, "b", "a"])


@check("merge and unmerge")
def merge(case: Case) -> None:
    case.attach(seed=1)
    with_adapter, before = case.run(), snapshot(case.model)
    report = epitaxy.merge(case.model, "a", probe=case.family.inputs(3))
    assert 0 <= report.drift <= report.tolerance
    assert report.weights > 0
    assert_close(case.run(), with_adapter, "outputs after the merge")
    assert any(not torch.equal(value, before[key]) for key, value in case.model.state_dict().items())
    epitaxy.unmerge(case.model, "a")
    after = case.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    epitaxy.activate(case.model, "a")
    assert torch.equal(case.run(), with_adapter)


@check("deepcopy")
def deepcopy(case: Case) -> None:
    base = case.run()
    case.attach(seed=1)
    expected = case.run()
    twin = copy.deepcopy(case.model)
    assert torch.equal(case.run(twin), expected)
    randomise(epitaxy.adapters(twin)["a"], 3)
    assert_moved(case.run(twin), expected)
    assert torch.equal(case.run(), expected)
    epitaxy.detach(twin)
    assert torch.equal(case.run(twin), base)
    assert torch.equal(case.run(), expected)


@check("pickle")
def pickling(case: Case) -> None:
    try:
        pickle.dumps(case.model)
    except Exception as error:
        raise BaseError(f"the bare base cannot be pickled: {error}") from error
    base = case.run()
    case.attach(seed=1)
    expected = case.run()
    twin = pickle.loads(pickle.dumps(case.model))
    assert torch.equal(case.run(twin), expected)
    epitaxy.detach(twin)
    assert torch.equal(case.run(twin), base)


@check("bf16 base, fp32 adapter")
def bf16(case: Case) -> None:
    case.model.to(torch.bfloat16)
    inputs = {
        key: value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in case.family.inputs(3).items()
    }
    if "added_cond_kwargs" in inputs:
        inputs["added_cond_kwargs"] = {key: value.bfloat16() for key, value in inputs["added_cond_kwargs"].items()}
    case.family = family_with(case.family, inputs)
    base = case.run()
    adapter = case.attach()
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    fresh = case.run()
    assert fresh.dtype == torch.bfloat16
    if "identity" not in case.method.cannot and fresh.shape == base.shape:
        assert torch.equal(fresh, base)
    before = {key: tensor.clone() for key, tensor in adapter.tensors().items()}
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        assert bool(torch.isfinite(case.learn()).all())
        optimiser.step()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in adapter.tensors().values())
    assert any(not torch.equal(tensor, before[key]) for key, tensor in adapter.tensors().items())


def family_with(family: Family, inputs: dict[str, Any]) -> Family:
    return Family(family.name, family.build, lambda batch: inputs, family.layout, family.like)


@check("gradient checkpointing")
def checkpointing(case: Case) -> None:
    adapter = case.attach(seed=1)
    case.model.train()
    plain = case.learn()
    expected = take_gradients([adapter])
    calls = [0]
    inner = innermost(case.model)
    handle = inner.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    enable_checkpointing(case.model)
    assert_close(case.learn(), plain)
    handle.remove()
    only_head = all(piece.role == "head" for piece in adapter.pieces)  # then no block is on the way back
    assert only_head or calls[0] >= 2, "checkpointing did not run the block again"
    found = take_gradients([adapter])
    assert_close_gradients(found, expected)


def innermost(model: nn.Module) -> nn.Module:
    """The first query projection: inside every block whatever a model checkpoints."""
    record = hosted(model)
    assert record is not None
    return model.get_submodule(record.anatomy.spots("attention.q")[0].path)


@check("torch.compile, whole graph")
def compiles(case: Case) -> None:
    adapter = case.attach(seed=1)
    eager = case.learn()
    expected = take_gradients([adapter])
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    assert_close(case.learn(compiled), eager)
    found = take_gradients([adapter])
    assert_close_gradients(found, expected)
    torch._dynamo.reset()
