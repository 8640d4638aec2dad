"""`facemllm keys ...`: who may decide, and with which key."""

from __future__ import annotations

from typing import Annotated

import typer

from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.workflow.options import PassphraseFd, Reason, Result, command

keys = typer.Typer(no_args_is_help=True, help="Keys of the persons who decide, and the policy that lists them.")


@command(keys, "new")
def keys_new(
    settings: Settings,
    person: Annotated[str, typer.Argument(help="Whose key it is: a person's name.")],
    role: Annotated[
        list[str],
        typer.Option("--role", help="What it may sign as: approver, requester, another role of the rule."),
    ],
    passphrase_fd: PassphraseFd = None,
    no_passphrase: Annotated[bool, typer.Option("--no-passphrase", help="Do not encrypt the private key.")] = False,
    entry: Annotated[
        bool, typer.Option("--entry", help="Only print the entry for a policy file that others keep.")
    ] = False,
) -> Result:
    """Make a key pair here and list its public half in the policy file."""
    from facemllm.signing import local
    from facemllm.signing.keys import new_passphrase
    from facemllm.signing.policy import check_key, entry_text

    if no_passphrase and passphrase_fd is not None:
        raise UserError("give one of --no-passphrase and --passphrase-fd")
    roles = tuple(dict.fromkeys(role))
    check_key(person, roles)
    if not entry and settings.promote.policy is None:
        local.policy(settings)
    passphrase = None if no_passphrase else new_passphrase(passphrase_fd)
    made = (local.make_key if entry else local.new_person_key)(settings, person, roles, passphrase)
    path = local.keys_folder(settings) / f"{made.id}.pem"
    facts = {"id": made.id, "person": person, "roles": list(roles), "private_key": str(path)}
    if entry:
        return facts | {"entry": entry_text(made)}, entry_text(made)
    state = "not encrypted: whoever reads the file can sign" if no_passphrase else "encrypted"
    listed = f"listed in {settings.policy_file}"
    return facts, f"key {made.id} of {person} ({', '.join(roles)}), {listed}\n{path}, {state}"


@command(keys, "list")
def keys_list(settings: Settings) -> Result:
    """List the keys of the policy, which of them lie here, and the rule."""
    from facemllm.signing import local
    from facemllm.signing.canonical import time_text, utc_now
    from facemllm.signing.keys import private_keys

    known, here, now = local.policy(settings), set(private_keys(local.keys_folder(settings))), utc_now()
    rows = []
    lines = [f"{'id':<13}{'state':<14}{'private key':<12}{'person':<24}roles"]
    for key in known.keys.values():
        state, where = key.state(now), "here" if key.id in here else "elsewhere"
        dates = {"not_before": time_text(key.not_before), "not_after": key.not_after and time_text(key.not_after)}
        row = {"id": key.id, "person": key.person, "roles": list(key.roles), **dates}
        rows.append(row | {"state": state, "here": key.id in here})
        lines.append(f"{key.id:<13.12}{state:<14}{where:<12}{key.person:<24}{', '.join(key.roles)}")
    rule = known.rule
    spoken = {"approvals": dict(rule.approvals), "request_by": list(rule.request_by), "valid_days": rule.valid_days}
    spoken |= {"requester_may_approve": rule.requester_may_approve}
    needed = " and ".join(f"{number} x {role}" for role, number in rule.approvals.items())
    who = "who asked may approve" if rule.requester_may_approve else "who asked may not approve"
    lines.append(f"rule: {needed}; asked by {' or '.join(rule.request_by)}; {who}; holds {rule.valid_days} days")
    return {"policy": str(settings.policy_file), "keys": rows, "rule": spoken}, "\n".join(lines)


@command(keys, "revoke")
def keys_revoke(
    settings: Settings,
    key: Annotated[str, typer.Argument(metavar="ID", help="The key's id, or its first eight digits or more.")],
    reason: Reason,
) -> Result:
    """Mark a key as revoked: whatever it signed, whenever, counts for nothing from now on."""
    from facemllm.signing.canonical import utc_now
    from facemllm.signing.policy import revoke_key
    from facemllm.version.tombstones import plain_line

    path = settings.policy_file
    if not (why := plain_line(reason)):
        raise UserError('a revocation needs a reason: --reason "..."')
    revoked = revoke_key(path, key, why, utc_now())
    facts = {"id": revoked.id, "person": revoked.person, "reason": why, "policy": str(path)}
    return facts, f"key {revoked.id[:12]} of {revoked.person} is revoked in {path}; what it signed counts for nothing"
