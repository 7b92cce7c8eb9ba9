"""Other names for a run's classes, without training again.

    python -m archive relabel runs/insects --name ants=Ameise --name bees=Biene

writes them wherever the run folder has them: what is served, the golden answers, the figures, the lists of images, the
report and the reference of drift. The model stays the same, and `provenance.json` keeps the names of the training.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import escape

from archive import card
from archive.errors import InvalidLabels
from archive.run_folder import RunFolder
from handler import golden, labels
from system import files
from system.printable import printable
from system.spreadsheet import cell, csv_line

_IN_REPORT = re.compile(r"(?<=<bdi>).*?(?=</bdi>)|(?<=“)[^”]*(?=”)")
"""Where `measure/report.html.j2` has names of classes."""
_RELABELLED = "relabelled"
_ROW = '\n      <tr><th scope="row">relabelled.{}</th><td>{}</td></tr>'


def new_names(names: Sequence[str], changes: Sequence[str], file: Path | None) -> list[str]:
    """What the classes are to be called, in the order of the model's outputs.

    Args:
        changes: `OLD=NEW`, each for a class of `names`.
        file: all names as `index_to_name.json` has them, instead.

    Raises:
        InvalidLabels: a class is unknown, two get one name, a name is no text in one line, or the number is wrong.
    """
    chosen = list(names) if file is None else _read(file, len(names))
    for change in changes:
        ends = [index for index, character in enumerate(change) if character == "=" and change[:index] in names]
        if not ends:
            known = ", ".join(map(printable, names[:10])) + (" ..." if len(names) > 10 else "")
            raise InvalidLabels(f"--name {change}: expected OLD=NEW, and OLD is one of the classes {known}")
        chosen[names.index(change[: ends[-1]])] = change[ends[-1] + 1 :]
    for name in chosen:
        if not name.strip() or printable(name) != name or name != name.strip():
            raise InvalidLabels(
                f"{printable(name)!r} is no name for a class: a server answers with it, so it is text in one line "
                "without spaces around it"
            )
    if double := next((name for name in chosen if chosen.count(name) > 1), None):
        raise InvalidLabels(f"two classes would be called {double!r}: give each a name of its own")
    return chosen


def _read(file: Path, count: int) -> list[str]:
    try:
        found = labels.read(file)
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidLabels(f"{file}: {error}; write {labels.mapping(['NAME', 'NAME'])} with every class") from None
    if len(found) != count or not all(isinstance(name, str) for name in found):
        raise InvalidLabels(f"{file} names {len(found)} classes, and the model has {count}: name each, as text")
    return found


def relabel(run: RunFolder, names: Sequence[str]) -> dict[str, str]:
    """Write `names` wherever the run folder has others, and say in its provenance what training called them.

    Returns:
        Each old name with its new one, where they differ.

    Raises:
        IncompleteRun: a file that has names is missing or damaged.
        InvalidLabels: the report is of an older version.
    """
    before = run.read_class_names()
    changed = {old: new for old, new in zip(before, names, strict=True) if old != new}
    if not changed:
        return {}
    run.read_golden()
    written: dict[Path, str] = {}
    for path in (run.golden / golden.GOLDEN_FILE, run.reference, run.metrics, run.provenance):
        document = run.read_json(path)
        document = _recorded(document, changed) if path == run.provenance else _renamed(document, before, changed)
        # The golden answers are written by what travels in archives, and that knows no other form.
        is_golden = path.name == golden.GOLDEN_FILE
        written[path] = json.dumps(document, indent=1) + "\n" if is_golden else files.as_json(document)
    for path in (run.mistakes, run.label_issues):
        if path.is_file():
            written[path] = _rows(path, changed)
    if run.report.is_file():
        written[run.report] = _page(run.report, changed, json.loads(written[run.provenance]).get(_RELABELLED, {}))
    written[run.labels] = files.as_json(labels.mapping(names))
    for path, content in written.items():
        files.write(path, content.encode(errors="surrogateescape"))
    if run.card.is_file():
        card.write(run, run.path.resolve().name)
    return changed


def _renamed(value: Any, before: Sequence[str], changed: Mapping[str, str]) -> Any:
    """A JSON value in which classes are keys of a mapping of them all, the list `class_names`, or a `name`."""
    if isinstance(value, list):
        return [_renamed(each, before, changed) for each in value]
    if not isinstance(value, dict):
        return value
    document = {key: _renamed(each, before, changed) for key, each in value.items()}
    if list(document) == list(before):
        return {changed.get(key, key): each for key, each in document.items()}
    if document.get("class_names") == list(before):
        document["class_names"] = [changed.get(name, name) for name in before]
    if document.get("name") in changed:
        document["name"] = changed[document["name"]]
    return document


def _recorded(provenance: dict[str, Any], changed: Mapping[str, str]) -> dict[str, Any]:
    """With the name of each class in training and its name now, where they differ."""
    trained = {now: first for first, now in provenance.get(_RELABELLED, {}).items()}
    renamed = {**provenance.get(_RELABELLED, {}), **{trained.get(old, old): new for old, new in changed.items()}}
    document = {key: value for key, value in provenance.items() if key != _RELABELLED}
    differing = {first: now for first, now in renamed.items() if first != now}
    return {**document, _RELABELLED: differing} if differing else document


def _rows(path: Path, changed: Mapping[str, str]) -> str:
    """The list of images with the names in its columns `truth` and `guess`."""
    header, *rows = csv.reader(io.StringIO(path.read_text(encoding="utf-8", errors="surrogateescape")))
    columns = [index for index, title in enumerate(header) if title in ("truth", "guess")]
    shown = {cell(old): cell(new) for old, new in changed.items()}
    for row in rows:
        for index in columns:
            row[index] = shown.get(row[index], row[index])
    return "".join(map(csv_line, [header, *rows]))


def _page(path: Path, changed: Mapping[str, str], relabelled: Mapping[str, str]) -> str:
    """The report with the new names, and with what `relabelled` holds among its provenance."""
    page = path.read_text(encoding="utf-8", errors="surrogateescape")
    if "<bdi>" not in page:
        raise InvalidLabels(f"{path} was written before classes could be renamed: train the run again")
    shown = {str(escape(old)): str(escape(new)) for old, new in changed.items()}
    page = _IN_REPORT.sub(lambda name: shown.get(name[0], name[0]), page)
    above, section, below = re.sub(_ROW.format(".*", ".*"), "", page).partition('<section id="provenance">')
    rows = "".join(_ROW.format(escape(first), escape(now)) for first, now in relabelled.items())
    return above + section + below.replace("\n    </tbody>", f"{rows}\n    </tbody>", 1)
