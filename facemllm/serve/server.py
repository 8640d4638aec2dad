"""The model server: KServe's ModelServer around one model directory, made fit for strangers.

`python -m facemllm.serve.server --model DIR --digest SHA256 --port 18080` loads a private copy whose bytes have that
digest, not the directory itself: what happens to it afterwards does not matter. DIR may be the address of a model in a
store (`facemllm.serve.model_store`), as s3://bucket/models/SHA256. With `--decisions` and `--policy` it serves approved
models alone (`facemllm.serve.approval`); without them it listens on loopback and nowhere else, and `/info` says so:
`"authorized": null`. It serves safetensors only, fetches nothing else, and logs digests, never images or questions.
`--copy-to DIR` verifies, authorizes, copies and ends: the first container of a pod in a cluster. What `--evaluated`
names it leaves beside the copy. `--export-vllm DIR` leaves such a copy for vLLM, which then computes for `--engine
vllm` (docs/serving.md).

What it listens to is in `listening`, how it is asked in `doors`, who answers in `service`. torch and KServe, which take
6 s to import, are imported once the directory is known to be right.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from facemllm.core.files import atomic_write
from facemllm.core.machine import is_loopback
from facemllm.errors import UserError
from facemllm.serve import model_store
from facemllm.serve.approval import Approval
from facemllm.serve.engine.export import export_for_vllm, exported_from
from facemllm.serve.imports import without
from facemllm.signing import manifest
from facemllm.signing.canonical import Refused

if TYPE_CHECKING:
    from facemllm.serve.assembly import Loaded
    from facemllm.settings.serve import Serve

log = logging.getLogger("facemllm.serve")

UNSAFE = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py"})
EVALUATED = "evaluated.json"
"""The file of figures beside a verified copy."""
_STOP_SECONDS = 8
_FILES = 512  # beside connections
_SWITCH_S = 0.001  # longest that the event loop waits for the Python of other threads


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify, load and serve until SIGTERM; the exit code: 1, with one line on standard error, when refused.

    The line begins with the check that failed, in brackets, where one of signing's failed.
    """
    options = _options(arguments)
    try:
        approval = _approval(options)
        files = approval.files() if approval else {}
        if options.copy_to:
            require_loadable(model_store.copy_to(options.model, options.digest, options.copy_to, files))
            if options.evaluated:
                atomic_write(options.copy_to.parent / EVALUATED, model_store.read(options.evaluated))
        if options.export_vllm:
            source = options.copy_to or _folder(options.model)
            if not options.export_vllm.exists() or exported_from(options.export_vllm) != options.digest:
                export_for_vllm(source, options.export_vllm, options.digest)
        if options.copy_to or options.export_vllm:
            return 0
        scratch = options.scratch or Path(tempfile.gettempdir())
        with model_store.verified_copy(options.model, options.digest, scratch, files) as (copy, found):
            require_loadable(found)
            chosen = _serve_settings(options.config, {"name": options.engine, "vllm_url": options.vllm_url})
            loaded = _load(options, chosen, copy)
        if approval:
            approval.require()  # loading takes minutes
        _listen(options, chosen, loaded, approval)
    except UserError as error:
        check = f"[{error.check}] " if error.check else ""
        print(f"refused: {check}{' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def require_loadable(found: manifest.Manifest) -> None:
    """Refuse a model directory that holds files which can carry code, or no weights in safetensors."""
    if unsafe := [path for path in found.files if Path(path).suffix.lower() in UNSAFE]:
        raise Refused("files", f"the model holds {unsafe[0]}, which can carry code; only safetensors are served")
    if not any(path.endswith(".safetensors") and "/" not in path for path in found.files):
        raise Refused("files", "the model holds no *.safetensors; only safetensors are served")


def _approval(options: argparse.Namespace) -> Approval | None:
    """The approval of the model, which is in force. Raises Refused; None for a server of this machine alone."""
    if options.decisions and options.policy:
        approval = Approval(options.digest, options.decisions, options.policy, options.checkpoint)
        approval.require()
        return approval
    if options.decisions or options.policy:
        raise Refused("policy", "--decisions and --policy belong together: give both")
    if options.copy_to or not is_loopback(options.host):
        where = f"on {options.host}" if not options.copy_to else "from a copy"
        why = "only an approved model is served to other machines"
        raise Refused("policy", f"cannot serve {where} without --decisions and --policy: {why}")
    return None


def _folder(model: str) -> Path:
    if model_store.is_remote(model):
        raise UserError("--export-vllm of a model in a store needs --copy-to, where it is verified first")
    return Path(model)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="facemllm.serve.server", description="Serve one model directory.")
    parser.add_argument("--model", required=True, help="what save_pretrained wrote: a folder, or s3://...")
    parser.add_argument("--digest", required=True, help="SHA-256 of the directory, as approved")
    parser.add_argument("--decisions", help="decisions repository, a folder or an address")
    parser.add_argument("--policy", type=Path, help="file that lists who may decide")
    parser.add_argument("--checkpoint", type=Path, help="file that remembers the newest decision seen")
    parser.add_argument(
        "--scratch", type=Path, help="where the copy to load from is made; default: the temporary folder"
    )
    parser.add_argument("--copy-to", type=Path, help="leave the verified copy here and end, without serving")
    parser.add_argument("--version", default="", help="version in the registry, as /info gives it")
    parser.add_argument("--name", default="face-mllm", help="model name in the URLs")
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on")
    parser.add_argument(
        "--tasks", default="", help="tasks whose questions are known; default: those of its lineage.json"
    )
    parser.add_argument("--config", default="", help="JSON of the settings' section serve; default: params.yaml's")
    parser.add_argument("--engine", choices=("own", "vllm"), help="what computes; default: as in --config")
    parser.add_argument("--vllm-url", help="where vLLM listens, as in http://127.0.0.1:8000; default: as in --config")
    parser.add_argument("--export-vllm", type=Path, help="leave the model here as vLLM loads it and end")
    parser.add_argument("--evaluated", help="file of figures that GET /tasks gives, as deploy writes it; or s3://...")
    parser.add_argument("--answers", type=Path, default=Path("answers"), help="folder of answers, where they are kept")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--grpc-port", type=int, default=0, help="0: no gRPC")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="of a free answer")
    return parser.parse_args(arguments)


def _serve_settings(text: str, engine: Mapping[str, str | None] = MappingProxyType({})) -> Serve:
    """The settings in `--config`: a JSON object of keys of the section `serve`; what it leaves out is as in
    params.yaml. Keys of its section `engine` that are given win. Raises UserError."""
    from facemllm.settings import serving

    try:
        given = json.loads(text or "{}")
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise UserError('--config must be a JSON object of keys of the section serve, as in {"threads": 2}')
    chosen = serving(given, "--config")
    if wins := {key: value for key, value in engine.items() if value is not None}:
        chosen = serving({**given, "engine": chosen.engine.model_dump() | wins}, "--engine, --vllm-url")
    return chosen


def _load(options: argparse.Namespace, chosen: Serve, folder: Path) -> Loaded:
    gc.disable()  # imports leave no garbage, and a full collection of them takes long
    sys.argv = sys.argv[:1]  # KServe reads the command line when it is imported
    with without():
        from facemllm.model.inference import Predictor
        from facemllm.model.reader import Reader
        from facemllm.serve import observability
        from facemllm.serve.assembly import loaded, service_of
        from facemllm.serve.evaluated import Evaluated
        from facemllm.serve.predictor import known_tasks, taught_tasks
        from facemllm.serve.service import Served

    own = chosen.engine.name == "own"
    predictor = Predictor.load(folder, device=chosen.device, threads=chosen.threads) if own else Reader.open(folder)
    served = Served(options.name, options.version or None, options.digest)
    evaluated = Evaluated.read(options.evaluated)
    names = options.tasks or taught_tasks(folder)
    observer = observability.observer(served, known_tasks(names), chosen, options.answers)
    service = service_of(served, predictor, chosen, names, evaluated, options.max_new_tokens, observer)
    dtype: str = chosen.engine.vllm_dtype
    if isinstance(predictor, Predictor):
        dtype = str(predictor.model.dtype).removeprefix("torch.")
    return loaded(service, chosen, predictor, options.max_new_tokens, dtype)


def _listen(options: argparse.Namespace, chosen: Serve, loaded: Loaded, approval: Approval | None) -> None:
    from facemllm.serve.guard.descriptors import allow_files
    from facemllm.serve.listening import FaceServer, Listening
    from facemllm.serve.metrics import follow_approval

    service = loaded.service
    about: dict[str, Any] = {"model": options.name, "digest": options.digest, "version": options.version or None}
    about |= {"tasks": list(service.tasks), "maps": service.takes_maps}
    about |= {
        "engine": chosen.engine.name,
        "dtype": loaded.dtype,
        "characteristics": list(service.characteristic_names),
    }

    def info() -> dict[str, Any]:
        return {**about, "authorized": approval.info() if approval else None}

    max_bytes = int(chosen.max_body_mb * 2**20)
    at = Listening(
        options.host, options.port, options.grpc_port, chosen.guard, max_bytes, chosen.drain_s, _STOP_SECONDS
    )
    warnings.filterwarnings("ignore", message="ORJSONResponse")  # KServe's, once for every route
    server = FaceServer(at, lambda plane: loaded.routers(plane, info))
    for name in ("uvicorn.access", "kserve", "kserve.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    by = " and ".join(one["person"] for one in approval.info()["approvals"]) if approval else "nobody"
    log.info("serving %s, approved by %s, on %s:%d", options.digest[:12], by, options.host, options.port)
    if approval:
        follow_approval(lambda: approval.withdrawn)
        approval.watch(lambda ready: setattr(loaded.model, "ready", ready))
    allow_files(2 * chosen.guard.max_connections + _FILES)
    sys.setswitchinterval(_SWITCH_S)
    gc.freeze()
    gc.enable()
    server.start([loaded.model])


if __name__ == "__main__":
    sys.exit(main())
