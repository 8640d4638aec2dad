"""What may not be asked, whatever the model could say: rules by meaning, in several languages and through disguises.

Identification, verification, search, names, religion, orientation, politics, crime and honesty, nationality, health,
character and attractiveness are always refused. Gender, ethnicity, age and expression are refused unless the deployment
allows them, each with a written reason, which `describe` shows. The words of the rules are in `rules.yaml`.

What is told by words can be said in other words: where no rule is found to be broken, a classifier of texts may refuse,
if it is sure. Both are a fence, not a proof. The model itself was taught to say
that such things cannot be told from a face.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from facemllm import tasks
from facemllm.errors import UserError
from facemllm.serve.asked.classifier import NONE, classifier, of_refusal
from facemllm.serve.asked.disguises import plain, readings
from facemllm.serve.asked.lexicon import LEXICON
from facemllm.serve.asked.matching import Match, Matcher
from facemllm.serve.asked.persons import holds_strange, names_somebody
from facemllm.serve.asked.rules import rules
from facemllm.serve.asked.telling import is_own, nameable, tells

SENSITIVE: Mapping[str, tuple[str, ...]] = {
    "gender": ("gender",),
    "ethnicity": ("ethnicity",),
    "age": ("age", "age_range"),
    "expression": ("expression", "expression_8", "expression_135", "expression_compound"),
}
"""What a deployment must allow by name, and the tasks that ask for it. Other tasks that their definition calls
sensitive must be allowed by their own name."""
_INCIDENTAL: Mapping[str, tuple[str, ...]] = {
    "caption": ("gender", "age", "expression"),
    "description": ("gender", "age", "expression"),
}
LIFTED = "ethnicity"
"""The rule that a deployment lifts by allowing the task; what else it allows is no rule, but a question of its own."""
_IDENTIFICATION, _OWN_OPTIONS = "identification", "options"
_SURE, _OF_ONE, _LONGEST = 0.85, 0.6, 600
"""Least probability of the classifier that some rule is broken where none was found to be, of that rule itself, and
most characters that it reads."""
_IDENTIFYING = (_IDENTIFICATION, "verification", "search", "name")
_NAME = r"[A-Z][\w'’.-]*[a-z](?:\s+(?:[a-z]{2,3}\s+)?[A-Z][\w'’.-]+)*"
_SOMEBODY = "(?:this|that|it|he|she|th(?:e|is|at) (?:person|man|woman|guy|girl|boy|lady|face))"
_IS_SAID = re.compile(
    rf"\b(?:[Ii]s|[Ii]sn't|[Ww]as|if|whether|that)\s+{_SOMEBODY}\s+"
    rf"(?:really |actually |not |maybe |in fact |possibly )?({_NAME})(?=\W*$|\s+(?:or|in|from|and)\b|\?)"
    rf"|\b(?:[Tt]his|[Tt]hat|[Ii]t|[Hh]e|[Ss]he) is (?:really |actually |not )?({_NAME})"
    r"(?=\W*(?:right|correct|no|or not|isn't \w+)?\W*$)"
    rf"|\b(?:looks?|resembles?|reminds?)\s+(?:(?:exactly |a bit |just )*like|you of|me of)\s+({_NAME})(?=\W*$)"
    r"|\b(?:[Ii]st (?:das|er|sie|dies)|[Ee]st-ce|[Cc]'est|[Ee]s(?: este| esta| ese| él| ella)?"
    rf"|[ÈEèÉé](?: lui| lei| este| esta)?|[Cc]zy to|[Ээ]то) ({_NAME})(?=\W*$)"
)
"""Somebody said to be, or to look like, what is written as a name is."""


@dataclass(frozen=True)
class Refusal:
    """The rule that refuses, and one plain line of reason."""

    rule: str
    reason: str


_OPTIONS = Refusal(_OWN_OPTIONS, "options of your own may only name what this model was taught")


class Policy:
    """A deployment's policy. `allowed` gives for a sensitive task the written reason why it may be asked; None refuses
    it, as does leaving it out."""

    def __init__(self, allowed: Mapping[str, str | None]) -> None:
        """Raises UserError where a reason is blank or a task is not a sensitive one."""
        known = (*SENSITIVE, *_called_sensitive())
        for task, reason in allowed.items():
            if reason is not None and not reason.strip():
                raise UserError(f"serve.policy.allowed.{task}: write down why it may be asked; null refuses it")
            if task not in known:
                raise UserError(f"serve.policy.allowed: '{task}' needs no leave; those that do are {', '.join(known)}")
        self._allowed = {task: reason for task, reason in allowed.items() if reason is not None}
        self._but = LIFTED if LIFTED in self._allowed else None
        asked = {name: names for name, names in SENSITIVE.items() if name not in self._allowed and name != LIFTED}
        withheld = [tasks.get(name) for names in asked.values() for name in names]
        self._withheld = Matcher(withheld) if withheld else None

    def refuses(self, text: str) -> Refusal | None:
        """The rule that a question breaks, in whatever words and disguise; None if it breaks none."""
        if (found := self.breaks(text)) is not None or (name := self._likely(text)) is None:
            return found
        return Refusal(name, rules().named(name).reason)

    def breaks(self, text: str) -> Refusal | None:
        """The first rule that a text is found to break, be it a question or an option; None if it breaks none."""
        found = rules()
        for words, squeezed in readings(text):
            broken = found.broken(words, squeezed, self._but)
            if broken is None and (spelt := found.spelt(words)) != words:
                broken = found.broken(spelt, "", self._but)
            if broken is not None:
                return Refusal(broken.name, broken.reason)
        if _names_somebody(text):
            return _identification()
        if self._withheld is not None and (match := self._withheld.match(text)):
            return self.refuses_task(match.question.task)
        return None

    def refuses_name(self, text: str) -> Refusal | None:
        """Refuses a text that names somebody: of what is answered every text is read by this, too."""
        return _identification() if names_somebody(text) else None

    def refuses_text(self, text: str) -> Refusal | None:
        """Refuses a text that asks what may not be asked, or names somebody."""
        return self.refuses(text) or self.refuses_name(text)

    def refuses_property(self, name: str) -> Refusal | None:
        """The rule that a client's own name of a property breaks, its words set apart; any word that is strange to
        questions about faces is taken for a person's name."""
        return self.refuses(name) or (_identification() if holds_strange(name) else None)

    def _likely(self, text: str) -> str | None:
        """The rule that the classifier is sure a text breaks in words that no rule has."""
        words = plain(text) if len(text) <= _LONGEST else ""
        if 2 * sum(len(word) == 1 for word in words.split()) >= len(words.split()):  # nothing, or letters set apart
            return None
        probability = classifier("refusals").probabilities(of_refusal(words))
        name = max(probability, key=probability.__getitem__)
        sure = probability[name] >= _OF_ONE and 1 - probability[NONE] >= _SURE
        return name if sure and name not in (NONE, self._but) else None

    def refuses_answer(self, text: str) -> Refusal | None:
        """The subject or rule for which an answer in free words is held back: it tells what may not be asked."""
        for subject, names in SENSITIVE.items():
            if subject not in self._allowed and tells(text, subject, names):
                return self.refuses_task(names[0])
        broken = rules().broken(plain(text), "", self._but)
        return None if broken is None else Refusal(broken.name, broken.reason)

    def refuses_options(
        self, text: str, options: Sequence[str], match: Match | None, taught: Container[str]
    ) -> Refusal | None:
        """Why options of a client's own are not scored as answers to a question, which means `match`: they break a
        rule, alone or read with it, tell what is withheld, or name what was not taught. `taught` are known answers,
        plain."""
        other = [option for option in options if not is_own(option, match)]
        together = [f"{text} {' or '.join(options)}"] if other else []
        for read in (*options, *(f"{text} {option}" for option in other), *together):
            if refusal := self.breaks(read):
                return refusal
        hair = " hair" if match is not None and match.question.item.endswith("_color") else ""  # "black" is no person
        for option in options:
            if plain(option) not in taught and (refusal := self.refuses_answer(option + hair)):
                return refusal
        return None if all(nameable(option, taught, match) for option in options) else _OPTIONS

    def refuses_task(self, task: str) -> Refusal | None:
        """The subject for which a task is refused, because it asks for it or tells it in passing."""
        for subject in _subjects(task):
            if subject not in self._allowed:
                return Refusal(subject, f"this deployment does not answer {subject}; its policy names no reason to")
        return None

    def describe(self) -> dict[str, Any]:
        """The policy as data: what is always refused, of sensitive tasks which are allowed and why, and which tasks are
        refused unless all that their words tell in passing is allowed (a caption says "a sad old man")."""
        return {
            "refused": [
                {"rule": rule.name, "about": rule.about, "reason": rule.reason}
                for rule in rules().rules
                if rule.name != self._but
            ],
            "sensitive": {
                subject: {"allowed": subject in self._allowed, "reason": self._allowed.get(subject)}
                for subject in (*SENSITIVE, *_called_sensitive())
            },
            "told_in_passing": {
                task: list(_subjects(task)) for task in tasks.all_names() if set(_subjects(task)) - _own_subjects(task)
            },
        }


def identifies(text: str) -> str | None:
    """Why a question is refused that asks who somebody is, compares or looks for people, by the rules alone; None if it
    does not."""
    refusal = Policy(dict.fromkeys(SENSITIVE, "only who somebody is matters here")).breaks(text)
    return refusal.reason if refusal is not None and refusal.rule in _IDENTIFYING else None


def rule_names() -> tuple[str, ...]:
    """Names of all rules that may refuse, in whatever deployment."""
    return (*(rule.name for rule in rules().rules), *SENSITIVE, *_called_sensitive(), _OWN_OPTIONS)


def _identification() -> Refusal:
    return Refusal(_IDENTIFICATION, rules().named(_IDENTIFICATION).reason)


def _names_somebody(text: str) -> bool:
    """Whether somebody is said to be what is written as a name, and is no ordinary word written large."""
    found = _IS_SAID.search(text)
    if found is None:
        return False
    name = next(filter(None, found.groups()))
    return not all(word in LEXICON.notions or word in rules().demonyms for word in name.lower().split())


@cache
def _called_sensitive() -> tuple[str, ...]:
    """Tasks that their definition calls sensitive, beside those of `SENSITIVE`."""
    of_subjects = {name for names in SENSITIVE.values() for name in names}
    return tuple(name for name in tasks.all_names() if tasks.get(name).sensitive and name not in of_subjects)


def _own_subjects(task: str) -> set[str]:
    """What a task asks for outright."""
    return {subject for subject, names in SENSITIVE.items() if task in names} | {task}


@cache
def _subjects(task: str) -> tuple[str, ...]:
    own = tuple(subject for subject, names in SENSITIVE.items() if task in names)
    found = tasks.get(task)
    itself = (task,) if found.sensitive and not own else ()
    return tuple(dict.fromkeys((*own, *itself, *found.reveals, *_INCIDENTAL.get(task, ()))))
