"""The alerts and the dashboard by Prometheus' own words: each alert fires when it should, each expression is one."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.test_k8s import documents, needs_kubectl, one
from tests.unit.test_k8s_platform import expressions

CASES = Path(__file__).with_name("alerts.yaml")
pytestmark = [
    needs_kubectl,
    pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is absent: apt-get install prometheus"),
]


def promtool(*words: str, folder: Path, groups: list[Any]) -> str:
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": groups}), "utf-8")
    done = subprocess.run(["promtool", *words], cwd=folder, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_each_alert_fires_when_it_should(tmp_path: Path) -> None:
    groups = one("gpu", "PrometheusRule")["spec"]["groups"]
    shutil.copy(CASES, tmp_path)
    assert promtool("test", "rules", CASES.name, folder=tmp_path, groups=groups) == ""
    tried = {
        case["alertname"] for test in yaml.safe_load(CASES.read_text())["tests"] for case in test["alert_rule_test"]
    }
    assert tried == {rule["alert"] for group in groups for rule in group["rules"]}


def test_each_expression_of_the_dashboard_can_be_read(tmp_path: Path) -> None:
    rules = [{"record": f"one:{place}", "expr": text} for place, text in enumerate(expressions(documents("gpu")))]
    assert promtool("check", "rules", "rules.yaml", folder=tmp_path, groups=[{"name": "all", "rules": rules}]) == ""
    rules[0]["expr"] += ")"
    assert promtool("check", "rules", "rules.yaml", folder=tmp_path, groups=[{"name": "all", "rules": rules}])
