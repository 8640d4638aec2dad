"""KServe's V2 protocol over gRPC: one host, bounded messages, no loading or unloading, refusals with their reason."""

from __future__ import annotations

import math
import time
from typing import Any

import grpc
from grpc_interceptor.server import AsyncServerInterceptor
from kserve import InferRequest, errors
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer

from facemllm.errors import UserError
from facemllm.serve.caller import CALLER, Caller
from facemllm.serve.doors import infer
from facemllm.serve.doors.errors import INTERNAL, log, one_line, place
from facemllm.serve.guard import connections
from facemllm.serve.language import Refused
from facemllm.serve.observer import Observer, grpc_interceptor
from facemllm.settings.serve import Guard

Code = grpc.StatusCode
_OF_STATUS = {
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    408: Code.DEADLINE_EXCEEDED,
    413: Code.RESOURCE_EXHAUSTED,
    429: Code.RESOURCE_EXHAUSTED,
    501: Code.UNIMPLEMENTED,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
}


class Grpc(GRPCServer):
    """KServe's gRPC server on one host, within the limits of `guard`."""

    def __init__(
        self,
        plane: Any,
        extension: Any,
        host: str,
        port: int,
        guard: Guard,
        max_bytes: int,
        grace_s: int,
        observer: Observer | None = None,
    ) -> None:
        super().__init__(port, plane, extension, {}, grace_s)
        self._host, self._guard, self._max_bytes = host, guard, max_bytes
        self._observer = observer or Observer()
        self._credentials = connections.grpc_credentials(guard)

    async def start(self, max_workers: int | None = None) -> None:
        """Serve until `stop`. Raises UserError if the port is taken."""
        options = connections.grpc_options(self._guard, self._max_bytes)
        interceptors = [grpc_interceptor(self._observer), *connections.grpc_interceptors(self._guard), Statuses()]
        self._server = grpc.aio.server(interceptors=interceptors, options=options)
        servicer = Servicer(self._data_plane, self._model_repository_extension)
        add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        address = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        try:
            if self._credentials is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, self._credentials)
        except RuntimeError:
            what = f"gRPC cannot listen on {address}; end what listens there, or choose another port"
            raise UserError(f"{what} (services.staging_grpc_port, production_grpc_port; 0: no gRPC)") from None
        await self._server.start()
        await self._server.wait_for_termination()


class Servicer(InferenceServicer):
    """KServe's servicer, which loads and unloads nothing, and knows who calls and until when."""

    async def ModelInfer(self, request: pb.ModelInferRequest, context: Any) -> pb.ModelInferResponse:
        """Answer a request."""
        left = context.time_remaining()
        host = context.peer().rpartition(":")[0] or context.peer()
        CALLER.set(Caller(CALLER.get().client or host, None if left is None else time.monotonic() + left))
        infer.require_few(request)
        self.validate_grpc_request(request)
        response, _ = await self._data_plane.infer(request.model_name, InferRequest.from_grpc(request), {})
        answer: pb.ModelInferResponse = response.to_grpc()
        return answer

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        """Closed."""
        raise NotImplementedError

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        """Closed."""
        raise NotImplementedError


class Statuses(AsyncServerInterceptor):
    """Every exception as a status with one line; what is not meant for the client stays here.

    No call is aborted: its context would hold the exception, and so the message, until garbage is collected.
    """

    async def intercept(self, method: Any, request_or_iterator: Any, context: Any, method_name: str) -> Any:
        """The answer, or none with a status."""
        try:
            return await method(request_or_iterator, context)
        except Exception as error:
            code, line = _status(error, context)
            context.set_code(code)
            context.set_details(one_line(line))
            return None


def _status(error: Exception, context: Any) -> tuple[grpc.StatusCode, str]:
    match error:
        case Refused():
            log.info("refused with %d", error.status)
            if error.retry_after is not None:
                context.set_trailing_metadata((("retry-after", str(max(1, math.ceil(error.retry_after)))),))
            return _OF_STATUS.get(error.status, Code.INVALID_ARGUMENT), error.reason
        case errors.InvalidInput() | errors.InferenceError() | errors.UnsupportedProtocol():
            return Code.INVALID_ARGUMENT, str(error.reason)
        case errors.ModelNotFound():
            return Code.NOT_FOUND, "no such model"
        case errors.ModelNotReady() | errors.ServerNotReady() | errors.ServerNotLive():
            return Code.UNAVAILABLE, "the model is not ready"
        case NotImplementedError():
            return Code.UNIMPLEMENTED, "not offered by this server"
    log.error("%s while answering, %s", type(error).__name__, place(error))
    return Code.INTERNAL, INTERNAL
