"""What a question comes to before the model is asked: settled by policy or meaning, or something to score or write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from facemllm import tasks
from facemllm.serve.asked.disguises import plain
from facemllm.serve.asked.matching import UNANSWERABLE, Match, Matcher
from facemllm.serve.asked.policy import Policy, Refusal
from facemllm.serve.engine.protocol import Chat
from facemllm.serve.language import Answer, Ask, Question, Refused
from facemllm.tasks.paraphrases import normal

UNTAUGHT = "this model was not taught that"
_REMEMBERED, _SHORT = 2048, 1200
"""Questions whose plans are kept, since people and programs ask the same again, and most characters of one of them."""


@dataclass(frozen=True)
class Plan:
    """One question: `answer` where it is settled already; else `text` is scored over `options`, or `chat` is answered
    in free text. `known` is the item it asks for, `match` how that was understood, if it was not named."""

    answer: Answer | None = None
    known: tasks.Question | None = None
    match: Match | None = None
    text: str = ""
    options: tuple[str, ...] = ()
    chat: Chat = ()


class Planner:
    """Plans questions: policy first, then meaning. `served` are the tasks that this deployment answers; the one that
    teaches what a face does not tell is asked by no name."""

    def __init__(self, served: Sequence[tasks.Task], matcher: Matcher, policy: Policy) -> None:
        self.served = {task.name: task for task in served}
        self._offered = {name: task for name, task in self.served.items() if name != UNANSWERABLE}
        self._matcher, self._policy = matcher, policy
        allowed = [task for task in self.served.values() if policy.refuses_task(task.name) is None]
        self._taught = frozenset(
            plain(name)
            for task in allowed
            for question in task.questions()
            if question.form != "number"
            for option in question.options
            for name in (option.value, option.text)
        )
        self._remembered = lru_cache(_REMEMBERED)(self._understood)

    def plan(self, ask: Ask, question: Question) -> Plan:
        """What is to be done about a question. Raises Refused (422) where it names no task or item of this server."""
        if question.task is not None:
            return self._named(question.task, question.item, ask.where)
        chat = question.chat or (("user", question.text or ""),)
        size = sum(len(text) for _, text in chat) + sum(map(len, question.options))
        return (self._remembered if size <= _SHORT else self._understood)(chat, question.options)

    def _understood(self, chat: Chat, options: tuple[str, ...]) -> Plan:
        chat = unrefused(chat, self._policy)
        said = [text for role, text in chat if role == "user"]
        # what is asked by pieces, of words too, is asked
        together = [" ".join(said), "".join(said)] if len(said) > 1 else []
        for text in (*(text for _, text in chat), *together):
            if refusal := self._policy.refuses(text):
                return _refused(refusal)
        for option in options:
            if refusal := self._policy.breaks(option):
                return _refused(refusal)
        plan = self._talk(chat) if len(chat) > 1 and not options else self._asked(chat[-1][1], options)
        if plan.answer is None:  # names say nothing of a face; the client wrote all turns, the assistant's, too
            taught = normal(plan.match.wording) if plan.match else None
            for text in (*(text for _, text in chat), *together):
                if normal(text) != taught and (refusal := self._policy.refuses_name(text)):
                    return _refused(refusal, plan.known)
        return plan

    def _talk(self, chat: Chat) -> Plan:
        """A chat of several turns: refused if any of them asks what may not be asked. A last turn that asks for an item
        by itself is that item; any other is answered freely, if a turn of the user's is about faces."""
        plans = [self._asked(text, ()) for role, text in chat if role == "user"]
        refused = next((one for one in plans if one.answer and one.answer.kind == "refused"), None)
        if refused or plans[-1].known or all(one.answer for one in plans):
            return refused or plans[-1]
        return Plan(chat=chat)

    def _asked(self, text: str, options: tuple[str, ...]) -> Plan:
        match = self._matcher.match(text)
        if match is None:
            if not self._matcher.about_faces(text):
                return self._untaught(text)
            if options:
                return self._own_options(text, text, options, None)
            return Plan(chat=(("user", text),))
        if refusal := self._policy.refuses_task(match.question.task):
            return _refused(refusal, match.question)
        if match.question.task not in self.served:
            return self._untaught(text)
        if options:
            return self._own_options(text, match.wording, options, match)
        return replace(_of_item(match.question, match.wording), match=match)

    def _own_options(self, text: str, wording: str, options: tuple[str, ...], match: Match | None) -> Plan:
        refusal = self._policy.refuses_options(text, options, match, self._taught)
        return _refused(refusal) if refusal else Plan(text=wording, options=options)

    def _named(self, name: str, item: str | None, where: str) -> Plan:
        refusal = self._policy.refuses_task(name) if name in tasks.all_names() else None
        task = self._offered.get(name)
        if task is None and refusal is None:
            raise Refused(422, f"{where}.task: unknown; known are {', '.join(self._offered)}")
        questions = {question.item: question for question in (task or tasks.get(name)).questions()}
        item = item or (next(iter(questions)) if len(questions) == 1 else "")
        if item not in questions:
            raise Refused(422, f"{where}.item: one of {', '.join(questions)} is needed for {name}")
        if refusal:
            return _refused(refusal, questions[item])
        return _of_item(questions[item], questions[item].templates[0])

    def _untaught(self, text: str) -> Plan:
        nearest = tuple(self._matcher.suggestions(text))
        reason = f"it can be asked: {' '.join(nearest)}" if nearest else None
        return Plan(Answer("untaught", UNTAUGHT, reason=reason, suggestions=nearest))


def unrefused(chat: Chat, policy: Policy) -> Chat:
    """A chat without what was refused in it: clients send all that was said again, and neither a question that is
    refused nor the refusal that stands behind it is shown to the model."""
    left: Chat = ()
    for asked, said in zip(chat[::2], chat[1::2], strict=False):
        refusal = policy.refuses_text(asked[1])
        left = left if refusal and said[1] == refusal.reason else (*left, asked, said)
    return (*left, chat[-1])


def _of_item(known: tasks.Question, wording: str) -> Plan:
    if known.options:
        return Plan(known=known, text=wording, options=tuple(option.text for option in known.options))
    return Plan(known=known, text=wording, chat=(("user", wording),))


def _refused(refusal: Refusal, known: tasks.Question | None = None) -> Plan:
    task, item = (known.task, known.item) if known else (None, None)
    return Plan(Answer("refused", refusal.reason, task=task, item=item, rule=refusal.rule, reason=refusal.reason))
