"""Notices: what leaves, that it is signed as its receiver checks, and that no failure stops a decision."""

import hashlib
import inspect
import json
import logging
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from facemllm.promote import notices, webhook
from facemllm.settings import Settings, load
from tests.answering import Answering, Loopback
from tests.refusing import refuses

SECRET = "correct horse"
FACTS = {"model": "a" * 64, "version": 3, "decision": "approve", "person": "Ada Lovelace", "reason": "figures hold"}


class Receiver(Loopback):
    """A server on loopback that keeps what it is sent and answers with the given statuses, the last one for ever."""

    def __init__(self, *statuses: int, headers: dict[str, str] | None = None) -> None:
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        answers = list(statuses or (204,))
        receiver = self

        class Handler(Answering):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((self.path, dict(self.headers), body))
                self._send(answers.pop(0) if len(answers) > 1 else answers[0], b"", headers=headers)

        super().__init__(Handler)
        self.url += "/hook?team=1"


class Sink:
    """A mail server on loopback that keeps messages; `refuse` is its answer to a RCPT, `data` to the message."""

    def __init__(self, rcpt: str = "250 ok", data: str = "250 kept") -> None:
        self.messages: list[bytes] = []
        self.receivers: list[str] = []
        self.sessions = 0
        self._answers = {"RCPT": rcpt, "DATA": data}
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]

    def __enter__(self) -> "Sink":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.sessions += 1
            with connection, connection.makefile("rwb") as stream:
                self._talk(stream)

    def _talk(self, stream: Any) -> None:
        def say(line: str) -> None:
            stream.write(line.encode() + b"\r\n")
            stream.flush()

        say("220 sink")
        while line := stream.readline():
            word = line[:4].upper().decode()
            if word == "RCPT":
                self.receivers.append(line.decode().strip())
                say(self._answers["RCPT"])
            elif word == "DATA":
                say("354 go on")
                lines = iter(stream.readline, b".\r\n")
                self.messages.append(b"".join(lines))
                say(self._answers["DATA"])
            elif word == "QUIT":
                say("221 bye")
                return
            else:
                say("250 ok")


@pytest.fixture
def receivers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    monkeypatch.setenv("FACEMLLM_WEBHOOK_SECRET", SECRET)
    monkeypatch.setattr(notices.time, "sleep", lambda seconds: None)

    def make(url: str | None = None, port: int | None = None, **smtp: Any) -> Settings:
        sets = [f"promote.notify.webhook={url}"] if url else []
        if port:
            server = {"host": "127.0.0.1", "port": port, "security": "none", "sender": "mlops@example.org", **smtp}
            sets += ["promote.notify.email=[ada@example.org, grace@example.org]"]
            sets += [f"promote.notify.smtp={json.dumps(server)}"]
        return load("laptop", sets)

    return make


@contextmanager
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    lines: list[str] = []
    with caplog.at_level(logging.WARNING):
        yield lines
    lines += [record.getMessage() for record in caplog.records if record.name.startswith("facemllm")]


def test_a_webhook_is_signed_as_its_receiver_checks(receivers, caplog) -> None:
    with Receiver() as receiver, warnings(caplog) as lines:
        notices.notify(receivers(receiver.url), "decided", FACTS)
    assert lines == []
    [(path, headers, body)] = receiver.got
    assert path == "/hook?team=1"
    assert headers["Host"] == receiver.url.split("/")[2]
    header = headers[webhook.SIGNATURE]
    stamp = int(re.fullmatch(r"t=(\d+),v1=[0-9a-f]{64}", header)[1])
    assert webhook.verify(SECRET.encode(), header, body, stamp + 299)
    notice = json.loads(body)
    assert (notice["event"], notice["id"]) == (headers[webhook.EVENT], headers[webhook.DELIVERY])
    assert notice["facts"] == {**FACTS, "version": "3", "name": "face-mllm"}
    for secret, changed, now in (
        (b"another", body, stamp),
        (SECRET.encode(), body.replace(b"figures", b"figurez"), stamp),
        (SECRET.encode(), body, stamp + 301),
        (SECRET.encode(), body, stamp - 301),
    ):
        assert not webhook.verify(secret, header, changed, now)
    digest = header.partition("v1=")[2]
    later = f"t={stamp + 1},v1={digest}"
    for bad in ("", "t=,v1=", "t=1", f"v1={digest}", "t=٣,v1=é", f"t={'9' * 5000},v1={digest}", later):
        assert not webhook.verify(SECRET.encode(), bad, body, stamp), bad


def test_the_receivers_check_needs_the_standard_library_alone_and_is_what_the_docs_print() -> None:
    source = inspect.getsource(webhook.verify)
    room: dict[str, Any] = {}
    exec(f"import hashlib, hmac\n{source}", room)
    body = b'{"event": "decided"}'
    assert room["verify"](b"s", webhook.signature(b"s", body, 1000), body, 1000)
    for page in Path("docs").glob("*.md"):
        for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            if "def verify(" in block:
                assert source in block


def test_a_failing_server_is_asked_again_with_one_delivery(receivers, caplog) -> None:
    with Receiver(503, 429, 204) as receiver, warnings(caplog) as lines:
        notices.notify(receivers(receiver.url), "requested", FACTS)
    assert lines == []
    assert len(receiver.got) == 3
    assert len({headers[webhook.DELIVERY] for _, headers, _ in receiver.got}) == 1


@pytest.mark.parametrize(
    ("status", "tries", "words"),
    [(400, 1, "it answered 400"), (307, 1, "redirects are not followed"), (302, 1, "redirects are not followed")],
)
def test_a_refusal_is_one_line_and_no_redirect_is_followed(receivers, caplog, status, tries, words) -> None:
    with Receiver() as other, Receiver(status, headers={"Location": other.url}) as receiver, warnings(caplog) as lines:
        notices.notify(receivers(receiver.url), "released", FACTS)
    assert (len(receiver.got), other.got) == (tries, [])
    [line] = lines
    assert words in line
    assert "\n" not in line
    assert "team=1" not in line, "the path of a webhook can hold a secret"


def test_nobody_there_and_a_server_that_never_answers_stop_nothing(receivers, caplog, monkeypatch) -> None:
    monkeypatch.setattr(notices, "LIMIT_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent, warnings(caplog) as lines:
        notices.notify(receivers(f"http://127.0.0.1:{silent.getsockname()[1]}/"), "decided", FACTS)
    with socket.socket() as bound, warnings(caplog) as more:
        bound.bind(("127.0.0.1", 0))
        notices.notify(receivers(f"http://127.0.0.1:{bound.getsockname()[1]}/"), "decided", FACTS)
    assert [line for line in lines if "notice 'decided' was not sent (webhook 127.0.0.1)" in line]
    assert "refused" in more[-1]


def test_without_a_secret_nothing_is_sent_unsigned(receivers, caplog, monkeypatch) -> None:
    with Receiver() as receiver, warnings(caplog) as lines:
        settings = receivers(receiver.url)
        monkeypatch.delenv("FACEMLLM_WEBHOOK_SECRET")
        notices.notify(settings, "decided", FACTS)
    assert receiver.got == []
    assert "set the environment variable FACEMLLM_WEBHOOK_SECRET" in lines[0]


def test_nothing_leaves_but_what_is_listed(receivers) -> None:
    more = {
        "image": "x",
        "path": "/home/ada",
        "samples": [1],
        "email": "e@x",
        "reason": "two\nlines\x1b[31m" + "x" * 9000,
    }
    with Receiver() as receiver:
        notices.notify(receivers(receiver.url), "decided", {**FACTS, **more, "expires": None})
    facts = json.loads(receiver.got[0][2])["facts"]
    assert set(facts) == {*FACTS, "name"}
    assert facts["reason"].startswith("two lines [31m")
    assert len(facts["reason"]) == 2000
    with pytest.raises(ValueError, match="unknown event"):
        notices.notify(receivers(), "party", FACTS)


@pytest.mark.parametrize("private", ["10.1.2.3", "127.0.0.1", "169.254.169.254", "::1", "fd00::1", "100.64.0.1"])
def test_a_public_name_that_points_to_a_private_address_is_refused(monkeypatch, private) -> None:
    family = socket.AF_INET6 if ":" in private else socket.AF_INET
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(family, 1, 6, "", (private, 443))])
    refuses(f"points to the private address {private}", webhook.checked_address, "hooks.example.org", 443)
    assert webhook.checked_address("hooks.internal", 443) == private
    assert webhook.checked_address(private, 443) == private


def test_the_address_that_was_checked_is_the_one_that_is_asked(receivers, caplog, monkeypatch) -> None:
    """A name that points elsewhere at the second look-up reaches nobody new."""
    with Receiver() as receiver, Receiver() as other:
        port = receiver.server_port
        looked: list[str] = []

        def look(host: str, *_: Any, **__: Any) -> Any:
            looked.append(host)
            return [(socket.AF_INET, 1, 6, "", ("127.0.0.1", port))]

        monkeypatch.setattr(socket, "getaddrinfo", look)
        webhook.post(f"http://hooks.internal:{port}/", b"s", b"{}", {})
        assert looked[0] == "hooks.internal"
        assert "hooks.internal" not in looked[1:]
        assert receiver.got[0][1]["Host"] == f"hooks.internal:{port}"
        assert other.got == []


def test_over_tls_the_name_of_the_setting_must_be_the_certificates(monkeypatch, tmp_path) -> None:
    key, certificate = self_signed("hooks.internal", tmp_path)
    look = [(socket.AF_INET, 1, 6, "", ("127.0.0.1", 0))]
    with Receiver() as receiver:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
        port = receiver.server_port
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(*look[0][:4], ("127.0.0.1", port))])
        refuses("certificate", webhook.post, f"https://hooks.internal:{port}/", b"s", b"{}", {})
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        refuses("certificate", webhook.post, f"https://other.internal:{port}/", b"s", b"{}", {})
        assert receiver.got == []
        webhook.post(f"https://hooks.internal:{port}/", b"s", b"{}", {})
        assert len(receiver.got) == 1


def self_signed(name: str, folder: Path) -> tuple[Path, Path]:
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    made = x509.CertificateBuilder(who, who, key.public_key(), 1, now - timedelta(1), now + timedelta(1))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    signed = made.sign(key, hashes.SHA256())
    plain, pem = serialization.NoEncryption(), serialization.Encoding.PEM
    (folder / "key.pem").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    (folder / "certificate.pem").write_bytes(signed.public_bytes(pem))
    return folder / "key.pem", folder / "certificate.pem"


def test_mail_goes_to_the_list(receivers, caplog) -> None:
    with Sink() as sink, warnings(caplog) as lines:
        notices.notify(receivers(port=sink.port), "decided", {**FACTS, "reason": "Grüße\nBcc: mallory@example.org"})
    assert lines == []
    assert [re.search("<(.*)>", one)[1] for one in sink.receivers] == ["ada@example.org", "grace@example.org"]
    mail = message_from_bytes(sink.messages[0], policy=policy.default)
    assert isinstance(mail, EmailMessage)
    assert mail["Subject"] == "face-mllm version 3: a decision was taken"
    assert (mail["From"], mail["To"], mail["Bcc"]) == ("mlops@example.org", "ada@example.org, grace@example.org", None)
    text = mail.get_content()
    assert "reason:    Grüße Bcc: mallory@example.org" in text
    assert "facemllm promote show 3" in text
    assert not list(mail.iter_attachments())


def test_mail_that_is_refused_is_one_line(receivers, caplog) -> None:
    with Sink(rcpt="550 no such user") as sink, warnings(caplog) as lines:
        notices.notify(receivers(port=sink.port), "requested", FACTS)
    with Sink(data="554 spam") as spam, warnings(caplog) as more:
        notices.notify(receivers(port=spam.port), "requested", FACTS)
    assert (sink.sessions, spam.sessions) == (1, 1)
    assert "it refused ada@example.org, grace@example.org" in lines[0]
    assert "554" in more[-1]


def test_a_mail_server_is_asked_again_when_busy(receivers, caplog, monkeypatch) -> None:
    monkeypatch.setattr(notices, "LIMIT_S", 2.0)
    with Sink(data="451 later") as sink, warnings(caplog) as lines:
        notices.notify(receivers(port=sink.port), "requested", FACTS)
    assert sink.sessions > 1
    assert "451" in lines[0]
    assert "tries" in lines[0]


def test_a_password_is_needed_where_a_user_is(receivers, caplog) -> None:
    login = {"user": "ada", "password_env": "NOT_SET_HERE", "security": "starttls"}
    with warnings(caplog) as lines:
        notices.notify(receivers(port=9, **login), "requested", FACTS)
    assert "set the environment variable NOT_SET_HERE" in lines[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("webhook=ftp://x.org/", "give an address such as"),
        ("webhook=https://ada:pw@x.org/", "leave user, password"),
        ("webhook=http://hooks.example.org/", "use https"),
        ("email=[ada]", "is no address"),
        ('email=["a@b.c\\nBcc: d@e.f"]', "is no address"),
        ("email=[ada@example.org]", "email needs smtp"),
        ("smtp={host: h, port: 0, security: tls, sender: a@b.c}", "greater than or equal to 1"),
        ("smtp={host: h, port: 25, security: none, sender: a@b.c, user: u, password_env: P}", "starttls or tls only"),
        ("smtp={host: h, port: 25, security: tls, sender: a@b.c, user: u}", "give both of user and password_env"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(override, words) -> None:
    refuses(words, load, "laptop", [f"promote.notify.{override}"])


def test_who_is_told_decides_no_result_and_is_recorded_nowhere() -> None:
    from facemllm.core.step import depends
    from facemllm.promote.step import GATE
    from facemllm.tracking.recorded import pipeline_params

    one, other = load("laptop"), load("laptop", ["promote.notify.webhook=https://hooks.example.org/t0ken"])
    assert "t0ken" not in str([other.model_dump(), pipeline_params(other), other.promote.model_dump_json()])
    assert depends(GATE, one)["settings"] == depends(GATE, other)["settings"]


def test_facts_are_those_of_a_statement() -> None:
    from datetime import UTC, datetime

    issued = datetime(2026, 11, 29, tzinfo=UTC)
    about = {"id": "5" * 64, "decision": "approve", "bundle": "b" * 64, "model": "a" * 64, "reason": "r", "key": "k"}
    statement = SimpleNamespace(**about, person="Ada", role="approver", issued=issued, expires=None, replaces=None)
    facts = notices.facts_of(statement, 3)
    assert (facts["statement"], facts["issued"], facts["expires"]) == ("5" * 64, "2026-11-29T00:00:00Z", None)
    assert set(facts) <= set(notices.FACTS)
    assert hashlib.sha256(json.dumps(facts).encode())
