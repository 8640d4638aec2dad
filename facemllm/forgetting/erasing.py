"""`forget`: sign the tombstone, rewrite revisions, remove copies, name the models, and prove it.

The report is written from the start and added to as the work goes on, so that a call that was cut short and one that
finishes it tell one tale. It holds digests only, and lies beside the others in `forgotten/` under `storage.home`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facemllm.core import progress
from facemllm.core.files import atomic_write, read_json
from facemllm.errors import UserError
from facemllm.forgetting.copies import FEEDBACK, copies
from facemllm.forgetting.finding import Found, groups, meant, perceptual_hashes, search
from facemllm.forgetting.models import affected, registered
from facemllm.settings import REPORTS, Settings, root
from facemllm.tables import MANIFEST
from facemllm.version.rewriting import purge, remaining, rewrite
from facemllm.version.tombstones import Marks, Tombstone, Tombstones


def forget(
    settings: Settings, *, image: str | None = None, subject: str | None = None, reason: str, by: str
) -> dict[str, Any]:
    """Delete a picture or a person everywhere, for good, and report what was done and which models have learnt of it.

    `image` is an image_id, its first 8 digits or more, or the SHA-256 of the original file; `subject` a subject_id, or
    SOURCE:NAME. What is not here is kept out from now on. Called again, it finishes what was cut short. The caller
    holds `runs.exclusive`: no run may use this home meanwhile.

    Raises UserError if the name is unknown or ambiguous, nobody or no reason is given, the data repository is in use or
    damaged, or the proof finds something left.
    """
    kind, first = meant(settings, image, subject)
    found = search(settings, first)
    forgotten = Tombstones.of(settings)
    known = forgotten.entries if found.marks <= forgotten.marks else ()
    entry = next((one for one in known if one.kind == kind and first <= one.marks), None)
    if entry is None:
        signed = found.marks | perceptual_hashes(settings, found.marks)
        forgotten = forgotten.add(kind, signed, reason=reason, by=by, affected=found.marks.image)
        entry = forgotten.entries[-1]
    marks = forgotten.marks
    report = _Report.opened(settings, entry)
    _look_at_models(settings, report, found)
    for revision in rewrite(settings):
        report.add("revisions", revision)
    report.put("objects", purge(settings))
    _remove_copies(settings, report, marks)
    report.put("replies", report.facts["replies"] + _purge_replies(settings, marks))
    left = _left(settings, marks)
    report.put("found", len(left))
    if left:
        message = f"{len(left)} places still hold what was to be forgotten ({'; '.join(left[:3])})"
        raise UserError(f"{message}; run the same command again")
    report.put("finished", True)
    return dict(report.facts)


def _look_at_models(settings: Settings, report: _Report, found: Found) -> None:
    """Note the tables and the models behind them before anything is removed, with those noted by an earlier call."""
    noted = {digest: set(splits) for digest, splits in report.facts["tables"].items()}
    for digest, splits in found.tables.items():
        noted.setdefault(digest, set()).update(splits)
    models = affected(settings, noted)
    report.facts["tables"] = {digest: sorted(splits) for digest, splits in sorted(noted.items())}
    report.facts["sources"] = sorted({*report.facts["sources"], *found.sources})
    for model in models:
        report.add("models", model)
    registry = registered(settings, report.facts["models"], noted)
    if registry["asked"]:
        report.facts["versions"] = registry["versions"]
    else:
        for version in registry["versions"]:
            report.add("versions", version)
    report.put("registry_asked", registry["asked"])
    report.put("left_to_you", _left_to_you(settings, report.facts))


def _remove_copies(settings: Settings, report: _Report, marks: Marks) -> None:
    found = copies(settings, marks)
    with progress.bar("removing copies", len(found)) as bar:
        for done, copy in enumerate(found, start=1):
            if copy.place == "store":
                report.keep_manifest(copy.path)
            report.add("removed", {"place": copy.place, "path": _short(settings, copy.path)})
            copy.remove()
            bar.update(done, copy.place)


def _purge_replies(settings: Settings, marks: Marks) -> int:
    from facemllm.asking import store

    pictures = [image for image in sorted(marks.image) if re.fullmatch(r"[0-9a-f]{64}", image)]
    try:
        return store.purge(settings.home, pictures)
    except TimeoutError as error:
        raise UserError(f"{error}; stop the annotation job and run the same command again") from None


def _left(settings: Settings, marks: Marks) -> list[str]:
    """Everything that still holds the rows: the whole search once more."""
    left = [f"{copy.place} {_short(settings, copy.path)}" for copy in copies(settings, marks)]
    left += [f"table {digest[:12] or 'without a manifest'}" for digest, rows in groups(settings, marks) if rows]
    if replies := _purge_replies(settings, marks):
        left.append(f"{replies} annotation replies")
    return left + remaining(settings)


def _left_to_you(settings: Settings, facts: Mapping[str, Any]) -> list[str]:
    """What this command may not or cannot delete, in words."""
    notes = []
    for source in settings.ingest.sources:
        if source.root is not None and source.name in facts["sources"] and source.name != FEEDBACK:
            notes.append(f"the original files of '{source.name}' in {source.root} are as they were")
    if settings.tracking.uri is not None:
        notes.append(
            f"MLflow at {settings.tracking.uri} is not this machine's own: delete the artifacts report.html, "
            "evaluation/answers.json, training/samples.json and validation/ of the runs that show the picture there"
        )
    configs = [root() / ".dvc" / name for name in ("config", "config.local")]
    if any("remote" in path.read_text("utf-8") for path in configs if path.is_file()):
        notes.append("the project's own DVC remote was not searched: run `dvc gc --workspace --cloud`")
    return notes


def _short(settings: Settings, path: Path) -> str:
    for base in (settings.home, settings.runs.parent, root()):
        if path.is_relative_to(base):
            return path.relative_to(base).as_posix()
    return str(path)


@dataclass(frozen=True)
class _Report:
    """The report of one entry on disk. Every change is written at once."""

    path: Path
    facts: dict[str, Any]

    @classmethod
    def opened(cls, settings: Settings, entry: Tombstone) -> _Report:
        """The report that an earlier call began, or a new one."""
        path = settings.home / REPORTS / f"{entry.id}.json"
        facts: dict[str, Any] = {
            "id": entry.id,
            "tombstone": entry.digest,
            "keys": entry.marks.as_json(),
            "found": None,
            "tables": {},
            "results": {},
            "objects": {"objects": 0, "copies": 0},
            "replies": 0,
            "registry_asked": False,
        }
        facts |= {name: getattr(entry, name) for name in ("kind", "reason", "by", "at")}
        facts |= {name: [] for name in ("sources", "revisions", "removed", "models", "versions", "left_to_you")}
        if path.is_file():
            try:
                facts |= json.loads(path.read_text("utf-8"))
            except ValueError:
                message = "the report of an earlier call is damaged; move it away and run again"
                raise UserError(f"{path}: {message}") from None
        report = cls(path, {**facts, "finished": False})
        report._write()
        return report

    def add(self, name: str, entry: Mapping[str, Any]) -> None:
        """Add to a list what it does not hold yet."""
        if entry not in self.facts[name]:
            self.facts[name].append(dict(entry))
            self._write()

    def keep_manifest(self, result: Path) -> None:
        """Note a result of the store that goes, with the manifest of a table: the chain to its sources outlives it."""
        self.facts["results"].setdefault(result.name, read_json(result / MANIFEST))
        self._write()

    def put(self, name: str, value: Any) -> None:
        """State a fact; of counts of deleted objects, add to what was counted before."""
        if name == "objects":
            value = {key: count + self.facts[name][key] for key, count in value.items()}
        self.facts[name] = value
        self._write()

    def _write(self) -> None:
        atomic_write(self.path, (json.dumps(self.facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())


def render(report: Mapping[str, Any]) -> str:
    """What was forgotten, where it was removed, which models have learnt of it, and what is left to the user."""
    counts = ", ".join(f"{len(values)} {kind}" for kind, values in report["keys"].items())
    lines = [
        f"forgotten {report['id']}: {report['kind']} ({counts}), by {report['by']}, {report['at']}: {report['reason']}",
        f"{len(report['tables'])} tables held it, {len(report['revisions'])} recorded revisions",
    ]
    if not report["tables"]:
        lines.append("nothing of it was found here; it is kept out of every table from now on")
    for revision in report["revisions"]:
        parts = []
        for name, rows in revision["rows"].items():
            shards = revision["shards"][name]
            parts.append(f"{name}: {rows:,} rows removed, {shards:,} shard{'s' * (shards != 1)} rewritten")
        successor = revision["successor"][:12] or "nothing: some of its bytes were lost before"
        lines.append(f"  revision {revision['revision'][:12]} -> {successor}  {'; '.join(parts)}")
    files, held = report["objects"]["objects"], report["objects"]["copies"]
    lines.append(f"removed: {files:,} recorded files ({held:,} copies in cache and remote)")
    lines.append(f"  annotation replies: {report['replies']:,}")
    for place, number in sorted(Counter(copy["place"] for copy in report["removed"]).items()):
        lines.append(f"  {place}: {number:,}")
    lines += _models(report)
    lines += [f"left to you: {note}" for note in report["left_to_you"]]
    lines.append(f"searched everything again: found {report['found']}")
    return "\n".join(lines)


def _models(report: Mapping[str, Any]) -> list[str]:
    taught = [model for model in report["models"] if model["saw"] == "training"]
    lines = [
        f"models trained on it, which still contain what they have learnt: {len(taught)}"
        + "".join(f"\n  {model['stage']} {model['digest'][:12]}" for model in taught)
    ]
    for version in report["versions"]:
        facts = [version["decision"] + (f" by {version['by']}" if version["by"] else "")]
        facts += [f"alias {alias}" for alias in version["aliases"]]
        facts += [f"serves in {stage}" for stage in version["serves"]]
        learnt = "trained on it" if version["saw"] == "training" else "measured on it only"
        lines.append(f"  {version['name']} version {version['version']} ({version['digest'][:12]}): {learnt}")
        lines[-1] += f", {', '.join(facts)}"
    if not report["registry_asked"]:
        lines.append("  MLflow is away: versions that this home does not remember, and decisions, are not told")
    return lines
