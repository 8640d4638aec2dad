"""What the review page shows: order, filters, what is first, what counts for nothing; all data are words."""

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from facemllm.errors import UserError
from facemllm.report.web import plain
from facemllm.review import facts, render, samples
from facemllm.review.fields import is_digest
from facemllm.review.pages import Pages
from facemllm.review.views import RequestPage
from facemllm.signing.canonical import Refused, utc_now
from facemllm.signing.policy import revoke_key
from tests.review_example import ADA, BUNDLE, GRACE, PASSPHRASE, PIPELINE, STRICT, Example, ago, example

SITE = {"read_only": False, "mlflow": "http://127.0.0.1:15000"}
HOSTILE = (
    "<script>alert(1)</script>",
    '" onmouseover="alert(1)" x=\'',
    "'><img src=x onerror=alert(1)>",
    "</title></textarea></svg></style><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    "javascript:alert(1)",
    "exe\u202egpj\u2066\u200b\ufeff",
    "nul\x00bell\x07escape\x1b[31m",
    "half \ud800",
    "line\u2028\r\nline",
    "w" * 4000,
)


class Checked(HTMLParser):
    """A page as a browser reads it: all tags closed in order, nothing that runs, links of ours alone."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.ids: list[str] = []
        self._open: list[str] = []
        html.encode("utf-8")
        self.feed(html)
        assert self._open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "object", "embed", "base", "style", "form") or tag == "form"
        for name, value in attributes:
            assert not name.startswith("on")
            assert name != "style"
            if name in ("href", "src", "action"):
                assert re.match(r"/|#|http://127\.0\.0\.1:15000", value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in ("meta", "link", "input", "img", "br", "line", "rect", "circle", "polyline", "polygon", "path"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def shown(request: RequestPage) -> str:
    return render.page("request.html.jinja", site=SITE, request=request, csrf="token")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return example(tmp_path_factory.mktemp("review") / "home")


@pytest.fixture(scope="module")
def page(workspace: Example) -> RequestPage:
    bundle = workspace.bundle(1)
    workspace.say("request", bundle, PIPELINE, "please look")
    return Pages(workspace.settings).request(bundle)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for name, below in inner:
        yield from leaves(below, (*path, name))


def changed(bundle: Any, path: tuple[Any, ...], value: Any) -> Any:
    made = copy.deepcopy(bundle)
    at = made
    for name in path[:-1]:
        at = at[name]
    at[path[-1]] = value
    return made


def hostile(value: Any, text: str) -> Any:
    """The same data with the text in every field of words, and in every name of an object of names."""
    if isinstance(value, dict):
        return {name: hostile(below, text) for name, below in value.items()}
    if isinstance(value, list):
        return [hostile(one, text) for one in value]
    return text + value if isinstance(value, str) and not is_digest(value) else value


@pytest.mark.parametrize("text", HOSTILE)
def test_whatever_a_bundle_says_is_words(page: RequestPage, text: str) -> None:
    bundle = hostile(BUNDLE, text)
    for check in bundle["gate"]["checks"]:
        check["kind"] = check["kind"].removeprefix(text)
    for section in ("tasks", "settings"):
        entries = bundle[section] if section == "tasks" else bundle[section]["changed"]
        entries[text] = copy.deepcopy(next(iter(entries.values())))
    bundle["cost"]["steps"][text] = {"device": text, text: 1.0}
    bundle["lineage"][text] = "a" * 64
    read = facts.read(bundle)
    made = replace(
        page,
        facts=read,
        samples=samples.read(bundle),
        digests=(*read.digests, *read.lineage),
        card=plain(text),
        reason=plain(text),
        requester=plain(text),
        warnings=(text,),
        earlier={name.name: [(text, 1.0), (text, 2.0)] for name in read.tasks},
    )
    html = shown(made)
    found = Checked(html)
    assert "<script" not in html
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200b\ufeff\x00\x07\x1b\u2028\ud800]", html)
    assert plain(text)[:50] in " ".join(found.words)


def test_a_decision_in_hostile_words_is_words(tmp_path: Path) -> None:
    name = '<script>alert(1)</script> "Eve" O\'Neill {{ 7*7 }}'
    workspace = example(tmp_path / "home", people=False)
    workspace.person(PIPELINE + "s", "pipeline")
    workspace.person(name, "approver", "requester")
    bundle = workspace.bundle(1)
    workspace.say("request", bundle, name, "<img src=x onerror=alert(1)>")
    workspace.say("reject", bundle, name, '"><script>alert(1)</script>' + "w" * 1000)
    pages = Pages(workspace.settings)
    html = shown(pages.request(bundle))
    assert name in " ".join(Checked(html).words)
    queue = render.page("queue.html.jinja", site=SITE, queue=pages.queue("all"))
    assert name in " ".join(Checked(queue).words)


@pytest.mark.parametrize(
    "junk", [None, [], {}, "x", True, 1e308, [None], {"a": {"b": []}}, 10**400], ids=lambda one: f"{one}"[:9]
)
def test_no_field_of_another_kind_is_an_error(page: RequestPage, junk: Any) -> None:
    small = {**BUNDLE, "evaluation": {}, "model": {**BUNDLE["model"], "files": {}}}
    for path in leaves(small):
        bundle = changed(small, path, junk)
        facts.read(bundle)
        samples.read(bundle)
    everywhere = {section: [junk] * 3 if isinstance(value, list) else junk for section, value in BUNDLE.items()}
    inside = {s: dict.fromkeys(v, junk) if isinstance(v, dict) else [junk] for s, v in BUNDLE.items()}
    figures = {**BUNDLE, "tasks": {n: dict.fromkeys(t, junk) for n, t in BUNDLE["tasks"].items()}}
    gate = {**BUNDLE, "gate": {"checks": [dict.fromkeys(c, junk) for c in BUNDLE["gate"]["checks"]]}}
    for bundle in (everywhere, inside, figures, gate):
        read = facts.read(bundle)
        Checked(shown(replace(page, facts=read, samples=samples.read(bundle), digests=read.digests)))


def test_an_empty_bundle_has_a_page(page: RequestPage) -> None:
    html = shown(replace(page, facts=facts.read({}), samples=samples.read({}), digests=(), earlier={}))
    words = " ".join(Checked(html).words)
    assert "states no rule" in words
    assert "names no source" in words


def test_failed_loosened_and_near_rules_come_first() -> None:
    bundle = copy.deepcopy(dict(BUNDLE))
    checks = bundle["gate"]["checks"]
    checks[-1]["passed"] = False
    states = [check.state for check in facts.read(bundle).checks]
    assert states[0] == "failed"
    assert states == sorted(states, key=["failed", "loosened", "near", "passed"].index)
    assert {"loosened", "near", "passed"} <= set(states)
    near = [check for check in facts.read(bundle).checks if check.state == "near"]
    assert all(check.low is not None and check.limit is not None for check in near)


def test_a_rule_that_only_claims_to_pass_is_failed() -> None:
    for claim in ("true", 1, None, [True]):
        bundle = changed(BUNDLE, ("gate", "checks", 0, "passed"), claim)
        assert facts.read(bundle).checks[0].state == "failed"


def test_what_is_worse_than_the_champion_is_first_and_marked(page: RequestPage) -> None:
    first, *others = page.facts.changes
    assert (first.name, first.verdict) == ("age", "worse")
    assert first.worse == pytest.approx(3.449, abs=1e-3)
    assert "worse" not in [one.verdict for one in others]


def test_gaps_have_their_power(page: RequestPage) -> None:
    found = {gap.task: gap for gap in page.facts.gaps if gap.kind == "the rule"}
    assert found["expression"].verdict == "too few people"
    assert found["expression"].detectable == pytest.approx(0.354, abs=1e-3)
    assert found["attributes"].verdict == "within"


def test_the_graph_leads_to_every_digest(page: RequestPage) -> None:
    html = shown(page)
    ids = Checked(html).ids
    links = re.findall(r'<a href="(#[^"]+)">', html)
    assert {"#digest-bundle", "#digest-model", "#digest-ingest", "#digest-model-card"} <= set(links)
    assert all(link[1:] in ids for link in links)
    for value in (page.bundle, page.facts.model):
        assert value in html


def test_the_queue_is_oldest_first_by_state_and_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = example(tmp_path / "home")
    monkeypatch.setattr("facemllm.review.pages.PAGE", 4)
    bundles = [workspace.bundle(version) for version in range(1, 7)]
    for hours, bundle in enumerate(bundles[:-1]):
        workspace.say("request", bundle, PIPELINE, "", issued=ago(hours=hours))
    workspace.say("approve", bundles[0], GRACE)
    workspace.say("reject", bundles[1], ADA, passphrase=PASSPHRASE)
    pages = Pages(workspace.settings)
    waiting = pages.queue()
    assert [row.bundle for row in waiting.rows] == bundles[2:-1][::-1]
    assert waiting.counts == {
        "waiting": 3,
        "approved": 1,
        "rejected": 1,
        "revoked": 0,
        "expired": 0,
        "not requested": 1,
        "all": 6,
    }
    assert waiting.rows[0].missing == "1 × approver"
    first, second = pages.queue("all", 1), pages.queue("all", 2)
    assert (len(first.rows), len(second.rows), second.pages) == (4, 2, 2)
    assert second.rows[-1].state == "pending"
    assert pages.queue("all", 99).page == 2
    assert not [row.bundle for row in first.rows if row in second.rows]


def test_what_changes_is_seen_at_once(tmp_path: Path) -> None:
    workspace = example(tmp_path / "home")
    bundle = workspace.bundle(1)
    pages = Pages(workspace.settings)
    assert pages.request(bundle).state == "pending"
    workspace.say("request", bundle, PIPELINE, "")
    before = pages.request(bundle)
    workspace.say("approve", bundle, GRACE)
    after = pages.request(bundle)
    assert (before.state, after.state) == ("requested", "approved")
    assert before.seen != after.seen
    assert [row.state for row in pages.queue("all").rows] == ["approved"]
    late = utc_now() + timedelta(days=91)
    assert pages.queue("all", now=late).rows[0].state != "approved"
    policy = workspace.settings.policy_file
    revoke_key(policy, workspace.keys[GRACE], "lost", utc_now())
    gone = pages.request(bundle)
    assert gone.state == "requested"
    assert [event.check for event in gone.history if event.refused] == ["revoked_key"]
    assert pages.queue("all").rows[0].state == "requested"


def test_a_decision_that_counts_for_nothing_says_which_check_failed(tmp_path: Path) -> None:
    workspace = example(tmp_path / "home", *STRICT)
    bundle = workspace.bundle(1)
    workspace.say("request", bundle, ADA, passphrase=PASSPHRASE)
    workspace.say("approve", bundle, ADA, passphrase=PASSPHRASE)
    found = Pages(workspace.settings).request(bundle)
    assert [event.check for event in found.history] == ["requester", ""]
    assert found.may_sign == (GRACE,)
    assert found.missing == {"approver": 1}
    assert "counts for nothing" in " ".join(Checked(shown(found)).words)


def test_earlier_versions_and_later_requests_are_known(tmp_path: Path) -> None:
    workspace = example(tmp_path / "home")

    def better(bundle: dict[str, Any]) -> None:
        bundle["tasks"]["gender"]["value"] = 0.99

    first, second = workspace.bundle(1), workspace.bundle(2, better)
    pages = Pages(workspace.settings)
    assert [version for version, _ in pages.request(second).earlier["gender"]] == ["1", "2"]
    assert len(pages.request(first).earlier["gender"]) == 1

    def again(bundle: dict[str, Any]) -> None:
        bundle["image"] = "another"

    later = workspace.bundle(1, again)
    assert pages.request(first).newer == (later,)
    assert pages.request(later).newer == ()


def test_unknown_bundles_and_files_are_refused(workspace: Example, page: RequestPage) -> None:
    pages = Pages(workspace.settings)
    with pytest.raises(Refused, match="no bundle"):
        pages.request("0" * 64)
    with pytest.raises(Refused):
        pages.file(page.bundle, "../policy.yaml")
    assert pages.picture(page.bundle, "bundle.json") is None


def test_a_page_that_only_shows_makes_no_policy(tmp_path: Path) -> None:
    workspace = Example(example(tmp_path / "home").settings)
    workspace.settings.policy_file.unlink()
    with pytest.raises(UserError, match="no policy"):
        Pages(workspace.settings, read_only=True).queue()
    assert not workspace.settings.policy_file.exists()


def test_every_colour_of_words_can_be_read_on_every_ground() -> None:
    css = render.STYLE
    light, dark = (
        dict(re.findall(r"--([\w-]+):\s*(#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", css, re.S)
    )
    assert light.keys() == dark.keys()
    rules = css[css.index("* { box-sizing") :]
    assert not re.search(r"#[0-9a-f]{3,8}\b", rules)
    words = set(re.findall(r"(?<![\w-])(?:color|fill): var\(--([\w-]+)\)", rules)) - {"band", "accent-fill"}
    grounds = set(re.findall(r"background: var\(--([\w-]+)\)", rules))
    own = {"good-back": "good", "bad-back": "bad", "warn-back": "warn", "accent": "on-accent"}
    marks = {"shade", "edge"}  # fills of boxes and arrows
    for colours in (light, dark):
        for ground in grounds:
            for word in {own[ground]} if ground in own else words - {"on-accent", *marks}:
                assert contrast(colours[word], colours[ground]) >= 4.5, (word, ground)
        for mark in ("edge", "accent", "constant", "champion", "limit"):  # what is no words: 3 to 1
            assert contrast(colours[mark], colours["card"]) >= 3, mark
    assert {"page", "card", "field", "shade"} <= grounds


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (lighter + .05) / (darker + .05) of relative luminance."""
    lights = []
    for colour in (one, other):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        shares = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_the_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000", "#fff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
