"""`facemllm gc`: what may go from a home, and why; removed with `--apply`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from facemllm.errors import UserError
from facemllm.settings.data import seconds
from facemllm.workflow.options import Json, Profile, Sets, say

if TYPE_CHECKING:
    from facemllm.gc.rubbish import Rubbish


def gc(
    apply: Annotated[bool, typer.Option("--apply", help="Remove it; else it is only listed.")] = False,
    older_than: Annotated[
        str, typer.Option(help="Only what nobody has used for so long: 12h, 7d; default: storage.gc_older_than.")
    ] = "",
    profile: Profile = "laptop",
    set_: Sets = [],
    as_json: Json = False,
) -> None:
    """List what no run, version, decision, revision or server names: results, unfinished work, caches, leftovers.

    Delete runs and versions in MLflow, and run folders, first: what they name stays. Safe beside running work. Models
    and tables in MLflow, in the data repository and its remote, replies of annotators and decisions are never touched.
    """
    from facemllm.gc import roots as naming
    from facemllm.gc.rubbish import rubbish
    from facemllm.gc.sweep import sweep
    from facemllm.promote.records import Records

    profiles = naming.sharing(profile, set_)
    settings = profiles[0]
    try:
        grace_s = seconds(older_than or settings.storage.gc_older_than)
    except ValueError as error:
        raise UserError(f"--older-than {older_than}: {error}") from None
    records = Records(settings.home)
    kept = naming.roots(profiles, records)
    found = rubbish(settings, kept, records, grace_s)
    shown = sweep(settings.home, found, grace_s) if apply else found
    here = sorted(digest for digest in records.here if digest in kept.named)
    facts = {
        "home": str(settings.home),
        "applied": apply,
        "older_than_s": grace_s,
        "bytes": sum(one.bytes for one in shown),
        "rubbish": [
            {"what": one.what, "path": str(one.path), "bytes": one.bytes, "age_s": round(one.age_s), "why": one.why}
            for one in shown
        ],
        "kept": {digest: [f"{kind}: {words}" for kind, words in kept.named[digest]] for digest in here},
        "notes": kept.notes,
    }
    counts = ", ".join(f"{number} by {kind}" for kind, number in sorted(kept.counts(here).items()))
    say(as_json, facts, "\n".join(_lines(facts, shown, settings.home, f"{len(here)} results ({counts})")))


def _lines(facts: dict[str, Any], shown: Sequence[Rubbish], home: Any, kept: str) -> list[str]:
    lines = [f"note: {note}" for note in facts["notes"]]
    if shown:
        lines.append(f"{'size':>9}  {'age':>7}  {'what':<16}{'where':<46}why")
    for one in shown:
        where = one.path.relative_to(home) if one.path.is_relative_to(home) else one.path
        short = str(where) if len(str(where)) < 45 else f"{str(where)[:44]}…"
        lines.append(f"{_amount(one.bytes):>9}  {_age(one.age_s):>7}  {one.what:<16}{short:<46}{one.why}")
    total = f"{len(shown)} things, {_amount(facts['bytes'])}"
    if not shown:
        lines.append("nothing may go")
    else:
        lines.append(f"{total} removed" if facts["applied"] else f"{total} may go; remove them with: --apply")
    return [*lines, f"kept: {kept}"]


def _amount(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _age(seconds_: float) -> str:
    return f"{seconds_ / 86400:.0f} d" if seconds_ >= 172_800 else f"{seconds_ / 3600:.0f} h"
