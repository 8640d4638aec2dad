"""The model server: KServe's ModelServer around one model directory, made fit for strangers.

`python -m facemllm.serve.server --model DIR --digest SHA256 --port 18080` loads a private copy whose bytes have that
digest, not the directory itself: what happens to it afterwards does not matter. With `--decisions` and `--policy` it
serves approved models alone (`facemllm.serve.approval`); without them it listens on loopback and nowhere else, and
`/info` says so: `"authorized": null`. It serves safetensors only, fetches nothing, and logs digests, never images or
questions. `--copy-to DIR` verifies, authorizes, copies and ends: the first container of a pod in a cluster.

KServe as it comes listens on every interface, accepts bodies of any size, lets anyone unload the model, writes a stack
trace into the log for every bad request and tells the client the text of any exception; here every refusal is one line.
torch and KServe, which take 6 s to import, are imported once the directory is known to be right.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facemllm.errors import UserError
from facemllm.serve.approval import Approval
from facemllm.signing import manifest
from facemllm.signing.canonical import Refused

if TYPE_CHECKING:
    from fastapi import FastAPI

    from facemllm.serve.predictor import FaceModel
    from facemllm.settings.operations import Guard

log = logging.getLogger("facemllm.serve")

UNSAFE = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py"})
_STOP_SECONDS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify, load and serve until SIGTERM; the exit code: 1, with one line on standard error, when refused.

    The line begins with the check that failed, in brackets, where one of signing's failed.
    """
    options = _options(arguments)
    try:
        approval = _approval(options)
        files = approval.files() if approval else {}
        if options.copy_to:
            require_loadable(manifest.copy_to(options.model, options.digest, options.copy_to, files))
            return 0
        with manifest.verified_copy(options.model, options.digest, options.scratch, files) as (copy, found):
            require_loadable(found)
            model = _load(options, copy)
        if approval:
            approval.require()  # loading takes minutes
        _serve(options, model, approval)
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
    if options.copy_to or not _loopback(options.host):
        where = f"on {options.host}" if not options.copy_to else "from a copy"
        why = "only an approved model is served to other machines"
        raise Refused("policy", f"cannot serve {where} without --decisions and --policy: {why}")
    return None


def _loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="facemllm.serve.server", description="Serve one model directory.")
    parser.add_argument("--model", type=Path, required=True, help="what save_pretrained wrote")
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
    parser.add_argument("--tasks", default="", help="tasks whose questions are known; default: all but sensitive ones")
    parser.add_argument("--max-body-mb", type=float, default=8)
    parser.add_argument("--guard", default="", help="JSON of the settings' section serve.guard; default: params.yaml's")
    numbers = {"port": 8080, "max-pixels": 16_000_000, "max-question-chars": 500, "max-instances": 32}
    for name, default in (numbers | {"max-new-tokens": 96, "batch-size": 16, "threads": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(arguments)


def _load(options: argparse.Namespace, folder: Path) -> FaceModel:
    sys.argv = sys.argv[:1]  # KServe reads the command line when it is imported
    from facemllm.model.inference import Predictor
    from facemllm.serve.language import Limits
    from facemllm.serve.predictor import FaceModel, known_tasks

    model = FaceModel(
        options.name,
        Predictor.load(folder, device="cpu", threads=options.threads),
        names=known_tasks(options.tasks),
        limits=Limits(options.max_body_mb, options.max_pixels, options.max_question_chars, options.max_instances),
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    model.load()
    return model


def _serve(options: argparse.Namespace, model: FaceModel, approval: Approval | None) -> None:
    import kserve.model_server as kserve_server

    from facemllm.serve.predictor import known_tasks

    about: dict[str, Any] = {"model": options.name, "digest": options.digest, "version": options.version or None}
    about |= {"tasks": known_tasks(options.tasks), "maps": model.takes_maps}
    about |= {"characteristics": list(model.characteristic_names)}

    def info() -> dict[str, Any]:
        return {**about, "authorized": approval.info() if approval else None}

    server = kserve_server.ModelServer(
        http_port=options.port, enable_grpc=False, enable_latency_logging=False, grace_period=_STOP_SECONDS
    )
    # The only way to choose the interface: KServe has 0.0.0.0 in its code.
    kserve_server.RESTServer = rest_server(
        options.host, int(options.max_body_mb * 2**20), info, lambda: bool(model.ready), _guard(options.guard)
    )
    warnings.filterwarnings("ignore", message="ORJSONResponse")  # KServe's, once for every route
    for name in ("uvicorn.access", "kserve", "kserve.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    by = " and ".join(one["person"] for one in approval.info()["approvals"]) if approval else "nobody"
    log.info("serving %s, approved by %s, on %s:%d", options.digest[:12], by, options.host, options.port)
    if approval:
        approval.watch(lambda ready: setattr(model, "ready", ready))
    server.start([model])


def _guard(text: str) -> Guard:
    from facemllm.settings import plain
    from facemllm.settings.operations import Guard

    return Guard.model_validate_json(text) if text else plain().serve.guard


def rest_server(
    host: str, max_bytes: int, info: Callable[[], dict[str, Any]], ready: Callable[[], bool], guard: Guard
) -> Any:
    """A REST server class that KServe can use in place of its own; `info` is what GET /info gives, `ready` what
    GET /v2/health/ready does."""
    from kserve.errors import ServerNotReady
    from kserve.protocol.rest.server import RESTServer

    from facemllm.serve.guard import connections, middleware

    class FaceRESTServer(RESTServer):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.config.host = host
            connections.apply(self.config, guard)

        def _register_endpoints(self, app: FastAPI) -> None:
            @app.get("/info")
            async def give() -> dict[str, Any]:
                return info()

            @app.get("/v2/health/ready")  # KServe's says yes whatever its models say
            async def give_ready() -> dict[str, Any]:
                if not ready():
                    raise ServerNotReady()
                return {"ready": True}

            @app.post("/v2/repository/{rest:path}")  # the first route wins: KServe's would load and unload the model
            async def closed(rest: str) -> None:
                raise NotImplementedError

            super()._register_endpoints(app)

        def _add_middlewares(self, app: FastAPI) -> None:
            middleware.install(app, guard, max_bytes)

        def _add_exception_handlers(self, app: FastAPI) -> None:
            add_handlers(app)

    return FaceRESTServer


def add_handlers(app: FastAPI) -> None:
    """Turn every exception into `{"error": line}`; what is not meant for the client stays in the log."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from kserve import errors
    from starlette.exceptions import HTTPException

    from facemllm.serve.language import Refused

    def misfit(error: Any) -> tuple[int, str]:
        first = error.errors()[0]
        return 422, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"

    answers: dict[type[Exception], Any] = {
        Refused: lambda error: (error.status, error.reason),
        errors.InvalidInput: lambda error: (400, str(error)),
        RequestValidationError: misfit,
        HTTPException: lambda error: (error.status_code, str(error.detail)),
        errors.ModelNotFound: lambda _: (404, "no such model; GET /v1/models lists them"),
        Exception: lambda _: (500, "internal error; the server's log has the details"),
    }
    not_ready = (errors.ModelNotReady, errors.ServerNotReady, errors.ServerNotLive)
    answers |= dict.fromkeys(not_ready, lambda _: (503, "the model is not ready"))
    not_offered = (NotImplementedError, errors.UnsupportedProtocol)
    answers |= dict.fromkeys(not_offered, lambda _: (501, "not offered by this server"))

    def handler(kind: type[Exception]) -> Any:
        async def handle(_: Any, error: Exception) -> JSONResponse:
            status, reason = answers[kind](error)
            if kind is Refused:
                log.info("refused with %d", status)
            elif kind is Exception:
                log.error("%s while answering", type(error).__name__)
            return JSONResponse({"error": " ".join(reason.split())[:500]}, status_code=status)

        return handle

    for kind in answers:
        app.add_exception_handler(kind, handler(kind))


if __name__ == "__main__":
    sys.exit(main())
