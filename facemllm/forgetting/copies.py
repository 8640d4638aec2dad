"""Where copies of a picture lie outside the data repository, and how they are removed.

Tables, evaluations, reports and caches can all be made again without the picture, so what holds it goes as a whole.
What cannot show that it is free of it (a cache of a table that is gone, unfinished work) goes, too. Training
checkpoints hold no pictures and stay; corrections that users sent cannot be made again, and the picture's alone go.
Text is searched for digests: the reports name a picture by the first 12.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from facemllm.core.corrections import Corrections
from facemllm.core.store import FACE
from facemllm.forgetting.finding import files_under, is_parquet, rows_of
from facemllm.settings import Settings, root
from facemllm.tables import MANIFEST
from facemllm.version.tombstones import Marks

REPORT = "report.html"
FEEDBACK = "feedback"
"""The source that reads corrections; what it was given goes with the rest."""
_TEXTS = (".json", ".jsonl", ".html", ".md", ".csv", ".txt")
_TOKENS = re.compile(rb"(?<![0-9a-f])(?:[0-9a-f]{64}|[0-9a-f]{32})(?![0-9a-f])|\bface [0-9a-f]{12}\b")
_BLOCK, _OVERLAP = 2**24, 80  # bytes of a text at a time; a name across the border is found in the next block
_TABLE = re.compile(r"[0-9a-f]{24,64}")
_CHECKPOINTS = re.compile(r"(align|instruct|specialize)-[0-9a-f]{16}")


@dataclass(frozen=True)
class Copy:
    """A file or folder that has to go. `place` says what it is part of."""

    place: str
    path: Path

    def remove(self) -> None:
        """Delete it; nothing happens if it is gone."""
        if self.path.is_dir():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Corrected(Copy):
    """Corrections of pictures, in the folder `path`, and these pictures; the others stay."""

    images: frozenset[str]

    def remove(self) -> None:
        """Delete them; nothing happens if they are gone."""
        Corrections(self.path).forget(self.images)


@dataclass(frozen=True)
class Seeker:
    """Looks for marked rows and for the digests of marked pictures and people."""

    marks: Marks

    def in_table(self, file: Path) -> bool:
        """Whether a Parquet file holds such rows, or is cut short so that nobody can tell."""
        rows = rows_of(file, self.marks)
        return rows is None or bool(rows)

    def in_text(self, file: Path) -> bool:
        """Whether a text names such a picture or person by digest."""
        marks = self.marks
        wanted = marks.image | marks.original | marks.subject | {f"face {image[:12]}" for image in marks.image}
        tail = b""
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                if not tail and b"\0" in block[:1024]:
                    return False  # no text
                if any(token.decode() in wanted for token in _TOKENS.findall(tail + block)):
                    return True
                tail = block[-_OVERLAP:]
        return False

    def in_file(self, file: Path) -> bool:
        """Either, by the file's name; other files hold neither."""
        if file.suffix == ".parquet":
            return self.in_table(file)
        return file.suffix in _TEXTS and self.in_text(file)

    def in_content(self, file: Path) -> bool:
        """Either, by what the file begins with: DVC names its objects by digests alone."""
        return self.in_table(file) if is_parquet(file) else self.in_text(file)


def copies(settings: Settings, marks: Marks) -> list[Copy]:
    """Everything outside the data repository that holds what the marks name, in the order of removal.

    What is found by means of something else comes before it, so that a removal that was cut short finds the rest.
    """
    seek = Seeker(marks)
    results = {folder: files_under(folder, lambda name: True) for folder in _folders(settings.home / "store")}
    stored = [Copy("store", folder) for folder, files in results.items() if any(map(seek.in_file, files))]
    places: tuple[Callable[[], Iterator[Copy]], ...] = (
        lambda: _runs(settings, seek),
        lambda: _tracked(settings, seek),
        lambda: _caches(settings, {copy.path.name for copy in stored}),
        lambda: _work(settings),
        lambda: _served(settings, seek),
        lambda: _keys(settings, seek),
        lambda: iter(stored),
        lambda: _project(settings, seek),
    )
    return [copy for place in places for copy in place()]


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.glob("*") if path.is_dir())


def _runs(settings: Settings, seek: Seeker) -> Iterator[Copy]:
    """Reports that show a picture, with the face on top of them, which is the first that they show."""
    for folder in _folders(settings.runs):
        report, face = folder / REPORT, folder / FACE
        if face.is_file() and (not report.is_file() or seek.in_text(report)):
            yield Copy("run", face)
        if report.is_file() and seek.in_text(report):
            yield Copy("run", report)
        yield from _tables(seek, folder, "run")


def _tracked(settings: Settings, seek: Seeker) -> Iterator[Copy]:
    """What the local MLflow server keeps of reports, answers and checks."""
    artifacts = settings.home / "mlflow" / "artifacts"
    for file in files_under(artifacts, lambda name: name.endswith((*_TEXTS, ".parquet"))):
        if seek.in_file(file):
            yield Copy("mlflow", file)


def _caches(settings: Settings, doomed: set[str]) -> Iterator[Copy]:
    """Caches of all tables but those in the store that are free of it, and KFP's, which answers with what is gone."""
    free = {folder.name for folder in _folders(settings.home / "store")} - doomed
    for path in sorted((settings.home / "cache").glob("*")):
        named = _TABLE.findall(path.name)
        if not any(digest.startswith(part) for part in named for digest in free):
            yield Copy("cache", path)


def _work(settings: Settings) -> Iterator[Copy]:
    """Unfinished work, but for folders with nothing but training checkpoints."""
    for folder in _folders(settings.home / "work"):
        files = [file.relative_to(folder).parts for file in files_under(folder, lambda name: True)]
        if any(not _CHECKPOINTS.fullmatch(parts[0]) for parts in files):
            yield Copy("work", folder)


def _served(settings: Settings, seek: Seeker) -> Iterator[Copy]:
    """What users of the model server sent as corrections, and the days of answers that it keeps."""
    images = seek.marks.image | seek.marks.original
    for folder in _corrections(settings):
        if Corrections(folder).holds(images):
            yield Corrected("corrections", folder, images)
    for file in files_under(settings.answers, lambda name: name.endswith(_TEXTS)):
        if seek.in_text(file):
            yield Copy("answers", file)


def _corrections(settings: Settings) -> list[Path]:
    """Every folder of corrections that the settings name: the server's, and those that are read."""
    read = [source.root for source in settings.ingest.sources if source.name == FEEDBACK and source.root]
    own = [settings.corrections] if settings.corrections else []
    return list(dict.fromkeys([*own, *(Path(root).expanduser().resolve() for root in read)]))


def _keys(settings: Settings, seek: Seeker) -> Iterator[Copy]:
    """What the store remembers of a result and names the picture; the rest stays, so that a model's chain is whole."""
    for path in sorted((settings.home / "keys").glob("*.json")):
        if seek.in_text(path):
            yield Copy("key", path)


def _project(settings: Settings, seek: Seeker) -> Iterator[Copy]:
    """Tables and reports under `data/`, and the objects and experiments that DVC keeps of them."""
    data = root() / "data"
    yield from _tables(seek, data, "data")
    for file in files_under(data, lambda name: name.endswith(_TEXTS)):
        corrected = any(file.resolve().is_relative_to(folder) for folder in _corrections(settings))
        if file.name != MANIFEST and not corrected and seek.in_text(file):
            yield Copy("data", file)
    for experiment in _folders(root() / ".dvc" / "tmp" / "exps"):
        if any(seek.in_content(file) for file in files_under(experiment, lambda name: True)):
            yield Copy("dvc experiment", experiment)
    for file in files_under(root() / ".dvc" / "cache", lambda name: True):
        if seek.in_content(file):
            yield Copy("dvc cache", file)


def _tables(seek: Seeker, place: Path, name: str) -> Iterator[Copy]:
    """Whole tables of which a shard holds such rows; of a half-written one, which has no manifest, its folder."""
    seen: set[Path] = set()
    for file in files_under(place, lambda name: name.endswith(".parquet")):
        folder = file.parent
        if folder in seen:
            continue
        inside = [parent for parent in file.parents if parent != place and parent.is_relative_to(place)]
        partial = next((parent for parent in inside if parent.name.startswith(".")), None)
        whole = (folder / MANIFEST).is_file()
        rows = rows_of(file, seek.marks)
        if rows or (rows is None and partial is not None):
            seen.add(folder)
            yield Copy(name, folder if whole else partial or file)
