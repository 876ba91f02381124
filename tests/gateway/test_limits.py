"""Limits: what is let in, what is refused and for how long, and what outlives a restart."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.gateway.keys import ANYONE, Key
from inferfleet.gateway.limits import Limits

DAY = 86400
NOON = 20_000 * DAY + DAY // 2


def key(**limits):
    return Key("alice", b"", **limits)


def admitted(limits, who, now, most=1000):
    """How many pass at once before one is refused."""
    for count in range(most):
        if limits.admit(who, now):
            return count
    return most


def test_a_key_without_limits_is_never_refused():
    limits = Limits()
    assert admitted(limits, ANYONE, NOON) == admitted(limits, key(), NOON) == 1000


@pytest.mark.parametrize(
    ("per_minute", "burst"), [(1, 1), (3, 3), (5, 5), (10, 5), (30, 5), (60, 10), (600, 100)]
)
def test_a_burst_is_ten_seconds_worth_but_a_few_at_least(per_minute, burst):
    assert admitted(Limits(), key(requests_per_minute=per_minute), NOON) == burst


@given(
    st.integers(1, 300),
    st.integers(1, 4),
    st.lists(st.floats(0, 5), max_size=300),
)
def test_no_minute_has_more_than_the_rate_and_one_burst(per_minute, workers, pauses):
    limits, who = Limits(workers), key(requests_per_minute=per_minute)
    now, passed = NOON, []
    for pause in pauses:
        now += pause
        if limits.admit(who, now) is None:
            passed.append(now)
    most = per_minute / workers + max(1, max(per_minute / 6, min(per_minute, 5)) / workers)
    for first in passed:
        assert sum(first <= one < first + 60 for one in passed) <= most + 1e-6


@given(st.integers(1, 600), st.lists(st.floats(0, 3), max_size=50))
def test_who_keeps_to_the_rate_is_never_refused(per_minute, late):
    limits, who = Limits(), key(requests_per_minute=per_minute)
    now = float(NOON)
    for more in late:
        assert limits.admit(who, now) is None
        now += 60 / per_minute * 1.000001 + more


@given(st.integers(1, 600), st.integers(1, 4), st.integers(1, 150))
def test_who_waits_as_told_is_let_in(per_minute, workers, sent):
    limits, who = Limits(workers), key(requests_per_minute=per_minute)
    admitted(limits, who, NOON, sent)
    refusal = limits.admit(who, NOON)
    if refusal is not None:
        assert refusal.code == "rate"
        assert 1 <= refusal.retry_after <= 60 * workers + 1
        assert limits.admit(who, NOON + refusal.retry_after) is None


def test_hammering_does_not_put_the_end_off():
    limits, who = Limits(), key(requests_per_minute=60)
    admitted(limits, who, NOON)
    assert all(limits.admit(who, NOON + tenth / 10) for tenth in range(10))
    assert limits.admit(who, NOON + 1) is None


def test_a_clock_that_goes_back_takes_nothing():
    limits, who = Limits(), key(requests_per_minute=60)
    assert limits.admit(who, NOON) is None
    assert admitted(limits, who, NOON - 3600) == 9
    assert limits.admit(who, NOON - 3599) is None


def test_as_many_at_once_as_the_key_may_have():
    limits, who = Limits(), key(concurrency=2)
    assert admitted(limits, who, NOON) == 2
    refusal = limits.admit(who, NOON)
    assert (refusal.code, refusal.retry_after) == ("concurrency", 1)
    limits.release(who, 0, NOON)
    assert admitted(limits, who, NOON) == 1
    assert admitted(limits, Key("bob", b"", concurrency=2), NOON) == 2


def test_a_refusal_for_concurrency_takes_nothing_off_the_rate():
    limits, who = Limits(), key(concurrency=1, requests_per_minute=3)
    assert limits.admit(who, NOON) is None
    assert {limits.admit(who, NOON).code for _ in range(10)} == {"concurrency"}
    limits.release(who, 0, NOON)
    assert limits.admit(who, NOON) is None


@pytest.mark.parametrize(("limit", "workers", "each"), [(4, 2, 2), (3, 2, 2), (1, 4, 1), (9, 4, 3)])
def test_a_worker_has_its_part_rounded_up(limit, workers, each):
    assert admitted(Limits(workers), key(concurrency=limit), NOON) == each


def test_the_day_s_tokens_are_refused_until_midnight_utc():
    limits, who = Limits(), key(tokens_per_day=100)
    for tokens in (60, 39):
        assert limits.admit(who, NOON) is None
        limits.release(who, tokens, NOON)
    assert limits.admit(who, NOON) is None  # 99: what a request costs shows at its end
    limits.release(who, 50, NOON)
    refusal = limits.admit(who, NOON + 0.5)
    assert (refusal.code, refusal.retry_after) == ("budget", DAY // 2)
    assert limits.admit(who, NOON + DAY / 2 - 0.1).retry_after == 1
    assert limits.admit(who, NOON + DAY / 2) is None


def test_tokens_count_on_the_day_a_request_ends():
    limits, who = Limits(), key(tokens_per_day=100)
    assert limits.admit(who, NOON) is None
    limits.release(who, 100, NOON + DAY)
    assert limits.admit(who, NOON + DAY).code == "budget"


def test_a_key_that_changes_keeps_its_counts():
    limits = Limits()
    assert admitted(limits, key(concurrency=2, tokens_per_day=100), NOON) == 2
    limits.release(key(), 70, NOON)
    assert limits.admit(key(concurrency=1), NOON).code == "concurrency"
    assert limits.admit(key(tokens_per_day=70), NOON).code == "budget"
    assert limits.admit(key(tokens_per_day=71), NOON) is None


def test_a_lower_rate_holds_at_once():
    limits = Limits()
    assert limits.admit(key(requests_per_minute=600), NOON) is None
    assert admitted(limits, key(requests_per_minute=6), NOON) == 5


def test_usage_is_of_today():
    limits, who = Limits(), key()
    admitted(limits, who, NOON, 2)
    limits.release(who, 30, NOON)
    assert limits.usage(NOON) == {"alice": {"running": 1, "tokens_today": 30}}
    assert limits.usage(NOON + DAY) == {"alice": {"running": 1, "tokens_today": 0}}


def used(limits, tokens, now=NOON, name="alice"):
    who = Key(name, b"")
    limits.admit(who, now)
    limits.release(who, tokens, now)


def tokens(limits, now=NOON):
    return {name: use["tokens_today"] for name, use in limits.usage(now).items()}


def test_tokens_outlive_a_restart_but_not_the_day(tmp_path):
    path = tmp_path / "tokens-0.json"
    before = Limits()
    used(before, 70)
    used(before, 5, name="bob")
    before.save(path, NOON)

    after = Limits()
    after.load(path, NOON + 1)
    assert tokens(after) == {"alice": 70, "bob": 5}
    assert after.admit(key(tokens_per_day=70), NOON).code == "budget"

    tomorrow = Limits()
    tomorrow.load(path, NOON + DAY)
    assert tokens(tomorrow, NOON + DAY) == {}


def test_two_generations_of_one_worker_count_into_the_same_file(tmp_path):
    path = tmp_path / "tokens-0.json"
    old, new = Limits(), Limits()
    used(old, 100)
    old.save(path, NOON)
    new.load(path, NOON)
    used(new, 50)
    used(old, 7)  # it drains
    old.save(path, NOON)
    new.save(path, NOON)
    assert tokens(new) == {"alice": 157}
    new.save(path, NOON)
    old.save(path, NOON)
    assert tokens(new) == tokens(old) == {"alice": 157}


def test_saves_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "tokens-0.json"

    def work(_):
        limits = Limits()
        for _ in range(30):
            used(limits, 1)
            limits.save(path, NOON)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert json.loads(path.read_bytes())["tokens"] == {"alice": 120}
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_after_midnight_holds_the_new_day_only(tmp_path):
    path = tmp_path / "tokens-0.json"
    limits = Limits()
    used(limits, 70)
    limits.save(path, NOON)
    used(limits, 3, NOON + DAY)
    limits.save(path, NOON + DAY)
    again = Limits()
    again.load(path, NOON + DAY)
    assert tokens(again, NOON + DAY) == {"alice": 3}


def test_a_save_that_fails_is_made_up_for_later(tmp_path):
    limits = Limits()
    used(limits, 70)
    with pytest.raises(FileNotFoundError):
        limits.save(tmp_path / "missing" / "tokens.json", NOON)
    limits.save(tmp_path / "tokens.json", NOON)
    assert json.loads((tmp_path / "tokens.json").read_bytes())["tokens"] == {"alice": 70}


@pytest.mark.parametrize("content", [b"", b'{"day": 1', b"[]", b'{"day":1,"tokens":{"a":"x"}}'])
def test_a_broken_file_is_told_and_begins_at_zero(tmp_path, caplog, content):
    path = tmp_path / "tokens.json"
    path.write_bytes(content)
    limits = Limits()
    limits.load(path, NOON)
    assert tokens(limits) == {}
    told = [one.levelno for one in caplog.records if one.name == "inferfleet.gateway"]
    assert told == [logging.ERROR]
    used(limits, 4)
    limits.save(path, NOON)
    assert json.loads(path.read_bytes())["tokens"] == {"alice": 4}
