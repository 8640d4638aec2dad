"""The report of `forget` in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


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
        parts = [f"{name}: {rows:,} rows removed, {_shards(revision, name)}" for name, rows in revision["rows"].items()]
        successor = revision["successor"][:12] or "nothing: some of its bytes were lost before"
        lines.append(f"  revision {revision['revision'][:12]} -> {successor}  {'; '.join(parts)}")
    files, held = report["objects"]["objects"], report["objects"]["copies"]
    lines.append(f"removed: {files:,} recorded files ({held:,} copies in cache and remote)")
    lines.append(f"  annotation replies: {report['replies']:,}")
    for place, number in sorted(Counter(copy["place"] for copy in report["removed"]).items()):
        lines.append(f"  {place}: {number:,}")
    lines += _models(report)
    lines += [f"left to you: {told}" for told in report["left_to_you"]]
    lines.append(f"searched everything again: found {report['found']}")
    return "\n".join(lines)


def _shards(revision: Mapping[str, Any], table: str) -> str:
    """How many shards of a table were rewritten, in words."""
    number = revision["shards"][table]
    return f"{number:,} shard{'s' * (number != 1)} rewritten"


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
