"""The model server: KServe's ModelServer around one model directory.

`python -m facemllm.serve.server --model DIR --digest SHA256 --port 18080` loads nothing before the directory's bytes
match the digest, serves safetensors only, and listens on 127.0.0.1 unless `--host` says otherwise (0.0.0.0 in a
container). It fetches nothing, and logs digests, never images or questions. Ready in about 8 s, of which torch and
KServe take 6 to import.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from facemllm.core import digests
from facemllm.errors import UserError

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
        raise UserError(
            f"{model} has digest {found[:12]}, not {digest[:12]}: its bytes are not those that were approved"
        )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="facemllm.serve.server", description="Serve one model directory.")
    parser.add_argument("--model", type=Path, required=True, help="what save_pretrained wrote")
    parser.add_argument("--digest", required=True, help="SHA-256 of the directory, as approved")
    parser.add_argument("--version", default="", help="version in the registry, told by /info")
    parser.add_argument("--name", default="face-mllm", help="model name in the URLs")
    parser.add_argument("--host", default="127.0.0.1", help="interface to listen on")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument(
        "--tasks", default="", help="tasks whose questions are known, by commas; default: all but sensitive ones"
    )
    parser.add_argument("--max-body-mb", type=float, default=8)
    parser.add_argument("--max-pixels", type=int, default=16_000_000)
    parser.add_argument("--max-question-chars", type=int, default=500)
    parser.add_argument("--max-instances", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def _serve(options: argparse.Namespace) -> None:
    sys.argv = sys.argv[:1]  # KServe reads the command line when it is imported
    import kserve.model_server as kserve_server

    from facemllm.model.inference import Predictor
    from facemllm.serve.policy import Limits
    from facemllm.serve.predictor import FaceModel, known_tasks
    from facemllm.serve.rest import rest_server

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
    info: dict[str, Any] = {
        "model": options.name,
        "digest": options.digest,
        "version": options.version or None,
        "tasks": names,
        "maps": model.takes_maps,
        "characteristics": list(model.characteristic_names),
    }
    server = kserve_server.ModelServer(
        http_port=options.port, enable_grpc=False, enable_latency_logging=False, grace_period=_STOP_SECONDS
    )
    # The only way to choose the interface: KServe has 0.0.0.0 in its code.
    kserve_server.RESTServer = rest_server(options.host, int(options.max_body_mb * 2**20), info)
    warnings.filterwarnings("ignore", message="ORJSONResponse")  # KServe's, once for every route
    for name in ("uvicorn.access", "kserve", "kserve.trace"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("facemllm.serve").info("serving %s on %s:%d", options.digest[:12], options.host, options.port)
    server.start([model])


if __name__ == "__main__":
    sys.exit(main())
