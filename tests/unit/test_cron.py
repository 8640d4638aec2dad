from types import SimpleNamespace

import pytest

import commands
from facemllm.errors import UserError
from facemllm.workflow import cron


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("0 0 3 * * *", "every day at 03:00 UTC"),
        ("30 15 3 * * *", "every day at 03:15:30 UTC"),
        ("0 0 3,15 * * *", "every day at 03:00 and 15:00 UTC"),
        ("0 30 2 * * MON", "every Monday at 02:30 UTC"),
        ("0 0 3 * * 1-5", "every Monday and Tuesday and Wednesday and Thursday and Friday at 03:00 UTC"),
        ("0 0 3 1 * ?", "on day 1 of every month at 03:00 UTC"),
        ("0 0 3 1 jan *", "on day 1 of month jan at 03:00 UTC"),
        ("0 0 3 13 * fri", "on day 13 of every month or every Friday at 03:00 UTC"),
        ("0 0 3 * 6-8 *", "every day in month 6-8 at 03:00 UTC"),
        ("0 5 * * * *", "every day every hour at minute 5 UTC"),
        ("0 */15 * * * *", "every day at every hour, minute */15, second 0 UTC"),
        ("0 0 */6 * * *", "every day at 00:00 and 06:00 and 12:00 and 18:00 UTC"),
        ("@daily", "every day at 00:00 UTC"),
    ],
)
def test_an_expression_is_said_in_words(expression: str, words: str) -> None:
    assert cron.described(expression) == words


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("0 3 * * *", "--cron '0 0 3 * * *'"),
        ("*/5 * * * *", "--cron '0 */5 * * * *'"),
        ("every day", "six fields"),
        ("", "six fields"),
        ("   ", "six fields"),
        ("@fortnightly", "six fields"),
        ("0 0 0 3 * * *", "six fields"),
        ("99 99 99 * * *", "'99' is no second"),
        ("0 0 24 * * *", "'24' is no hour"),
        ("0 0 3 0 * *", "'0' is no day of the month"),
        ("0 0 3 * 13 *", "'13' is no month"),
        ("0 0 3 * * 7", "'7' is no day of the week"),
        ("0 0 3 * * funday", "'funday' is no day of the week"),
        ("0 0/0 3 * * *", "'0/0' is no minute"),
        ("0 5-1 3 * * *", "'5-1' is no minute"),
        ("0 -1 3 * * *", "'-1' is no minute"),
        ("0 1, 3 * * *", "'' is no minute"),
        ("0 ٣ 3 * * *", "is no minute"),
    ],
)
def test_another_expression_is_refused_with_what_would_be_right(expression: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        cron.described(expression)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


class Kubeflow:
    """Recurring runs as KFP's client keeps them, one a page."""

    def __init__(self) -> None:
        self.kept = [SimpleNamespace(recurring_run_id=str(n), display_name=f"other {n}") for n in range(3)]

    def create_experiment(self, name: str, namespace: str | None) -> SimpleNamespace:
        return SimpleNamespace(experiment_id="1")

    def list_recurring_runs(self, page_token: str, page_size: int, experiment_id: str) -> SimpleNamespace:
        at = int(page_token or 0)
        more = str(at + 1) if at + 1 < len(self.kept) else None
        return SimpleNamespace(recurring_runs=self.kept[at : at + 1], next_page_token=more)

    def create_recurring_run(self, experiment: str, job_name: str, **given: object) -> SimpleNamespace:
        self.kept.append(SimpleNamespace(recurring_run_id=f"new {len(self.kept)}", display_name=job_name, **given))
        return self.kept[-1]

    def delete_recurring_run(self, one: str) -> None:
        self.kept = [kept for kept in self.kept if kept.recurring_run_id != one]


def test_a_second_schedule_stands_in_place_of_the_first(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    client = Kubeflow()
    monkeypatch.setattr(commands, "_client", lambda endpoint, namespace: client)
    monkeypatch.setattr(commands, "write_specification", lambda *_: None)
    monkeypatch.setattr(commands, "_build", None, raising=False)
    commands.schedule("http://kfp", "0 0 3 * * *")
    commands.schedule("http://kfp", "0 0 4 * * *")
    names = [one.display_name for one in client.kept]
    assert names == ["other 0", "other 1", "other 2", "face-mllm laptop"]
    assert (client.kept[-1].cron_expression, client.kept[-1].max_concurrency) == ("0 0 4 * * *", 1)
    assert "face-mllm laptop runs every day at 04:00 UTC, in place of new 3" in capsys.readouterr().err
    with pytest.raises(UserError, match="five fields"):
        commands.schedule("http://kfp", "0 3 * * *")
    assert len(client.kept) == 4
