"""Observability of a real server: its page, its metrics, and a log without texts."""

import base64
import re
from pathlib import Path

import httpx
import pytest

from facemllm.core import digests
from facemllm.core.corrections import Correction, read
from facemllm.serve import deploy
from facemllm.settings import Settings
from tests.conftest import picture
from tests.integration.test_serving import endpoint, model, probe, settings  # noqa: F401

pytestmark = pytest.mark.integration
SECRET = "Is this Zebulon of the mill?"


def test_page_metrics_log_and_corrections_of_a_real_server(
    endpoint: deploy.Endpoint,  # noqa: F811
    settings: Settings,  # noqa: F811
) -> None:
    instance = {"image": {"b64": base64.b64encode(picture(1)).decode()}, "question": SECRET}
    with httpx.Client(base_url=endpoint.url, trust_env=False, timeout=60) as client:
        assert client.post(f"/v1/models/{endpoint.model}:predict", json={"instances": [instance]}).status_code == 200
        assert client.get("/").json() == {"status": "alive"}
        shown = client.get("/", headers={"Accept": "text/html"})
        assert "default-src 'none'" in shown.headers["content-security-policy"]
        assert endpoint.digest in shown.text
        files = {"picture": ("face.jpg", picture(1), "image/jpeg")}
        answered = client.post("/", data={"task": "expression", "questions": SECRET}, files=files)
        assert answered.status_code == 200
        assert digests.of_bytes(picture(1)) in answered.text
        assert client.post("/", data={"task": "age"}).status_code == 415
        correction = {"image": digests.of_bytes(picture(1)), "task": "age", "correction": "42", "answer": SECRET}
        assert client.post("/feedback", json={**correction, "consent": False}).status_code == 422
        assert client.post("/feedback", json={**correction, "answer": "40", "consent": False}).status_code == 200
        metrics = client.get("/metrics").text
    for door, status in (("v1", 200), ("page", 200), ("page", 415), ("feedback", 200)):
        assert re.search(rf'facemllm_requests_total{{door="{door}",status="{status}"}} [1-9]', metrics), (door, status)
    assert re.search(r'facemllm_questions_total\{kind="\w+",task="expression"\} 1', metrics)
    assert f'digest="{endpoint.digest}"' in metrics
    logs = [file.read_text("utf-8") for file in Path(settings.home).rglob("*.log")]
    assert any("answered 1 questions about" in log for log in logs)
    assert not any("Zebulon" in text for text in [*logs, metrics])
    assert settings.corrections is not None
    (kept,) = [one for _, one in read(settings.corrections) if isinstance(one, Correction)]
    assert (kept.label, kept.picture, kept.model) == ("42", False, endpoint.digest)
