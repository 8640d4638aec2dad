"""What Kubernetes takes for names, labels, quantities, images and paths: the types of settings that become part of one
of its objects, so that none is refused there first.

Sources: k8s.io/apimachinery validation (names, labels), api/resource (quantities), distribution/reference (images). Of
quantities KFP takes fewer units: neither `k` nor an exponent.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, StringConstraints

_UNITS = {"": 1, **{f"{unit}i": 1024**power for power, unit in enumerate("KMGTP", 1)}}
_UNITS |= {unit: 1000**power for power, unit in enumerate("MGTP", 2)}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_LEAST_MEMORY, _LEAST_CORES, _LONGEST_S = 1024**2, 0.001, 2**31 - 1
_HELD = ["/app", "/tmp", "/dev/shm", "/proc", "/sys", "/etc", "/usr", "/bin", "/lib", "/lib64", "/sbin", "/run"]
_HELD += ["/var/run", "/gcs", "/minio", "/s3", "/kfp-launcher", "/.local", "/.cache", "/.config"]
"""Folders of the image, of its pods and of KFP's launcher, which a volume would hide."""
_KFPS = ("pipeline/", "pipelines.kubeflow.org/", "workflows.argoproj.io/")
_RUNS = ("FACEMLLM_RUN", "FACEMLLM_PARENT_RUN")

_LABEL, _SUBDOMAIN = "[a-z0-9]([-a-z0-9]*[a-z0-9])?", r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_VALUE = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_HOST = r"[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?(\.[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?)*(:[0-9]+)?"
_PART = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"((localhost|(?=[^/]*[.:]){_HOST})/)?{_PART}(/{_PART})*"
    r"(:(?P<tag>\w[\w.-]{0,127}))?(@sha256:(?P<digest>[0-9a-f]{64}))?",
    re.ASCII,
)


def bytes_of(quantity: str) -> int:
    """Bytes of a Kubernetes quantity such as `4Gi`."""
    number, unit = re.fullmatch(r"([0-9]+)([KMGTP]?i?)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * _UNITS[unit]


def cores_of(cpu: str) -> float:
    """Cores of a Kubernetes quantity such as `500m`."""
    return int(cpu[:-1]) / 1000 if cpu.endswith("m") else float(cpu)


def seconds_of(duration: str) -> int:
    """Seconds of a duration such as `6h`."""
    return int(duration[:-1]) * _SECONDS[duration[-1]]


def _text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _enough(quantity: str) -> str:
    if bytes_of(quantity) < _LEAST_MEMORY:
        raise ValueError(f"{quantity} is {bytes_of(quantity)} bytes; give a unit, as in 4Gi")
    return quantity


def _some(cpu: str) -> str:
    if cores_of(cpu) < _LEAST_CORES:
        raise ValueError(f"{cpu} is no share of a core; give 1m or more, as in 500m")
    return cpu


def _short(duration: str) -> str:
    if seconds_of(duration) > _LONGEST_S:
        raise ValueError(f"{duration} is more seconds than Kubernetes can count to ({_LONGEST_S}); give fewer")
    return duration


def _own(key: str) -> str:
    if key.startswith(_KFPS):
        raise ValueError(f"{key} is Kubeflow's own; give one of yours")
    return key


def hidden_by(mount: str, *more: str) -> str:
    """The first folder of pods, or of `more`, that a volume mounted there would hide; empty for none."""
    return next((one for one in (*_HELD, *more) if PurePosixPath(one).is_relative_to(mount)), "")


def _free(mount: str) -> str:
    path = PurePosixPath(mount)
    if ".." in path.parts or str(path) != mount:
        raise ValueError(f"{mount} is no plain path; give one such as /workspace")
    if hidden := hidden_by(mount):
        raise ValueError(f"{mount} would hide {hidden}, which the pods need; give one such as /workspace")
    return mount


def _free_variable(name: str) -> str:
    if name in _RUNS:
        raise ValueError(f"{name} says which run a pod is of; leave it out")
    return name


def _image(image: str) -> str:
    parts = _IMAGE.fullmatch(image)
    if not parts or not (parts["tag"] or parts["digest"]) or (parts["tag"] == "latest" and not parts["digest"]):
        raise ValueError("give a tag other than latest, or a digest: registry/face-mllm@sha256:...")
    return image


def _by_digest(image: str) -> str:
    if not (parts := _IMAGE.fullmatch(image)) or not parts["digest"]:
        raise ValueError("give its digest: registry/name@sha256:...")
    return image


Text = Annotated[str, BeforeValidator(_text)]
Cpu = Annotated[
    Text, StringConstraints(pattern=r"^([0-9]{1,9}|[0-9]{0,9}\.[0-9]{1,9}|[0-9]{1,9}m)$"), AfterValidator(_some)
]
Quantity = Annotated[Text, StringConstraints(pattern=r"^[0-9]{1,15}([KMGTP]i|[MGTP])?$"), AfterValidator(_enough)]
Duration = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,9}[smhd]$"), AfterValidator(_short)]
ObjectName = Annotated[str, StringConstraints(pattern=f"^{_SUBDOMAIN}$", max_length=253)]
Namespace = Annotated[str, StringConstraints(pattern=f"^{_LABEL}$", max_length=63)]
QueueName = Annotated[str, StringConstraints(pattern=f"^{_SUBDOMAIN}$", max_length=63)]  # it becomes a label's value
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(_free_variable)]
DataKey = Annotated[str, StringConstraints(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)]
LabelKey = Annotated[str, StringConstraints(pattern=f"^({_SUBDOMAIN}/)?{_VALUE}$", max_length=317)]
OwnKey = Annotated[LabelKey, AfterValidator(_own)]
LabelValue = Annotated[Text, StringConstraints(pattern=f"^({_VALUE})?$")]
Accelerator = Annotated[str, StringConstraints(pattern=f"^{_SUBDOMAIN}/{_VALUE}$")]
Mount = Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9._/-]*[A-Za-z0-9._-]$"), AfterValidator(_free)]
Image = Annotated[str, AfterValidator(_image)]
ImageByDigest = Annotated[str, AfterValidator(_by_digest)]
