"""KServe as a target: staging and production are an InferenceService each, in a namespace of its own.

A new model becomes a revision beside the one that serves, with no request (`canaryTrafficPercent: 0`) and an address of
its own. What served before, its whole pod, is kept in an annotation from then on, so that whoever goes on after a
release that was killed can put it back. Going back is in three applications, of which none lets the new one have a
request: its share is 0, then the former pod is the newest revision with none, then it gets all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from facemllm.core.kubernetes import Api, Object, connect
from facemllm.core.servers import Deployed, evaluated_file
from facemllm.errors import UserError
from facemllm.serve.kserve import lease, rendering
from facemllm.serve.kserve.gitops import CommittedService
from facemllm.serve.kserve.rendering import DIGEST, FORMER, PREDICTOR, PRODUCTION, STAGING, VERSION, Model
from facemllm.serve.kserve.service import LATEST, PREVIOUS, InferenceService, rolled_out, share, whole
from facemllm.serve.kserve.split import Revision, RevisionSplit
from facemllm.serve.model_store import ModelStore
from facemllm.serve.target import Endpoint
from facemllm.settings import Settings

_ASKED_AGAIN = 3


class KServe:
    """Staging and production in the cluster that `connect` finds."""

    keeps_adopted = True

    def __init__(self, settings: Settings, connected: Callable[[str], Api] = connect) -> None:
        rendering.refuse(settings)
        self._settings, known = settings, settings.cluster.serving
        committed = CommittedService if settings.serve.target == "gitops" else InferenceService
        self._production = committed(
            settings, connected(known.production_namespace), rendering.name_of(settings, PRODUCTION)
        )
        self._staging = InferenceService(
            settings, connected(known.staging_namespace), rendering.name_of(settings, STAGING)
        )
        self._about: dict[str, str] = {}
        self._predictor: Object = {}
        self._former: Object | None = None
        self._revisions: tuple[str, str] = ("", "")
        self._mode = ""
        self._lease: lease.Lease | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """A Lease beside production, renewed before each change of it."""
        taken = "another release is under way; nothing was changed, look at `facemllm promote list` and try again"
        with lease.held(self._production.api, f"{self._production.name}-release", taken) as self._lease:
            yield

    def serving(self) -> Deployed | None:
        """What the InferenceService names where that gets every request, else what served before."""
        found = self._production.get()
        if found is None:
            return None
        about = found["metadata"].get("annotations", {}) if whole(found) else (_former(found) or {}).get("about", {})
        return Deployed(Path(), about[DIGEST], about.get(VERSION, "")) if DIGEST in about else None

    def put(self, model: Deployed, before: Deployed | None) -> Endpoint:
        """Store the model, and have a revision of it that gets no request; all, where none serves."""
        current = self._production.get()
        self._mode = self._production.mode(current)
        self._predictor, self._about = self._rendered(PRODUCTION, model)
        adopted = current is not None and whole(current) and _annotation(current, PREDICTOR) == self._about[PREDICTOR]
        if current is not None and adopted:
            url = self._production.address(current, LATEST)
            return Endpoint(PRODUCTION, url, self._settings.promote.model_name, model.digest, 0, True)
        if current is not None and before is not None:
            self._former = _as_former(current) if whole(current) else _former(current)
            self._revisions = rolled_out(current), ""
        ready = self._applied(0 if self._former else None, current)
        newest = ready["status"]["components"]["predictor"]["latestReadyRevision"]
        self._revisions = self._revisions[0], newest
        url = self._production.address(ready, LATEST)
        return Endpoint(PRODUCTION, url, self._settings.promote.model_name, model.digest, 0, False)

    def split(self) -> RevisionSplit:
        """The two revisions, by their tags."""
        found = self._production.get() or {}
        urls = [self._production.address(found, tag) for tag in (PREVIOUS, LATEST)]
        if not all(urls):
            raise UserError(f"{self._production.words} gives no address for each of its two revisions")
        stable, canary = (Revision(name, url) for name, url in zip(self._revisions, urls, strict=True))
        return RevisionSplit(self._settings, stable, canary, lambda percent: self._applied(int(percent), None))

    def keep(self) -> str:
        """See that all requests go to one revision, and that whoever answers them names the model."""
        self._still()
        found = self._production.get()
        digest = self._about[DIGEST]
        if found is None or not whole(found) or _annotation(found, DIGEST) != digest:
            raise UserError(f"{self._production.words} does not give every request to model {digest[:12]}")
        return self._answers(found, digest)

    def back(self) -> None:
        """Give every request to the former revision at once; then have the former pod be what the object names."""
        self._still()
        if self._former is None:
            return
        stable, current = self._revisions[0], self._production.get()
        if current is not None and share(current, stable) < 100:
            self._apply(self._body(0))
        self._production.routed(stable)
        self._about, self._predictor = dict(self._former["about"]), dict(self._former["predictor"])
        self._applied(0, self._production.get())
        self._answers(self._applied(100, None), self._about[DIGEST])

    def down(self) -> None:
        """Delete production's InferenceService."""
        self._still()
        self._production.delete()

    def stage(self, model: Deployed) -> Endpoint:
        """Apply staging's InferenceService, which nobody outside the cluster reaches."""
        current = self._staging.get()
        mode = self._staging.mode(current)
        predictor, about = self._rendered(STAGING, model)
        body = rendering.service(self._settings, STAGING, about, predictor, mode, None, None)
        self._staging.apply(body)
        url = self._staging.address(self._staging.ready(body, current), LATEST)
        same = current is not None and _annotation(current, PREDICTOR) == about[PREDICTOR]
        return Endpoint(STAGING, url, self._settings.promote.model_name, model.digest, 0, same)

    def unstage(self) -> None:
        """Delete staging's InferenceService."""
        self._staging.delete()

    def staged(self, model: Deployed) -> None:
        """The InferenceService says it itself."""

    def _rendered(self, stage: str, model: Deployed) -> tuple[Object, dict[str, str]]:
        """A model's predictor and what is said of it, once the store holds its bytes."""
        store = ModelStore(self._settings.cluster.serving.models or "")
        figures, file = None, evaluated_file(self._settings, model.digest)
        address = store.put(model.model, model.digest)
        if file.is_file():
            figures = store.put_figures(model.digest, file.read_bytes())
        known = Model(model.digest, model.version, address, figures)
        predictor = rendering.predictor_of(self._settings, stage, known)
        return predictor, rendering.annotations_of(known, predictor)

    def _body(self, percent: int | None) -> Object:
        about, predictor = self._about, self._predictor
        return rendering.service(self._settings, PRODUCTION, about, predictor, self._mode, percent, self._former)

    def _still(self) -> None:
        """Raises Superseded where another release holds the Lease meanwhile."""
        if self._lease is not None:
            self._lease.keep()

    def _apply(self, body: Object) -> None:
        self._still()
        self._production.apply(body)

    def _applied(self, percent: int | None, before: Object | None) -> Object:
        body = self._body(percent)
        self._apply(body)
        return self._production.ready(body, before)

    def _answers(self, found: Object, digest: str) -> str:
        """Production's address. Raises UserError where a server behind it names another model."""
        url = self._production.address(found)
        for _ in range(_ASKED_AGAIN * self._settings.cluster.serving.max_replicas):
            if (said := str(self._production.info(url).get("digest"))) != digest:
                raise UserError(f"{url} is answered by model {said[:12]}, not {digest[:12]}")
        return url


def _annotation(found: Object, name: str) -> str:
    return str(found["metadata"].get("annotations", {}).get(name, ""))


def _as_former(found: Object) -> Object:
    """What serves now, as it is put back."""
    predictor = {key: value for key, value in found["spec"]["predictor"].items() if key != "canaryTrafficPercent"}
    return {"about": {key: _annotation(found, key) for key in (DIGEST, VERSION, PREDICTOR)}, "predictor": predictor}


def _former(found: Object) -> Object | None:
    """What served before, as a release wrote it down."""
    try:
        known: Any = json.loads(_annotation(found, FORMER) or "null")
        return known if known and {"about", "predictor"} <= set(known) else None
    except (ValueError, TypeError):
        return None
