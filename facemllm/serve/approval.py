"""Whether the model of this server is approved: asked before it is loaded, before it is ready, and every minute after.

An approval that is withdrawn (revoked, rejected, its key revoked, its history rewritten) takes the server out of
service within a minute; one that comes back puts it in again. Time alone ends no service: an expired approval, or a
clock that was set back, keeps the next start from happening, since a busy server must not fall silent at midnight
because nobody looked. What cannot be read at the moment (a repository out of reach) changes nothing either: it was
approved when it started, and whoever revokes it makes the repository readable to say so.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from facemllm.errors import UserError, one_line
from facemllm.signing.authorization import Authorization, authorize
from facemllm.signing.canonical import Refused, time_text, utc_now
from facemllm.signing.decisions import Decisions
from facemllm.signing.policy import Policy, read_policy

log = logging.getLogger("facemllm.serve")

EVERY_S = 60.0
TIME_ALONE = ("expired", "clock")
"""Checks that keep a server from starting and end none that serves."""


class Approval:
    """The standing of one model, as decisions and policy say it now.

    `decisions` is a folder or an address, whose copy is kept beside the checkpoint. `withdrawn` says why the model may
    be served no more; empty while it may.
    """

    def __init__(self, digest: str, decisions: str, policy: Path, checkpoint: Path | None) -> None:
        self.digest, self.withdrawn = digest, ""
        self._place, self._policy, self._checkpoint = decisions, policy, checkpoint
        self._found: Authorization | None = None
        self._decisions: Decisions | None = None
        self._checked = utc_now()

    def require(self) -> Authorization:
        """Read policy and decisions on. Raises Refused with the one check that failed."""
        policy, decisions = self._read()
        try:
            self._found = authorize(self.digest, decisions, policy)
        except Refused as refused:
            if refused.check == "history":  # it may be mended meanwhile: the next look begins anew
                self._decisions = None
            raise
        self._checked = utc_now()
        return self._found

    def files(self) -> Mapping[str, str]:
        """The files of the model by its bundle, path to SHA-256: to say which one differs, not to decide anything."""
        bundle = self._read()[1].bundle(self.require().bundle)
        files = bundle.get("model", {}).get("files", {})
        return files if isinstance(files, dict) else {}

    def _read(self) -> tuple[Policy, Decisions]:
        policy = read_policy(self._policy)
        if self._decisions is None:
            clones = self._checkpoint.parent / "clones" if self._checkpoint else None
            self._decisions = Decisions(self._place, policy, self._checkpoint, clones)
        return policy, self._decisions

    def look(self) -> None:
        """Ask again while serving, and set `withdrawn`."""
        try:
            self.require()
            self.withdrawn = ""
        except Refused as refused:
            if refused.check in TIME_ALONE:
                log.warning("serving on, but no server would start again: %s: %s", refused.check, one_line(refused))
            elif not self.withdrawn:
                log.error("out of service, %s: %s", refused.check, one_line(refused))
                self.withdrawn = f"{refused.check}: {one_line(refused)}"
        except (UserError, OSError) as error:
            log.warning("decisions cannot be read, serving on as approved before: %s", one_line(error))

    def watch(self, ready: Callable[[bool], object], every_s: float | None = None) -> threading.Event:
        """Ask every minute in a thread of its own, and tell `ready` of each change. Set the event to end it."""
        end = threading.Event()

        def work() -> None:
            while not end.wait(EVERY_S if every_s is None else every_s):
                before = self.withdrawn
                self.look()
                if bool(before) != bool(self.withdrawn):
                    ready(not self.withdrawn)

        threading.Thread(target=work, name="approval", daemon=True).start()
        return end

    def info(self) -> dict[str, Any]:
        """What `/info` says: the bundle, who approved it as what, until when, when that was read, and why no more."""
        found = self._found or self.require()
        return {
            "bundle": found.bundle,
            "approvals": [
                {"person": one.person, "role": one.role, "issued": time_text(one.issued), "statement": one.id}
                for one in found.approvals
            ],
            "expires": time_text(found.expires),
            "checked": time_text(self._checked),
            "withdrawn": self.withdrawn or None,
        }
