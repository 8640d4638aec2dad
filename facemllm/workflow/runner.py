"""The one way a step is run.

A step is a plain function in its room, listed in `facemllm.workflow.steps`. `execute` puts what every step needs
around it: settings, the content store (same inputs, settings and code: the remembered result), a nested MLflow run,
events for the live table, and one clear line when it fails. KFP components, commands and DVC stages call this function;
none holds logic of its own.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from facemllm.core import claims, digests, progress
from facemllm.core.processes import die_with
from facemllm.core.step import CLUSTER_RUN, PARENT_RUN, Context, Step, depends, key_of, step_key
from facemllm.core.store import Store
from facemllm.errors import UserError
from facemllm.scoring.figures import differing
from facemllm.settings import Settings
from facemllm.tables import MANIFEST, open_table
from facemllm.tracking import runs as tracking
from facemllm.workflow import launcher
from facemllm.workflow.pods import launched
from facemllm.workflow.rayjob import Job
from facemllm.workflow.steps import steps

ENGINE = "FACEMLLM_ENGINE"  # process id of KFP's local runner, which starts each step through a shell


def execute(name: str, settings: Settings, **inputs: str) -> str:
    """Run one step, or recall its result, and return its output value: what the next step is given.

    Raises UserError with one clear line; the same line goes to the live table.
    """
    return str(run_record(name, settings, **inputs)[0]["output"])


def run_record(name: str, settings: Settings, **inputs: str) -> tuple[dict[str, Any], bool]:
    """The same, and return all that is remembered of it (its `output`, `digest`, `seconds`, the step's own facts), and
    whether it was recalled."""
    if engine := os.environ.pop(ENGINE, None):
        die_with(int(engine))
    step = steps(settings)[name]
    if set(inputs) != set(step.inputs):
        raise ValueError(f"step {name} takes inputs {sorted(step.inputs)}, got {sorted(inputs)}")
    os.environ[progress.STEP] = name
    started = time.monotonic()
    try:
        progress.event(state="running")
        inputs |= {world: read(settings) for world, read in step.world.items()}
        depends_on = depends(step, settings)
        record, recalled = _made(step, settings, depends_on, inputs)
    except BaseException as error:
        message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]
        message = "interrupted" if isinstance(error, KeyboardInterrupt) else message
        progress.event(state="failed", message=message, seconds=time.monotonic() - started)
        raise
    state = "cached" if recalled else "done"
    seconds = record["seconds"] if recalled else time.monotonic() - started
    progress.event(state=state, seconds=seconds, digest=record["digest"], figure=record["figure"])
    return record, recalled


def recall_all(settings: Settings) -> dict[str, dict[str, Any]]:
    """What the store remembers of a run under these settings: records by step, up to the first that is missing."""
    records: dict[str, dict[str, Any]] = {}
    for step in steps(settings).values():
        if not step.keeps or step.world or not set(step.inputs.values()) <= set(records):
            continue
        inputs = {name: str(records[source]["output"]) for name, source in step.inputs.items()}
        if record := _recall(step, settings, step_key(step, settings, inputs)):
            records[step.name] = record
    return records


@dataclass(frozen=True)
class Planned:
    """What a run will do with a step: `run` it, `recall` its result, or one of both (`open`); why; and the seconds that
    it took the last time."""

    step: str
    action: str
    why: str = ""
    seconds: float | None = None


def plan(settings: Settings) -> list[Planned]:
    """What a run under these settings would do, step by step. No server is asked, nothing is started or written."""
    last = {record["step"]: record for record in Store(settings.home).records().values() if "step" in record}
    recalled: dict[str, dict[str, Any]] = {}
    planned: dict[str, Planned] = {}
    for name, step in steps(settings).items():
        before = last.get(name)
        behind = [planned[source] for source in step.inputs.values() if source not in recalled]
        running = next((one for one in behind if one.action == "run"), None)
        depends_on = {} if behind or step.world or not step.keeps else depends(step, settings)
        inputs = {} if behind else {key: str(recalled[source]["output"]) for key, source in step.inputs.items()}
        if not step.keeps:
            action, why = "run", "every time" if step.when is None else f"once it is {step.when.name}"
        elif running:
            action, why = "run", f"after {running.step}"
        elif behind or step.world:
            action, why = "open", f"after {behind[0].step}" if behind else f"goes by the {', '.join(step.world)} then"
        elif record := _recall(step, settings, key_of(step, depends_on, inputs)):
            recalled[name], action, why = record, "recall", ""
        else:
            action, why = "run", _changed(before, {**depends_on, "inputs": inputs})
        seconds = before["seconds"] if before and action != "recall" else None
        planned[name] = Planned(name, action, why, seconds)
    return list(planned.values())


def _changed(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """What differs from the last time that a step ran; its result may also be gone."""
    if before is None:
        return "has not run yet"
    if "settings" not in before:
        return "changed since it last ran"
    settings = [name.removeprefix("step.") for name in differing(before["settings"], now["settings"])]
    parts = [f"changed: {', '.join(settings[:4])}{' …' * (len(settings) > 4)}"] if settings else []
    parts += ["its code has changed"] if before["code"] != now["code"] else []
    parts += ["its inputs have changed"] if before["inputs"] != now["inputs"] else []
    return "; ".join(parts) or "its last result is gone"


def _recall(step: Step, settings: Settings, key: str) -> dict[str, Any] | None:
    record = Store(settings.home).recall(key) if step.keeps else None
    if record is not None and step.still is not None and not step.still(settings, record):
        return None
    return record


def _nested(settings: Settings, name: str, **inputs: str) -> dict[str, Any]:
    """Record of another step, recalled or made now, with no place of its own in the live table or in MLflow."""
    step = steps(settings)[name]
    return _made(step, settings, depends(step, settings), inputs, tracked=False)[0]


def _made(
    step: Step, settings: Settings, depends_on: Mapping[str, Any], inputs: Mapping[str, str], tracked: bool = True
) -> tuple[dict[str, Any], bool]:
    """A step's record, and whether it was recalled: what another process is making now is waited for.

    Steps that act on the world, which run every time, wait for nobody here.
    """
    key = key_of(step, depends_on, inputs)
    if record := _taken(step, settings, key):
        return record, True
    if launched(settings, step.name):
        return _launched(step, settings, key, inputs), False
    place = key if step.keeps else secrets.token_hex(32)
    with claims.claim(settings.home, place, step.name, inputs), Store(settings.home).attempt(place) as out:
        if record := _taken(step, settings, key):
            return record, True
        return _perform(step, settings, depends_on, inputs, out, tracked), False


def _launched(step: Step, settings: Settings, key: str, inputs: Mapping[str, str]) -> dict[str, Any]:
    """The record that a RayJob has left in the store: it alone says what came of the work, and the bytes have to agree.

    Raises UserError where they do not, and as `launcher.launch` does.
    """
    job = Job(step.name, key, inputs, digests.of_package(), os.environ.get(CLUSTER_RUN), _parent(settings))
    launcher.launch(settings, job, lambda: _recall(step, settings, key) is not None)
    record = _taken(step, settings, key)
    if record is None or not _whole(Store(settings.home).path(record["digest"])):
        raise UserError(
            f"the bytes that RayJob {job.name} left under {key[:12]} are not those of its record; run again"
        )
    return record


def _whole(result: Path) -> bool:
    """Whether the bytes of a result are those that it is named by: a table's by its manifest, others by all files."""
    if not (result / MANIFEST).is_file():
        return digests.of_tree(result, fresh=True) == result.name
    with suppress(UserError):
        return open_table(result).digest == result.name
    return False


def _taken(step: Step, settings: Settings, key: str) -> dict[str, Any] | None:
    """What is remembered under a key, taken into use."""
    record = _recall(step, settings, key)
    return record if record and claims.use(settings.home, [str(record["digest"])]) else None


def _perform(
    step: Step,
    settings: Settings,
    depends_on: Mapping[str, Any],
    inputs: Mapping[str, str],
    out: Path,
    tracked: bool,
) -> dict[str, Any]:
    store, key, started = Store(settings.home), key_of(step, depends_on, inputs), time.monotonic()
    # a step that acts on the world leaves no result to track: a recalled run has no nested runs
    with _tracked(step, settings, key, inputs) if tracked and step.keeps else nullcontext(None) as run:
        context = Context(settings, store, inputs, out.parent, out, partial(_nested, settings), run)
        outcome = step.work(context)
        facts = {
            "step": step.name,
            "inputs": dict(inputs),
            "output": outcome.output or outcome.digest,
            "figure": outcome.figure,
            "seconds": round(time.monotonic() - started, 3),
            "run_id": run.run_id if run is not None else None,
            "commit": tracking.commit(),
            **depends_on,
            **outcome.facts,
        }
        if step.keeps:
            store.keep(key, out, outcome.digest, facts)
        if run is not None:
            run.finish(outcome.digest, facts)
    return {"digest": outcome.digest, **facts}


def _tracked(step: Step, settings: Settings, key: str, inputs: Mapping[str, str]) -> Any:
    parent = _parent(settings)
    if not parent:
        return nullcontext(None)
    return tracking.step_run(settings, parent, step.name, key=key, inputs=inputs)


def _parent(settings: Settings) -> str | None:
    """The MLflow run of the pipeline run that a step is part of, if it is part of one."""
    if name := os.environ.get(CLUSTER_RUN):
        os.environ[PARENT_RUN] = tracking.join_pipeline(settings, name)
    return os.environ.get(PARENT_RUN)
