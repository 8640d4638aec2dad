"""Two runs compared: the evaluations that their names mean, found and paired.

A name is that of a run folder, an evaluation folder, a model version, a digest, or an MLflow run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.scoring import paired
from facemllm.scoring.benchmarks import benchmark_of
from facemllm.scoring.figures import differing
from facemllm.settings import Settings, load
from facemllm.tables import CONVERSATIONS, open_table

NAMES = "a run's name, a run or evaluation folder, a model version or alias, an evaluation's digest, an MLflow run id"

EvaluationOf = Callable[[str], str]
"""Digest of the evaluation of a model version or alias; raises UserError if there is none. The registry knows."""


def compare(
    settings: Settings, first: str, second: str, evaluation_of: EvaluationOf, conversations: Path | None = None
) -> dict[str, Any]:
    """Two runs by name, paired (`scoring.paired.compare`), with their `names` and the `settings` that differ, a pair of
    values by key (None: not known of one of them). `conversations` is needed where the store holds them no more. Raises
    UserError unless both runs answered the same questions."""
    ours, theirs = (find(settings, name, evaluation_of) for name in (first, second))
    table = _conversations_of(ours, theirs, conversations)
    if benchmark_of(open_table(table, CONVERSATIONS)) is not None:
        raise UserError(f"{table} is a benchmark; compare models on it with `facemllm leaderboard`")
    made = [_settings_behind(found) for found in (ours, theirs)]
    changed = differing(*made) if all(made) else None
    return {
        **paired.compare(settings, table, ours.folder, theirs.folder),
        "names": [first, second],
        "settings": changed,
    }


def _settings_behind(found: Found) -> dict[str, Any]:
    """The settings that an evaluation and what is behind it depend on, and the `commit`; empty where the store does not
    remember all of them."""
    records = Store(found.home).behind(found.folder.name)
    if not records or not all("settings" in record for record in records.values()):
        return {}
    values: dict[str, Any] = {"commit": records["evaluate"].get("commit")}
    for step, record in records.items():
        own = dict(record["settings"]["step"])
        if (stage := own.pop("stage", None)) is not None:
            own[f"train.stages.{step}"] = stage
        own["seed"] = record["settings"]["seed"]
        values |= {name: value for name, value in own.items() if name.partition(".")[0] in Settings.model_fields}
    return values


@dataclass(frozen=True)
class Found:
    """An evaluation by the name it was asked for: its folder, and the home whose store may hold its conversations."""

    name: str
    folder: Path
    home: Path
    conversations: str  # digest


def find(settings: Settings, name: str, evaluation_of: EvaluationOf) -> Found:
    """The evaluation that `name` means. Raises UserError saying what was looked for and how to mend."""
    for folder in (Path(name), settings.runs / name):
        if (folder / "metrics.json").is_file():
            return _found(name, folder, settings.home)
        if (folder / "summary.json").is_file():
            return _of_summary(settings, name, _read(folder / "summary.json"))
    if re.fullmatch(r"[0-9a-f]{32}", name):
        return _of_mlflow_run(settings, name)
    if re.fullmatch(r"[0-9a-f]{6,64}", name) and not (name.isdigit() and len(name) < 12):
        return _found(name, Store(settings.home).find(name), settings.home)
    if "/" in name:
        raise UserError(f"{name} holds neither metrics.json nor summary.json; give {NAMES}")
    try:
        digest = evaluation_of(name)
    except UserError as error:
        runs = ", ".join(sorted(found.parent.name for found in settings.runs.glob("*/summary.json"))) or "none"
        raise UserError(f"no run folder {settings.runs / name} (runs: {runs}), and {error}; give {NAMES}") from None
    return _in_store(settings.home, name, digest)


def _conversations_of(first: Found, second: Found, given: Path | None) -> Path:
    """Folder of the conversations that both were asked. Raises UserError if they differ, or are not at hand."""
    if first.conversations != second.conversations:
        raise UserError(
            f"'{first.name}' was evaluated on conversations {first.conversations[:12]}, '{second.name}' on "
            f"{second.conversations[:12]}; only answers to the same questions compare: evaluate both models on one "
            "table with `facemllm evaluate`"
        )
    if given is not None:
        return given
    for home in (first.home, second.home):
        if (home / "store" / first.conversations).is_dir():
            return home / "store" / first.conversations
    at = Store(first.home).forgotten(first.conversations).get("at")
    raise UserError(
        f"the conversations {first.conversations[:12]} are not in {first.home / 'store'}"
        f"{f': they were deleted {at} to forget a picture, run both again' if at else ''}; give their folder with "
        "--conversations"
    )


def _found(name: str, folder: Path, home: Path) -> Found:
    metrics = _read(folder / "metrics.json")
    if "conversations_digest" not in metrics:
        raise UserError(f"{folder}: metrics.json is not that of an evaluation; give {NAMES}")
    return Found(name, folder, home, str(metrics["conversations_digest"]))


def _in_store(home: Path, name: str, digest: str) -> Found:
    return _found(name, Store(home).path(digest), home)


def _of_summary(settings: Settings, name: str, summary: Mapping[str, Any]) -> Found:
    """The evaluation of a run, in the home of these settings or of the profile it ran under."""
    steps = [step for step in summary.get("steps") or () if isinstance(step, Mapping)]
    digest = next((step.get("digest") for step in steps if step.get("name") == "evaluate"), None)
    if digest is None:
        raise UserError(f"run '{name}' did not come to its evaluation; run it again to the end")
    homes = [settings.home]
    if not (settings.home / "store" / digest).is_dir() and summary.get("profile") not in (None, settings.profile):
        homes.insert(0, load(str(summary["profile"])).home)
    home = next((home for home in homes if (home / "store" / digest).is_dir()), homes[-1])
    return _in_store(home, name, digest)


def _of_mlflow_run(settings: Settings, run_id: str) -> Found:
    """The evaluation of a pipeline's run in MLflow, or of the run of its step `evaluate`."""
    from facemllm.tracking.client import connect, guard, uri  # MLflow takes a second to load

    client = connect(settings)
    with guard(uri(settings)):
        tags = client.get_run(run_id).data.tags
        if tags.get("facemllm.step") == "evaluate" and "facemllm.output" in tags:
            return _in_store(settings.home, run_id, tags["facemllm.output"])
        held = {file.path for file in client.list_artifacts(run_id)}
        if "summary.json" not in held:
            raise UserError(f"MLflow run {run_id} is neither a finished pipeline's nor an evaluation's; give {NAMES}")
        return _of_summary(settings, run_id, _read(Path(client.download_artifacts(run_id, "summary.json"))))


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); run or evaluate again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; run or evaluate again")
    return value
