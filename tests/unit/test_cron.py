import pytest

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
        ("0 0 0 31 2 *", "never comes: no month of 2 has a day 31"),
        ("0 0 3 31 4,jun,9,11 *", "never comes"),
    ],
)
def test_another_expression_is_refused_with_what_would_be_right(expression: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        cron.described(expression)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_day_that_comes_now_and_then_is_taken() -> None:
    assert cron.described("0 0 0 29 2 *") == "on day 29 of month 2 at 00:00 UTC"
    assert "or every Monday" in cron.described("0 0 0 31 2 mon")
