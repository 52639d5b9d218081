"""Attaching, switching, routing, merging: states, names, wrappers and refusals."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import epitaxy
from epitaxy.core.errors import EpitaxyError, SiteError, StateError, UnsupportedError
from epitaxy.core.host import hosted
from epitaxy.core.route import Route


def vit(layers: int = 2) -> transformers.ViTForImageClassification:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return transformers.ViTForImageClassification(config).eval()


PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(pixel_values=PIXELS).logits
        return output


def randomise(adapter: epitaxy.Adapter) -> epitaxy.Adapter:
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    return adapter


@pytest.mark.parametrize(
    ("at", "says"),
    [
        ("atention.q", r"'atention.q' matches no role and no module of vit; did you mean 'attention.q'"),
        (("attention.q", "q_porj"), "'q_porj' matches no role .* did you mean 'q_proj'"),
        ("vit.layers.*.nothing", "matches no role and no module"),
        ("conv1", "matches no role"),
        ((), "`at` is empty"),
    ],
)
def test_every_pattern_must_match(at: object, says: str) -> None:
    model = vit()
    with pytest.raises(SiteError, match=says):
        epitaxy.attach(model, epitaxy.LoRA(at=at))  # type: ignore[arg-type]
    assert hosted(model) is None


@pytest.mark.parametrize(
    ("at", "count"),
    [
        ("attention.q", 3),
        ("q_proj", 3),
        ("vit.layers.1.attention.q_proj", 1),
        ("*.layers.[02].mlp.fc1", 2),
        ("mlp.*", 6),
        (("attention.q", "q_proj"), 3),
        ("linear", 18),
    ],
)
def test_roles_endings_and_patterns(at: str, count: int) -> None:
    assert len(epitaxy.attach(vit(3), epitaxy.LoRA(at=at, rank=1)).edits) == count


def test_layers() -> None:
    assert len(epitaxy.attach(vit(3), epitaxy.LoRA(rank=1, layers=(0, -1))).edits) == 4
    with pytest.raises(SiteError, match=r"layers \[3\] do not exist: vit has 3 blocks, 0 to 2"):
        epitaxy.attach(vit(3), epitaxy.LoRA(rank=1, layers=(3,)))
    with pytest.raises(SiteError, match="outside the blocks"):
        epitaxy.attach(vit(3), epitaxy.NormTuning(at="norm.final", layers=(0,)))


@pytest.mark.parametrize("name", ["", "a.b", "a b", "a/b", "-a", None, 3])
def test_names(name: object) -> None:
    with pytest.raises(StateError, match="letters, digits"):
        epitaxy.attach(vit(), epitaxy.LoRA(), name=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["forward", "state", "training", "weight", "0", "epitaxy", "_modules"])
def test_names_that_modules_use_themselves(name: str, tmp_path: Path) -> None:
    model = vit()
    randomise(epitaxy.attach(model, epitaxy.LoRA() + epitaxy.BitFit(), name=name))
    expected = logits(model)
    epitaxy.save(model, tmp_path / "a")
    other = vit()
    epitaxy.load(other, tmp_path / "a")
    assert torch.equal(logits(other), expected)


def test_states_that_contradict() -> None:
    model = vit()
    with pytest.raises(StateError, match="no adapter is attached"):
        epitaxy.detach(model)
    epitaxy.activate(model, None)  # nothing to switch off is no error
    epitaxy.attach(model, epitaxy.LoRA(), name="first")
    for call in (epitaxy.detach, epitaxy.activate, epitaxy.merge, epitaxy.unmerge):
        with pytest.raises(StateError):
            call(model, "frist")
    with pytest.raises(StateError, match="did you mean 'first'"):
        epitaxy.activate(model, "frist")
    with pytest.raises(StateError, match="attached already"):
        epitaxy.attach(model, epitaxy.LoRA(), name="first")
    with pytest.raises(StateError, match="named twice"):
        epitaxy.activate(model, ["first", "first"])
    with pytest.raises(EpitaxyError, match="expected a method such as LoRA"):
        epitaxy.attach(model, epitaxy.LoRA, name="a_class")
    with pytest.raises(EpitaxyError, match="expected a method such as LoRA"):
        epitaxy.attach(model, "lora", name="a_word")
    with epitaxy.route(model, ["first", None, None]), pytest.raises(StateError, match="nested"):
        epitaxy.route(model, [None]).__enter__()
    with pytest.raises(StateError, match="'frist'"), epitaxy.route(model, ["frist"]):
        pass
    with pytest.raises(StateError, match="2 rows, but a module"), epitaxy.route(model, ["first", None]):
        logits(model)
    record = hosted(model)
    assert record is not None
    assert record.state.route is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: epitaxy.activate(model, 3), "named by strings, got 3"),
        (lambda model: epitaxy.activate(model, ["first", None]), "named by strings, got None"),
        (lambda model: epitaxy.detach(model, ["first"]), "named by strings, got"),
        (lambda model: epitaxy.route(model, ["first", 3]).__enter__(), "named by strings, got 3"),
        (lambda model: epitaxy.route(model, "first").__enter__(), "got the single name 'first'"),
        (lambda model: epitaxy.merge(model, "first", probe=3), "probe must be a mapping"),
        (lambda model: epitaxy.attach(model, epitaxy.LoRA(rank=2.5), name="b"), "lora.rank: expected .* integer"),
        (lambda model: epitaxy.attach(model, epitaxy.LoRA(at=None), name="b"), "lora.at: expected .* found None"),
        (lambda model: epitaxy.attach(model, epitaxy.LoRA(layers=3), name="b"), "lora.layers: expected .* found 3"),
        (lambda model: epitaxy.attach(model, epitaxy.Prompt(tokens=2.5), name="b"), "prompt.tokens: expected"),
        (lambda model: epitaxy.attach("a model", epitaxy.LoRA()), "expected a model .* found str"),
    ],
)
def test_arguments_of_another_kind(call: Callable[[nn.Module], object], says: str) -> None:
    model = vit()
    epitaxy.attach(model, epitaxy.LoRA(at=["attention.q"]), name="first")  # a list is as good as a tuple
    keys = list(model.state_dict())
    with pytest.raises(EpitaxyError, match=says):
        call(model)
    record = hosted(model)
    assert record is not None
    assert (record.state.active, record.state.route) == (("first",), None)
    assert list(model.state_dict()) == keys


def test_a_pipeline_is_no_model() -> None:
    class Pipeline:
        unet = nn.Linear(2, 2)

    with pytest.raises(StateError, match=r"found Pipeline; pass its part \.unet"):
        epitaxy.attach(Pipeline(), epitaxy.LoRA())  # type: ignore[arg-type]


def test_trainability_is_a_function_of_state() -> None:
    model = vit()
    model.vit.embeddings.cls_token.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    first = epitaxy.attach(model, epitaxy.LoRA(), name="first")
    second = epitaxy.attach(model, epitaxy.BitFit(), name="second")
    for names in (None, "first", ["first", "second"]):
        epitaxy.activate(model, names)
        asking = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert asking == {id(parameter) for adapter in (first, second) for parameter in adapter.parameters()}
    first.trainable = False
    assert not any(parameter.requires_grad for parameter in first.parameters())
    text = str(epitaxy.explain(model))
    assert "adapter first [active]" in text
    assert "adapter.trainable is False" in text
    assert "0 trained (frozen while adapters are attached)" in text
    epitaxy.detach(model)
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def test_explain_notices_hands_in_the_works() -> None:
    model = vit()
    adapter = epitaxy.attach(model, epitaxy.LoRA(), name="a")
    next(adapter.parameters()).requires_grad_(False)
    model.classifier.weight.requires_grad_(True)
    text = str(epitaxy.explain(model))
    assert "changed by hand" in text
    assert "set by hand" in text


def test_wrapped_models_are_accepted() -> None:
    model = vit()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        adapter = epitaxy.attach(wrapped, epitaxy.LoRA(), name="a")
        randomise(adapter)
        assert "a" in str(epitaxy.explain(wrapped))
        epitaxy.merge(wrapped, "a")
        epitaxy.unmerge(wrapped)
        epitaxy.activate(wrapped, None)
        epitaxy.detach(wrapped)
        assert hosted(model) is None


def test_a_pickled_model_runs_in_a_process_that_attached_nothing(tmp_path: Path) -> None:
    model = vit()
    randomise(epitaxy.attach(model, epitaxy.Prefix(tokens=3) + epitaxy.LoRA(), name="a"))
    (tmp_path / "model").write_bytes(pickle.dumps((model, PIXELS, logits(model))))
    code = (
        "import pickle, sys, torch; torch.set_num_threads(1)\n"
        f"model, x, y = pickle.load(open({str(tmp_path / 'model')!r}, 'rb'))\n"
        "assert torch.equal(model(pixel_values=x).logits, y)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_copy_is_independent() -> None:
    model = vit()
    randomise(epitaxy.attach(model, epitaxy.LoRA(), name="a"))
    twin, expected = copy.deepcopy(model), logits(model)
    epitaxy.activate(twin, None)
    assert torch.equal(logits(model), expected)
    randomise(epitaxy.adapters(twin)["a"])
    epitaxy.activate(twin, "a")
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(twin), expected)


def test_merged_adapters_stand_in_a_row() -> None:
    model = vit()
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for name in ("first", "second"):
        randomise(epitaxy.attach(model, epitaxy.LoRA() + epitaxy.BitFit() + epitaxy.NormTuning(), name=name))
    epitaxy.activate(model, ["first", "second"])
    both = logits(model)
    epitaxy.merge(model, "first", probe={"pixel_values": PIXELS})
    epitaxy.merge(model, "second", probe=lambda net: net(pixel_values=PIXELS).logits)
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    for call in (epitaxy.detach, epitaxy.activate, epitaxy.merge):
        with pytest.raises(StateError, match="merged"):
            call(model, "first")
    with pytest.raises(StateError, match="merged"), epitaxy.route(model, ["first"]):
        pass
    with pytest.raises(StateError, match="'second' was merged after 'first'"):
        epitaxy.unmerge(model, "first")
    epitaxy.unmerge(model)
    epitaxy.unmerge(model)
    epitaxy.detach(model)
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters())


def test_a_merge_that_drifts_is_undone() -> None:
    model = vit().to(torch.bfloat16)
    randomise(epitaxy.attach(model, epitaxy.LoRA(), name="a"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(UnsupportedError, match=r"more than the tolerance 1\.0e-09; the base is unchanged"):
        epitaxy.merge(model, tolerance=1e-9)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    record = hosted(model)
    assert record is not None
    assert record.state.active == ("a",)
    assert epitaxy.merge(model).drift < 5e-2


def test_what_does_not_merge_says_why() -> None:
    model = vit()
    epitaxy.attach(model, epitaxy.LoRA() + epitaxy.Bottleneck(bottleneck=2), name="a")
    with pytest.raises(UnsupportedError, match="bottleneck: a bottleneck is not linear"):
        epitaxy.merge(model)


def test_two_heads_conflict_but_can_be_routed() -> None:
    model = vit()
    for name in ("first", "second"):
        randomise(epitaxy.attach(model, epitaxy.Head(labels=5), name=name))
    with pytest.raises(StateError, match="both replace 'classifier'"):
        epitaxy.activate(model, ["first", "second"])
    with epitaxy.route(model, ["second", "first", "second"]):
        routed = logits(model)
    for row, name in enumerate(["second", "first", "second"]):
        epitaxy.activate(model, name)
        torch.testing.assert_close(routed[row], logits(model)[row])


def test_torch_attention_is_refused_where_nothing_would_run() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    with pytest.raises(SiteError, match="reads its weights without calling the module"):
        epitaxy.attach(model, epitaxy.LoRA(at="out_proj", rank=1))
    epitaxy.attach(model.eval(), epitaxy.LoRA(at=("linear1", "linear2"), rank=1))
    x = torch.randn(2, 3, 8)
    before = model(x)
    randomise(epitaxy.adapters(model)["default"])
    assert not torch.allclose(model(x), before)  # torch's fused path would skip the hooks


@given(
    numbers=st.lists(st.sampled_from(["a", "b", None]), min_size=1, max_size=6),
    repeat=st.integers(1, 4),
    tile=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_routes_repeat_for_modules_that_see_more_rows(numbers: list[str | None], repeat: int, tile: bool) -> None:
    route = Route(numbers, "tile" if tile else "interleave")
    size = repeat * len(numbers)
    told = [None if number < 0 else route.names[number] for number in route.each(size)]
    expected = numbers * repeat if tile else [name for name in numbers for _ in range(repeat)]
    assert told == expected
    for number, name in enumerate(route.names):
        rows = route.members(number, size, torch.device("cpu")).tolist()
        assert rows == [row for row, other in enumerate(expected) if other == name]


def test_weights_changed_inside_a_route_are_seen() -> None:
    """The stacked factors are kept from call to call, but not beyond a change of one of them."""
    model = vit()
    adapter = randomise(epitaxy.attach(model, epitaxy.LoRA(rank=2), name="a"))
    with epitaxy.route(model, ["a", None, "a"]):
        before = logits(model)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(1.5)
        after = logits(model)
    torch.testing.assert_close(after[0], logits(model)[0])
    assert not torch.allclose(after[0], before[0])
    assert torch.equal(after[1], before[1])


def test_guidance_repeats_the_whole_batch() -> None:
    model = vit()
    for name in ("first", "second"):
        randomise(epitaxy.attach(model, epitaxy.LoRA(), name=name))
    doubled = torch.cat([PIXELS[:2], PIXELS[:2]])
    with epitaxy.route(model, ["first", "second"], expand="tile"), torch.no_grad():
        together = model(pixel_values=doubled).logits
    with epitaxy.route(model, ["first", "second"]), torch.no_grad():
        once = model(pixel_values=PIXELS[:2]).logits
    torch.testing.assert_close(together, torch.cat([once, once]))
    with pytest.raises(StateError, match="expand"):
        Route(["a"], "stretch")


def test_a_compiled_model_switches_among_more_adapters_than_torch_keeps_graphs_by_default() -> None:
    """One graph for each; the limit is torch's, and docs/troubleshooting.md says how to raise it."""
    model = vit(1)
    names = [f"a{number}" for number in range(10)]
    for name in names:
        for parameter in epitaxy.attach(model, epitaxy.LoRA(rank=2), name=name).parameters():
            nn.init.normal_(parameter)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        for name in [*names, *names]:
            epitaxy.activate(model, name)
            torch.testing.assert_close(compiled(PIXELS).logits, model(PIXELS).logits)
    torch._dynamo.reset()
