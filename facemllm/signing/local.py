"""Keys, policy and decisions of this machine: where the settings say they lie, and what is made on first use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from facemllm.core.files import locked
from facemllm.errors import UserError
from facemllm.settings import Settings, root
from facemllm.signing import keys
from facemllm.signing.canonical import utc_now
from facemllm.signing.keys import FileSigner, Passphrase
from facemllm.signing.policy import (
    APPROVER,
    PIPELINE,
    RELEASER,
    REQUESTER,
    Key,
    Policy,
    Rule,
    add_key,
    find_key,
    read_policy,
    same_person,
)


def keys_folder(settings: Settings) -> Path:
    """Folder of the private keys."""
    return settings.signing / "keys"


def new_rule(settings: Settings) -> Rule:
    """The rule that a new policy file is made with (`promote.rule`)."""
    rule = settings.promote.rule
    return Rule(dict(rule.approvals), tuple(rule.request_by), rule.requester_may_approve, rule.valid_days)


def policy(settings: Settings) -> Policy:
    """The policy in force; on a laptop without one it is made, with a key for the pipeline, and a line says so."""
    path = settings.policy_file
    if settings.promote.policy is None and not path.exists():
        with locked(path.with_name(".first-use.lock")):
            if not path.exists():
                new_person_key(settings, PIPELINE, (PIPELINE, RELEASER), None)
                _say(f"made a policy of who may decide ({path}) and an unencrypted key for the pipeline's requests")
    return read_policy(path)


def new_person_key(settings: Settings, person: str, roles: tuple[str, ...], passphrase: bytes | None) -> Key:
    """Make a key pair here and list its public half in the policy file. Raises UserError."""
    entry = make_key(settings, person, roles, passphrase)
    try:
        add_key(settings.policy_file, entry, new_rule(settings))
    except BaseException:  # a key that no policy lists is nobody's
        (keys_folder(settings) / f"{entry.id}.pem").unlink(missing_ok=True)
        raise
    return entry


def make_key(settings: Settings, person: str, roles: tuple[str, ...], passphrase: bytes | None) -> Key:
    """Make a key pair here. Returns the entry for a policy file, which is not written. Raises UserError."""
    name, public = keys.new_key(keys_folder(settings), passphrase)
    return Key(name, person, roles, public, utc_now())


def pipeline_signer(settings: Settings, role: str = PIPELINE) -> FileSigner:
    """Who signs for the pipeline here (`role` pipeline or releaser). Raises UserError when no key here has the role."""
    fits = [key for key in _own_keys(settings, policy(settings)) if role in key.roles]
    if not fits:
        raise UserError(f"no valid key with the role {role} in {keys_folder(settings)}: {_make('pipeline', role)}")
    machines = [key for key in fits if same_person(key.person) == PIPELINE]
    return keys.signer(keys_folder(settings), (machines or fits)[0].id)


def person_signer(
    settings: Settings,
    decision: str,
    by: str | None = None,
    key: str | None = None,
    role: str | None = None,
    passphrase: Passphrase | None = None,
) -> tuple[FileSigner, str]:
    """Who signs a decision here, and in which role: the private key of person `by`, or `key` where several fit.

    Without `by` it is the only person with a fitting key here, else git's `user.name`. The first decision of a laptop
    whose policy lists no person yet makes a key, and a line says so. Raises UserError when no key here fits, or several
    do.
    """
    known = policy(settings)
    if settings.promote.policy is None and all(set(one.roles) <= {PIPELINE, RELEASER} for one in known.keys.values()):
        known = _first_person(settings, by)
    roles = (role,) if role else known.roles_for(decision)
    folder = keys_folder(settings)
    own = [one for one in _own_keys(settings, known) if set(roles) & set(one.roles) - {PIPELINE, RELEASER}]
    if key:
        wanted = find_key(known, key).id
        own = [one for one in own if one.id == wanted]
    if by:
        own = [one for one in own if same_person(one.person) == same_person(by)]
    elif len({same_person(one.person) for one in own}) > 1:
        own = [one for one in own if same_person(one.person) == same_person(git_name())] or own
    if not own:
        whose = f" of {by}" if by else ""
        asked = " or ".join(roles)
        raise UserError(f"no valid key{whose} in {folder} may {decision} (as {asked}): {_make(by or 'NAME', roles[0])}")
    if len(own) > 1:
        listed = ", ".join(f"{one.id[:12]} of {one.person}" for one in own)
        raise UserError(f"several keys here may {decision} ({listed}); name the person with --by or the key with --key")
    found = own[0]
    return keys.signer(folder, found.id, passphrase), next(one for one in roles if one in found.roles)


def git_name() -> str:
    """Git's `user.name` in the project folder; empty where there is none."""
    try:
        command = ["git", "-C", str(root()), "config", "user.name"]
        return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""


def _first_person(settings: Settings, by: str | None) -> Policy:
    name = by or git_name()
    if not name:
        raise UserError('nobody is named as the one who decides: --by "Ada Lovelace", or `git config user.name`')
    made = new_person_key(settings, name, (REQUESTER, APPROVER), None)
    where = keys_folder(settings) / f"{made.id}.pem"
    better = f"`facemllm keys new {name!r} --role approver` makes one with a passphrase"
    _say(f"made the first key, of {name}: {where}, unencrypted, so whoever reads that file decides as {name}; {better}")
    return read_policy(settings.policy_file)


def _own_keys(settings: Settings, known: Policy) -> list[Key]:
    """The valid keys of the policy whose private halves lie here."""
    here, now = set(keys.private_keys(keys_folder(settings))), utc_now()
    return [one for one in known.keys.values() if one.id in here and one.valid_at(now)]


def _make(person: str, role: str) -> str:
    return f"`facemllm keys new {person!r} --role {role}` makes one"


def _say(line: str) -> None:
    print(line, file=sys.stderr)
