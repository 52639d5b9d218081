"""Opening a base model by name or path, with the processor that prepares its inputs."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from epitaxy.core.anatomy import describe
from epitaxy.core.errors import EpitaxyError, FormatError, meant, nearest
from epitaxy.models.google_vit import google_processor, read_google
from epitaxy.models.picture_size import resize_pictures, resized_processor
from epitaxy.models.positions import How, resize_input
from epitaxy.models.towers import as_classifier, with_one_head
from epitaxy.models.whisper_encoder import allow_short

Modality = Literal["vision", "audio", "text"]
SHIPPED = {"reference-vit": "reference_vit", "reference-ast": "reference_ast"}  # names, and folders beside this file
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Opened:
    """A classifier ready for training.

    ``head`` tells whether its last layer came with the source ("kept") or was made anew ("fresh").
    """

    model: nn.Module
    processor: Any
    modality: Modality
    source: str
    head: Literal["kept", "fresh"] = "kept"


@dataclass(frozen=True)
class InputSize:
    """The input wanted of a model; None: the model's own.

    For sounds ``frames`` of 10 ms; ``mels`` bins and the rule for the position table are for spectrogram transformers.
    For pictures the side in ``pixels``, the position table interpolated.
    """

    frames: int | None = None
    mels: int | None = None
    positions: How = "crop"
    legacy: Literal["zeroed"] | None = None
    pixels: int | None = None


def open_classifier(
    source: str, labels: Sequence[str], dtype: str = "float32", size: InputSize | None = None
) -> Opened:
    """Open ``source`` as a classifier of ``labels``.

    ``source`` is "reference-vit" or "reference-ast" (shipped with this package), a local directory, the id of a model
    on the hub, or a ``.npz`` of Google's vision transformer.  A trunk without a head gets one.
    Where the labels differ from the model's own, in number or in name, the last layer is drawn anew from torch's
    global generator.  Weights are read from safetensors only.  ``size`` adapts a model, and its processor, to other
    clips or pictures than its own.  Raises ``FormatError`` when the source cannot be opened, ``EpitaxyError`` for
    labels, a type or a size that make no sense.
    """
    labels = _checked(labels)
    if dtype not in DTYPES:
        raise EpitaxyError(f"no weight type is called {dtype!r}{nearest(dtype, DTYPES)}")
    with _quiet():
        if source.endswith(".npz"):
            model, processor, modality, fresh = _open_google(source, labels, DTYPES[dtype])
        else:
            model, processor, modality, fresh = _open_pretrained(source, labels, DTYPES[dtype])
        if size is not None:
            processor = _resize(model, processor, modality, size, source)
    model.config._name_or_path = source  # what files name as the base: not where this installation keeps it
    if fresh:
        _draw(model.get_submodule(_head_path(source, model, len(labels))), model.config)
    if modality == "text":
        _ensure_padding(model, processor)
    return Opened(model, processor, modality, source, "fresh" if fresh else "kept")


Parts = tuple[Any, Any, Modality, bool]  # model, processor, what it reads, whether its head must be drawn


def _open_pretrained(source: str, labels: list[str], dtype: torch.dtype) -> Parts:
    where = _locate(source)
    config = _read(source, "config", lambda: _auto("AutoConfig").from_pretrained(where, **_OWN_CODE))
    config, key_mapping = as_classifier(config)
    modality = _modality(source, config)
    fresh = _is_fresh(config, labels)
    if fresh:
        with_one_head(config)
    _name_labels(config, labels)
    model, info = _read(source, "weights", lambda: _load(where, modality, config, dtype, key_mapping))
    if key_mapping is not None:
        del model._weight_conversions  # or it would be saved under the tower's names, which its class does not read
    if config.model_type != "timm_wrapper":  # whose config says it
        _require_preparation(source, where, modality)
    processor = _read(source, "processor", lambda: _auto(_PROCESSORS[modality]).from_pretrained(where, **_OWN_CODE))
    fresh = _check_loaded(source, model, _head_path(source, model, len(labels)), info) or fresh
    return model, processor, modality, fresh


def _open_google(source: str, labels: list[str], dtype: torch.dtype) -> Parts:
    file = Path(source).expanduser()
    if not file.is_file():
        raise FormatError(f"{source}: no such file")
    config, state = read_google(file)
    fresh = "classifier.weight" not in state or _is_fresh(config, labels)
    _name_labels(config, labels)
    with torch.random.fork_rng(devices=[]):  # what it draws is overwritten
        model = _auto("ViTForImageClassification")(config)
    own = model.state_dict()
    head = {key: value for key, value in own.items() if key.startswith("classifier.")}
    model.load_state_dict(state if not fresh else {**state, **head})
    return model.to(dtype).eval(), google_processor(config), "vision", fresh


def _name_labels(config: Any, labels: list[str]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}


def _require_preparation(source: str, where: str, modality: Modality) -> None:
    """How pictures are scaled and normalised changes every result, so it is never guessed."""
    names = ("preprocessor_config.json", "processor_config.json")
    if modality == "vision" and Path(where).is_dir() and not any((Path(where) / name).exists() for name in names):
        raise FormatError(
            f"{source}: preprocessor_config.json is missing, which says how pictures are resized and normalised; copy "
            "it from where the model came from"
        )


_OWN_CODE = {"trust_remote_code": False}  # None would ask on the terminal whether to run the model's code
_PROCESSORS = {"vision": "AutoImageProcessor", "audio": "AutoFeatureExtractor", "text": "AutoTokenizer"}
_MODELS: dict[Modality, str] = {
    "vision": "AutoModelForImageClassification",
    "audio": "AutoModelForAudioClassification",
    "text": "AutoModelForSequenceClassification",
}


def _resize(model: Any, processor: Any, modality: Modality, size: InputSize, source: str) -> Any:
    """Adapt a model; returns its processor, set to the same size."""
    if modality == "vision" and size.pixels is not None:
        resize_pictures(model, size.pixels, source)
        return resized_processor(processor, size.pixels)
    if size.pixels is not None:
        raise EpitaxyError(f"{source}: a size in pixels is for models of pictures, this one reads {modality}")
    if modality != "audio":
        return processor
    kind = model.config.model_type
    if kind == "audio-spectrogram-transformer":
        frames, mels = size.frames or model.config.max_length, size.mels or model.config.num_mel_bins
        resize_input(model, frames, mels, size.positions, size.legacy)
        return type(processor).from_dict({**processor.to_dict(), "max_length": frames, "num_mel_bins": mels})
    if size.mels is not None or size.legacy is not None:
        raise EpitaxyError(f"{source}: only spectrogram transformers take another number of mel bins, this is {kind}")
    if kind == "whisper" and size.frames is not None:
        most = 2 * model.config.max_source_positions
        if size.frames % 2 or size.frames > most:
            raise EpitaxyError(f"{source}: Whisper takes an even number of frames up to {most}, got {size.frames}")
        allow_short(model)
    return processor


def _auto(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _checked(labels: Sequence[str]) -> list[str]:
    names = [str(label) for label in labels]
    if len(names) < 2:
        raise EpitaxyError(f"a classifier needs at least two labels, got {names}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise EpitaxyError(f"the labels of a classifier differ from each other; {twice[0]!r} is there twice")
    return names


def _locate(source: str) -> str:
    """The directory or hub id to hand to transformers."""
    if source in SHIPPED:
        path = Path(str(files("epitaxy.models") / SHIPPED[source]))
        if not (path / "config.json").exists():
            raise FormatError(f"{source}: this installation of epitaxy lacks the model's files at {path}")
        return str(path)
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FormatError(f"{source}: no model there, config.json is missing")
        if not any(path.glob("*.safetensors")):
            found = ", ".join(sorted(item.name for item in path.glob("*") if item.suffix in (".bin", ".pt", ".h5")))
            raise FormatError(
                f"{source}: no weights in safetensors there" + (f"; {found} is never opened" if found else "")
            )
        return str(path)
    if path.is_file():
        raise FormatError(f"{source}: expected the directory of a model, found a file")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source.strip():
        raise FormatError(f"{source}: no such directory, and not the id of a model on the hub")
    return source


def _read(source: str, what: str, read: Any) -> Any:
    """Call ``read``; whatever transformers raises becomes one sentence about ``what``."""
    from safetensors import SafetensorError

    try:
        return read()
    except SafetensorError as error:
        raise FormatError(f"{source}: its weights are truncated or not safetensors ({_first_line(error)})") from None
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, AttributeError, TypeError) as error:
        hint = meant(source, SHIPPED) if source not in SHIPPED and "/" not in source else ""
        raise FormatError(f"{source}: cannot open the model's {what}: {_first_line(error)}{hint}") from None


def _first_line(error: Exception) -> str:
    if lacking := re.search(r"requires the (\S+) library but it was not found", str(error)):
        return f"it needs {lacking[1]}, which is not installed: pip install {lacking[1]}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]


def _modality(source: str, config: Any) -> Modality:
    """What a model reads: by the class its config names, else by its type."""
    from transformers.models.auto import modeling_auto

    tables: dict[Modality, Any] = {
        "vision": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "audio": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        "text": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    architectures = set(config.architectures or ())
    for modality, table in tables.items():
        classes = table.get(config.model_type, ())
        if architectures & set(classes if isinstance(classes, (tuple, list)) else (classes,)):
            return modality
    for modality, table in tables.items():
        if config.model_type in table:
            return modality
    raise FormatError(
        f"{source}: transformers has no classifier of pictures, sounds or texts for {config.model_type!r}"
    )


def _is_fresh(config: Any, labels: list[str]) -> bool:
    """Whether the model's own head answers another question.  ``LABEL_0`` and the like are no names."""
    own = [str(label) for _, label in sorted((int(number), label) for number, label in config.id2label.items())]
    unnamed = all(label == f"LABEL_{number}" for number, label in enumerate(own))
    return len(own) != len(labels) or (own != labels and not unnamed)


def _load(where: str, modality: Modality, config: Any, dtype: torch.dtype, key_mapping: dict[str, str] | None) -> Any:
    return _auto(_MODELS[modality]).from_pretrained(
        where,
        config=config,
        ignore_mismatched_sizes=True,
        use_safetensors=True,
        dtype=dtype,
        key_mapping=key_mapping,
        output_loading_info=True,
        **_OWN_CODE,
    )


def _check_loaded(source: str, model: nn.Module, head: str, info: dict[str, Any]) -> bool:
    """Whether the head was not in the file; raises for a weight of another size, warns of one that was missing."""
    root = head.split(".")[0] + "."
    mismatched = sorted(key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys", ()))
    foreign = [key for key in mismatched if not key.startswith(root)]
    if foreign:
        raise FormatError(
            f"{source}: {len(foreign)} weights have other sizes than its config says, the first is {foreign[0]!r}"
        )
    _refuse_left_blocks(source, model, info.get("unexpected_keys", ()))
    missing = sorted(info.get("missing_keys", ()))
    unfilled = [key for key in missing if not key.startswith(root)]
    if unfilled:
        warnings.warn(
            f"{source}: {len(unfilled)} weights are not in its files and start at random, the first is {unfilled[0]!r}",
            stacklevel=3,
        )
    return any(key.rpartition(".")[0] == head for key in (*mismatched, *missing))


def _refuse_left_blocks(source: str, model: nn.Module, unexpected: Iterable[str]) -> None:
    """A trunk's pooler and other heads may be left over, blocks may not: the model would be another one."""
    blocks = [spot.path for spot in describe(model).roles.get("block", ())]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    stacks = {
        name for path in blocks for name in (path.rpartition(".")[0], path.removeprefix(prefix).rpartition(".")[0])
    }
    left = sorted(key for key in unexpected if any(re.match(rf"{re.escape(stack)}\.\d+\.", key) for stack in stacks))
    if left:
        raise FormatError(
            f"{source}: {len(left)} weights of its blocks have no place in the {len(blocks)} blocks that its config "
            f"says, the first is {left[0]!r}"
        )


def _head_path(source: str, model: nn.Module, count: int) -> str:
    """The last linear map of a classifier, by its role or else by its number of outputs."""
    spots = describe(model).roles.get("head", ())
    fitting = [spot.path for spot in spots if getattr(model.get_submodule(spot.path), "out_features", None) == count]
    if not fitting:
        fitting = [
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.out_features == count
        ]
    if not fitting:
        raise FormatError(f"{source}: cannot tell which layer of {type(model).__name__} is its head")
    return fitting[-1]


def _draw(head: nn.Module, config: Any) -> None:
    assert isinstance(head, nn.Linear)
    nn.init.normal_(head.weight, std=float(getattr(config, "initializer_range", None) or 0.02))
    if head.bias is not None:
        nn.init.zeros_(head.bias)


def _ensure_padding(model: Any, tokenizer: Any) -> None:
    """Decoders come without a padding token; they pool at the last token that is none."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no load report on the terminal: what matters of it is raised or warned here.

    AST's extractor warns of its own published filter bank, some of whose narrowest filters fall between two bins.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="At least one mel filter has all zero values")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
