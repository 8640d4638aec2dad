"""Settings of the model server: what a request may hold and cost, what may be asked, how a model takes over."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from facemllm.settings.data import Positive, Section
from facemllm.settings.operations import Limit, Share


class Canary(Section):
    """How a new model takes over in production: it gets each of these percentages of the requests for at least
    `step_seconds`, and goes on when it did as well as the model before it with `min_requests` requests of each. It may
    fail by `max_error_rate_increase` more of them, have a 95th percentile of answer times `max_p95_ratio` times as
    long, and must give at least `min_agreement` of the answers that evaluation gave."""

    steps: Annotated[list[Annotated[float, Field(gt=0, le=100)]], Field(min_length=1)]
    min_requests: Positive
    max_error_rate_increase: Share
    max_p95_ratio: Annotated[float, Field(ge=1)]
    min_agreement: Share
    step_seconds: Annotated[float, Field(ge=0)]

    @field_validator("steps")
    @classmethod
    def _rising(cls, value: list[float]) -> list[float]:
        if value != sorted(set(value)) or value[-1] != 100:
            raise ValueError("give rising percentages that end with 100, as in [10, 50, 100]")
        return value


class Consent(Section):
    """What users agree to when they send a picture with a correction; a changed text is a new version."""

    version: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,20}$")]
    text: Annotated[str, Field(min_length=20, max_length=2000)]


class Feedback(Section):
    """Corrections of answers that users may send: kept in `folder` (null: none are taken), `max_mb` in all, so many
    `per_minute` of one client."""

    folder: str | None
    max_mb: Annotated[float, Field(gt=0)]
    per_minute: Positive
    consent: Consent


class Retention(Section):
    """Whether the server keeps answers, and for how many days; it logs digests alone otherwise. Never pictures."""

    answers: bool
    days: Annotated[int, Field(ge=0, le=3650)]

    @model_validator(mode="after")
    def _kept_for_a_time(self) -> Retention:
        if self.answers != (self.days > 0):
            raise ValueError("give answers: true with days of 1 or more, or answers: false with days: 0")
        return self


class ServePolicy(Section):
    """What of the sensitive tasks (gender, ethnicity, age, expression) may be asked: the task and the written reason,
    which `GET /policy` shows; null refuses it, as does leaving it out."""

    allowed: dict[str, str | None]

    @field_validator("allowed")
    @classmethod
    def _reasons(cls, value: dict[str, str | None]) -> dict[str, str | None]:
        for task, reason in value.items():
            if reason is not None and not reason.strip():
                raise ValueError(f"{task}: write down why it may be asked; null refuses it")
        return value


class Fetch(Section):
    """Hosts from which pictures that are named by an address are got (none: no picture is), and how long that may
    take."""

    hosts: list[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*(:[0-9]{1,5})?$")]]
    seconds: Annotated[float, Field(gt=0, le=60)]


class Guard(Section):
    """What strangers may cost the model server: decoding of pictures, connections, headers, JSON, gRPC calls.

    `keys` is a file of client names and SHA-256 of API keys; null asks for none. `tls` is a certificate and its key,
    both PEM files; null speaks plain HTTP and gRPC. `hosts` are more names in requests' Host that a server on loopback
    answers to, as that of a proxy before it.
    """

    decode_threads: Positive
    decode_s: Annotated[float, Field(gt=0)]
    decode_cache_mb: Annotated[float, Field(ge=0)]
    max_connections: Positive
    max_headers: Positive
    header_kb: Positive
    header_s: Annotated[float, Field(gt=0)]
    body_s: Annotated[float, Field(gt=0)]
    bodies_mb: Annotated[float, Field(gt=0)]
    idle_s: Positive
    json_depth: Positive
    json_values: Positive
    grpc_streams: Positive
    grpc_age_s: Positive
    keys: str | None
    tls: tuple[str, str] | None
    hosts: list[str]
    fetch: Fetch


class ServeQuality(Section):
    """Pictures that are answered about: pixels of the shorter side, and figures of `serve.asked.quality.measure`.
    Null: no limit. `detector` is the folder of a face detector's weights; null: nobody counts faces."""

    min_side: Positive | None
    min_sharpness: Limit | None
    min_brightness: Share | None
    min_contrast: Share | None
    min_color: Share | None
    detector: str | None


class Queue(Section):
    """Who waits for the model: `faces` and `questions` in all, `client_faces` of one client.

    Where more than a batch waits, none is taken that would wait longer than `wait_s` for its turn. A pass takes what
    has come, and under load waits `window_s` for company; `open_questions` are written at a time.
    `cache_mb` of encoded faces are kept.
    """

    faces: Positive
    questions: Positive
    client_faces: Positive
    wait_s: Annotated[float, Field(gt=0)]
    open_questions: Positive
    window_s: Annotated[float, Field(ge=0, le=1)]
    cache_mb: Annotated[float, Field(ge=0)]


class ServeEngine(Section):
    """What computes the answers: `own`, or a vLLM server of this pod or machine (LLaVA, Qwen-VL, InternVL) at
    `vllm_url`, which computes in `vllm_dtype` (its --dtype; the parity gate allows accordingly), is given
    `vllm_requests` at once, and may take `vllm_wait_s` to start."""

    name: Literal["own", "vllm"]
    vllm_url: Annotated[str, Field(pattern=r"^http://(127\.0\.0\.1|localhost|\[::1\]):[0-9]{1,5}/?$")]
    vllm_dtype: Literal["float32", "bfloat16"]
    vllm_requests: Positive
    vllm_wait_s: Annotated[float, Field(ge=0)]


class Serve(Section):
    """Limits of the model server. `max_pixels` is for all images of one request together. A client that does not say
    how long it waits is refused after `timeout_s`; a server that is to end is no longer ready, and takes requests for
    `drain_s` more. `canary` says how one takes over from another.

    `target` says where models are put into service: on this machine, in KServe (`cluster.serving`), or in KServe by way
    of a git repository that is applied to the cluster. `device` is what the server's own engine computes on.
    """

    target: Literal["local", "kserve", "gitops"]
    device: Literal["cpu", "cuda"]

    max_body_mb: Annotated[float, Field(gt=0)]
    max_pixels: Positive
    max_question_chars: Positive
    max_instances: Positive
    batch_size: Positive
    threads: Positive
    timeout_s: Annotated[float, Field(gt=0)]
    drain_s: Annotated[float, Field(ge=0, le=600)]
    parity_faces: Positive
    policy: ServePolicy
    feedback: Feedback
    retention: Retention
    quality: ServeQuality
    canary: Canary
    engine: ServeEngine
    queue: Queue
    guard: Guard
