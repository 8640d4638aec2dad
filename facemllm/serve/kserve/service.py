"""A stage's InferenceService: applied, waited for, asked.

What it waits for is Knative's: KServe's `observedGeneration` is that of the Knative Service beneath, which has nothing
to do with the generation of the InferenceService. So a model counts as there when the newest revision is ready, another
one than before where the pod changed, the traffic is as asked for, and `/info` names it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx

from facemllm.core import servers
from facemllm.core.kubernetes import CONFIG_MAP, EVENT, INFERENCE_SERVICE, Api, ApiError, Object
from facemllm.errors import UserError, one_line
from facemllm.serve.kserve.rendering import DIGEST, PREDICTOR
from facemllm.settings import Settings
from facemllm.settings.kubernetes import seconds_of

LATEST, PREVIOUS = "latest", "prev"
"""Tags of revisions, each with an address of its own: the newest, and the one that served before."""
_CONFIG, _CONFIG_NAMESPACE = "inferenceservice-config", "kserve"
_WORDS = {"Knative": "Knative", "Standard": "Knative", "Serverless": "Serverless", "RawDeployment": "Serverless"}
_FALSE_S = 15.0  # as long as this a condition may be False, as left over from the revision before
_TICK_S = 5
_EVENTS = 3


class InferenceService:
    """The InferenceService `name` in the namespace of an API."""

    def __init__(self, settings: Settings, api: Api, name: str) -> None:
        self.api, self.name = api, name
        self._known, self._limit_s = settings.cluster.serving, float(seconds_of(settings.cluster.serving.ready_timeout))

    @property
    def words(self) -> str:
        """The name, for messages."""
        return f"InferenceService {self.name} in {self.api.namespace}"

    def get(self) -> Object | None:
        """It as it is, or None. Raises UserError where the cluster has no KServe, or one that is too old."""
        return self.api.get(INFERENCE_SERVICE, self.name)

    def apply(self, body: Object) -> None:
        """Have the cluster hold this; what others set in these fields is ours again."""
        self.api.apply(INFERENCE_SERVICE, body, force=True)

    def delete(self) -> None:
        """Have the cluster hold it no more."""
        self.api.delete(INFERENCE_SERVICE, self.name)

    def ready(self, body: Object, before: Object | None) -> Object:
        """Wait until what was applied answers, `before` having been there; the object as it is then.

        Raises UserError, with what the cluster says and its last events, when it fails or time is up.
        """
        about, former = body["metadata"]["annotations"], _revisions(before)[0]
        changed = before is not None and _about(before).get(PREDICTOR) != about[PREDICTOR]
        percent = body["spec"]["predictor"].get("canaryTrafficPercent", 100)

        def done(found: Object) -> bool:
            created, latest = _revisions(found)
            return (
                _about(found).get(PREDICTOR) == about[PREDICTOR]
                and _condition(found, "Ready").get("status") == "True"
                and bool(latest)
                and created == latest
                and not (changed and created == former)
                and (share(found, latest) == percent or first(found))
                and self._digest(found) == about[DIGEST]
            )

        return self._until(done, former if changed else None)

    def routed(self, revision: str) -> Object:
        """Wait until every request goes to a revision, whatever else starts or fails."""
        return self._until(lambda found: share(found, revision) == 100, None, fails=False)

    def address(self, found: Object, tag: str | None = None) -> str:
        """Where it answers: a revision by its tag, else all that production's traffic goes to. Empty before it does."""
        status = found.get("status", {})
        predictor = status.get("components", {}).get("predictor", {})
        if tag is None:
            return str(
                status.get("url", "") if self._known.reach == "public" else status.get("address", {}).get("url", "")
            )
        if self._known.reach == "public":
            return next((str(one.get("url", "")) for one in predictor.get("traffic", ()) if one.get("tag") == tag), "")
        parts = urlsplit(predictor.get("address", {}).get("url", ""))
        return f"{parts.scheme}://{tag}-{parts.netloc}" if parts.netloc else ""

    def info(self, url: str) -> dict[str, Any]:
        """What `/info` of a server says. Raises UserError."""
        try:
            reply = httpx.get(f"{url}/info", headers=servers.authorization(), timeout=30, trust_env=False)
            found = reply.raise_for_status().json()
            if isinstance(found, dict):
                return found
            raise ValueError("no JSON object")
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise UserError(f"{url}/info: {one_line(error)}") from None

    def mode(self, current: Object | None) -> str:
        """KServe's word for Knative: that of the settings, of the object that is there, or of KServe's configuration.

        Raises UserError where none of them says it.
        """
        if self._known.mode != "auto":
            return self._known.mode
        if word := _about(current or {}).get("serving.kserve.io/deploymentMode"):
            return str(word)
        mend = "say cluster.serving.mode: Knative, or Serverless before KServe 0.16"
        try:
            found = Api(self.api.client, _CONFIG_NAMESPACE, self.api.clock, self.api.sleep).get(CONFIG_MAP, _CONFIG)
            deploy = json.loads((found or {}).get("data", {}).get("deploy", "{}"))
            return _WORDS[deploy["defaultDeploymentMode"]]
        except (ApiError, ValueError, LookupError, TypeError) as error:
            why = one_line(error) if isinstance(error, ApiError) else "it is not there, or names no mode"
            raise UserError(f"ConfigMap {_CONFIG} of {_CONFIG_NAMESPACE}: {why}; {mend}") from None

    def _digest(self, found: Object) -> str | None:
        url = self.address(found, LATEST)
        try:
            return str(self.info(url).get("digest")) if url else None
        except UserError:
            return None

    def _until(self, done: Callable[[Object], bool], former: str | None, *, fails: bool = True) -> Object:
        """Watch until `done`. A False condition ends it, unless it may be that of the revision `former`."""
        clock = self.api.clock
        until, false_since, there = clock() + self._limit_s, None, False
        said = "nothing yet"
        for found in self.api.watch(INFERENCE_SERVICE, self.name, _TICK_S):
            if found is None and there:
                raise UserError(f"{self.words} was deleted meanwhile")
            if found is not None and done(found):
                return found
            there, found = there or found is not None, found or {}
            created, failed = _revisions(found)[0], _failure(found)
            said = failed or _waits(found)
            if not failed or not created or created == former:
                false_since = None
            elif false_since is None:
                false_since = clock()
            elif fails and clock() - false_since > _FALSE_S:
                raise UserError(f"{self.words} cannot serve: {said}{self._events()}")
            if clock() > until:
                raise UserError(
                    f"{self.words} was not ready within {self._known.ready_timeout}: {said}{self._events()}"
                )
        raise AssertionError("a watch has no end")

    def _events(self) -> str:
        """The last events about it and its pods, ready to append."""
        try:
            listed, _ = self.api.select(EVENT)
        except UserError as error:
            return f"; its events cannot be read: {one_line(error, 120)}"
        own = [one for one in listed if str(one.get("involvedObject", {}).get("name", "")).startswith(self.name)]
        own.sort(key=lambda one: str(one.get("lastTimestamp") or one.get("eventTime") or ""))
        lines = [f"{one.get('reason')}: {' '.join(str(one.get('message')).split())[:160]}" for one in own[-_EVENTS:]]
        return f"; last events: {' | '.join(lines)}" if lines else ""


def share(found: Object, revision: str) -> int:
    """Percent of the requests that go to a revision."""
    traffic = found.get("status", {}).get("components", {}).get("predictor", {}).get("traffic", ())
    return sum(int(one.get("percent") or 0) for one in traffic if revision and one.get("revisionName") == revision)


def first(found: Object) -> bool:
    """Whether there was no revision before the newest: it gets every request, whatever was asked for."""
    predictor = found.get("status", {}).get("components", {}).get("predictor", {})
    return bool(share(found, predictor.get("latestReadyRevision", "")) == 100 and not rolled_out(found))


def rolled_out(found: Object) -> str:
    """The revision that last got every request."""
    return str(found.get("status", {}).get("components", {}).get("predictor", {}).get("latestRolledoutRevision", ""))


def whole(found: Object) -> bool:
    """Whether what the object names gets every request."""
    created, latest = _revisions(found)
    asked = found["spec"]["predictor"].get("canaryTrafficPercent", 100)
    return bool(asked == 100 and created and created == latest == rolled_out(found))


def _about(found: Object) -> dict[str, str]:
    annotations: dict[str, str] = found.get("metadata", {}).get("annotations", {})
    return annotations


def _revisions(found: Object | None) -> tuple[str, str]:
    """The newest revision, and the newest that is ready."""
    predictor = (found or {}).get("status", {}).get("components", {}).get("predictor", {})
    return str(predictor.get("latestCreatedRevision", "")), str(predictor.get("latestReadyRevision", ""))


def _condition(found: Object, kind: str) -> dict[str, Any]:
    conditions = found.get("status", {}).get("conditions", ())
    return next((one for one in conditions if one.get("type") == kind), {})


def _failure(found: Object) -> str:
    """Why it cannot serve, in the cluster's words; empty while it may yet."""
    info = found.get("status", {}).get("modelStatus", {}).get("lastFailureInfo", {})
    for kind in ("PredictorReady", "Ready"):
        one = _condition(found, kind)
        if one.get("status") == "False":
            said = [one.get("reason"), one.get("message"), info.get("message")]
            return " ".join(": ".join(str(part) for part in said if part).split())[:600]
    return ""


def _waits(found: Object) -> str:
    one = _condition(found, "PredictorReady") or _condition(found, "Ready")
    return " ".join(f"{one.get('reason') or 'no condition'}: {one.get('message') or 'no word yet'}".split())[:300]
