"""Position tables of spectrogram transformers: the golden cases, and that no way of opening a model loses them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification, ASTModel

from epitaxy.core.errors import EpitaxyError, FormatError
from epitaxy.models.opening import InputSize, open_classifier
from epitaxy.models.positions import adapt_positions

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "ast_petl" / "frontend.safetensors"


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden vectors lie beside the repository, and are not there")
@pytest.mark.parametrize("grid", [(3, 9), (4, 13), (4, 4), (6, 4), (6, 9)])
def test_golden_tables(grid: tuple[int, int]) -> None:
    golden = load_file(GOLDEN)
    found = adapt_positions(golden["pos.source"], (4, 9), grid)
    assert (found - golden[f"pos.f{grid[0]}_t{grid[1]}"]).abs().max() < 1e-10


def table(frequency: int = 3, time: int = 8) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(1, 2 + frequency * time, 5)


def test_the_same_grid_is_the_identity() -> None:
    source = table()
    assert adapt_positions(source, (3, 8), (3, 8)) is source


def test_crops_are_slices_and_special_tokens_stay() -> None:
    source = table()
    grid = source[0, 2:].view(3, 8, 5)
    for how, start in (("crop", 2), ("start", 0)):
        found = adapt_positions(source, (3, 8), (3, 4), how)  # type: ignore[arg-type]
        assert torch.equal(found[0, :2], source[0, :2])
        assert torch.equal(found[0, 2:].view(3, 4, 5), grid[:, start : start + 4])
    lower = adapt_positions(source, (3, 8), (1, 8))
    assert torch.equal(lower[0, 2:].view(1, 8, 5), grid[1:2])


def test_interpolation_keeps_ramps() -> None:
    ramp = torch.cat([torch.zeros(1, 2, 1), torch.arange(8.0).view(1, 8, 1)], 1)
    longer = adapt_positions(ramp, (1, 8), (1, 16))[0, 2:, 0]
    assert torch.allclose(longer[1:-1], torch.arange(0.25, 7, 0.5))
    shorter = adapt_positions(ramp, (1, 8), (1, 4), "interpolate")[0, 2:, 0]
    assert torch.allclose(shorter, torch.tensor([0.5, 2.5, 4.5, 6.5]))


def test_tables_of_another_grid_are_refused() -> None:
    with pytest.raises(EpitaxyError, match=r"26 rows cannot go from the grid \(5, 8\) to \(3, 4\)"):
        adapt_positions(table(), (5, 8), (3, 4))
    with pytest.raises(EpitaxyError, match="positions is one of crop, start, interpolate, got 'centre'"):
        adapt_positions(table(), (3, 8), (3, 4), "centre")  # type: ignore[arg-type]


SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture
def ear(tmp_path: Path) -> Path:
    """A tiny AST, its position table drawn at random as training would leave it."""
    torch.manual_seed(0)
    model = ASTForAudioClassification(ASTConfig(**SIZES, num_mel_bins=36, max_length=96))  # a grid of 3 x 9
    torch.nn.init.normal_(model.audio_spectrogram_transformer.embeddings.position_embeddings)
    model.save_pretrained(tmp_path / "ear")
    ASTFeatureExtractor(num_mel_bins=36, max_length=96).save_pretrained(tmp_path / "ear")
    return tmp_path / "ear"


def positions(model: torch.nn.Module) -> torch.Tensor:
    return model.get_parameter("audio_spectrogram_transformer.embeddings.position_embeddings")


@pytest.mark.parametrize(
    ("frames", "mels", "grid"), [(46, 36, (3, 4)), (206, 36, (3, 20)), (96, 56, (5, 9)), (56, 26, (2, 5))]
)
def test_opening_with_another_size_adapts_the_table(ear: Path, frames: int, mels: int, grid: tuple[int, int]) -> None:
    stock = open_classifier(str(ear), ["a", "b"])
    opened = open_classifier(str(ear), ["a", "b"], size=InputSize(frames, mels))
    found = positions(opened.model)
    assert torch.equal(found, adapt_positions(positions(stock.model), (3, 9), grid))
    assert found.abs().mean() > 0.3  # never the zeros of a discarded table
    logits = opened.model(input_values=torch.randn(2, frames, mels)).logits
    assert logits.shape == (2, 2)
    assert (opened.processor.max_length, opened.processor.num_mel_bins) == (frames, mels)
    assert (opened.model.config.max_length, opened.model.config.num_mel_bins) == (frames, mels)  # type: ignore[union-attr]
    names = {name: value for name, value in stock.model.state_dict().items() if "position" not in name}
    assert all(
        torch.equal(value, opened.model.state_dict()[name]) for name, value in names.items() if "classifier" not in name
    )


def test_the_own_size_changes_nothing(ear: Path) -> None:
    stock = open_classifier(str(ear), ["a", "b"])
    for size in (InputSize(), InputSize(96, 36), InputSize(96, None, "start", "zeroed")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened = open_classifier(str(ear), ["a", "b"], size=size)
        assert torch.equal(positions(opened.model), positions(stock.model))


def test_zeros_only_when_asked_for_and_with_a_warning(ear: Path) -> None:
    with pytest.warns(UserWarning, match=r"runs without positions, its table of 3 x 4 is all zeros"):
        opened = open_classifier(str(ear), ["a", "b"], size=InputSize(46, legacy="zeroed"))
    assert not positions(opened.model).any()
    trap = ASTModel.from_pretrained(ear, max_length=46, ignore_mismatched_sizes=True)  # what the switch reproduces
    assert torch.equal(trap.embeddings.position_embeddings, positions(opened.model))


def test_a_config_edited_to_another_length_is_refused_rather_than_zeroed(ear: Path) -> None:
    config = json.loads((ear / "config.json").read_text())
    (ear / "config.json").write_text(json.dumps({**config, "max_length": 46}))
    with pytest.raises(FormatError, match=r"1 weights have other sizes than its config says.*position_embeddings"):
        open_classifier(str(ear), ["a", "b"])


def test_what_cannot_be_resized_says_so(ear: Path, tmp_path: Path) -> None:
    from tests.tasks.bases import save_wav2vec2

    with pytest.raises(EpitaxyError, match=r"patches are 16 wide; got 8 frames and 36 mel bins"):
        open_classifier(str(ear), ["a", "b"], size=InputSize(8))
    with pytest.raises(
        EpitaxyError, match="only spectrogram transformers take another number of mel bins, this is wav2vec2"
    ):
        open_classifier(str(save_wav2vec2(tmp_path / "w")), ["one", "two"], size=InputSize(None, 64))


def test_resized_models_in_half_precision_are_saved_and_opened_as_they_are(ear: Path, tmp_path: Path) -> None:
    opened = open_classifier(str(ear), ["a", "b"], "bfloat16", InputSize(56, 26))
    assert positions(opened.model).dtype == torch.bfloat16
    opened.model.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    opened.processor.save_pretrained(tmp_path / "again")
    again = open_classifier(str(tmp_path / "again"), ["a", "b"], "bfloat16")
    assert torch.equal(positions(again.model), positions(opened.model))
