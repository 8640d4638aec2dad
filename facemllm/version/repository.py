"""The data repository: its layout, its git side, and the lock that keeps two writers apart.

    <repository>/README.md, .gitignore, .dvcignore, .dvc/config     written once, the same everywhere
    <repository>/faces.dvc, conversations.dvc                       what DVC knows of the two folders
    <repository>/manifests/faces.json, conversations.json           the tables' own manifests, readable without DVC
    <repository>/.dvc/config.local                                  this machine's remote; never committed

The branch `main` holds the data's revisions. What must not change their names lies on branches of its own, one file
each (`tombstones`). Commits are made with git's plumbing from a private index: no user configuration, hook, signature
or clock takes part.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from facemllm.core import git, progress
from facemllm.core.files import building, locked
from facemllm.errors import UserError
from facemllm.settings import Settings, root

TABLES = ("faces", "conversations")
REMOTE = "data"
BRANCH = "refs/heads/main"

_TITLE = "# Data repository of Face-MLLM Workflow"
# part of every revision's name: a change here would give known bytes a new name
_FIXED = {
    "README.md": f"{_TITLE}\n\nEvery commit is one version of the tables `faces` and `conversations`. Written by "
    "`facemllm version record`; read with `facemllm version restore REVISION OUT`, or `dvc pull` for the newest.\n",
    ".gitignore": "/faces\n/conversations\n",
    ".dvcignore": "",
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    ".dvc/config": "[core]\n    analytics = false\n    autostage = false\n    check_update = false\n",
}
_COMMITTED = (*_FIXED, *(f"{t}.dvc" for t in TABLES), *(f"manifests/{t}.json" for t in TABLES))
_FIRST_DATE = 946684800  # 2000-01-01; each commit is a second after its parent, so no clock enters its name


@dataclass(frozen=True)
class Revision:
    """One recorded version of the data. `new` tells whether this call made it."""

    sha: str
    faces: str
    conversations: str
    faces_rows: int
    conversations_rows: int
    new: bool = False


@dataclass(frozen=True)
class Repository:
    """A data repository on disk, and the address of its remote."""

    path: Path
    remote: str

    @classmethod
    def of(cls, settings: Settings) -> Repository:
        """The repository that the settings name; it may not exist yet."""
        named = settings.version.repository
        path = Path(root(), named).resolve() if named else settings.home / "data-repo"
        remote = settings.version.remote or str(settings.home / "dvc-remote")
        return cls(path, remote if "://" in remote else str(Path(root(), remote).resolve()))

    def exists(self) -> bool:
        """Whether the repository was made. Raises UserError when something else lies in its place."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return False
        readme = self.path / "README.md"
        if not (self.path / ".git").is_dir() or not readme.is_file() or not readme.read_text().startswith(_TITLE):
            raise UserError(f"{self.path} is no data repository of ours; set version.repository to another folder")
        return True

    def require(self) -> None:
        """Raise UserError unless the repository exists."""
        if not self.exists():
            raise UserError(f"no data repository at {self.path}; run: facemllm version record FACES CONVERSATIONS")

    def make(self) -> None:
        """Make the repository if it is absent, in one move, and bring its settings up to date."""
        if not self.exists():
            if self.path.is_dir():
                self.path.rmdir()
            with building(self.path) as partial:
                self._git("init", "-q", "--template=", f"--initial-branch={BRANCH.rsplit('/', 1)[1]}", at=partial)
                _write(partial, _FIXED)
        _write(self.path, {**_FIXED, ".dvc/config.local": self._local_config()})

    def lock(self, wait: bool = False) -> AbstractContextManager[None]:
        """Hold the repository for writing. While another process does, this one waits if it may, else it raises
        UserError; a dead one does not."""
        path, taken = self.path.with_name(f"{self.path.name}.lock"), f"{self.path}: another process is recording"
        if wait:
            return locked(path, waiting=lambda holder: progress.event(note=f"{taken} ({holder}); waiting for it"))
        return locked(path, f"{taken}; run again when it is done")

    def clear_leftovers(self) -> None:
        """Leave only what is committed: what a recording, finished or interrupted, needed beside it is removed.

        Call with the lock held: no one else can own these files.
        """
        leftovers = (".dvc/tmp/lock", ".dvc/tmp/rwlock*", ".git/*.lock", f".git/{BRANCH}.lock", ".git/facemllm-index*")
        for pattern in leftovers:
            for leftover in self.path.glob(pattern):
                leftover.unlink(missing_ok=True)
        for table in TABLES:
            shutil.rmtree(self.path / table, ignore_errors=True)
        if self._history("%H"):
            self._git("reset", "-q", "--hard", BRANCH)

    def commit(self, message: str) -> tuple[str, bool]:
        """Name the present state: an earlier commit of the very same files, or a new one. The flag tells which."""
        private = str(self.path / ".git" / "facemllm-index")
        self._git("add", "-f", "--", *_COMMITTED, index=private)
        tree = self._git("write-tree", index=private)
        history = [line.split() for line in self._history("%H %T")]
        for sha, recorded in history:
            if recorded == tree:
                return sha, False
        parent = ["-p", history[0][0]] if history else []
        sha = self._git("commit-tree", tree, *parent, "-m", message, date=_FIRST_DATE + len(history))
        self._git("update-ref", BRANCH, sha, history[0][0] if history else "0" * len(sha))
        return sha, True

    def resolve(self, revision: str) -> str:
        """The full name of a revision given in short. Raises UserError if it is unknown or ambiguous."""
        self.require()
        known = [line for line in self._history("%H") if line.startswith(revision.lower())]
        if not re.fullmatch(r"[0-9a-fA-F]{4,64}", revision) or len(known) != 1:
            problem = "fits several revisions" if len(known) > 1 and revision else "is unknown"
            raise UserError(f"revision '{revision}' {problem} in {self.path}; list them with: facemllm version log")
        return known[0]

    def branches(self, name: str) -> list[str]:
        """Full names of the branch, here and as fetched from elsewhere, this repository's own first."""
        if not (self.path / ".git").is_dir():
            return []
        patterns = (f"refs/heads/{name}", f"refs/remotes/*/{name}")
        return self._git("for-each-ref", "--format=%(refname)", *patterns).splitlines()

    def length(self, branch: str) -> int:
        """Number of commits of a branch."""
        return int(self._git("rev-list", "--count", branch))

    def extend(self, name: str, file: str, text: str, message: str, parent: str) -> None:
        """Commit a new text of the one file of a branch, on top of the branch `parent` ("" for none).

        Call with the lock held and the repository made.
        """
        blob = self._git("hash-object", "-w", "--stdin", data=text)
        tree = self._git("mktree", data=f"100644 blob {blob}\t{file}\n")
        base = ["-p", self._git("rev-parse", parent)] if parent else []
        date = _FIRST_DATE + (self.length(parent) if parent else 0)
        sha = self._git("commit-tree", tree, *base, "-m", message, date=date)
        self._git("update-ref", f"refs/heads/{name}", sha)

    def revision(self, sha: str, new: bool = False) -> Revision:
        """What a commit holds, read from its manifests."""
        faces, conversations = (json.loads(self.show(sha, f"manifests/{table}.json")) for table in TABLES)
        named, rows = (faces["digest"], conversations["digest"]), (faces["rows"], conversations["rows"])
        return Revision(sha, *named, *rows, new)

    def revisions(self) -> list[str]:
        """All commits, newest first."""
        return self._history("%H") if self.exists() else []

    def show(self, sha: str, name: str) -> str:
        """A committed file's text, at a commit or the end of a branch."""
        return self._git("cat-file", "blob", f"{sha}:{name}")

    def dvc_config(self) -> dict[str, Any]:
        """This machine's DVC settings."""
        return {
            "core": {"remote": REMOTE},
            "cache": {"type": "reflink,hardlink,copy"},
            "remote": {REMOTE: self._remote_options()},
        }

    def _local_config(self) -> str:
        options = "".join(f"    {name} = {value}\n" for name, value in self._remote_options().items())
        return (
            f'[core]\n    remote = {REMOTE}\n[cache]\n    type = "reflink,hardlink,copy"\n'
            f"['remote \"{REMOTE}\"']\n{options}"
        )

    def _remote_options(self) -> dict[str, str]:
        # DVC hands its own (empty) endpoint to the S3 client, which then never looks at these variables
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        named = {"endpointurl": endpoint} if endpoint and self.remote.startswith("s3://") else {}
        return {"url": self.remote, **named}

    def _history(self, form: str) -> list[str]:
        try:
            return self._git("log", f"--format={form}", BRANCH, "--").splitlines()
        except UserError:
            if (self.path / ".git" / BRANCH).exists():
                raise
            return []

    def _git(
        self, *arguments: str, at: Path | None = None, index: str = "", date: int = 0, data: str | None = None
    ) -> str:
        environment = git.environment(**git_settings())
        if index:
            environment["GIT_INDEX_FILE"] = index
        who = {"NAME": "facemllm", "EMAIL": "facemllm@localhost", "DATE": f"@{date} +0000"}
        environment |= {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in who.items()}
        fixed = ["-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false", "-c", "core.autocrlf=false"]
        command = ["git", "-C", str(at or self.path), *fixed, *arguments]
        done = git.run(command, environment, "data versions need it", (data or "").encode())
        out = done.stdout.decode().strip()
        if done.returncode:
            said = (done.stderr.decode().strip() or out or "no message").splitlines()[-1]
            raise UserError(f"git {arguments[0]} failed in {at or self.path}: {said}")
        return out


def git_settings() -> dict[str, str]:
    """The variables that keep git from the user's and the machine's configuration, but for one thing that they alone
    can say: which folders of other owners are to be trusted (`safe.directory`)."""
    given = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_COUNT": str(len(_trusted()))}
    for number, folder in enumerate(_trusted()):
        given |= {f"GIT_CONFIG_KEY_{number}": "safe.directory", f"GIT_CONFIG_VALUE_{number}": folder}
    return given


@cache
def _trusted() -> list[str]:
    command = ["git", "config", "--get-all", "safe.directory"]
    with suppress(FileNotFoundError):
        return subprocess.run(command, cwd="/", capture_output=True, text=True).stdout.splitlines()
    return []


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")
