"""The model server: KServe's ModelServer around one model directory, made fit for strangers.

`python -m facemllm.serve.server --model DIR --digest SHA256 --port 18080` loads nothing before the directory's bytes
match the digest, serves safetensors only, and listens on 127.0.0.1 unless `--host` says otherwise (0.0.0.0 in a
container). It fetches nothing, and logs digests, never images or questions. KServe as it comes listens on every
interface, accepts bodies of any size, lets anyone unload the model, writes a stack trace into the log for every bad
request and tells the client the text of any exception; here every refusal is one line. torch and KServe, which take 6 s
to import, are imported once the directory is known to be right.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from facemllm.core import digests
from facemllm.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

log = logging.getLogger("facemllm.serve")

UNSAFE = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py"})
_STOP_SECONDS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, load and serve until SIGTERM; the exit code: 1, with one line on standard error, when refused."""
    options = _options(arguments)
    try:
        check(options.model, options.digest)
        _serve(options)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def check(model: Path, digest: str) -> None:
    """Refuse a directory whose bytes are not those of `digest`, or which holds files that can carry code."""
    if not model.is_dir():
        raise UserError(f"{model} is not a model directory")
    if unsafe := sorted(p.name for p in model.rglob("*") if p.suffix.lower() in UNSAFE):
        raise UserError(f"{model} holds {unsafe[0]}, which can carry code; only safetensors are served")
    if not any(model.glob("*.safetensors")):
        raise UserError(f"{model} holds no *.safetensors")
    if (found := digests.of_tree(model, fresh=True)) != digest:
        have = f"{model} has digest {found[:12]}, not {digest[:12]}"
        raise UserError(f"{have}: its bytes are not those that were approved")


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="facemllm.serve.server", description="Serve one model directory.")
    parser.add_argument("--model", type=Path, required=True, help="what save_pretrained wrote")
    parser.add_argument("--digest", required=True, help="SHA-256 of the directory, as approved")
    parser.add_argument("--version", default="", help="version in the registry, as /info gives it")
    parser.add_argument("--name", default="face-mllm", help="model name in the URLs")
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on")
    parser.add_argument("--tasks", default="", help="tasks whose questions are known; default: all but sensitive ones")
    parser.add_argument("--max-body-mb", type=float, default=8)
    numbers = {"port": 8080, "max-pixels": 16_000_000, "max-question-chars": 500, "max-instances": 32}
    for name, default in (numbers | {"max-new-tokens": 96, "batch-size": 16, "threads": 1}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser.parse_args(arguments)


def _serve(options: argparse.Namespace) -> None:
    sys.argv = sys.argv[:1]  # KServe reads the command line when it is imported
    import kserve.model_server as kserve_server

    from facemllm.model.inference import Predictor
    from facemllm.serve.policy import Limits
    from facemllm.serve.predictor import FaceModel, known_tasks

    names = known_tasks(options.tasks)
    model = FaceModel(
        options.name,
        Predictor.load(options.model, device="cpu", threads=options.threads),
        names=names,
        limits=Limits(options.max_body_mb, options.max_pixels, options.max_question_chars, options.max_instances),
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    model.load()
    info: dict[str, Any] = {"model": options.name, "digest": options.digest, "version": options.version or None}
    info |= {"tasks": names, "maps": model.takes_maps, "characteristics": list(model.characteristic_names)}
    server = kserve_server.ModelServer(
        http_port=options.port, enable_grpc=False, enable_latency_logging=False, grace_period=_STOP_SECONDS
    )
    # The only way to choose the interface: KServe has 0.0.0.0 in its code.
    kserve_server.RESTServer = rest_server(options.host, int(options.max_body_mb * 2**20), info)
    warnings.filterwarnings("ignore", message="ORJSONResponse")  # KServe's, once for every route
    for name in ("uvicorn.access", "kserve", "kserve.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    log.info("serving %s on %s:%d", options.digest[:12], options.host, options.port)
    server.start([model])


def rest_server(host: str, max_bytes: int, info: dict[str, Any]) -> Any:
    """A REST server class that KServe can use in place of its own; `info` is what GET /info gives."""
    from kserve.protocol.rest.server import RESTServer

    from facemllm.serve.policy import BodyLimit

    class FaceRESTServer(RESTServer):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            super().__init__(*arguments, **keywords)
            self.config.host = host

        def _register_endpoints(self, app: FastAPI) -> None:
            @app.get("/info")
            async def give() -> dict[str, Any]:
                return info

            @app.post("/v2/repository/{rest:path}")  # the first route wins: KServe's would load and unload the model
            async def closed(rest: str) -> None:
                raise NotImplementedError

            super()._register_endpoints(app)

        def _add_middlewares(self, app: FastAPI) -> None:
            app.add_middleware(BodyLimit, max_bytes=max_bytes)

        def _add_exception_handlers(self, app: FastAPI) -> None:
            add_handlers(app)

    return FaceRESTServer


def add_handlers(app: FastAPI) -> None:
    """Turn every exception into `{"error": line}`; what is not meant for the client stays in the log."""
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from kserve import errors
    from starlette.exceptions import HTTPException

    from facemllm.serve.policy import Refused

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
