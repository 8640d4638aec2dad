"""Notices of decisions: a webhook and an e-mail when one is asked for, taken or about to expire, a version is released,
or production is rolled back.

Nothing leaves but what `FACTS` names, all of it from signed statements: no picture, no other name. Addresses come from
`promote.notify` alone. A notice that cannot be sent is logged as one line; it stops no decision.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from facemllm.errors import UserError, one_line
from facemllm.promote import decided, webhook
from facemllm.promote.webhook import LIMIT_S, Temporary
from facemllm.report.kit import render
from facemllm.settings import Settings
from facemllm.signing.canonical import time_text, utc_now
from facemllm.signing.standing import standing
from facemllm.version.tombstones import plain_line

if TYPE_CHECKING:
    from email.message import EmailMessage

log = logging.getLogger(__name__)

EVENTS = {
    "requested": "a decision is asked for",
    "decided": "a decision was taken",
    "expiring": "an approval is about to expire",
    "released": "a model was released",
    "rolled_back": "production was rolled back",
}
FACTS = (
    *("model", "version", "name", "bundle", "decision", "person", "role", "reason", "issued", "expires"),
    *("statement", "replaces"),
)
"""Names of facts that leave this machine; others are dropped."""
_LONGEST = 2000


def notify(settings: Settings, event: str, facts: Mapping[str, Any]) -> bool:
    """Tell the receivers of `promote.notify` of one of `EVENTS`, within `LIMIT_S` seconds; whether all were told.

    What fails is logged as one line. Raises ValueError for an unknown event, nothing else.
    """
    if event not in EVENTS:
        raise ValueError(f"unknown event {event}; one of {', '.join(EVENTS)}")
    payload = {"name": settings.promote.model_name}
    payload |= {name: plain_line(str(facts[name]))[:_LONGEST] for name in FACTS if facts.get(name) is not None}
    about = {"id": secrets.token_hex(16), "event": event, "at": datetime.now(UTC).isoformat(timespec="seconds")}
    notice = {**about, "facts": payload}
    senders: dict[str, Callable[[], None]] = {}
    if address := settings.promote.notify.webhook:
        senders[f"webhook {webhook.host_of(address)}"] = lambda: _post(settings, notice)
    if settings.promote.notify.email and settings.promote.notify.smtp:
        senders[f"e-mail through {settings.promote.notify.smtp.host}"] = lambda: _mail(settings, notice)
    problems = _at_once(senders)
    for channel, problem in problems.items():
        if problem:
            log.warning("notice '%s' was not sent (%s): %s", event, channel, problem)
        else:
            log.info("notice '%s' was sent (%s)", event, channel)
    return not any(problems.values())


def facts_of(statement: Any, version: int | str | None = None) -> dict[str, Any]:
    """What a notice says of a signed statement, about a version if its number is known."""
    facts = {name: getattr(statement, name) for name in FACTS if hasattr(statement, name)}
    times = {name: facts[name] and time_text(facts[name]) for name in ("issued", "expires")}
    return {**facts, **times, "statement": statement.id, "version": version}


def tell_expiring(settings: Settings, days: int, now: datetime | None = None) -> list[dict[str, Any]]:
    """Tell of every approval in force that ends within `days` days. Returns the facts of each, and whether all were
    told (`sent`)."""
    found, notified, now = decided.decisions(settings), [], now or utc_now()
    if found is None:
        return []
    decisions, policy = found
    for bundle, model in {s.bundle: s.model for entry in decisions.statements() if (s := entry.statement)}.items():
        in_force = standing(decisions, policy, bundle, now)
        if in_force.state != "approved" or in_force.expires is None or in_force.expires > now + timedelta(days=days):
            continue
        about = decisions.bundle(bundle).get("model", {})
        facts = {"model": model, "bundle": bundle, "name": about.get("name"), "version": about.get("version")}
        people = ", ".join(one.person for one in in_force.approvals)
        facts |= {"decision": "approve", "person": people, "expires": time_text(in_force.expires)}
        notified.append({**facts, "sent": notify(settings, "expiring", facts)})
    return notified


def _post(settings: Settings, notice: Mapping[str, Any]) -> None:
    receivers = settings.promote.notify
    assert receivers.webhook is not None
    secret = os.environ.get(receivers.secret_env, "").encode()
    if not secret:
        raise UserError(f"set the environment variable {receivers.secret_env} to the secret that the receiver knows")
    body = json.dumps(notice, ensure_ascii=False, sort_keys=True).encode()
    headers = {webhook.EVENT: notice["event"], webhook.DELIVERY: notice["id"]}
    _again(lambda left: webhook.post(receivers.webhook or "", secret, body, headers, left))


def _mail(settings: Settings, notice: Mapping[str, Any]) -> None:
    import smtplib
    import ssl

    receivers = settings.promote.notify
    smtp = receivers.smtp
    assert smtp is not None
    password = os.environ.get(smtp.password_env, "") if smtp.password_env else ""
    if smtp.user and not password:
        raise UserError(f"set the environment variable {smtp.password_env} to the password of {smtp.user}")
    message = _message(smtp.sender, receivers.email or (), notice)

    def send(left: float) -> None:
        webhook.checked_address(smtp.host, smtp.port)
        safe = ssl.create_default_context()
        try:
            tls = smtp.security == "tls"
            server = (
                smtplib.SMTP_SSL(smtp.host, smtp.port, timeout=left, context=safe)
                if tls
                else smtplib.SMTP(smtp.host, smtp.port, timeout=left)
            )
            with server:
                if smtp.security == "starttls":
                    server.starttls(context=safe)
                if smtp.user:
                    server.login(smtp.user, password)
                refused = server.send_message(message)
        except smtplib.SMTPResponseException as error:
            kind = Temporary if 400 <= error.smtp_code < 500 else UserError
            raise kind(f"it answered {error.smtp_code} {plain_line(repr(error.smtp_error))[:120]}") from None
        except smtplib.SMTPRecipientsRefused as error:
            raise UserError(f"it refused {', '.join(error.recipients)}") from None
        except smtplib.SMTPServerDisconnected as error:
            raise Temporary(one_line(error, 120)) from None
        except (smtplib.SMTPException, ssl.SSLError) as error:
            raise UserError(one_line(error, 120)) from None
        except OSError as error:
            raise Temporary(one_line(error, 120)) from None
        if refused:
            raise UserError(f"it refused {', '.join(refused)}; the others were written to")

    _again(send)


def _message(sender: str, receivers: tuple[str, ...], notice: Mapping[str, Any]) -> EmailMessage:
    from email.message import EmailMessage
    from email.utils import format_datetime

    facts = notice["facts"]
    what = f"{facts['name']} version {facts['version']}" if "version" in facts else str(facts["name"])
    message = EmailMessage()
    message["Subject"] = f"{what}: {EVENTS[notice['event']]}"[:200]
    message["From"], message["To"] = sender, ", ".join(receivers)
    message["Date"], message["Message-ID"] = format_datetime(datetime.now(UTC)), f"<{notice['id']}@face-mllm>"
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(render("notice.txt.jinja", what=what, happened=EVENTS[notice["event"]], facts=facts))
    return message


def _again(send: Callable[[float], None]) -> None:
    """Try until it succeeds, fails for good, or the time is over: the pause doubles from half a second."""
    deadline, pause, tries = time.monotonic() + LIMIT_S, 0.5, 1
    while True:
        try:
            return send(max(0.1, deadline - time.monotonic()))
        except Temporary as error:
            if time.monotonic() + pause >= deadline:
                raise UserError(f"{error} ({tries} tries)") from None
        time.sleep(pause)
        pause, tries = pause * 2, tries + 1


def _at_once(senders: Mapping[str, Callable[[], None]]) -> dict[str, str]:
    """Run all at the same time; what went wrong with each, "" for nothing. Nobody is waited for beyond the limit."""
    problems = dict.fromkeys(senders, f"no answer within {LIMIT_S:.0f} s")

    def run(channel: str, send: Callable[[], None]) -> None:
        try:
            send()
            problems[channel] = ""
        except Exception as error:
            problems[channel] = one_line(error)

    threads = [threading.Thread(target=run, args=one, daemon=True) for one in senders.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + LIMIT_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(problems)
