"""Launch of one training stage by Ray Train: 1..N workers, restarts from checkpoints, one clear error.

The only module of training that imports Ray, inside its functions. A worker that dies is restarted by Ray and goes on
from the last checkpoint; a launch that dies goes on from it when called again with the same `work` folder. Ray joins
the head named by RAY_ADDRESS, else starts one for the time of the call. Checkpoints do not pass through Ray.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from facemllm.core.files import locked
from facemllm.core.machine import cores
from facemllm.core.objects import filesystem
from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.train.stage import Log, StageRun, TrainResult, clean_up, prepare_run

_RESULT, _FAILURE = "result.json", "failure.json"
_OBJECT_STORE_BYTES = 128 * 2**20
_PASSED_ON = ("FACEMLLM_", "MLFLOW_", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
# Ray Train polls its workers every 2 s and starts watchers that one machine does not need
_RAY_SWITCHES = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_STATE_ACTOR_RECONCILIATION": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's own default of 15 lets any other process starve the training
}


def train(
    stage: str,
    settings: Settings,
    conversations: Path,
    base: Path | None,
    out: Path,
    work: Path,
    cache: Path,
    on_log: Log | None = None,
    base_digest: str | None = None,
) -> TrainResult:
    """Train one stage and write its model directory to `out`, which must not exist.

    `base` is the previous stage's model directory, None for the first stage: the preset or the hub checkpoint of the
    settings; `base_digest` is its digest, where the caller knows it. `work` keeps checkpoints while the stage runs,
    unless `train.storage` names another place: call again with the same one to go on after a crash. `cache` keeps
    decoded pixels. `on_log` is pickled and called by the first worker. Raises UserError with the cause in one line,
    also while another launch uses `work`.
    """
    with locked(work / ".lock", f"another training uses {work}; wait for it or give another folder"):
        return _train(prepare_run(stage, settings, conversations, base, out, work, cache, base_digest), on_log)


def _train(run: StageRun, on_log: Log | None) -> TrainResult:
    for name in (_RESULT, _FAILURE):
        (run.work / name).unlink(missing_ok=True)
    os.environ.update({name: os.environ.get(name, value) for name, value in _RAY_SWITCHES.items()})
    with _ray(run.settings):
        _enough(run.settings)
        _fit(run, on_log)
    result = json.loads((run.work / _RESULT).read_text("utf-8"))
    clean_up(run)
    shutil.rmtree(run.work / run.run_name, ignore_errors=True)  # what Ray keeps of a run
    return TrainResult(**result)


@contextmanager
def _ray(settings: Settings) -> Iterator[None]:
    """A connection to Ray: the running head, or one of our own for the time of the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "address": address or None}
    if not address:
        options |= {"include_dashboard": False, "num_cpus": max(settings.train.workers, cores())}
        options["object_store_memory"] = _OBJECT_STORE_BYTES
    try:
        ray.init(**options)
    except Exception as error:
        hint = f"is the Ray head at {address} running?" if address else "is there memory left?"
        raise UserError(f"cannot start Ray: {_one_line(error)}; {hint}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _enough(settings: Settings) -> None:
    """Raise UserError when the cluster has no room for the workers: Ray itself would wait for it for ever."""
    import ray

    training = settings.train
    fewest = training.min_workers or training.workers
    has = ray.cluster_resources()
    for kind, each in _resources(settings).items():
        if has.get(kind, 0) < fewest * each:
            hint = "train.workers, or set train.use_gpu=false" if kind == "GPU" else "train.workers"
            raise UserError(
                f"{fewest} workers need {fewest * each:g} {kind}s, and Ray's cluster has {has.get(kind, 0):g}; "
                f"lower {hint}"
            )


def _fit(run: StageRun, on_log: Log | None) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    training = run.settings.train
    given = {n: v for n, v in os.environ.items() if n.startswith(_PASSED_ON + _OFFLINE)}
    workers: Any = training.workers
    if training.min_workers is not None and training.min_workers < training.workers:
        workers = (training.min_workers, training.workers)
    storage: dict[str, Any] = {"storage_path": str(run.work)}  # of Ray's own account: beside the checkpoints
    if training.storage is not None and "://" in training.storage:
        system, path = filesystem(training.storage)
        storage = {"storage_path": path, "storage_filesystem": system}
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run": run, "on_log": on_log, "environment": given},
        torch_config=TorchConfig(backend="nccl" if training.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=training.use_gpu, resources_per_worker=_resources(run.settings)
        ),
        run_config=RunConfig(
            name=run.run_name, **storage, failure_config=FailureConfig(max_failures=training.max_failures)
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise _cause(run, error) from error
    if (run.work / _FAILURE).exists():
        raise _cause(run, None)
    if not (run.work / _RESULT).exists():
        raise UserError(f"training of stage {run.name} ended without a result; look into {run.work} and run again")


def _resources(settings: Settings) -> dict[str, float]:
    return {"CPU": 1, "GPU": 1} if settings.train.use_gpu else {"CPU": 1}


def _cause(run: StageRun, error: Exception | None) -> UserError:
    """The one line a user needs: what a worker said, or what Ray says of the workers."""
    note = run.work / _FAILURE
    if note.exists():
        return UserError(json.loads(note.read_text("utf-8"))["message"])
    failures = getattr(error, "worker_failures", None) or {}
    failed = next(iter(failures.values()), error)
    return UserError(f"training of stage {run.name} failed: {_in_words(failed)}")


def _in_words(failed: Any) -> str:
    """A worker's end: Ray's own words for it fill a page, and name neither cause nor remedy."""
    said = f"{type(failed).__name__}: {failed}"
    if re.search(r"OutOfMemoryError|running low on memory|out of memory|OOM", said):
        return (
            "a worker was ended because the machine's memory was full; lower train.workers or the stage's "
            "batch_images, or run it where there is more"
        )
    if re.search(r"ActorDied|WorkerCrashed|ActorUnavailable|worker died|connection error code", said, re.IGNORECASE):
        return (
            "a worker was killed more often than train.max_failures allows (by hand, or by the system when memory "
            "was full); run again to go on from the last checkpoint"
        )
    return _one_line(failed)


def _one_line(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:400]


def _worker(config: dict[str, Any]) -> None:
    """One rank, inside a Ray actor. What a restart cannot mend is written down instead of raised."""
    os.environ.update(config["environment"])
    import ray.train

    from facemllm.train.worker import train_worker

    context = ray.train.get_context()
    run: StageRun = replace(
        config["run"],
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
    )
    failure = run.work / _FAILURE
    if failure.exists():
        return  # Ray has started the workers again, for what no restart mends
    try:
        result = train_worker(run, config["on_log"])
    except (UserError, FloatingPointError) as error:
        if run.rank == 0 or not failure.exists():
            failure.write_text(json.dumps({"message": str(error)}), "utf-8")
        if run.world_size > 1:
            raise  # the other ranks may be waiting for this one
        return
    if result is not None:
        (run.work / _RESULT).write_text(json.dumps(asdict(result)), "utf-8")
