"""What must never count as an approval: one way to tamper a row, and the one check that refuses it.

Each row is done twice, as it should be and with the one thing wrong: the first is authorized, the second refused.
"""

import base64
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from facemllm.core.digests import of_bytes
from facemllm.signing.authorization import Authorization, authorize
from facemllm.signing.canonical import Refused, utc_now
from facemllm.signing.policy import Policy, Rule
from facemllm.signing.statements import PAYLOAD_TYPE, opened
from tests.signed import FOUR_EYES, MODEL, OTHER, Place, bundle_files, git, id_of, key, policy, signer, usual

DAY = timedelta(days=1)


@dataclass
class Ask:
    """What is asked for, where it is not the usual: MODEL, now, by the place's own policy."""

    model: str = MODEL
    now: datetime | None = None
    bundle: str | None = None


Row = Callable[[Place, bool], Ask | None]
ROWS: dict[str, tuple[str, Row]] = {}
WORDS: dict[str, str] = {}


def row(check: str) -> Callable[[Row], Row]:
    def add(act: Row) -> Row:
        ROWS[act.__name__] = (check, act)
        return act

    return add


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which the pipeline has asked for a decision."""
    folder = tmp_path_factory.mktemp("asked")
    Place(folder).add("pipeline", "request", role="pipeline")
    return folder


def placed(asked: Path, folder: Path) -> Place:
    shutil.copytree(asked, folder)
    return Place(folder)


def ask(place: Place, what: Ask) -> Authorization:
    return authorize(what.model, place.open(), place.policy, what.now, what.bundle)


# about which bytes


@row("other_model")
def approval_of_another_digest_copied(place: Place, bad: bool) -> Ask:
    envelope = place.envelope("ada", "approve")
    place.put_statement(envelope, OTHER if bad else MODEL)
    return Ask(OTHER if bad else MODEL)


@row("missing")
def other_bytes(place: Place, bad: bool) -> Ask:
    place.add("ada", "approve")
    return Ask(OTHER if bad else MODEL)


@row("other_model")
def another_model_of_the_same_name(place: Place, bad: bool) -> Ask:
    """The bundle of one model, a statement about another."""
    own = place.open().append_bundle(bundle_files(OTHER))
    about = {"model": OTHER, "bundle": place.bundle if bad else own}
    place.put_statement(place.envelope("pipeline", "request", role="pipeline", **about), OTHER)
    place.put_statement(place.envelope("ada", "approve", **about), OTHER)
    return Ask(OTHER)


@row("other_bundle")
def approval_on_another_evaluation(place: Place, bad: bool) -> Ask:
    second = place.open().append_bundle(bundle_files(evaluation="another"))
    place.add("pipeline", "request", role="pipeline", bundle=second)
    place.add("ada", "approve")
    return Ask(bundle=second if bad else place.bundle)


@row("missing")
def bundle_that_is_not_there(place: Place, bad: bool) -> Ask:
    about = {"bundle": OTHER if bad else place.bundle}
    place.put_statement(place.envelope("ada", "approve", **about))
    if bad:
        place.put_statement(place.envelope("pipeline", "request", role="pipeline", **about))
    return Ask(bundle=about["bundle"])


@row("digest")
def bundle_whose_bytes_are_others(place: Place, bad: bool) -> Ask:
    """A bundle.json put under the digest of another."""
    shown, real = bundle_files(evaluation="good"), bundle_files(evaluation="poor")
    digest = of_bytes(shown["bundle.json"])
    place.put({f"bundles/{digest}/{name}": data for name, data in (real if bad else shown).items()})
    place.put_statement(place.envelope("pipeline", "request", role="pipeline", bundle=digest))
    place.put_statement(place.envelope("ada", "approve", bundle=digest))
    return Ask()


# when


@row("expired")
def approval_that_ran_out(place: Place, bad: bool) -> Ask:
    place.add("ada", "approve", expires=utc_now() + 3 * DAY)
    return Ask(now=utc_now() + (4 * DAY if bad else DAY))


@row("expired")
def approval_older_than_the_policy_lets_it_be(place: Place, bad: bool) -> Ask:
    place.add("ada", "approve", expires=utc_now() + 900 * DAY)
    return Ask(now=utc_now() + timedelta(days=90, seconds=30 if bad else -30))


@row("not_yet_valid")
def approval_of_a_time_to_come(place: Place, bad: bool) -> Ask:
    place.put_statement(place.envelope("ada", "approve", issued=utc_now() + (DAY if bad else timedelta())))
    return Ask()


@row("not_yet_valid")
def key_of_a_time_to_come(place: Place, bad: bool) -> None:
    place.policy = with_key(place.policy, key("cy", "Cy", "approver", not_before=utc_now() + (DAY if bad else -DAY)))
    place.put_statement(place.envelope("cy", "approve"))


@row("expired")
def key_whose_time_was_over(place: Place, bad: bool) -> None:
    end = utc_now() + (-DAY if bad else DAY)
    place.policy = with_key(place.policy, key("cy", "Cy", "approver", not_after=end))
    place.put_statement(place.envelope("cy", "approve"))


@row("expired")
def key_whose_time_was_over_when_it_was_recorded(place: Place, bad: bool) -> None:
    """Whoever finds an old key dates the statement back."""
    end = utc_now() + (-DAY if bad else DAY)
    place.policy = with_key(place.policy, key("cy", "Cy", "approver", not_after=end))
    place.put_statement(place.envelope("cy", "approve", issued=utc_now() - 2 * DAY))


# by whom


@row("revoked_key")
def revoked_key(place: Place, bad: bool) -> None:
    place.add("ada", "approve")
    if bad:
        place.policy = with_key(place.policy, replace(place.policy.keys[signer("ada").key_id], revoked=utc_now() + DAY))


@row("unknown_key")
def unknown_key(place: Place, bad: bool) -> None:
    place.put_statement(place.envelope("mallory" if bad else "ada", "approve"))


@row("signature")
def key_id_of_another(place: Place, bad: bool) -> None:
    """Signed with a key of one's own, said to be Ada's."""
    outer = json.loads(place.envelope("mallory", "approve"))
    if bad:
        outer["signatures"][0]["keyid"] = signer("ada").key_id
        place.put_statement(json.dumps(outer).encode())
    else:
        place.add("ada", "approve")


@row("role")
def key_without_the_role(place: Place, bad: bool) -> None:
    place.policy = with_key(place.policy, key("cy", "Cy", "requester", *([] if bad else ["approver"])))
    place.put_statement(place.envelope("cy", "approve"))


@row("role")
def signed_in_a_role_that_does_not_approve(place: Place, bad: bool) -> None:
    place.put_statement(place.envelope("ada", "approve", role="requester" if bad else "approver"))


@row("role")
def pipeline_approves(place: Place, bad: bool) -> None:
    place.put_statement(place.envelope(*(("pipeline", "approve") if bad else ("ada", "approve"))))


@row("requester")
def by_the_requester(place: Place, bad: bool) -> None:
    place.policy = usual(FOUR_EYES)
    place.add("ada", "request")
    place.add("ada" if bad else "bob", "approve")


@row("requester")
def by_the_requester_with_another_key(place: Place, bad: bool) -> None:
    place.policy = usual(FOUR_EYES)
    place.add("ada", "request")
    place.add("ada2" if bad else "bob", "approve")


@row("same_person")
def twice_by_one_person_with_two_keys(place: Place, bad: bool) -> None:
    place.policy = usual(Rule({"approver": 2}, ("pipeline",), True, 90))
    place.add("ada", "approve")
    place.add("ada2" if bad else "bob", "approve")


@row("same_person")
def one_person_in_two_roles(place: Place, bad: bool) -> None:
    rule = Rule({"approver": 1, "fairness": 1}, ("pipeline",), True, 90)
    people = [key("ada", "Ada", "approver", "fairness"), key("bob", "Bob", "approver", "fairness")]
    place.policy = policy(*people, key("pipeline", "pipeline", "pipeline"), rule=rule)
    place.add("ada", "approve")
    place.add("ada" if bad else "bob", "approve", role="fairness")


@row("missing")
def too_few(place: Place, bad: bool) -> None:
    place.policy = usual(Rule({"approver": 2}, ("pipeline",), True, 90))
    place.add("ada", "approve")
    if not bad:
        place.add("bob", "approve")


@row("missing")
def nobody_asked(place: Place, bad: bool) -> None:
    place.anew()
    if not bad:
        place.add("ada", "request")
    place.add("bob", "approve")


# against what


@row("rejected")
def rejected(place: Place, bad: bool) -> None:
    place.add("ada", "approve")
    if bad:
        place.add("bob", "reject")


@row("revoked")
def revoked_approval(place: Place, bad: bool) -> None:
    place.add("ada", "approve")
    if bad:
        place.add("ada", "revoke")


@row("revoked")
def replayed_after_revocation(place: Place, bad: bool) -> None:
    """Somebody makes a repository anew in which the old approval comes after its revocation."""
    approval = place.envelope("ada", "approve")
    if bad:
        previous = (*place.open().previous(MODEL), id_of(approval))
        place.put_statement(place.envelope("ada", "revoke", previous=previous))
    place.put_statement(approval)


@row("rejected")
def rejected_on_another_evaluation_of_the_same_bytes(place: Place, bad: bool) -> None:
    second = place.open().append_bundle(bundle_files(evaluation="another"))
    place.add("ada", "approve")
    place.add("bob", "reject" if bad else "approve", bundle=second)


@row("rejected")
def two_decisions_at_once(place: Place, bad: bool) -> None:
    previous = place.open().previous(MODEL)
    place.add("bob", "reject" if bad else "approve", previous=previous)
    place.add("ada", "approve", previous=previous)


# in which form


@row("signature")
def edited_reason(place: Place, bad: bool) -> None:
    place.put_statement(
        resaid(place.envelope("ada", "approve"), b"figures hold", b"figures hole" if bad else b"figures hold")
    )


@row("signature")
def expiry_put_off(place: Place, bad: bool) -> None:
    envelope = place.envelope("ada", "approve", expires=utc_now() + DAY)
    year = utc_now().year
    place.put_statement(resaid(envelope, b'"expires":"%d' % year, b'"expires":"%d' % (year + (1 if bad else 0))))


def form(name: str, change: Callable[[bytes], bytes], check: str = "malformed") -> None:
    """A payload that is no canonical statement, signed by Ada herself."""

    def act(place: Place, bad: bool) -> None:
        payload = opened(place.envelope("ada", "approve")).payload
        changed = change(payload)
        assert changed != payload
        payload = changed if bad else payload
        place.put_statement(sealed(payload))

    ROWS[name] = (check, act)


form("doubled_key", lambda p: p.replace(b'"reason":"figures hold"', b'"reason":"bad","reason":"figures hold"'))
form("doubled_decision", lambda p: p.replace(b'"decision":"approve"', b'"decision":"reject","decision":"approve"'))
form("number_that_changes", lambda p: p.replace(b'"replaces":null', b'"replaces":1.0'))
form("number_beyond_double", lambda p: p.replace(b'"replaces":null', b'"replaces":9007199254740993'))
form("not_a_number", lambda p: p.replace(b'"replaces":null', b'"replaces":NaN'))
form("number_of_5000_digits", lambda p: p.replace(b'"replaces":null', b'"replaces":' + b"9" * 5000))
form("space", lambda p: p.replace(b'":"', b'": "', 1))
form(
    "other_order_of_keys",
    lambda p: p.replace(b'"replaces":null,"role":"approver"', b'"role":"approver","replaces":null'),
)
form("escape_where_none_is_needed", lambda p: p.replace(b"figures", rb"\u0066igures"))
form("half_a_character", lambda p: p.replace(b"figures", rb"\ud800"))
form("no_utf8", lambda p: p.replace(b"figures", b"\xff"))
form("control_character", lambda p: p.replace(b"figures", rb"\u001b[2J"))
form("reversed_text", lambda p: p.replace(b"figures", "\u202e".encode()))
form("empty_reason", lambda p: p.replace(b"figures hold", b" "))
form("reason_of_3000_characters", lambda p: p.replace(b"figures hold", b"x" * 3000))
form("deep_payload", lambda p: p.replace(b'"replaces":null', b'"replaces":' + b"[" * 40 + b"]" * 40))
form("very_deep_payload", lambda p: p.replace(b'"replaces":null', b'"replaces":' + b"[" * 20000 + b"]" * 20000))
form("oversized_payload", lambda p: p.replace(b"figures hold", b"x" * 70_000), "too_large")
form("unknown_key_in_the_predicate", lambda p: p.replace(b'"decision"', b'"also":"x","decision"'))
form("unknown_decision", lambda p: p.replace(b'"approve"', b'"Approve"'))
form("unknown_predicate_type", lambda p: p.replace(b"decision/v1", b"decision/v2"))
form("subject_renamed", lambda p: p.replace(b'"name":"bundle"', b'"name":"bundles"'))
form("digest_in_capitals", lambda p: p.replace(MODEL.encode(), MODEL.upper().encode()))
form("impossible_time", lambda p: p.replace(b'"issued":"2', b'"issued":"x'))
form("expiry_that_is_no_text", lambda p: p.replace(b'"expires":null', b'"expires":0'))
form("previous_twice", lambda p: p.replace(b'"previous":[', b'"previous":["' + b"0" * 64 + b'","' + b"0" * 64 + b'",'))
form("list_for_statement", lambda p: b"[]")


def outer(name: str, change: Callable[[bytes], bytes], check: str = "malformed") -> None:
    """An envelope around an honest payload and signature that is not what an envelope must be."""

    def act(place: Place, bad: bool) -> None:
        envelope = place.envelope("ada", "approve")
        changed = change(envelope)
        assert changed != envelope
        place.put_statement(changed if bad else envelope)

    ROWS[name] = (check, act)


def twice(envelope: bytes) -> bytes:
    found = json.loads(envelope)
    return json.dumps(found | {"signatures": found["signatures"] * 2}).encode()


outer("two_signatures", twice)
outer("doubled_payload", lambda e: e.replace(b'{"payload"', b'{"payload":"e30=","payload"'))
outer("no_signature", lambda e: json.dumps(json.loads(e) | {"signatures": []}).encode())
outer("other_payload_type", lambda e: e.replace(b"vnd.in-toto+json", b"json"))
outer("key_beside", lambda e: e.replace(b'{"payload"', b'{"a":1,"payload"'))
outer("base64_with_line_ends", lambda e: e.replace(b'"payload":"', b'"payload":"\\n'))
outer("oversized_envelope", lambda e: e + b" " * 70_000, "too_large")
outer("deep_envelope", lambda e: b"[" * 30_000 + b"]" * 30_000)
outer("empty_file", lambda e: b"")
outer("no_json", lambda e: b"\x00\xff")
outer("list_for_envelope", lambda e: b"[1]")


@row("malformed")
def statement_under_the_name_of_another(place: Place, bad: bool) -> None:
    envelope = place.envelope("ada", "approve")
    place.put_statement(envelope, name="0" * 64 if bad else None)


# in the repository


def approved(place: Place) -> Place:
    place.add("ada", "approve")
    ask(place, Ask())
    return place


def history(name: str, words: str, act: Callable[[Place], object]) -> None:
    """Something done to the repository after a good approval, and what of it the refusal must name."""

    def run(place: Place, bad: bool) -> None:
        approved(place)
        if bad:
            act(place)

    ROWS[name] = ("history", run)
    WORDS[name] = words


def statement_file(place: Place) -> str:
    return next(
        path
        for path in git(place.path, "ls-tree", "-r", "--name-only", "decisions").split("\n")
        if "statements" in path
    )


def without_revocation(place: Place, bad: bool) -> None:
    """The revocation is taken out in a commit of its own."""
    approved(place)
    revoked = place.add("bob", "revoke")
    place.put({}, remove=(place.file_of(revoked.id),))


def moved_back(place: Place) -> None:
    place.add("bob", "revoke")
    with pytest.raises(Refused, match="revoke by Bob"):
        ask(place, Ask())
    git(place.path, "update-ref", "refs/heads/decisions", "decisions~1")


def hidden_from_a_new_verifier(place: Place) -> None:
    """Approved after a rejection, which is then left out of a history made anew, by a verifier that knows no other."""
    rejected = place.add("bob", "reject")
    place.add("ada", "approve")
    left_out = place.file_of(rejected.id)
    (place.folder / "checkpoint.json").unlink()
    rewritten(place, left_out)


def rewritten(place: Place, leave_out: str = "") -> None:
    paths = [path for path in git(place.path, "ls-tree", "-r", "--name-only", "decisions").split("\n") if path]
    files = {path: place_file(place, path) for path in paths if not (leave_out and path.endswith(leave_out))}
    git(place.path, "update-ref", "-d", "refs/heads/decisions")
    place.put(files)


def place_file(place: Place, path: str) -> bytes:
    return git(place.path, "cat-file", "blob", f"decisions:{path}").encode()


def raw_tree(place: Place, *entries: bytes) -> None:
    """A commit whose root has these entries besides its own, as git's commands would never make it."""
    old = git(place.path, "cat-file", "tree", "decisions^{tree}", whole=True).encode("utf-8", "surrogateescape")
    tree = git(place.path, "hash-object", "-w", "-t", "tree", "--literally", "--stdin", data=old + b"".join(entries))
    made = git(place.path, "commit-tree", tree, "-p", "decisions", "-m", "forged")
    git(place.path, "update-ref", "refs/heads/decisions", made)


def blob(place: Place) -> bytes:
    return bytes.fromhex(git(place.path, "hash-object", "-w", "--stdin", data=b"x"))


def damaged(place: Place) -> None:
    """The file that holds a folder of statements, in place."""
    name = git(place.path, "rev-parse", f"decisions:statements/{MODEL}")
    other = git(place.path, "rev-parse", "decisions:statements")
    file = place.path / "objects" / name[:2] / name[2:]
    file.chmod(0o600)
    shutil.copy(place.path / "objects" / other[:2] / other[2:], file)


def merged(place: Place) -> None:
    side = git(place.path, "commit-tree", "decisions^{tree}", "-m", "side")
    place.put({}, parents=(side,))


history("decision_removed", "drops statements/", lambda place: without_revocation(place, True))
history(
    "decision_removed_with_its_folder", "drops statements", lambda place: place.put({}, remove=(statement_file(place),))
)
history("branch_moved_back", "lacks commit", moved_back)
history("branch_gone", "lacks commit", lambda place: git(place.path, "update-ref", "-d", "refs/heads/decisions"))
history("repository_gone", "lacks commit", lambda place: shutil.rmtree(place.path))
history("history_rewritten", "lacks commit", rewritten)
history("rejection_left_out_of_a_history_made_anew", "builds on statement", hidden_from_a_new_verifier)
history("statement_edited_in_place", "rewrites statements/", lambda place: place.put({statement_file(place): b"{}"}))
history(
    "bundle_edited_in_place",
    "rewrites bundles/",
    lambda place: place.put({f"bundles/{place.bundle}/card.md": b"# fine"}),
)
history(
    "file_added_to_a_bundle",
    "to a bundle that was there",
    lambda place: place.put({f"bundles/{place.bundle}/more.md": b"# fine"}),
)
history(
    "bundle_without_its_first_file",
    "without a bundle.json",
    lambda place: place.put({f"bundles/{OTHER}/card.md": b"# fine"}),
)
history(
    "backdated_commit", "is backdated", lambda place: place.put({f"signatures/{OTHER}.json": b""}, at=utc_now() - DAY)
)
history("merge", "is a merge", merged)
history("foreign_file", "adds README.md", lambda place: place.put({"README.md": b"hello"}))
history("workflow_of_a_forge", "adds .github", lambda place: place.put({".github/workflows/x.yaml": b"on: push"}))
history("attributes_of_git", "adds .gitattributes", lambda place: place.put({".gitattributes": b"* filter=x"}))
history("odd_name", "adds statements/.*note.txt", lambda place: place.put({f"statements/{MODEL}/note.txt": b"x"}))
history(
    "name_with_line_end", r"adds statements/.*a\\+nb", lambda place: place.put({f"statements/{MODEL}/a\nb.json": b"x"})
)
history(
    "name_that_is_no_utf8",
    r"adds statements/.*\\+xff",
    lambda place: place.put({f"statements/{MODEL}/".encode() + b"\xff\xfe.json": b"x"}),
)
history(
    "traversal",
    r"adds \.\.",
    lambda place: raw_tree(place, b"40000 ..\0" + bytes.fromhex(git(place.path, "rev-parse", "decisions^{tree}"))),
)
history("slash_in_a_name", "adds zz/", lambda place: raw_tree(place, b"100644 zz/../../etc/cron.d/x\0" + blob(place)))
history("git_folder", "adds .git", lambda place: raw_tree(place, b"100644 .git\0" + blob(place)))
history(
    "name_twice",
    "a name twice",
    lambda place: raw_tree(place, b"100644 x\0" + blob(place), b"100644 x\0" + blob(place)),
)
history(
    "symlink", "symbolic link", lambda place: place.put({f"signatures/{OTHER}.json": b"/etc/passwd"}, mode="120000")
)
history(
    "symlink_for_a_statement",
    "rewrites statements/",
    lambda place: place.put({statement_file(place): b"/etc/passwd"}, mode="120000"),
)
history("submodule", "submodule", lambda place: place.put({f"signatures/{OTHER}.json": b""}, mode="160000"))
history("executable", "its mode", lambda place: place.put({f"signatures/{OTHER}.json": b"#!/bin/sh"}, mode="100755"))
history("damaged_object", "missing or damaged", damaged)
history(
    "shallow_copy",
    "shallow",
    lambda place: (place.path / "shallow").write_text(git(place.path, "rev-parse", "decisions")),
)
history("damaged_checkpoint", "damaged", lambda place: (place.folder / "checkpoint.json").write_text("{}"))


@row("revoked")
def revocation_hidden_by_a_replacement(place: Place, bad: bool) -> None:
    """`git replace` shows another commit under the name of the newest; whoever reads with git's defaults is fooled."""
    approved(place)
    before = git(place.path, "rev-parse", "decisions")
    if bad:
        place.add("bob", "revoke")
        git(place.path, "replace", "decisions", before)


@row("clock")
def clock_set_back(place: Place, bad: bool) -> Ask:
    approved(place)
    ask(place, Ask(now=utc_now() + 5 * DAY))
    return Ask(now=utc_now() + (DAY if bad else 6 * DAY))


@row("clock")
def clock_behind_the_newest_decision(place: Place, bad: bool) -> Ask:
    place.add("ada", "approve")
    (place.folder / "checkpoint.json").unlink()
    return Ask(now=utc_now() - (DAY if bad else timedelta()))


@pytest.mark.parametrize("name", ROWS)
def test_refused(name: str, asked: Path, tmp_path: Path) -> None:
    check, act = ROWS[name]
    good = placed(asked, tmp_path / "good")
    what = act(good, False) or Ask()
    allowed = ask(good, what)
    assert (allowed.model, bool(allowed.approvals)) == (what.model, True)
    bad = placed(asked, tmp_path / "bad")
    what = act(bad, True) or Ask()
    with pytest.raises(Refused) as refused:
        ask(bad, what)
    assert refused.value.check == check
    assert re.search(WORDS.get(name, ""), str(refused.value)), refused.value
    assert str(refused.value).isprintable()


def sealed(payload: bytes, who: str = "ada") -> bytes:
    """An envelope around any bytes, with a signature that holds, made without the package."""
    head = f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} ".encode()
    signature = signer(who).sign(head + payload)
    signatures = [{"keyid": signer(who).key_id, "sig": base64.b64encode(signature).decode()}]
    text = base64.b64encode(payload).decode()
    return json.dumps({"payload": text, "payloadType": PAYLOAD_TYPE, "signatures": signatures}).encode()


def resaid(envelope: bytes, old: bytes, new: bytes) -> bytes:
    """Other words under the old signature."""
    outer = json.loads(envelope)
    payload = base64.b64decode(outer["payload"])
    assert old in payload
    return json.dumps(outer | {"payload": base64.b64encode(payload.replace(old, new)).decode()}).encode()


def with_key(known: Policy, one: object) -> Policy:
    return replace(known, keys={**known.keys, one.id: one})  # type: ignore[attr-defined]
