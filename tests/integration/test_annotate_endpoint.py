"""A paid annotator on real Ray: killed at random, stopped by its budget; nothing that was answered is asked again."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from facemllm import settings
from facemllm.annotate.run import annotate
from facemllm.errors import UserError
from facemllm.tables import open_table
from tests.fake_endpoint import FakeEndpoint
from tests.integration.conftest import counted
from tests.refusing import refuses
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

ROWS, TASKS, PARALLEL = 400, 2, 4

DRIVER = """
import sys
from pathlib import Path
from facemllm import settings
from facemllm.annotate.run import annotate
from facemllm.asking.store import Replies
from facemllm.errors import UserError
if __name__ == "__main__":
    try:
        print("DIGEST", annotate(settings.load("laptop", sys.argv[3:]), Path(sys.argv[1]), Path(sys.argv[2]))["digest"])
    except UserError as error:
        sys.exit(f"refused: {error}")
"""


@pytest.fixture
def faces(faces_table, face_rows):
    rows = face_rows(40)
    return faces_table([rows[n % 40] | {"image_id": f"{n:064x}", "age": float(20 + n % 50)} for n in range(ROWS)])


def overrides(fake, home, *more):
    chosen = {"annotator": "endpoint", "vision_language.model": "m", "endpoint.base_url": fake.base_url}
    chosen |= {"endpoint.parallel": PARALLEL, "endpoint.timeout_s": 10, "batch_size": 50}
    return [f"storage.home={home}", *(f"annotate.{key}={value}" for key, value in chosen.items()), *more]


def annotating_workers(head):
    """Workers of this Ray head that are in a task now; another run may be annotating beside this test."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("ray::") and "IDLE" not in title and "MapBatches" in title:
                found += [process] if head in " ".join(process.parent().cmdline()) else []
    return found


def test_a_job_killed_twice_gives_the_same_table_and_repeats_only_what_was_under_way(ray_head, faces, tmp_path):
    rng = random.Random()
    moments = sorted(rng.sample(range(10, ROWS - 60), 2))
    print(f"killed at requests {moments}")
    environment = {**os.environ, "RAY_ADDRESS": ray_head}
    with FakeEndpoint(latency_s=0.05) as fake:
        options = overrides(fake, tmp_path / "home")

        def started():
            command = [sys.executable, "-c", DRIVER, str(faces), str(tmp_path / "killed"), *options]
            return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

        for number, moment in enumerate(moments):
            driver = started()
            try:
                wait_until(lambda moment=moment: fake.received.total() >= moment, driver)
                if number == 1:  # Ray brings a killed worker's task back; the driver goes the same way a little later
                    (worker, *_) = annotating_workers(ray_head)
                    worker.kill()
                    wait_until(lambda moment=moment: fake.received.total() >= moment + 20, driver)
            finally:
                driver.send_signal(signal.SIGKILL)
                driver.wait(30)
            assert not (tmp_path / "killed").exists()
        driver = started()
        out, errors = driver.communicate(timeout=120)
        assert driver.returncode == 0, errors[-3000:]
        now, received = counted(tmp_path / "home"), fake.received.total()
        assert ROWS <= received <= now.requests == ROWS + now.in_doubt
        assert now.in_doubt <= 3 * TASKS * PARALLEL, "of each kill what its tasks had under way"
        assert now.answered == ROWS

        undisturbed = annotate(settings.load("laptop", overrides(fake, tmp_path / "other")), faces, tmp_path / "whole")
        assert out.split() == ["DIGEST", undisturbed["digest"]]
        assert (undisturbed["rows"], undisturbed["quarantined"]) == (ROWS, 0)


def test_a_budget_stops_a_job_on_ray_in_one_line_and_leaves_nothing_running(ray_head, faces, tmp_path):
    with FakeEndpoint(latency_s=0.01) as fake:
        limited = settings.load("laptop", overrides(fake, tmp_path / "home", "annotate.endpoint.max_requests=90"))
        with pytest.raises(UserError, match=r"of 400 rows: annotate\.endpoint\.max_requests is used up") as stop:
            annotate(limited, faces, tmp_path / "out")
        assert "\n" not in str(stop.value)
        assert fake.received.total() == 90
        time.sleep(0.5)
        assert fake.received.total() == 90
        manifest = annotate(settings.load("laptop", overrides(fake, tmp_path / "home")), faces, tmp_path / "out")
        assert manifest["rows"] == ROWS
        now = counted(tmp_path / "home")
        assert (now.answered, now.requests) == (ROWS, ROWS + now.in_doubt)
        assert open_table(tmp_path / "out").digest == manifest["digest"]
        fake.default = "401"
        other = settings.load("laptop", overrides(fake, tmp_path / "home", "annotate.vision_language.model=other"))
        refuses("after 0 of 400 rows: the endpoint refuses every request", annotate, other, faces, tmp_path / "never")
