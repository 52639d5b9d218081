"""``epitaxy predict``: what a trained classifier says of new pictures, sounds or texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from epitaxy.cli import arguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from epitaxy.train.predict import Prediction

FORMATS = (".csv", ".json")


def command(
    target: Annotated[
        Path, typer.Argument(metavar="ADAPTER|RUN|MODEL", help="An adapter, a run directory, or a merged model.")
    ],
    inputs: Annotated[list[Path], typer.Argument(metavar="INPUT...", help="Files and folders.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write all scores to this .csv or .json file.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="The base.", show_default="the one the adapter names")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Fold the adapter into the base first.")] = False,
    window: Annotated[
        float | None, typer.Option(help="Seconds of a window of long sounds.", show_default="as trained")
    ] = None,
    hop: Annotated[
        float | None, typer.Option(help="Seconds from one window to the next.", show_default="half a window")
    ] = None,
    aggregate: Annotated[str, typer.Option(help="How windows become the score of a file: mean or max.")] = "mean",
    batch: Annotated[int, typer.Option(min=1, help="Inputs of one forward pass.")] = 16,
    stop: Annotated[bool, typer.Option("--stop", help="Stop at the first input that cannot be read.")] = False,
    json: arguments.Json = False,
) -> None:
    """Tell the classes of new inputs.

    Prints label and confidence of every file; --out keeps the scores of all classes, and of every window of a long
    sound.  Inputs that cannot be read are named and left out, and the exit code is then 1.
    """
    import epitaxy.interop  # noqa: F401  (registers the formats of other programs)
    from epitaxy.cli.console import say, say_json
    from epitaxy.core.errors import EpitaxyError, nearest
    from epitaxy.data.inputs import collect
    from epitaxy.train.predict import Unreadable, open_predictor

    if out is not None and out.suffix not in FORMATS:
        raise EpitaxyError(f"{out}: the scores go to a file that ends in {' or '.join(FORMATS)}")
    if aggregate not in ("mean", "max"):
        raise EpitaxyError(f"--aggregate: no way is called {aggregate!r}{nearest(aggregate, ('mean', 'max'))}")
    if not target.exists():
        raise EpitaxyError(f"{target}: no such adapter, run directory or model")
    for path in inputs:
        if not path.exists():
            raise EpitaxyError(f"{path}: no such file or folder")
    predictor = open_predictor(target, base)
    files = collect(inputs, predictor.task.modality)  # type: ignore[arg-type]
    windows = predictor.windows(window, hop)
    if merge:
        print(predictor.merge(), file=sys.stderr)
    predictions: list[Prediction] = []
    unreadable: list[Unreadable] = []
    for found in predictor.predict(files, windows, batch, aggregate):  # type: ignore[arg-type]
        if isinstance(found, Unreadable):
            unreadable.append(found)
            if stop:
                raise EpitaxyError(f"{found.name}: {found.reason}")
            continue
        predictions.append(found)
        if not json:
            label, confidence = _best(found.scores, predictor.classes)
            parts = f"  ({len(found.windows)} windows)" if len(found.windows) > 1 else ""
            say(f"{found.name}  {label}  {confidence:.4f}{parts}")
    if out is not None:
        _write(out, predictions, predictor.classes)
    if json:
        say_json(_plain(predictions, predictor.classes))
    for fault in unreadable:
        print(f"left out: {fault.name}: {fault.reason}", file=sys.stderr)
    if unreadable:
        raise EpitaxyError(f"{len(unreadable)} of {len(files)} inputs could not be read")


def _best(scores: Sequence[float], classes: Sequence[str]) -> tuple[str, float]:
    place = max(range(len(scores)), key=scores.__getitem__)
    return classes[place], scores[place]


def _plain(predictions: Sequence[Prediction], classes: Sequence[str]) -> list[dict[str, Any]]:
    """As JSON holds it: one object for each file, with its windows."""

    def told(scores: Sequence[float]) -> dict[str, Any]:
        label, confidence = _best(scores, classes)
        return {"label": label, "confidence": confidence, "scores": dict(zip(classes, scores, strict=True))}

    return [
        {
            "file": one.name,
            **told(one.scores),
            **(
                {"windows": [{"start": w.start, "end": w.end, **told(w.scores)} for w in one.windows]}
                if one.windows
                else {}
            ),
        }
        for one in predictions
    ]


def _write(out: Path, predictions: Sequence[Prediction], classes: Sequence[str]) -> None:
    from epitaxy.core.storage import write_atomically
    from epitaxy.train.run_directory import write_json

    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".json":
        write_json(out, _plain(predictions, classes))
    else:
        write_atomically(out, _csv(predictions, classes).encode())


def _csv(predictions: Sequence[Prediction], classes: Sequence[str]) -> str:
    """One line for each file (``part`` is "file"), and for each window of a long sound (``part`` is "window")."""
    import csv
    import io

    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["file", "part", "start", "end", "label", "confidence", *(f"score {name}" for name in classes)])
    for one in predictions:
        for part in one.windows if len(one.windows) > 1 else ():
            writer.writerow([one.name, "window", *_times(part.start, part.end), *_cells(part.scores, classes)])
        times = _times(one.windows[0].start, one.windows[-1].end) if one.windows else ["", ""]
        writer.writerow([one.name, "file", *times, *_cells(one.scores, classes)])
    return stream.getvalue()


def _times(start: float, end: float) -> list[str]:
    return [f"{start:.3f}", f"{end:.3f}"]


def _cells(scores: Sequence[float], classes: Sequence[str]) -> list[str]:
    label, confidence = _best(scores, classes)
    return [label, *(f"{value:.6f}" for value in (confidence, *scores))]
