"""What is in force about a bundle, from the statements alone."""

import random
from datetime import timedelta
from itertools import permutations, product
from typing import Any

import pytest

from facemllm.signing.canonical import Refused
from facemllm.signing.decisions import Entry
from facemllm.signing.policy import Policy, Rule, same_person
from facemllm.signing.standing import Standing, judge, require_counts
from facemllm.signing.statements import Draft, Statement
from tests.signed import FOUR_EYES, MODEL, ONE, OTHER, START, Place, key, policy, sign, signer, usual, verify

BUNDLE, NEXT = "b" * 64, "c" * 64
DAY = timedelta(days=1)
TWO_ROLES = Rule({"approver": 2, "fairness": 1}, ("pipeline",), True, 90)


class Record:
    """Statements about one model, each a minute after the last, each of a signer who saw all before."""

    def __init__(self, known: Policy | None = None):
        self.policy, self.entries = known or usual(), list[Entry]()

    def add(self, who: str, decision: str, **more: Any) -> Statement:
        given: dict[str, Any] = {"bundle": BUNDLE, "model": MODEL, "reason": "so", "role": "approver"}
        given |= {"role": "pipeline"} if who == "pipeline" else {"role": "requester"} if decision == "request" else {}
        at = START + timedelta(minutes=len(self.entries))
        given |= {"issued": at, "previous": tuple(entry.id for entry in self.entries)}
        statement = verify(sign(Draft(decision=decision, **given | more), signer(who)), self.policy)  # type: ignore[arg-type]
        self.entries.append(Entry(statement, None, "", at, f"statements/{MODEL}/{statement.id}.json", statement.id))
        return statement

    def stands(self, bundle: str = BUNDLE, after: timedelta = DAY, rule: Rule | None = None) -> Standing:
        known = self.policy if rule is None else Policy(self.policy.keys, rule)
        return judge(bundle, MODEL, self.entries, known, START + after)


def test_the_way_of_a_bundle() -> None:
    record = Record()
    assert (record.stands().state, record.stands().may_sign) == ("pending", ())
    record.add("pipeline", "request")
    assert (record.stands().state, record.stands().requester) == ("requested", "pipeline")
    assert record.stands().may_sign == ("Ada Lovelace", "Bob Noyce")
    assert record.stands().missing == {"approver": 1}
    approved = record.add("ada", "approve")
    found = record.stands()
    assert (found.state, found.approvals, found.missing, found.may_sign) == ("approved", (approved,), {}, ())
    assert found.expires == approved.issued + 90 * DAY
    assert record.stands(after=91 * DAY).state == "expired"
    assert record.stands(after=90 * DAY).state == "approved", "to the minute"
    revoked = record.add("bob", "revoke", reason="it fails on scarves")
    found = record.stands()
    assert (found.state, found.against, found.approvals) == ("revoked", revoked, ())
    assert [one.check for one in found.refused] == ["revoked"]
    record.add("pipeline", "request")
    assert record.stands().state == "requested", "asked anew by somebody who saw the revocation"
    record.add("bob", "reject")
    assert record.stands().state == "rejected"
    record.add("ada", "approve")
    assert record.stands().state == "approved", "by somebody who saw the rejection"


def test_every_order_of_decisions_that_did_not_see_each_other() -> None:
    """Whatever the order in which they arrive, one rejection among them is in force."""
    base = Record()
    asked = base.add("pipeline", "request")
    for decisions in product(("approve", "reject"), repeat=3):
        made = Record()
        made.entries = base.entries[:]
        for number, decision in enumerate(decisions):
            made.add("ada" if decision == "approve" else "bob", decision, previous=(asked.id,), reason=str(number))
        for order in permutations(made.entries[1:]):
            made.entries = [base.entries[0], *order]
            assert made.stands().state == ("rejected" if "reject" in decisions else "approved")


def test_seen_through_others() -> None:
    """An approval that saw a statement whose signer saw the rejection has seen it, too."""
    record = Record()
    record.add("pipeline", "request")
    record.add("bob", "reject")
    between = record.add("bob", "request")
    record.add("ada", "approve", previous=(between.id,))
    assert record.stands().state == "approved"


def test_the_other_bundle_of_a_model() -> None:
    record = Record()
    record.add("pipeline", "request")
    record.add("pipeline", "request", bundle=NEXT)
    record.add("ada", "approve")
    assert (record.stands().state, record.stands(NEXT).state) == ("approved", "requested")
    record.add("bob", "reject", bundle=NEXT)
    assert (record.stands().state, record.stands(NEXT).state) == ("rejected", "rejected")


def test_four_eyes() -> None:
    record = Record(usual(FOUR_EYES))
    record.add("ada", "request")
    assert record.stands().may_sign == ("Bob Noyce",)
    record.add("ada2", "approve")
    assert [one.check for one in record.stands().refused] == ["requester"]
    record.add("bob", "approve")
    assert (record.stands().state, len(record.stands().approvals)) == ("approved", 1)


def people(*roles: str) -> list[Any]:
    return [key(f"p{number}", f"Person {number}", *one.split()) for number, one in enumerate(roles)]


def test_one_person_counts_once_in_whatever_role_is_wanted() -> None:
    """Person 0 can sign for both; that person's signature goes where the others cannot."""
    machine = key("pipeline", "pipeline", "pipeline")
    known = policy(*people("approver fairness", "approver", "approver"), machine, rule=TWO_ROLES)
    record = Record(known)
    record.add("pipeline", "request")
    record.add("p0", "approve")
    record.add("p0", "approve", role="fairness")
    assert record.stands().missing in ({"approver": 1, "fairness": 1}, {"approver": 2})
    record.add("p1", "approve")
    record.add("p2", "approve")
    found = record.stands()
    assert (found.state, [(one.person, one.role) for one in found.approvals]) == (
        "approved",
        [("Person 0", "fairness"), ("Person 1", "approver"), ("Person 2", "approver")],
    )
    assert [one.check for one in found.refused] == ["same_person"]


def test_a_bundle_is_approved_exactly_if_persons_can_be_given_to_roles() -> None:
    """Against a search of all ways, on 60 small cases drawn at random."""
    draw = random.Random(7)
    roles = ["approver", "fairness", "safety"]
    for _ in range(60):
        asked = draw.sample(roles, draw.randint(1, 3))
        rule = Rule({role: draw.randint(1, 2) for role in asked}, ("pipeline",), True, 90)
        number = draw.randint(1, 4)
        machine = key("pipeline", "pipeline", "pipeline")
        record = Record(policy(*people(*[" ".join(roles)] * number), machine, rule=rule))
        record.add("pipeline", "request")
        signed = {(draw.randrange(number), draw.choice(list(rule.approvals))) for _ in range(6)}
        for who, role in sorted(signed):
            record.add(f"p{who}", "approve", role=role)
        wanted = [role for role, count in rule.approvals.items() for _ in range(count)]
        ways = permutations(range(number), len(wanted))
        possible = any(all((who, role) in signed for who, role in zip(way, wanted, strict=True)) for way in ways)
        assert (record.stands().state == "approved") == possible
        assert (record.stands().missing == {}) == possible


def test_a_request_may_end_and_its_approval_stay() -> None:
    record = Record()
    record.add("pipeline", "request", expires=START + 5 * DAY)
    assert [record.stands(after=days * DAY).state for days in (4, 6)] == ["requested", "pending"]
    record.add("ada", "approve")
    assert record.stands(after=80 * DAY).state == "approved"


def test_an_approval_of_a_time_to_come() -> None:
    record = Record()
    record.add("pipeline", "request")
    record.add("ada", "approve", issued=START + 2 * DAY)
    assert [one.check for one in record.stands(after=DAY).refused] == ["not_yet_valid"]
    assert [record.stands(after=days * DAY).state for days in (1, 2)] == ["requested", "approved"]


def test_until_when() -> None:
    """Of three approvals two are needed: it holds until the second last of them ends."""
    rule = Rule({"approver": 2}, ("pipeline",), True, 90)
    machine = key("pipeline", "pipeline", "pipeline")
    record = Record(policy(*people("approver", "approver", "approver"), machine, rule=rule))
    record.add("pipeline", "request")
    for number, days in enumerate((30, 10, 20)):
        record.add(f"p{number}", "approve", expires=START + days * DAY)
    assert record.stands().expires == START + 20 * DAY
    assert record.stands(after=20 * DAY - timedelta(seconds=1)).state == "approved"
    assert record.stands(after=20 * DAY).state == "expired"


def test_an_approval_is_renewed() -> None:
    record = Record()
    record.add("pipeline", "request")
    record.add("ada", "approve", expires=START + 10 * DAY)
    longer = record.add("ada", "approve", expires=START + 20 * DAY)
    assert (record.stands().approvals, record.stands().expires) == ((longer,), START + 20 * DAY)


def test_what_would_not_count(tmp_path: Any) -> None:
    """Said before it is added."""
    place = Place(tmp_path, usual(FOUR_EYES))

    def refused(who: str, decision: str = "approve") -> str | None:
        statement = verify(place.envelope(who, decision), place.policy)
        try:
            require_counts(place.open(), place.policy, statement)
        except Refused as error:
            return error.check
        return None

    assert refused("bob") == "missing"
    place.add("ada", "request")
    assert [refused(who) for who in ("ada", "ada2", "bob")] == ["requester", "requester", None]
    assert refused("ada", "reject") is None
    place.policy = usual(ONE)
    place.add("ada", "approve")
    assert (refused("ada2"), refused("ada"), refused("bob")) == ("same_person", None, None)


@pytest.mark.parametrize("rule", [ONE, FOUR_EYES])
def test_words_of_the_rule(rule: Rule) -> None:
    known = usual(rule)
    assert known.roles_for("approve") == known.roles_for("reject") == known.roles_for("revoke") == ("approver",)
    assert known.roles_for("release") == known.roles_for("rollback") == ("releaser",)
    assert known.roles_for("request") == rule.request_by
    assert same_person("Ada Lovelace") in map(same_person, known.persons("approver", START))
    assert OTHER != MODEL
