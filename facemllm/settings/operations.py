"""Settings of evaluation, promotion, services and serving."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from facemllm.settings.data import Positive, Section

Port = Annotated[int, Field(ge=1024, le=65535)]
GrpcPort = Port | Literal[0]


class Evaluate(Section):
    """Predictions on held-out identities and their statistics.

    Of `generated_faces` faces the closed questions are also answered by free generation, to compare; `disturbed_faces`
    faces are asked again blurred, dark, as poor JPEG and occluded. With `maps`, a model that takes maps of face parts
    is shown those of the data, and the disturbed faces also without. A group of fewer than `min_group` people gets no
    fairness figure.
    """

    split: Literal["validation", "test"]
    batch_images: Positive
    bootstrap: Annotated[int, Field(ge=100)]
    baseline_pixels: Annotated[int, Field(ge=8, le=64)]
    max_new_tokens: Positive
    generated_faces: Annotated[int, Field(ge=0)]
    disturbed_faces: Annotated[int, Field(ge=0)]
    maps: bool
    min_group: Annotated[int, Field(ge=2)]


class Threshold(Section):
    """What a figure must reach. It stands under `task`, `task.item` or `closed_mean`."""

    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Threshold:
        if (self.min is None) == (self.max is None):
            raise ValueError("give exactly one of min and max")
        return self


Share = Annotated[float, Field(ge=0, le=1)]
Limit = Annotated[float, Field(ge=0)]


class Contradictions(Section):
    """Largest share of checks that the model's answers may break: relations between answers, captions against them."""

    relations: Share | None
    captions: Share | None


class Robustness(Section):
    """By how much mean balanced accuracy may fall on pictures made worse, or without the map of face parts."""

    blur: Share | None
    dark: Share | None
    jpeg: Share | None
    noise: Share | None
    occlusion: Share | None
    no_map: Share | None


class Budget(Section):
    """What the steps behind a model may have cost together; a price needs `cost.price_per_hour`."""

    seconds: Limit | None
    price: Limit | None


class Smtp(Section):
    """The mail server that notices go through. `password_env` names the environment variable with the password."""

    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    security: Literal["starttls", "tls", "none"]
    sender: str
    user: str | None = None
    password_env: str | None = None

    @model_validator(mode="after")
    def _login_is_private(self) -> Smtp:
        if (self.user is None) != (self.password_env is None):
            raise ValueError("give both of user and password_env, or neither")
        if self.user is not None and self.security == "none":
            raise ValueError("a password is sent over starttls or tls only")
        return self


class Notify(Section):
    """Who hears of decisions: a `webhook` (signed with the secret in the environment variable `secret_env`) and the
    addresses in `email`, through `smtp`; null: nobody.

    A webhook goes over https; over http only to this machine or a private network that the address itself names.
    """

    webhook: str | None
    secret_env: str
    email: tuple[str, ...] | None
    smtp: Smtp | None

    @field_validator("webhook")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts, plain = urlsplit(value), value.isascii() and value.isprintable() and " " not in value
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise ValueError("give an address such as https://hooks.example.org/face-mllm")
        if parts.username is not None or parts.fragment:
            raise ValueError("leave user, password and # out of the address; the notice is signed")
        if parts.scheme == "http" and not named_private(parts.hostname):
            raise ValueError("use https: over http a notice can be read on the way")
        return value

    @field_validator("email")
    @classmethod
    def _addresses(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for one in value or ():
            if one.count("@") != 1 or not one.isprintable() or any(c in one for c in ' ,;<>"()[]:'):
                raise ValueError(f"'{one[:60]}' is no address; give plain ones, as in [ada@example.org]")
        return value

    @model_validator(mode="after")
    def _mail_has_a_server(self) -> Notify:
        if self.email and self.smtp is None:
            raise ValueError("email needs smtp: {host, port, security, sender}")
        return self


def named_private(host: str) -> bool:
    """Whether a host's name itself says that it is of this machine or a private network: an address that is not
    global, `localhost`, a name without a dot, or one below `.local`, `.internal` or `.localhost`."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        name = host.lower().rstrip(".")
        return "." not in name or name.endswith((".local", ".internal", ".localhost"))


Role = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")]


class PromoteRule(Section):
    """What a new policy file is made with: persons who must sign, by role; who may ask; days an approval holds."""

    approvals: Annotated[dict[Role, Annotated[int, Field(ge=1, le=100)]], Field(min_length=1)]
    request_by: Annotated[list[Role], Field(min_length=1)]
    requester_may_approve: bool
    valid_days: Annotated[int, Field(ge=1, le=3650)]


class Promote(Section):
    """What the gate asks for, and how long a run waits for a person.

    A threshold of null is not asked for. `every_task` refuses a model when the data hold no label of a task in
    `reformat.tasks`; else such a task is left out. `fairness_gap` is the largest difference between two groups of
    people that a task may be shown to have, in the task's own unit; null is not asked for. With `fairness_power:
    required` a task also fails where the minimum detectable difference of two groups is larger than that; `reported`
    only says so. `champion_margin` is in the figure's own unit for shares, and a share of the champion's error for
    errors. `unreadable` is the largest share of a task's answers that cannot be read. `uses` are those that the terms
    of every source the model was trained on must allow. Of these, too, null is not asked for. `policy` and `decisions`
    say where keys and signed decisions are (null: under home); `rule` makes a new policy file and has no say once there
    is one. Who is told (`notify`) is in no dump: it decides no result and is recorded nowhere.
    """

    model_name: str
    thresholds: dict[str, Threshold | None]
    above_constant: bool
    every_task: bool
    fairness_gap: dict[str, Annotated[float, Field(gt=0)] | None]
    fairness_power: Literal["required", "reported"]
    champion_margin: Annotated[float, Field(ge=0)]
    unreadable: Share | None
    contradictions: Contradictions
    robustness: Robustness
    budget: Budget
    uses: list[Literal["train", "evaluate", "serve"]]
    wait_minutes: Annotated[float, Field(ge=0)]
    policy: str | None
    decisions: str | None
    rule: PromoteRule
    notify: Annotated[Notify, Field(exclude=True)]


class Tracking(Section):
    """MLflow. `uri: null` means the local server that `facemllm services` keeps."""

    uri: str | None
    experiment: str


RAY_PORTS = 320


class Services(Section):
    """Ports of a laptop run, on loopback; Ray, which cannot be kept there, takes `ray_port` and the 320 after it. A
    `grpc_port` of 0 means that the server speaks no gRPC."""

    mlflow_port: Port
    ray_port: Port
    staging_port: Port
    staging_grpc_port: GrpcPort
    production_port: Port
    production_grpc_port: GrpcPort
    review_port: Port
    start_timeout_s: Positive

    @model_validator(mode="after")
    def _ports_differ(self) -> Services:
        ports = [self.mlflow_port, self.ray_port, self.staging_port, self.production_port, self.review_port]
        ports += [port for port in (self.staging_grpc_port, self.production_grpc_port) if port]
        if len(set(ports)) < len(ports):
            raise ValueError("each service needs a port of its own")
        rays = range(self.ray_port, self.ray_port + RAY_PORTS + 1)
        if rays.stop > 65536 or any(port in rays for port in ports if port != self.ray_port):
            raise ValueError(f"Ray takes ports {rays.start} to {rays.stop - 1}; keep the others out, below 65536")
        return self


class Cost(Section):
    """Rates for the cost report; null leaves the price out."""

    price_per_hour: Annotated[float, Field(ge=0)] | None
