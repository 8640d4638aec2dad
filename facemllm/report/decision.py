"""What there is to decide, for the terminal: all registered versions, or one with all that a decision needs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from facemllm.report.kit import decimals, number
from facemllm.report.terminal import head

_DIGEST = re.compile(r"[0-9a-f]{64}")
_STATES = {"approved": "green", "rejected": "bold red", "revoked": "bold red", "expired": "yellow"}


def versions_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row a version: which is in production, what was decided, by whom and until when."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("version", "digest", "registered", "gate", "decision", "production", "aliases"):
        table.add_column(name, no_wrap=name != "decision")
    for row in rows:
        since = (row["released"] or "")[:10]
        decision = Text(row["words"], _STATES.get(row["state"], ""))
        cells = [str(row["version"]), row["digest"][:12], row["registered"][:10], row["gate"], decision]
        aliases = ", ".join(alias for alias in row["aliases"] if alias != "champion")
        table.add_row(*cells, f"since {since}" if row["production"] else since and f"released {since}", aliases)
    return table


def version_shown(facts: Mapping[str, Any]) -> Iterator[Table | Text]:
    """One version: its state, what failed or was loosened first, its figures beside the champion's, who said what."""
    yield Text.assemble(
        (f"{facts['name']} version {facts['version']}", "bold"),
        f"  {facts['digest'][:12]}  registered {facts['registered'][:10]}",
    )
    yield Text(facts["words"], _STATES.get(facts["state"], ""))
    if facts["missing"] and facts["state"] != "pending":
        lacks = ", ".join(f"{count} {role}" for role, count in facts["missing"].items())
        yield Text(f"still to sign: {lacks}; may: {', '.join(facts['may_sign']) or 'nobody of the policy'}")
    if (bundle := facts["bundle"]) is None:
        yield Text(f"nobody asked for a decision yet: facemllm promote request {facts['version']}")
    else:
        yield Text(f"bundle {facts['bundle_digest']}", "dim")
        yield from _bundle(bundle, facts["rules"])
    if facts["statements"]:
        yield _statements(facts["statements"])


def _bundle(bundle: Mapping[str, Any], rules: Sequence[Mapping[str, Any]]) -> Iterator[Table | Text]:
    if bundle.get("loosened"):
        yield Text("\nlimits that were loosened (value, default in params.yaml):", "bold yellow")
        for one in bundle["loosened"]:
            yield Text(f"  {one['key']}  {_value(one['value'])}  {_value(one['default'])}", "yellow")
    champion = bundle.get("champion")
    if champion is None:
        yield Text("\nno version was in production when this was asked for: nothing to compare with")
    else:
        worse = champion.get("worse") or []
        verdict = "worse than" if worse else "not shown to be worse than"
        yield Text(
            f"\n{verdict} version {champion.get('version')}, in production when this was asked for",
            "bold red" if worse else "",
        )
        for one in worse:
            interval = f"({_value(one.get('low'))} to {_value(one.get('high'))})"
            allowed = f"allowed {_value(one.get('limit'))}"
            yield Text(f"  {one.get('task')}  by {_value(one.get('value'))} {interval}, {allowed}", "red")
    yield Text()
    yield _figures(bundle.get("tasks") or {})
    yield Text()
    yield _rules(rules)
    sources = ", ".join(f"{one['name']} ({one['licence']})" for one in bundle.get("sources") or [])
    code, settings = bundle.get("code") or {}, bundle.get("settings") or {}
    commit = f"{str(code.get('commit'))[:12]}{' with changes' if code.get('dirty') else ''}"
    yield Text(f"\nsources  {sources or 'none recorded'}")
    yield Text(f"code     {commit}, profile {settings.get('profile')}")


def _figures(tasks: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task")
    for name in ("value", "95 %", "constant", "champion", "unreadable", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("metric")
    for task, one in tasks.items():
        places = decimals(one, 3)
        champion = one.get("champion") or {}
        constant = (one.get("baselines") or {}).get("constant")
        low, high = number(one.get("low"), places), number(one.get("high"), places)
        cells = [number(one.get("value"), places), f"{low} – {high}"]
        cells += [number(constant, places), number(champion.get("value"), places)]
        cells += [f"{100 * (one.get('unreadable') or 0):.1f} %", f"{one.get('n') or 0:,}"]
        table.add_row(escape(head(task)), *cells, str(one.get("metric")))
    return table


def _rules(rules: Sequence[Mapping[str, Any]]) -> Table:
    """The rules of the gate, in the order in which they matter."""
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.title = f"gate, {len(rules)} rules"
    table.add_column("rule")
    for name in ("value", "limit", "default"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for one in rules:
        failed = one["state"] == "failed"
        verdict = Text("refused" if failed else "passed", "bold red" if failed else "")
        if one["state"] == "near":
            verdict.append(", near the limit", "yellow")
        change = "loosened" if one["state"] == "loosened" else one.get("change")
        if change:
            verdict.append(f", {change}", "yellow" if change == "loosened" else "")
        limits = (one.get("asked"), one.get("default")) if one.get("setting") else (one.get("limit"), None)
        table.add_row(escape(f"{one.get('kind')} {one.get('key')}"), *map(_value, (one.get("value"), *limits)), verdict)
    return table


def _statements(statements: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title="\nsigned statements", title_justify="left")
    for name in ("when (UTC)", "what", "who", "as", "reason"):
        table.add_column(name, no_wrap=name != "reason")
    for one in statements:
        reason = Text(str(one.get("reason") or ""))
        if not one["counts"]:
            reason.append(f"  counts for nothing, {one['why']}", "red")
        when = one["at"][:16].replace("T", " ")
        who = (str(one.get(name) or "-") for name in ("decision", "person", "role"))
        table.add_row(when, *map(escape, who), reason)
    return table


def _value(value: Any) -> str:
    """A figure as people read it: three significant digits, digests cut."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int | float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return value[:12]
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value))[:40]
