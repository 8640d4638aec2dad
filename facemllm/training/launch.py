"""Launch of one training stage by Ray Train: 1..N workers, restarts from checkpoints, one clear error.

The only module that imports Ray, inside its functions. `train` is called by the steps align, instruct and specialize.
A worker that dies is restarted by Ray from the last checkpoint; a launch that dies goes on from it when called again
with the same `work` folder. Ray joins the head named by RAY_ADDRESS, else starts one for the time of the call.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from facemllm import cost, digests, progress
from facemllm.errors import UserError
from facemllm.machine import cores
from facemllm.records import CONVERSATIONS, open_table
from facemllm.settings import Settings

_RESULT, _FAILURE = "result.json", "failure.json"
_OBJECT_STORE_BYTES = 128 * 2**20
_PASSED_ON = ("FACEMLLM_", "MLFLOW_", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
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

OnLog = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainResult:
    """What a stage did. `cost`: device, seconds, samples, tokens, operations, memory and energy (`facemllm.cost`)."""

    steps: int
    resumed_from: int
    final_loss: float
    cost: dict[str, Any]


def train(
    stage: str,
    settings: Settings,
    conversations: Path,
    base: Path | None,
    out: Path,
    work: Path,
    cache: Path,
    on_log: OnLog | None = None,
) -> TrainResult:
    """Train one stage and write its model directory to `out`, which must not exist.

    `base` is the previous stage's model directory, None for the first stage: the preset or the hub checkpoint of the
    settings. `work` keeps checkpoints while the stage runs: call again with the same one to go on after a crash.
    `cache` keeps decoded pixels. `on_log(step, metrics)` is pickled and called by the first worker.
    Raises UserError with the cause in one line.
    """
    if stage not in settings.stages():
        raise UserError(f"no training stage '{stage}'; choose one of {', '.join(settings.stages())}")
    if out.exists():
        raise UserError(f"{out} exists already; choose another output folder or remove it")
    table = open_table(conversations, CONVERSATIONS)
    key = digests.of_json(
        {
            "stage": stage,
            "plan": settings.stages()[stage].model_dump(),
            "model": settings.model.model_dump(),
            "held_out": settings.qa.held_out,
            "lora": settings.training.lora.model_dump(),
            "precision": settings.training.precision,
            "seed": settings.seed,
            "conversations": table.digest,
            "base": digests.of_tree(base) if base is not None else None,
        }
    )
    work.mkdir(parents=True, exist_ok=True)
    for name in (_RESULT, _FAILURE):
        (work / name).unlink(missing_ok=True)
    run = f"{stage}-{key[:16]}"
    config: dict[str, Any] = {
        "stage": stage,
        "settings": settings.model_dump(),
        "conversations": str(conversations.resolve()),
        "base": str(base.resolve()) if base is not None else None,
        "out": str(out.resolve()),
        "work": str(work.resolve()),
        "run": run,
        "cache": str(cache.resolve()),
        "key": key,
        "on_log": on_log,
        "environment": {n: v for n, v in os.environ.items() if n.startswith(_PASSED_ON)},
    }
    os.environ.update({name: os.environ.get(name, value) for name, value in _RAY_SWITCHES.items()})
    with _ray(settings):
        _fit(config, settings, work)
    result = json.loads((work / _RESULT).read_text("utf-8"))
    shutil.rmtree(work / run, ignore_errors=True)  # the model is written: no more need of checkpoints
    return TrainResult(**result)


@contextmanager
def _ray(settings: Settings) -> Iterator[None]:
    """A connection to Ray: the running head, or one of our own for the time of the block."""
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                include_dashboard=False,
                num_cpus=max(settings.training.workers, os.cpu_count() or 1),
                object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )
    except Exception as error:
        hint = f"is the Ray head at {address} running?" if address else "is there memory left?"
        raise UserError(f"cannot start Ray: {_one_line(error)}; {hint}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _fit(config: dict[str, Any], settings: Settings, work: Path) -> None:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    training = settings.training
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if training.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=training.use_gpu, resources_per_worker=_resources(settings)
        ),
        run_config=RunConfig(
            name=config["run"],
            storage_path=str(work.resolve()),
            failure_config=FailureConfig(max_failures=training.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise _cause(config, error) from error
    if (work / _FAILURE).exists():
        raise _cause(config, None)
    if not (work / _RESULT).exists():
        raise UserError(f"training of stage {config['stage']} ended without a result; look into {work} and run again")


def _resources(settings: Settings) -> dict[str, float]:
    return {"CPU": 1, "GPU": 1} if settings.training.use_gpu else {"CPU": 1}


def _cause(config: dict[str, Any], error: Exception | None) -> UserError:
    """The one line a user needs: what a worker said, or what Ray says of the workers."""
    note = Path(config["work"]) / _FAILURE
    if note.exists():
        return UserError(json.loads(note.read_text("utf-8"))["message"])
    failures = getattr(error, "worker_failures", None) or {}
    text = _one_line(next(iter(failures.values()), error))
    return UserError(f"training of stage {config['stage']} failed: {text}")


def _one_line(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:400]


def _worker(config: dict[str, Any]) -> None:
    """One rank, inside a Ray actor. What a restart cannot mend is written down instead of raised."""
    os.environ.update(config["environment"])
    import ray.train

    world = ray.train.get_context().get_world_size()
    try:
        _train_rank(config)
    except (UserError, FloatingPointError) as error:
        if ray.train.get_context().get_world_rank() == 0 or not (Path(config["work"]) / _FAILURE).exists():
            (Path(config["work"]) / _FAILURE).write_text(json.dumps({"message": str(error)}), "utf-8")
        if world > 1:
            raise  # the other ranks may be waiting for this one


def _train_rank(config: dict[str, Any]) -> None:
    import ray.train
    import torch
    import torch.distributed as dist

    from facemllm.model.saving import save_model
    from facemllm.training import material
    from facemllm.training.loop import Job, decide_precision, run_stage

    settings = Settings.model_validate(config["settings"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    training = settings.training
    device = "cuda" if training.use_gpu else "cpu"
    torch.set_num_threads(training.threads or max(1, cores() // context.get_local_world_size()))

    table = open_table(Path(config["conversations"]), CONVERSATIONS)
    ready = material.prepare(
        settings,
        table,
        Path(config["base"]) if config["base"] else None,
        Path(config["cache"]),
        first=rank == 0,
        wait=dist.barrier if world > 1 else lambda: None,
    )
    job = Job(
        name=config["stage"],
        stage=settings.stages()[config["stage"]],
        lora=training.lora,
        seed=settings.seed,
        key=config["key"],
        model=settings.model,
        precision=decide_precision(training.precision, device),
        device=device,
        rank=rank,
        world=world,
        local_rank=context.get_local_rank(),
        checkpoint_every=training.checkpoint_every,
    )

    def keep(step: int, write: Callable[[Path], None]) -> None:
        with tempfile.TemporaryDirectory(dir=Path(config["work"]) / config["run"]) as folder:
            saved = None
            if rank == 0:
                write(Path(folder))
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=saved)

    with progress.bar(config["stage"], job.stage.steps) as bar:

        def log(step: int, metrics: dict[str, float]) -> None:
            bar.update(step, f"loss {metrics['loss']:.3f}, {metrics['images_per_second']:.0f} images/s")
            if config["on_log"] is not None:
                config["on_log"](step, metrics)

        with _last_checkpoint(Path(config["work"]) / config["run"]) as folder:
            outcome = run_stage(
                job, ready.model, ready.processor, ready.corpus, ready.faces, resume=folder, keep=keep, log=log
            )
    if rank == 0:
        if flush := getattr(config["on_log"], "flush", None):
            flush()  # this process ends soon, and curves are sent in the background
        # the launch saw that `out` did not exist: what is there now, a worker wrote that died on its way back
        shutil.rmtree(config["out"], ignore_errors=True)
        save_model(outcome.model, ready.processor, Path(config["out"]))
        spent = {
            "device": f"{cost.device_name(device, world)}, {job.precision}",
            "samples": outcome.samples,
            "tokens": outcome.tokens,
            "flops": outcome.flops,
            "peak_memory_bytes": cost.peak_memory_bytes(device),
            **outcome.spent,
        }
        result = TrainResult(outcome.steps, outcome.resumed_from, outcome.final_loss, cost.tidy(spent))
        (Path(config["work"]) / _RESULT).write_text(json.dumps(asdict(result)), "utf-8")


@contextmanager
def _last_checkpoint(storage: Path) -> Iterator[Path | None]:
    """The checkpoint to go on from: Ray's, unless a kill cut it short; then the newest whole one beside it."""
    import ray.train

    from facemllm.training import checkpoint

    last = ray.train.get_checkpoint()
    if last is None:
        yield None
        return
    with last.as_directory() as folder:
        if checkpoint.whole(Path(folder)):
            yield Path(folder)
            return
    yield next((p for p in sorted(storage.glob("checkpoint_*"), reverse=True) if checkpoint.whole(p)), None)
