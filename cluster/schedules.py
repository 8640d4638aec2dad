"""Runs that start by themselves: by the clock, or when a new revision of the data is recorded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

from cluster.client import Api, Exists, conflicts, experiment_of
from cluster.specification import NAME, specification
from facemllm.core import digests
from facemllm.errors import UserError
from facemllm.settings import Settings, load

_YOUNG = timedelta(minutes=10)  # so long a claim on a revision is believed that no run has come of yet


def by_clock(
    api: Api, file: str, cron: str, *, name: str, experiment: str, account: str | None
) -> tuple[str, list[str]]:
    """Have a compiled pipeline run by the clock: the recurring run's id, and those of the same name that it replaced.

    KFP cannot change one, so the new one stands before the old ones go; of two that are made at once the newer stays.
    What a pause of the cluster missed is not made up for.
    """
    group = experiment_of(api, experiment)
    given = {"cron_expression": cron, "max_concurrency": 1, "no_catchup": True, "service_account": account}
    job = api.call(
        api.client.create_recurring_run,
        group,
        job_name=name,
        pipeline_package_path=file,
        enable_caching=False,
        **given,
    )
    found = sorted(recurring(api, group, name), key=lambda one: (one.created_at, one.recurring_run_id))
    *before, newest = found or [job]
    for earlier in before:
        api.call(_absent, api.client.delete_recurring_run, earlier.recurring_run_id)
    return str(newest.recurring_run_id), [str(one.recurring_run_id) for one in before]


def _absent(delete: Any, one: str) -> None:
    """Delete something; another `schedule` may have been quicker."""
    from kfp_server_api import ApiException

    try:
        delete(one)
    except ApiException as error:
        if error.status != 404:
            raise


def recurring(api: Api, experiment: str, name: str) -> list[Any]:
    """An experiment's recurring runs of this name."""
    found, token = [], ""
    while True:
        page = api.patiently(api.client.list_recurring_runs, page_token=token, page_size=100, experiment_id=experiment)
        found += [one for one in page.recurring_runs or [] if one.display_name == name]
        if not (token := page.next_page_token or ""):
            return found


@dataclass(frozen=True)
class Data:
    """A revision of the data: its commit, and the digest of its tables."""

    revision: str
    digest: str


def newest_data(settings: Settings) -> Data | None:
    """The newest revision of the data that stands and whose bytes are all in the DVC remote; None without one."""
    from facemllm.version.record import has, log

    for entry in log(settings):
        if entry["replaced_by"] is None and has(settings, entry["sha"]):
            return Data(entry["sha"], digests.of_json([entry["faces"], entry["conversations"]]))
    return None


def by_data(
    api: Api, profile: str, overrides: Sequence[str], data: Data, *, experiment: str, account: str | None
) -> str | None:
    """Start one run on a revision of the data, the id; None if its digest has had its run, or is about to.

    Whoever makes the pipeline's version that is named after the digest has claimed it: KFP lets one of two succeed. A
    claim that no run came of, since its maker was killed, is taken over after ten minutes, by the next name.
    """
    every = [*overrides, f"version.restore={data.revision}"]
    with specification(profile, every) as (_, file):
        pipeline = _pipeline(api, f"{NAME}-{profile}", file)
        for attempt in count():
            name = f"data-{data.digest[:16]}" + (f"-{attempt}" if attempt else "")
            run_name = f"{NAME} {profile} on {name}"
            version = _claim(api, pipeline, name, file)
            if version is not None:
                run = api.call(
                    api.client.run_pipeline,
                    experiment_of(api, experiment),
                    run_name,
                    pipeline_id=pipeline,
                    version_id=version,
                    service_account=account,
                )
                return str(run.run_id)
            if not _abandoned(api, pipeline, name, run_name):
                return None
    raise AssertionError


def _named(name: str) -> str:
    """A filter, in KFP's words, for what has this name."""
    return json.dumps({"predicates": [{"operation": 1, "key": "display_name", "stringValue": name}]})


def _pipeline(api: Api, name: str, file: str) -> str:
    """Id of the pipeline of this name in the namespace, made if absent."""
    given = {"namespace": api.namespace} if api.namespace else {}
    for _ in range(2):
        found = api.call(api.client.list_pipelines, filter=_named(name), **given)
        if found.pipelines:
            return str(found.pipelines[0].pipeline_id)
        try:
            return str(api.call(conflicts, api.client.upload_pipeline, file, pipeline_name=name, **given).pipeline_id)
        except Exists:
            continue
    raise UserError(f"{api.endpoint} says that there is a pipeline {name}, and does not list it; look in its pages")


def _claim(api: Api, pipeline: str, name: str, file: str) -> str | None:
    """Id of a new version of the pipeline; None if there is one of this name."""
    try:
        made = api.call(conflicts, api.client.upload_pipeline_version, file, name, pipeline_id=pipeline)
    except Exists:
        return None
    return str(made.pipeline_version_id)


def _abandoned(api: Api, pipeline: str, name: str, run_name: str) -> bool:
    """Whether a version was made long ago and its run is not there."""
    found = api.call(api.client.list_pipeline_versions, pipeline, filter=_named(name)).pipeline_versions or ()
    if not found:
        return True  # somebody removed it meanwhile
    if datetime.now(UTC) - found[0].created_at < _YOUNG:
        return False
    given = {"namespace": api.namespace} if api.namespace else {}
    return not api.call(api.client.list_runs, filter=_named(run_name), **given).runs


def watched(profile: str, overrides: Sequence[str], repository: str | None) -> Settings:
    """The settings under which the data repository is looked at: those of a cluster, or a clone in `repository`.

    Raises UserError if it is not to be found from here.
    """
    from facemllm.version.repository import Repository
    from facemllm.workflow.pods import on_cluster

    settings, every = on_cluster(profile, overrides)
    if repository is not None:
        settings = load(profile, [*every, f"version.repository={json.dumps(repository)}"])
    place = Repository.of(settings)
    if not place.exists():
        where = "run this where the volume is mounted, or give --repository, a clone of it"
        raise UserError(f"no data repository at {place.path} here; {where}")
    return settings
