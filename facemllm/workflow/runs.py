"""A pipeline run as its user sees it: a live table of steps, then `runs/<name>/summary.json` and `report.html`.

Steps report through an events file, from whichever process they run in; this module turns the events into the table
and, with what the store remembers, into the summary.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facemllm.core.cost import priced
from facemllm.core.files import atomic_write, locked
from facemllm.core.machine import cores
from facemllm.core.store import FACE, Store
from facemllm.errors import UserError
from facemllm.scoring.figures import RELATIONS, SAMPLES, trust
from facemllm.settings import Settings
from facemllm.tables import open_table
from facemllm.tracking import recorded
from facemllm.tracking.runs import commit
from facemllm.version import ledger
from facemllm.workflow.runner import recall_all
from facemllm.workflow.steps import steps

_PIXELS, _LINE_S = 256, 30.0
MARKS = {"waiting": "·", "running": "▸", "done": "✓", "cached": "=", "failed": "✗", "skipped": "–"}


@dataclass
class StepView:
    """What is known of one step while a run goes on."""

    state: str = "waiting"
    seconds: float | None = None
    digest: str | None = None
    figure: str = ""
    message: str = ""
    began: float | None = None
    since: tuple[float, int, int] | None = None  # time and units done when the work of so many units was first heard of

    def to_dict(self, name: str) -> dict[str, Any]:
        """The step's entry in `summary.json`."""
        facts = {"name": name, "state": self.state, "seconds": self.seconds, "cached": self.state == "cached"}
        return {**facts, "digest": self.digest, "figure": self.message or self.figure}

    def so_far(self, event: Mapping[str, Any]) -> str:
        """How far the step is by an event of progress: units done, time left at the speed so far, and the note."""
        done, total, note, now = event["progress"], event["total"], str(event["note"]), event["time"]
        if self.since is None or total != self.since[2] or done < self.since[1]:
            self.since = now, done, total
        start, first, _ = self.since
        count = f"{done:,} of {total:,}" if total and f" of {total}" not in note else ""
        left = (now - start) / (done - first) * (total - done) if total and done > first else 0.0
        words = f"{f'{left:.0f} s' if left < 60 else clock(left)} left" if left else ""
        return ", ".join(part for part in ((count, words, note) if count else (note, words)) if part)


@dataclass
class RunView:
    """The steps of a run, as its events file says; `refresh` reads what has been added since."""

    events: Path
    steps: dict[str, StepView]
    said: list[str] = field(default_factory=list)  # notes that nobody has been shown yet
    _read: int = 0

    @classmethod
    def of(cls, settings: Settings, events: Path) -> RunView:
        """All steps under these settings, waiting."""
        return cls(events, {name: StepView() for name in steps(settings)})

    def refresh(self) -> dict[str, StepView]:
        """Read new events; return the steps whose state changed, by name."""
        changed: dict[str, StepView] = {}
        if not self.events.is_file():
            return changed
        with self.events.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                event = json.loads(line)
                if not {"state", "progress"} & set(event):
                    self.said.append(f"{event['step']}: {event['note']}".removeprefix(": "))
                    continue
                step = self.steps.get(event["step"])
                if step is not None and self._apply(step, event):
                    changed[event["step"]] = step
        return changed

    def _apply(self, step: StepView, event: Mapping[str, Any]) -> bool:
        if "progress" in event:
            step.figure = step.so_far(event)
            return False
        step.state = event["state"]
        step.began = event["time"] if step.state == "running" else step.began
        step.seconds, step.digest = event.get("seconds"), event.get("digest")
        step.figure, step.message = event.get("figure", ""), event.get("message", "")
        return True

    def settle(self, recalled: Mapping[str, Mapping[str, Any]]) -> None:
        """The run is over: steps that the pipeline engine answered from its cache take what the store remembers."""
        for name, step in self.steps.items():
            record = recalled.get(name)
            if step.state == "waiting" and record is not None:
                step.state, step.seconds = "cached", record["seconds"]
                step.digest, step.figure = record["digest"], record["figure"]
            elif step.state == "waiting":
                step.state = "skipped"
            elif step.state == "running":
                step.state, step.message = "failed", "ended without a word; its last lines are in run.log"

    def failure(self) -> tuple[str, str] | None:
        """Name and message of the step that failed, if one did."""
        return next(((name, s.message) for name, s in self.steps.items() if s.state == "failed"), None)


def exclusive(settings: Settings) -> AbstractContextManager[None]:
    """Let one run of the whole workflow at a time use `storage.home`: two would share its servers, the Ray head and the
    engine's cache. Steps alone, as commands and on a cluster, run beside it (`facemllm.core.claims`). Raises UserError
    while another does; a killed run leaves no lock."""
    taken = f"another pipeline run uses {settings.home}; wait for it or give --set storage.home=DIR"
    return locked(settings.home / "run.lock", taken)


def plain_name(name: str) -> str:
    """A run's name, as given. Raises UserError for one that is no plain name."""
    if not name or name != Path(name).name or name.startswith("."):
        raise UserError(f"--name {name!r}: give a plain name such as 'laptop' or 'gentle-2'")
    return name


def run_folder(settings: Settings, name: str) -> Path:
    """The folder of a run, made if absent. Raises UserError for a name that is no plain one, or if not writable."""
    folder = settings.runs / plain_name(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "events.jsonl").write_bytes(b"")
        for name in ("summary.json", "report.html", FACE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        mend = "set storage.runs to a folder you may write to"
        raise UserError(f"cannot write {folder}: {error.strerror}; {mend}") from None
    return folder


def summarise(settings: Settings, name: str, view: RunView, seconds: float, overrides: list[str]) -> dict[str, Any]:
    """The run's `summary.json` (DESIGN: a run folder), from the steps as they ended and the results in the store."""
    store = Store(settings.home)
    recalled = recall_all(settings)
    view.settle(recalled)
    made = store.records()
    records = {name: recalled.get(name) or made.get(step.digest or "", {}) for name, step in view.steps.items()}
    registered = records["register"]
    metrics = _read(store, records["evaluate"], "metrics.json")
    gate = _read(store, records["gate"], "gate.json")
    model = records[list(settings.stages())[-1]]
    kind = "GPU" if settings.train.use_gpu else "CPU"
    release = view.steps["release"]
    endpoint = release if release.state == "done" else view.steps["deploy"]
    return {
        "run": name,
        "profile": settings.profile,
        "commit": commit(),
        "overrides": list(overrides),
        "sources": _licences(settings, view.steps["ingest"].digest),
        "seconds": round(seconds, 1),
        "device": f"{kind}, {cores()} cores, {platform.machine()}, Python {platform.python_version()}",
        "steps": [step.to_dict(name) for name, step in view.steps.items()],
        "tasks": metrics.get("tasks", {}),
        "closed_mean": metrics.get("closed_mean"),
        "trust": trust(metrics),
        "gate": {name: gate[name] for name in ("passed", "reasons", "checks")} if gate else None,
        "model": {
            "digest": model.get("digest"),
            "name": settings.promote.model_name,
            "version": registered.get("output"),
        },
        "approval": view.steps["await_approval"].figure or None,
        "endpoint": endpoint.figure if endpoint.state == "done" else None,
        "cost": {
            step: priced(record["cost"], settings.cost.price_per_hour)
            for step, record in records.items()
            if record.get("cost") and record["step"] == step  # what is deployed has the digest of what was trained
        },
    }


def write_run(settings: Settings, folder: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, `report.html` and one held-out face to ask about, each whole or not at all."""
    from facemllm.report.run import write_report

    atomic_write(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    digests = {step["name"]: step["digest"] for step in summary["steps"]}
    evaluation = settings.home / "store" / digests["evaluate"] if digests["evaluate"] else None
    if evaluation is not None:
        atomic_write(folder / FACE, next(iter(sorted((evaluation / "samples").glob("*.jpg")))).read_bytes())
    shown, source = training(settings, summary), _sources(settings, digests["ingest"])
    write_report(folder / "report.html", summary, evaluation, shown, source=source)


def _read(store: Store, record: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A JSON object that a step left in the store; empty for a step that did not run."""
    return dict(json.loads((store.path(record["digest"]) / name).read_text("utf-8"))) if record else {}


def _licences(settings: Settings, faces: str | None) -> list[dict[str, Any]]:
    """The ledger's rows of the sources of a run's faces."""
    rows, shown = ledger.entries(settings), {"key", "name", "licence", "status", "uses"}
    names = _sources(settings, faces).split(", ")
    return [rows[name].model_dump(mode="json", include=shown) for name in names if name in rows]


def _sources(settings: Settings, faces: str | None) -> str:
    """Sources of a run's faces, as their table says; as the settings say when there is none yet."""
    if faces and (settings.home / "store" / faces).is_dir():
        return ", ".join(open_table(settings.home / "store" / faces).sources)
    return ", ".join(source.name for source in settings.ingest.sources)


def training(settings: Settings, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a report shows of the training: by stage the `curves` (one dictionary a logged step) and `samples` that its
    MLflow run holds, the audit of `relations`, the sampled faces' `pictures` (JPEG, by image_id), and the settings of
    the model's `branches`."""
    store = Store(settings.home)
    found: dict[str, Any] = {"curves": {}, "samples": {}, "relations": [], "pictures": {}}
    made, digests = store.records(), {step["name"]: step["digest"] for step in summary["steps"]}
    trained = {stage: made.get(digests.get(stage) or "", {}).get("run_id") for stage in settings.stages()}
    with suppress(UserError):  # a report without them is better than none
        for stage, run_id in trained.items():
            if not run_id:
                continue
            found["curves"][stage] = recorded.curve(settings, run_id)
            found["samples"][stage] = recorded.table(settings, run_id, SAMPLES)
            found["relations"] = found["relations"] or recorded.table(settings, run_id, RELATIONS)
    conversations = digests["reformat"]
    if any(found["samples"].values()) and conversations and (store.home / "store" / conversations).is_dir():
        found["pictures"] = _pictures(store.path(conversations))
    model = settings.model
    branches = {"segmentation": model.segmentation.mode != "none", "knowledge": model.knowledge.enabled}
    found["branches"] = {name: getattr(model, name).model_dump() for name, on in branches.items() if on}
    return found


def _pictures(conversations: Path) -> dict[str, bytes]:
    from facemllm.core.images import encoded, opened
    from facemllm.train.samples import fixed_faces

    found = {}
    for face in fixed_faces(open_table(conversations)):
        image = opened(face.image)
        image.thumbnail((_PIXELS, _PIXELS))
        found[face.image_id] = encoded(image)
    return found


def clock(seconds: float | None) -> str:
    """Seconds as people read them."""
    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def steps_table(view: RunView, started: float) -> Any:
    """The live table: a row a step with its state, time and one telling figure (a rich Table)."""
    from rich.markup import escape
    from rich.table import Table

    styles = {"running": "bold cyan", "done": "green", "cached": "blue", "failed": "bold red"}
    table = Table(title=f"face-mllm · {clock(time.time() - started)}", title_justify="left", box=None, pad_edge=False)
    for column in ("", "step", "state", "time", ""):
        table.add_column(column, overflow="ellipsis", no_wrap=True)
    last = max((i for i, s in enumerate(view.steps.values()) if s.state != "waiting"), default=-1)
    for index, (name, step) in enumerate(view.steps.items()):
        state = "cached" if step.state == "waiting" and index < last else step.state
        seconds = time.time() - step.began if state == "running" and step.began else step.seconds
        text = escape(step.message or step.figure)
        table.add_row(MARKS[state], name, state, clock(seconds), text, style=styles.get(state, "dim"))
    return table


def follow(console: Any, view: RunView, child: subprocess.Popen[bytes], started: float) -> None:
    """Show the steps until the child process ends: a live table in a terminal; elsewhere a line a change, and now and
    then one of how far the running step is."""
    if console.is_terminal:
        from rich.live import Live

        with Live(console=console, refresh_per_second=4, get_renderable=lambda: steps_table(view, started)):
            ended = False
            while not ended:
                ended = child.poll() is not None
                view.refresh()
                _say(console, view)
                time.sleep(0 if ended else 0.2)
        return
    line = time.monotonic() + _LINE_S
    while True:
        ended = child.poll() is not None
        shown = view.refresh()
        _say(console, view)
        if shown or time.monotonic() > line:
            line = time.monotonic() + _LINE_S
            shown = shown or {name: step for name, step in view.steps.items() if step.state == "running"}
        for name, step in shown.items():
            seconds = time.time() - step.began if step.state == "running" and step.began else step.seconds
            text = f"{name:<15}{step.state:<9}{clock(seconds):<14}{step.message or step.figure}"
            console.print(text, markup=False, soft_wrap=True)
        if ended:
            return
        time.sleep(0.2)


def _say(console: Any, view: RunView) -> None:
    """Print the notes that steps have left, above the live table."""
    while view.said:
        console.print(view.said.pop(0), markup=False, soft_wrap=True)
