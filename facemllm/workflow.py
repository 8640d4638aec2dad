"""The steps of the workflow, and the one way each is run.

A step is a plain function in its room. `run_step` puts what every step needs around it: settings, the content store
(same inputs, settings and code: the remembered result), a nested MLflow run, events for the live table, and one clear
line when it fails. KFP components, commands and DVC stages are doors to this function; none holds logic of its own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from facemllm import digests, progress
from facemllm.errors import UserError
from facemllm.records import CONVERSATIONS, open_table
from facemllm.settings import Settings, load
from facemllm.store import Store

PARENT_RUN = "FACEMLLM_PARENT_RUN"  # MLflow run of the pipeline run, handed on by the local runner
CLUSTER_RUN = "FACEMLLM_RUN"  # name of the pipeline run on a cluster, where no process spans the steps


@dataclass
class Context:
    """What a running step has at hand: settings, input values by name, folders, and its MLflow run (or None)."""

    settings: Settings
    store: Store
    inputs: Mapping[str, str]
    work: Path
    out: Path
    run: Any = None

    def path(self, name: str) -> Path:
        """Folder of an input that is a digest in the store."""
        return self.store.path(self.inputs[name])


@dataclass
class Outcome:
    """What a step gives: its output value (a digest unless `output` says otherwise), a telling figure, facts."""

    digest: str
    figure: str
    output: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step: its code, the settings it depends on, which steps its inputs come from, what it does.

    `keeps` is false for the steps that act on the world (deploy, await_approval, release): they run every time.
    `world` names inputs read from the world when the step starts; `still` tells whether a remembered result still
    stands in it.
    """

    name: str
    module: str
    sections: Callable[[Settings], Any]
    inputs: Mapping[str, str]
    work: Callable[[Context], Outcome]
    keeps: bool = True
    world: Mapping[str, Callable[[Settings], str]] = field(default_factory=dict)
    still: Callable[[Settings, Mapping[str, Any]], bool] | None = None


def run_step(name: str, profile: str, overrides: Sequence[str], **inputs: str) -> str:
    """Run one step, or recall its result, and return its output value: what the next step is given.

    Raises UserError with one clear line; the same line goes to the live table.
    """
    from facemllm.machine import die_with_parent

    if os.environ.get(progress.EVENTS):
        die_with_parent()
    return execute(name, load(profile, list(overrides)), **inputs)


def execute(name: str, settings: Settings, **inputs: str) -> str:
    """Run one step under settings that are already loaded. See `run_step`."""
    step = STEPS[name]
    store = Store(settings.home)
    if set(inputs) != set(step.inputs):
        raise ValueError(f"step {name} takes inputs {sorted(step.inputs)}, got {sorted(inputs)}")
    os.environ[progress.STEP] = name
    started = time.monotonic()
    try:
        progress.event(state="running")
        inputs |= {world: read(settings) for world, read in step.world.items()}
        key = step_key(step, settings, inputs)
        record = _recall(step, settings, store, key)
        if record is None:
            record = _perform(step, settings, store, key, inputs, started)
            state = "done"
        else:
            state = "cached"
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        message = "interrupted" if interrupted else str(error) if isinstance(error, UserError) else _unexpected(error)
        progress.event(state="failed", message=message, seconds=time.monotonic() - started)
        raise
    seconds = record["seconds"] if state == "cached" else time.monotonic() - started
    progress.event(state=state, seconds=seconds, digest=record["digest"], figure=record["figure"])
    return str(record["output"])


def step_key(step: Step, settings: Settings, inputs: Mapping[str, str]) -> str:
    """Name of this piece of work: step, code, the settings it depends on, inputs, and what it reads of the world."""
    values: dict[str, Any] = {"seed": settings.seed, "step": step.sections(settings)}
    if step.name in ("ingest", "annotate", "reformat"):
        values["restore"] = settings.versioning.restore
    return Store(settings.home).key(step.name, step.module, values, inputs)


def recall_all(settings: Settings) -> dict[str, dict[str, Any]]:
    """What the store remembers of a run under these settings: records by step, up to the first that is missing."""
    store = Store(settings.home)
    records: dict[str, dict[str, Any]] = {}
    for step in STEPS.values():
        if not step.keeps or step.world or not set(step.inputs.values()) <= set(records):
            continue
        inputs = {name: str(records[source]["output"]) for name, source in step.inputs.items()}
        record = _recall(step, settings, store, step_key(step, settings, inputs))
        if record is not None:
            records[step.name] = record
    return records


def _recall(step: Step, settings: Settings, store: Store, key: str) -> dict[str, Any] | None:
    record = store.recall(key) if step.keeps else None
    if record is not None and step.still is not None and not step.still(settings, record):
        return None
    return record


def _perform(
    step: Step,
    settings: Settings,
    store: Store,
    key: str,
    inputs: Mapping[str, str],
    started: float,
    tracked: bool = True,
) -> dict[str, Any]:
    work = store.work(key)
    out = work / "result"
    if out.exists():
        _discard(out)
    from facemllm.tracking import commit

    with _tracked(step, settings, key, inputs) if tracked else nullcontext(None) as run:
        context = Context(settings, store, inputs, work, out, run)
        outcome = step.work(context)
        facts = {
            "step": step.name,
            "inputs": dict(inputs),
            "output": outcome.output or outcome.digest,
            "figure": outcome.figure,
            "seconds": round(time.monotonic() - started, 3),
            "run_id": run.run_id if run is not None else None,
            "commit": commit(),
            **outcome.facts,
        }
        if step.keeps:
            store.keep(key, out, outcome.digest, facts)
        if run is not None:
            run.finish(outcome.digest, facts)
    return {"digest": outcome.digest, **facts}


def _tracked(step: Step, settings: Settings, key: str, inputs: Mapping[str, str]) -> Any:
    from facemllm import tracking

    if name := os.environ.get(CLUSTER_RUN):
        os.environ[PARENT_RUN] = tracking.join_pipeline(settings, name)
    parent = os.environ.get(PARENT_RUN)
    if not parent:
        return nullcontext(None)
    return tracking.step_run(settings, parent, step.name, key=key, inputs=inputs)


def _discard(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)


def _unexpected(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _write_json(folder: Path, name: str, value: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")
    return digests.of_tree(folder)


def _table(manifest: Mapping[str, Any], what: str) -> Outcome:
    refused = manifest.get("quarantined", 0)
    figure = f"{manifest['rows']:,} {what}" + (f", {refused} quarantined" if refused else "")
    return Outcome(manifest["digest"], figure)


def _restored(c: Context, name: str) -> Outcome:
    """A table of the recorded revision that the settings ask for, in place of making it."""
    from facemllm.versioning import restore

    revision = str(c.settings.versioning.restore)
    folder = c.work / "restored"
    if folder.exists():
        _discard(folder)
    restore(c.settings, revision, folder)
    (folder / name).rename(c.out)
    manifest = open_table(c.out).manifest
    return Outcome(manifest["digest"], f"{manifest['rows']:,} {name} restored from {revision[:12]}")


def _ingest(c: Context) -> Outcome:
    from facemllm.sources.ingest import ingest

    if c.settings.versioning.restore:
        return _restored(c, "faces")
    return _table(ingest(c.settings, c.out), "faces")


def _annotate(c: Context) -> Outcome:
    from facemllm.annotation import annotate

    if c.settings.versioning.restore:
        return _restored(c, "faces")
    return _table(annotate(c.settings, c.path("faces"), c.out), "faces annotated")


def _reformat(c: Context) -> Outcome:
    from facemllm.qa import reformat

    if c.settings.versioning.restore:
        return _restored(c, "conversations")
    manifest = reformat(c.settings, c.path("annotated"), c.out)
    return _table(manifest, "conversations")


def _validate(c: Context) -> Outcome:
    from facemllm.quality import validate

    verdict = validate(c.settings, c.path("annotated"), c.path("conversations"), c.out)
    if c.run is not None:
        c.run.log_artifacts(c.out, "validation")
    return Outcome(digests.of_tree(c.out), verdict.figure)


def _version(c: Context) -> Outcome:
    from facemllm.versioning import record

    revision = record(c.settings, c.path("annotated"), c.path("conversations"))
    digest = _write_json(c.out, "revision.json", {"revision": revision.sha, **c.inputs})
    return Outcome(digest, f"revision {revision.sha[:12]}", output=revision.sha)


def _still_recorded(settings: Settings, record: Mapping[str, Any]) -> bool:
    from facemllm.versioning import has

    return has(settings, record["output"])


def _whole_model(c: Context) -> Path:
    """Folder of the input model. Raises UserError when its bytes are no longer those of its digest."""
    path = c.path("model")
    if digests.of_tree(path) != c.inputs["model"]:
        raise UserError(f"{path}: the model's bytes have changed since it was made; remove that folder and run again")
    return path


def _train(stage: str) -> Callable[[Context], Outcome]:
    def work(c: Context) -> Outcome:
        from facemllm.training.launch import train

        base = _whole_model(c) if "model" in c.inputs else None
        on_log = c.run.curve_logger() if c.run is not None else None
        result = train(
            stage,
            c.settings,
            conversations=c.path("conversations"),
            base=base,
            out=c.out,
            work=c.work,
            cache=c.settings.home / "cache",
            on_log=on_log,
        )
        lineage = {"stage": stage, "inputs": dict(c.inputs), "settings": c.settings.stages()[stage].model_dump()}
        _write_json(c.out, "lineage.json", lineage)
        cost = {
            "seconds": round(result.seconds, 1),
            "samples": result.samples,
            "tokens": result.tokens,
            "peak_memory_bytes": result.peak_memory_bytes,
        }
        resumed = f", resumed at step {result.resumed_from}" if result.resumed_from else ""
        figure = f"loss {result.final_loss:.3f} after {result.steps:,} steps{resumed}"
        return Outcome(digests.of_tree(c.out), figure, facts={"cost": cost, "resumed_from": result.resumed_from})

    return work


def _evaluate(c: Context) -> Outcome:
    from facemllm.evaluation.evaluate import evaluate

    metrics = evaluate(c.settings, _whole_model(c), c.inputs["model"], c.path("conversations"), c.out)
    if c.run is not None:
        c.run.log_evaluation(metrics, c.out)
    mean = metrics["closed_mean"]
    return Outcome(digests.of_tree(c.out), f"mean balanced accuracy {mean['value']:.3f}")


def _gate(c: Context) -> Outcome:
    from facemllm.promotion import gates, registry

    candidate = c.path("evaluation")
    metrics = json.loads((candidate / "metrics.json").read_text("utf-8"))
    conversations = c.store.path(metrics["conversations_digest"])
    decision = gates.decide(c.settings, conversations, candidate, _champion_evaluation(c, metrics))
    if not decision.passed:
        registry.withdraw(c.settings, metrics["model_digest"], decision.reasons)
    gate = {"passed": decision.passed, "reasons": list(decision.reasons)}
    digest = _write_json(c.out, "gate.json", {**gate, "checks": decision.checks, "evaluation": c.inputs["evaluation"]})
    verdict = "passed" if decision.passed else "refused"
    figure = verdict if decision.passed else f"refused: {decision.reasons[0]}"
    return Outcome(digest, figure, output=verdict, facts={"gate": gate})


def _champion_evaluation(c: Context, metrics: Mapping[str, Any]) -> Path | None:
    """The champion's predictions on the candidate's own items: recalled, or made now with the champion's bytes."""
    from facemllm.promotion import registry

    digest = c.inputs["champion"]
    if not digest or digest == metrics["model_digest"]:
        return None
    model_dir(c.settings, registry.find_version(c.settings, "champion"))
    made = execute_nested("evaluate", c, model=digest, conversations=metrics["conversations_digest"])
    return c.store.path(made)


def execute_nested(name: str, c: Context, **inputs: str) -> str:
    """Run another step on behalf of a running one, without its own place in the live table or in MLflow."""
    step = STEPS[name]
    key = step_key(step, c.settings, inputs)
    record = c.store.recall(key)
    if record is None:
        record = _perform(step, c.settings, c.store, key, inputs, time.monotonic(), tracked=False)
    return str(record["output"])


def _register(c: Context) -> Outcome:
    from facemllm.promotion import registry

    metrics = json.loads((c.path("evaluation") / "metrics.json").read_text("utf-8"))
    version = registry.register(
        c.settings,
        model_dir=c.path("model"),
        model_digest=c.inputs["model"],
        evaluation=metrics,
        evaluation_digest=c.inputs["evaluation"],
        gate=_gate_of(c),
        run_id=os.environ.get(PARENT_RUN),
    )
    facts = {"name": version.name, "version": version.version, "model_digest": c.inputs["model"]}
    digest = _write_json(c.out, "registered.json", facts)
    return Outcome(digest, f"{version.name} version {version.version}", output=str(version.version), facts=facts)


def _gate_of(c: Context) -> dict[str, Any]:
    """The gate's verdict with its reasons, as the gate left it in the store."""
    inputs = {"evaluation": c.inputs["evaluation"], "champion": _champion(c.settings)}
    record = c.store.recall(step_key(STEPS["gate"], c.settings, inputs)) or {}
    passed = c.inputs["gate"] == "passed"
    return {"passed": passed, "reasons": record.get("gate", {}).get("reasons", [])}


def _still_registered(settings: Settings, record: Mapping[str, Any]) -> bool:
    from facemllm.promotion import registry

    try:
        version = registry.find_version(settings, record["output"])
        return bool(version.digest == record["model_digest"] and version.gate == "passed")
    except UserError:
        return False


def _deploy(c: Context) -> Outcome:
    from facemllm.promotion import registry
    from facemllm.serving import deploy

    version = registry.find_version(c.settings, c.inputs["version"])
    folder = model_dir(c.settings, version)
    endpoint = deploy.deploy(c.settings, folder, version.digest, str(version.version), _probe(c, version))
    return Outcome(version.digest, endpoint.predict_url, output=endpoint.predict_url)


def _await_approval(c: Context) -> Outcome:
    from facemllm.promotion import approvals

    state = approvals.await_decision(c.settings, c.inputs["version"], c.settings.promotion.wait_minutes)
    return Outcome(digests.of_json({"version": c.inputs["version"], "state": state}), state, output=state)


def _release(c: Context) -> Outcome:
    from facemllm.promotion import approvals, registry
    from facemllm.serving import deploy

    version = approvals.require_approved(c.settings, c.inputs["version"])
    folder = model_dir(c.settings, version)
    before = registry.champion(c.settings)
    put_back = before is not None and approvals.state(c.settings, before.version) == "approved"
    number = str(version.version)
    endpoint = deploy.release(c.settings, folder, version.digest, number, _probe(c, version), put_back=put_back)
    registry.set_alias(c.settings, version.version, "champion")
    return Outcome(version.digest, endpoint.predict_url, output=endpoint.predict_url)


def model_dir(settings: Settings, version: Any) -> Path:
    """Folder with a registered version's bytes, checked against its digest; fetched from MLflow if not here.

    Raises UserError when the bytes are not the registered ones.
    """
    path = settings.home / "store" / version.digest
    if not path.is_dir():
        from facemllm.promotion import registry

        return registry.fetch(settings, version.version, path)
    if digests.of_tree(path) != version.digest:
        raise UserError(
            f"{path}: the model's bytes do not match the digest of version {version.version} "
            f"({version.digest[:12]}); remove that folder and run again to fetch the registered bytes"
        )
    return path


def _probe(c: Context, version: Any) -> Any:
    """One closed question about one held-out face that evaluation answered, with the face's very bytes."""
    from facemllm.serving.deploy import Probe

    evaluation = c.store.path(version.evaluation)
    metrics = json.loads((evaluation / "metrics.json").read_text("utf-8"))
    samples = json.loads((evaluation / "samples" / "samples.json").read_text("utf-8"))
    asked = [(s["image_id"], q) for s in samples for q in s["questions"] if q["metric"] != "fact_f1"]
    if not asked:
        raise UserError("evaluation asked no closed question that staging could be proved by; add a task to qa.tasks")
    image_id, question = max(asked, key=lambda pair: (pair[1]["parsed"] is not None, pair[1]["metric"] != "mae"))
    conversations = open_table(c.store.path(metrics["conversations_digest"]), CONVERSATIONS)
    faces = conversations.iterate(["image_id", "images"], metrics["split"])
    image = next(face["images"][0]["bytes"] for face in faces if face["image_id"] == image_id)
    return Probe(image, question["question"], question["raw"], question["parsed"])


def _champion(settings: Settings) -> str:
    from facemllm.promotion import registry

    champion = registry.champion(settings)
    return champion.digest if champion else ""


def _stage_sections(stage: str) -> Callable[[Settings], Any]:
    def sections(s: Settings) -> Any:
        training = s.training.model_dump(exclude={"stages", "max_failures", "checkpoint_every"})
        return {"training": training, "stage": s.stages()[stage].model_dump(), "model": s.model.model_dump()}

    return sections


def _stage(name: str, inputs: Mapping[str, str]) -> Step:
    return Step(
        name=name,
        module="facemllm.training.launch",
        sections=_stage_sections(name),
        inputs=inputs,
        work=_train(name),
    )


def _dump(*names: str, **excluded: set[str]) -> Callable[[Settings], Any]:
    return lambda s: {name: getattr(s, name).model_dump(exclude=excluded.get(name)) for name in names}


_ALL = (
    Step(
        name="ingest",
        module="facemllm.sources.ingest",
        sections=_dump("data", data={"workers"}),
        inputs={},
        work=_ingest,
    ),
    Step(
        name="annotate",
        module="facemllm.annotation",
        sections=_dump("annotation", annotation={"concurrency", "batch_size"}),
        inputs={"faces": "ingest"},
        work=_annotate,
    ),
    Step(
        name="reformat",
        module="facemllm.qa",
        sections=_dump("qa"),
        inputs={"annotated": "annotate"},
        work=_reformat,
    ),
    Step(
        name="validate",
        module="facemllm.quality",
        sections=_dump("quality"),
        inputs={"annotated": "annotate", "conversations": "reformat"},
        work=_validate,
    ),
    Step(
        name="version",
        module="facemllm.versioning",
        sections=_dump("versioning"),
        inputs={"annotated": "annotate", "conversations": "reformat"},
        work=_version,
        still=_still_recorded,
    ),
    _stage("align", {"conversations": "reformat"}),
    _stage("instruct", {"conversations": "reformat", "model": "align"}),
    _stage("specialize", {"conversations": "reformat", "model": "instruct"}),
    Step(
        name="evaluate",
        module="facemllm.evaluation.evaluate",
        sections=_dump("evaluation"),
        inputs={"model": "specialize", "conversations": "reformat"},
        work=_evaluate,
    ),
    Step(
        name="gate",
        module="facemllm.promotion.gates",
        sections=_dump("promotion", promotion={"wait_minutes"}),
        inputs={"evaluation": "evaluate"},
        work=_gate,
        world={"champion": _champion},
        still=lambda settings, record: record["output"] == "passed",  # a refusal is told to the registry every time
    ),
    Step(
        name="register",
        module="facemllm.promotion.registry",
        sections=lambda s: {"model_name": s.promotion.model_name, "tracking": s.tracking.model_dump()},
        inputs={"model": "specialize", "evaluation": "evaluate", "gate": "gate"},
        work=_register,
        still=_still_registered,
    ),
    Step(
        name="deploy",
        module="facemllm.serving.deploy",
        sections=_dump("serving"),
        inputs={"version": "register"},
        work=_deploy,
        keeps=False,
    ),
    Step(
        name="await_approval",
        module="facemllm.promotion.approvals",
        sections=_dump("promotion"),
        inputs={"version": "register"},
        work=_await_approval,
        keeps=False,
    ),
    Step(
        name="release",
        module="facemllm.serving.deploy",
        sections=_dump("serving"),
        inputs={"version": "register"},
        work=_release,
        keeps=False,
    ),
)

STEPS: dict[str, Step] = {step.name: step for step in _ALL}
