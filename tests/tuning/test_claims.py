"""The queue of settings: who has what, what is queued again, and that nothing is done twice."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage, InMemoryStorage, get_storage
from optuna.trial import TrialState

from lightning_bln import StatFlags
from lightning_bln.tuning.cells import FLAG, Claimed
from lightning_bln.tuning.claims import Claims
from lightning_bln.tuning.storage import open_storage
from lightning_bln.tuning.table import CellScore

ALL = list(StatFlags.all())
CODES = [flags.code for flags in ALL]
DEAD = "there/1/2/elsewhere/run"


def make_claims(storage: BaseStorage | None = None, cells: list[StatFlags] | None = None, **arguments: Any) -> Claims:
    storage = storage or InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
    return Claims(study, storage, ALL if cells is None else cells, **arguments)


def claimed_by(worker: str, storage: BaseStorage, workers: int = 3) -> list[Claimed]:
    """What another worker claimed, which then says no more."""
    other = make_claims(storage)
    other.worker = other.mutex.worker = worker
    return other.claim(workers)


def score(claims: Claims, claimed: list[Claimed], loss: float = 1.0, error: str | None = None) -> None:
    claims.finish((one, CellScore(one.setting, loss, error=error), None if error else loss, {}) for one in claimed)


def states(claims: Claims) -> Counter[str]:
    return Counter(trial.state.name for trial in claims.study.trials)


def done(claims: Claims) -> Counter[str]:
    trials = claims.study.get_trials(states=(TrialState.COMPLETE,))
    return Counter(str(claims.setting_of(trial)) for trial in trials)


# ------------------------------------------------------------------------ claiming


def test_one_worker_takes_all_in_order():
    claims = make_claims()
    assert [one.code for one in claims.claim(1)] == CODES
    assert not claims.claim(1)
    trial = claims.study.trials[3]
    assert trial.state == TrialState.RUNNING
    assert trial.distributions == dict.fromkeys(StatFlags.names(), FLAG)
    assert trial.user_attrs == {"attempt": 1, "worker": claims.worker, "beat": 0}


def test_shares_of_three_workers():
    storage = InMemoryStorage()
    workers = [make_claims(storage) for _ in range(4)]
    assert [len(claims.claim(3)) for claims in workers] == [6, 6, 4, 0]
    assert Counter(len(claims.study.trials) for claims in workers) == {16: 4}


def test_looking_changes_nothing():
    claims = make_claims()
    view = claims.look()
    assert list(view.cells) == CODES
    assert not claims.study.trials
    assert not claims.settled()
    assert claims.settled([])


def test_what_is_done_is_not_claimed():
    claims = make_claims()
    score(claims, claims.claim(2))
    rest = claims.claim(2)
    assert [one.code for one in rest] == CODES[8:12]
    score(claims, rest + claims.claim(1))
    assert not claims.claim(1)
    assert claims.settled()
    assert done(claims) == dict.fromkeys(CODES, 1)


def test_the_choices_of_every_flag_are_in_canonical_order():
    assert CategoricalDistribution((True, False)) == FLAG


@pytest.mark.parametrize("kind", ["memory", "sqlite:///{}/flags.db", "{}/flags.journal", "postgresql"])
def test_workers_that_claim_together_share_without_overlap(kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    one = InMemoryStorage()
    url = request.getfixturevalue("postgres")() if kind == "postgresql" else kind.format(tmp_path)

    def opened() -> BaseStorage:
        return one if kind == "memory" else get_storage(open_storage(url))

    workers = [make_claims(opened()) for _ in range(4)]
    barrier = threading.Barrier(4)
    taken: list[str] = []
    errors: list[BaseException] = []

    def work(claims: Claims) -> None:
        try:
            barrier.wait()
            for share in claims.shares(4):
                taken.extend(claimed.code for claimed in share)
                score(claims, share)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=[claims]) for claims in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert Counter(taken) == dict.fromkeys(CODES, 1)
    assert done(workers[0]) == dict.fromkeys(CODES, 1)
    assert len(workers[0].study.trials) == 16


# -------------------------------------------------------------- failures and silence


def test_a_failed_setting_is_queued_again_as_often_as_said():
    claims = make_claims(cells=ALL[:2], max_retries=2)
    for attempt in (1, 2, 3):
        first, *others = claims.claim(1)
        assert first.code == "TTTT"
        assert claims.study.trials[first.number].user_attrs["attempt"] == attempt
        score(claims, [first], error=f"no {attempt}")
        score(claims, others)
    assert not claims.claim(1)
    assert claims.given_up(claims.look()) == {"TTTT": "no 3"}
    assert claims.settled()
    more = make_claims(claims.storage, ALL[:2], max_retries=3)
    assert [one.code for one in more.claim(1)] == ["TTTT"]


def test_nan_is_given_up_at_once():
    claims = make_claims(cells=ALL[:2])
    first, second = claims.claim(1)
    score(claims, [first], loss=math.nan)
    score(claims, [second], loss=math.inf)
    assert not claims.claim(1)
    assert claims.given_up(claims.look()) == {"TTTT": "the value is NaN"}
    assert done(claims) == {"TTTF": 1}


def test_trials_of_a_silent_worker_are_queued_again_after_the_grace():
    storage = InMemoryStorage()
    theirs = claimed_by(DEAD, storage)
    assert len(theirs) == 6
    claims = make_claims(storage, grace=0.2)
    score(claims, claims.claim(1))
    assert not claims.settled()
    assert not claims.claim(1)
    time.sleep(0.25)
    again = claims.claim(1)
    assert [one.code for one in again] == [one.code for one in theirs]
    assert claims.study.trials[0].user_attrs["error"] == "worker there/1 fell silent"
    assert claims.study.trials[again[0].number].user_attrs["attempt"] == 2
    score(claims, again)
    assert done(claims) == dict.fromkeys(CODES, 1)
    assert not claims.given_up(claims.look())


def test_a_worker_that_beats_is_not_silent():
    storage = InMemoryStorage()
    theirs = claimed_by(DEAD, storage)
    claims = make_claims(storage, grace=0.2)
    score(claims, claims.claim(1))
    for beat in range(1, 7):
        for one in theirs:
            storage.set_trial_user_attr(one.trial_id, "beat", beat)
        assert not claims.claim(1)
        time.sleep(0.06)
    assert states(claims) == {"RUNNING": 6, "COMPLETE": 10}


def test_silence_does_not_use_up_the_tries():
    storage = InMemoryStorage()
    for _ in range(5):
        claimed_by(DEAD, storage, workers=1)
        claims = make_claims(storage, grace=0.01, max_retries=0)
        claims.look()
        time.sleep(0.02)
        claims.exclusively(claims.reconcile)
    assert states(claims) == {"FAIL": 80, "WAITING": 16}


def test_a_worker_taken_for_dead_does_not_finish_what_another_does(caplog: pytest.LogCaptureFixture):
    storage = InMemoryStorage()
    slow = make_claims(storage, cells=ALL[:2])
    slow.worker = DEAD
    late = slow.claim(1)
    quick = make_claims(storage, cells=ALL[:2], grace=0.05)
    quick.look()
    time.sleep(0.06)
    again = quick.claim(1)
    assert len(again) == 2
    score(slow, late, loss=5.0)
    score(quick, again, loss=7.0)
    assert done(quick) == {"TTTT": 1, "TTTF": 1}
    assert {trial.value for trial in quick.study.get_trials(states=(TrialState.COMPLETE,))} == {7.0}
    assert "was finished by another worker" in caplog.text


def test_trials_claimed_but_not_signed_by_a_dead_worker_are_not_lost(monkeypatch: pytest.MonkeyPatch):
    storage = InMemoryStorage()
    dying = make_claims(storage)
    dying.worker = dying.mutex.worker = DEAD

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        # SIGKILL in between: the trial runs, it has no worker's name, and the mutex stays.
        patch.setattr(storage, "set_trial_user_attr", killed)
        patch.setattr(dying.mutex, "_release", lambda: None)
        with pytest.raises(Killed):
            dying.claim(1)
    claims = make_claims(storage, grace=0.2, patience=0.2)
    assert states(claims) == {"RUNNING": 1, "WAITING": 15}
    for share in claims.shares(1):
        score(claims, share)
    assert done(claims) == dict.fromkeys(CODES, 1)
    assert claims.study.trials[0].state == TrialState.FAIL


def test_a_mutex_lost_in_the_middle_is_taken_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    storage = InMemoryStorage()
    claims = make_claims(storage)
    real, broken = claims.storage.create_new_trial, []

    def create(*args: Any, **kwargs: Any) -> int:
        if not broken:
            broken.append(True)
            storage.delete_study(storage.get_study_id_from_name("s (lock)"))
        return real(*args, **kwargs)

    monkeypatch.setattr(storage, "create_new_trial", create)
    assert [one.code for one in claims.claim(1)] == CODES
    assert len(claims.study.trials) == 16
    assert "starts over" in caplog.text


def test_giving_back_queues_again():
    claims = make_claims()

    def work() -> None:
        with claims.working():
            claims.claim(2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert states(claims) == {"FAIL": 8, "WAITING": 16}
    assert claims.study.trials[0].user_attrs["error"] == "interrupted by KeyboardInterrupt"
    assert claims.study.trials[16].user_attrs["attempt"] == 2


# ----------------------------------------------------------------------- other code


def test_trials_without_a_heartbeat_are_left_alone():
    claims = make_claims(grace=0.01)
    asked = claims.study.ask(dict.fromkeys(StatFlags.names(), FLAG))
    code = str(claims.setting_of(claims.storage.get_trial(asked._trial_id)))
    claimed = claims.claim(1)
    assert sorted(one.code for one in claimed) == sorted(set(CODES) - {code})
    time.sleep(0.02)
    score(claims, claimed)
    cell = claims.look().cells[code]
    assert [trial.number for trial in cell.elsewhere] == [asked.number]
    assert not claims.claim(1)
    assert claims.settled()


def test_a_setting_that_other_code_completed_meanwhile_is_not_completed_twice():
    claims = make_claims(cells=ALL[:1])
    (mine,) = claims.claim(1)
    other = claims.study.ask()
    for name, value in ALL[0].to_dict().items():
        claims.storage.set_trial_param(other._trial_id, name, FLAG.to_internal_repr(value), FLAG)
    claims.study.tell(other, 2.0)
    score(claims, [mine])
    assert done(claims) == {"TTTT": 1}
    assert claims.study.trials[mine.number].user_attrs["error"] == "trial 1 had this setting first"
    assert not claims.claim(1)


def test_a_claim_that_is_about_to_be_signed_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    storage = InMemoryStorage()
    claims, other = make_claims(storage, ALL[:1]), make_claims(storage, ALL[:1])
    real, settled = storage.set_trial_user_attr, []
    asking = threading.Thread(target=lambda: settled.append(claims.settled()))

    def sign(trial_id: int, key: str, value: Any) -> None:
        if key == "worker":
            assert claims.look().cells["TTTT"].elsewhere
            asking.start()
            time.sleep(0.1)
        real(trial_id, key, value)

    monkeypatch.setattr(storage, "set_trial_user_attr", sign)
    assert len(other.claim(1)) == 1
    asking.join()
    assert settled == [False]


def test_optuna_ask_may_be_faster_than_a_claim(monkeypatch: pytest.MonkeyPatch):
    claims = make_claims()
    claims.exclusively(claims.reconcile)
    note: Callable[..., None] = claims.mutex.note

    def ask_then_note(**what: Any) -> None:
        claims.study.ask(dict.fromkeys(StatFlags.names(), FLAG))
        note(**what)

    monkeypatch.setattr(claims.mutex, "note", ask_then_note)
    assert [one.code for one in claims.claim(1)] == CODES[1:]
    assert len(claims.look().cells["TTTT"].elsewhere) == 1
