"""The steps of the workflow, in order: the one list that components, commands and the DVC graph are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from facemllm.core.step import Step
from facemllm.settings import Settings
from facemllm.workflow import deciding, making

_LAUNCH = {"max_failures", "checkpoint_every", "storage", "min_workers", "divergence"}
_ECONOMY = {"feature_cache", "recompute", "micro_images", "row_tokens", "sharding", "compile"}
"""Of `training`, what decides nothing of what is learnt: whoever runs out of memory may change it and go on."""


def _stage_sections(stage: str) -> Callable[[Settings], Any]:
    def sections(s: Settings) -> Any:
        training = s.train.model_dump(exclude={"stages"} | _LAUNCH | _ECONOMY)
        plan = s.stages()[stage].model_dump()
        # a map of face parts does not show what is held out
        return {"train": training, "stage": plan, "model": s.model.model_dump(), "held_out": s.reformat.held_out}

    return sections


def _stage(name: str, inputs: Mapping[str, str]) -> Step:
    return Step(
        name=name,
        module="facemllm.train.launch",
        sections=_stage_sections(name),
        inputs=inputs,
        work=making.train(name),
    )


def _dump(*names: str, **excluded: set[str]) -> Callable[[Settings], Any]:
    return lambda s: {name: getattr(s, name).model_dump(exclude=excluded.get(name)) for name in names}


_ALL = (
    Step(
        name="ingest",
        module="facemllm.ingest.run",
        sections=making.what_ingest_reads,
        inputs={},
        work=making.ingest,
    ),
    Step(
        name="annotate",
        module="facemllm.annotate",
        sections=making.what_annotate_reads,
        inputs={"faces": "ingest"},
        work=making.annotate,
    ),
    Step(
        name="reformat",
        module="facemllm.reformat.run",
        sections=_dump("reformat"),
        inputs={"annotated": "annotate"},
        work=making.reformat,
    ),
    Step(
        name="validate",
        module="facemllm.validate.run",
        sections=making.what_validate_reads,
        inputs={"faces": "ingest", "annotated": "annotate", "conversations": "reformat"},
        work=making.validate,
    ),
    Step(
        name="version",
        module="facemllm.version",
        sections=_dump("version"),
        inputs={"annotated": "annotate", "conversations": "reformat"},
        work=making.version,
        still=making.still_recorded,
    ),
    _stage("align", {"conversations": "reformat"}),
    _stage("instruct", {"conversations": "reformat", "model": "align"}),
    _stage("specialize", {"conversations": "reformat", "model": "instruct"}),
    Step(
        name="evaluate",
        module="facemllm.evaluate.run",
        sections=_dump("evaluate"),
        inputs={"model": "specialize", "conversations": "reformat"},
        work=making.evaluate,
    ),
    Step(
        name="gate",
        module="facemllm.promote.gates",
        sections=_dump("promote", promote={"wait_minutes"}),
        inputs={"evaluation": "evaluate"},
        work=deciding.gate,
        world={"champion": deciding.champion},
        still=lambda settings, record: record["output"] == "passed",  # a refusal is told to the registry every time
    ),
    Step(
        name="register",
        module="facemllm.promote.registry",
        sections=lambda s: {"model_name": s.promote.model_name, "tracking": s.tracking.model_dump()},
        inputs={"model": "specialize", "evaluation": "evaluate", "gate": "gate"},
        work=deciding.register,
        still=deciding.still_registered,
    ),
    Step(
        name="deploy",
        module="facemllm.serve.deploy",
        sections=_dump("serve"),
        inputs={"version": "register"},
        work=deciding.deploy,
        keeps=False,
    ),
    Step(
        name="await_approval",
        module="facemllm.promote.approvals",
        sections=_dump("promote"),
        inputs={"version": "register"},
        work=deciding.await_approval,
        keeps=False,
    ),
    Step(
        name="release",
        module="facemllm.serve.deploy",
        sections=_dump("serve"),
        inputs={"version": "register"},
        work=deciding.release,
        keeps=False,
    ),
)

STEPS: dict[str, Step] = {step.name: step for step in _ALL}
