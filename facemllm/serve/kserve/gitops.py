"""The InferenceService by way of a git repository, which something else (Argo CD, Flux) applies to the cluster."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from facemllm.core import git
from facemllm.core.digests import of_bytes
from facemllm.core.kubernetes import Api, Object
from facemllm.errors import UserError
from facemllm.serve.kserve.rendering import DIGEST, VERSION
from facemllm.serve.kserve.service import InferenceService
from facemllm.settings import Settings

_TRIES = 5
_WAIT_S = 120
_PURPOSE = "`serve.target: gitops` releases by it"
_WHO = ("-c", "user.name=facemllm", "-c", "user.email=facemllm@localhost", "-c", "core.hooksPath=/dev/null")


class CommittedService(InferenceService):
    """Applied by a commit to the repository's file, waited for and asked as any other."""

    def __init__(self, settings: Settings, api: Api, name: str) -> None:
        super().__init__(settings, api, name)
        assert settings.cluster.serving.gitops is not None
        self._place = settings.cluster.serving.gitops
        self._clone = settings.home / "work" / "gitops" / of_bytes(self._place.repository.encode())[:16]

    def apply(self, body: Object) -> None:
        """Commit it, unless the file is that already, and push."""
        about, share = body["metadata"]["annotations"], body["spec"]["predictor"].get("canaryTrafficPercent", 100)
        head = "# Written by `facemllm`: the model that is served, and all that it is served with.\n"
        text = head + yaml.safe_dump(body, sort_keys=False, width=120)
        what = f"version {about[VERSION]} ({about[DIGEST][:12]})"
        self._commit(text, f"{self.name}: {what} gets {share} % of the requests")

    def delete(self) -> None:
        """Take the file away."""
        self._commit(None, f"{self.name}: nothing serves")

    def _commit(self, text: str | None, message: str) -> None:
        place = self._place
        for _ in range(_TRIES):
            self._fetch()
            file = self._clone / place.file
            if text is None:
                file.unlink(missing_ok=True)
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, "utf-8")
            self._git("add", "--all", "--", place.file)
            if not self._git("status", "--porcelain", "--", place.file):
                return
            self._git(*_WHO, "commit", "--quiet", "-m", message)
            try:
                self._git("push", "--quiet", "origin", f"HEAD:refs/heads/{place.branch}")
                return
            except UserError as error:
                if not any(word in str(error) for word in ("non-fast-forward", "fetch first", "cannot lock ref")):
                    raise
        raise UserError(f"{place.repository}: others pushed to {place.branch} each time; try again")

    def _fetch(self) -> None:
        """Have the clone stand where the branch does now."""
        if not (self._clone / ".git").is_dir():
            shutil.rmtree(self._clone, ignore_errors=True)
            self._clone.mkdir(parents=True)
            self._git("init", "--quiet")
            self._git("remote", "add", "origin", self._place.repository)
        self._git("fetch", "--quiet", "--depth=1", "origin", f"refs/heads/{self._place.branch}")
        self._git("reset", "--quiet", "--hard", "FETCH_HEAD")
        for part in Path(self._place.file).parents:
            if (self._clone / part).is_symlink():
                raise UserError(f"{self._place.repository}: {part} is a link; cluster.serving.gitops.file names a file")

    def _git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self._clone), *arguments]
        done = git.run(command, git.environment(), _PURPOSE, wait_s=_WAIT_S, place=self._place.repository)
        if done.returncode:
            message = " ".join(done.stderr.decode("utf-8", "replace").split())[-400:]
            raise UserError(f"{self._place.repository}: git {arguments[0]} failed: {message}")
        return done.stdout.decode("utf-8", "replace").strip()
