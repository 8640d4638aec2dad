"""KServe's V2 infer (Open Inference Protocol), REST and gRPC: tensors of BYTES in, tensors out.

`image` holds one picture for all questions or one for each: the bytes of a file, or base64 (in JSON always). What is
asked stands in `question`, or in `task` and `item`. `segmentation` may hold maps of face parts. Every output has as
many elements as there are questions; what there is not is empty, a probability -1.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.infer_type import RequestedOutput

from facemllm.serve.doors.reading import Pictures, read_json, read_names, read_text
from facemllm.serve.language import Answer, Answers, Ask, Encoded, Limits, Question, Refused
from facemllm.serve.service import Served

INPUTS = [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in ("image", "question")]
OUTPUTS = [
    {"name": name, "datatype": "FP64" if name == "probability" else "BYTES", "shape": [-1]}
    for name in ("answer", "value", "probability", "kind", "task", "item", "scores", "rule", "reason")
]
NONE = -1.0
MOST_ELEMENTS, MOST_PARTS = 4096, 64
"""Elements of a tensor, and its dimensions, or tensors and parameters of a request: more are refused before they are
read one by one, which holds up everybody."""
_CONTENTS = tuple(field.name for field in pb.InferTensorContents.DESCRIPTOR.fields)
_INPUTS = ("image", "question", "task", "item", "segmentation")
_OUTPUTS = tuple(str(output["name"]) for output in OUTPUTS)


def require_few(request: pb.ModelInferRequest) -> None:
    """Refuse a gRPC message of too many parts, before KServe reads them. Raises Refused (413)."""
    inputs, raw = request.inputs, request.raw_input_contents
    parts = [len(inputs), len(raw), len(request.outputs), len(request.parameters)]
    if max(parts) <= MOST_PARTS:
        parts += [len(one.shape) for one in inputs] + [len(one.parameters) for one in (*inputs, *request.outputs)]
    if max(parts) > MOST_PARTS:
        raise Refused(
            413, f"the message has {max(parts)} dimensions, tensors or parameters; this server takes {MOST_PARTS}"
        )
    for one in inputs:
        if any(len(getattr(one.contents, name)) > MOST_ELEMENTS for name in _CONTENTS):
            raise _many(one.name)
    for data in raw:
        with contextlib.suppress(ValueError):  # KServe says what is wrong with it
            elements(data, "raw_input_contents")


def elements(data: bytes, name: str) -> list[bytes]:
    """The elements of a tensor of BYTES as they follow one another: four bytes of length, then so many. Raises
    ValueError, and Refused (413) for too many."""
    found, at = list[bytes](), 0
    while at < len(data):
        if len(found) == MOST_ELEMENTS:
            raise _many(name)
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data) or at + 4 > len(data):
            raise ValueError("an element ends behind the data")
        found.append(data[at + 4 : end])
        at = end
    return found


def _many(name: str) -> Refused:
    return Refused(413, f"inputs: {name[:40]} has more than {MOST_ELEMENTS} elements")


def read_body(body: bytes, json_length: str | None, model: str) -> InferRequest:
    """The request in a body of the REST protocol; `json_length` is its header Inference-Header-Content-Length, which
    says that tensors follow the JSON as bytes. Raises Refused (400)."""
    length = len(body)
    if json_length is not None:
        if not json_length.isdecimal() or int(json_length) > length:
            raise Refused(
                400, "Inference-Header-Content-Length must be the length of the JSON that the body begins with"
            )
        length = int(json_length)
    payload = read_json(body[:length])
    try:
        inputs, rest = [], body[length:]
        for one in payload["inputs"]:
            parameters = one.get("parameters") or {}
            if not isinstance(one["name"], str) or not isinstance(one["datatype"], str):
                raise ValueError
            if (size := parameters.get("binary_data_size")) is not None:
                if not isinstance(size, int) or not 0 <= size <= len(rest):
                    raise ValueError
                data, rest = elements(rest[:size], one["name"]), rest[size:]
            else:
                data = one["data"]
            inputs.append(InferInput(one["name"], list(one["shape"]), one["datatype"], data, parameters))
        outputs = [RequestedOutput(str(one["name"]), one.get("parameters")) for one in payload.get("outputs") or ()]
        parameters, number = payload.get("parameters") or {}, payload.get("id")
        parameters.get("binary_data_output")
        if not isinstance(number, str | None):
            raise ValueError
    except Refused:
        raise
    except Exception:  # hostile shapes can raise almost anything on the way
        raise Refused(400, f"the body is no v2 inference request: inputs are {', '.join(_INPUTS)}, of BYTES") from None
    return InferRequest(model, inputs, number, parameters=parameters, request_outputs=outputs or None)


def read_request(request: InferRequest, limits: Limits) -> list[Ask]:
    """The asks of a request, one a question. Raises Refused."""
    columns = dict[str, list[bytes]]()
    for one in request.inputs:
        if one.name not in _INPUTS:
            raise Refused(422, f"inputs: unknown input '{one.name[:40]}'; known are {', '.join(_INPUTS)}")
        if one.name in columns:
            raise Refused(422, f"inputs: {one.name} stands there twice")
        columns[one.name] = _elements(one)
    for one in request.request_outputs or ():
        if one.name not in _OUTPUTS:
            raise Refused(422, f"outputs: unknown output '{one.name[:40]}'; known are {', '.join(_OUTPUTS)}")
    if "image" not in columns or ("question" in columns) == ("task" in columns):
        raise Refused(422, "inputs: give image, and either question or task")
    if "item" in columns and "task" not in columns:
        raise Refused(422, "inputs: item needs task")
    count = len(columns["question" if "question" in columns else "task"])
    if not 1 <= count <= limits.max_instances:
        raise Refused(413 if count else 422, f"{count} questions; this server takes 1 to {limits.max_instances}")
    rows = {name: _rows(name, column, count) for name, column in columns.items()}
    pictures = Pictures(limits)
    return [_read_row(n, {name: own[n] for name, own in rows.items()}, limits, pictures) for n in range(count)]


def write_answers(request: InferRequest, model: Served, answers: Sequence[Answers]) -> InferResponse:
    """The response, with the outputs that were asked for."""
    rows = [_row(one) for found in answers for one in found.answers]
    kinds = {str(output["name"]): str(output["datatype"]) for output in OUTPUTS}
    wanted = [one.name for one in request.request_outputs or ()] or list(_OUTPUTS)
    outputs = []
    for name in wanted:
        output = InferOutput(name, [len(rows)], kinds[name])
        output.data = [row[name] for row in rows]
        if request.use_binary_outputs and request.from_grpc:
            output.set_data_from_numpy(np.array(output.data, object if kinds[name] == "BYTES" else np.float64))
        outputs.append(output)
    return InferResponse(
        request.id or "",
        request.model_name,
        outputs,
        model_version=model.version or "",
        parameters={"model_digest": model.digest},
        from_grpc=request.from_grpc,
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=request.request_outputs,
    )


def _elements(one: InferInput) -> list[bytes]:
    """The elements of a tensor of BYTES. Tensors sent as raw contents are in `as_numpy` alone."""
    if one.datatype != "BYTES":
        raise Refused(422, f"inputs: {one.name} must be of datatype BYTES")
    try:
        values = one.as_numpy().ravel().tolist()
        return [value if isinstance(value, bytes) else value.encode() for value in values]
    except Exception:  # hostile shapes and contents can raise almost anything
        raise Refused(400, f"inputs: the data of {one.name} are no BYTES of its shape") from None


def _rows(name: str, column: list[bytes], count: int) -> list[bytes]:
    if len(column) == 1 and name in ("image", "segmentation"):
        return column * count
    if len(column) != count:
        raise Refused(422, f"inputs: {name} has {len(column)} elements for {count} questions")
    return column


def _read_row(n: int, row: Mapping[str, bytes], limits: Limits, pictures: Pictures) -> Ask:
    where = f"inputs[{n}]"
    image = pictures.file(row["image"], f"{where}.image")
    texts = {name: _text(row[name], f"{where}.{name}") for name in ("question", "task", "item") if name in row}
    if "question" in texts:
        question = Question(read_text(texts["question"], f"{where}.question", limits))
    else:
        task, item = read_names(texts["task"], texts.get("item"), where, limits)
        question = Question(task=task, item=item)
    parts: Encoded | None = None
    if row.get("segmentation"):
        parts = pictures.file_map(row["segmentation"], f"{where}.segmentation")
    return Ask(image, (question,), map=parts, where=where)


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Refused(422, f"{where} must be a text in UTF-8") from None


def _row(found: Answer) -> dict[str, Any]:
    texts = {"answer": found.text, "kind": found.kind, "task": found.task, "item": found.item}
    texts |= {"rule": found.rule, "reason": found.reason}
    row: dict[str, Any] = {name: text or "" for name, text in texts.items()}
    row["value"] = "" if found.value is None else str(found.value)
    row["scores"] = "" if found.scores is None else json.dumps(dict(found.scores))
    row["probability"] = NONE if found.probability is None else found.probability
    return row
