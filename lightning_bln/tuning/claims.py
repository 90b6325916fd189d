"""Who scores which setting of a study: trials queued, claimed, finished and given back by several processes.

Every setting that is to be scored has at most one trial that is waiting, running or complete. All that changes a
trial's state happens under a `Mutex`, on whichever storage; what takes long, the scoring, does not.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_bln.tuning.cells import FLAG, Cell, Claimed, View, score_attrs
from lightning_bln.tuning.mutex import PATIENCE, Mutex, MutexLostError
from lightning_bln.tuning.space import Setting, params_setting, setting_code, setting_params
from lightning_bln.tuning.table import CellScore
from lightning_bln.tuning.workers import Heartbeat, Watch, is_gone, worker_name

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""How often, at the longest, a worker looks whether there is something to do for it again."""

T = TypeVar("T")


class Claims:
    """The queue of a study's settings, shared by all processes that work on it.

    Args:
        study: Its trials have the parameters of `space.parameter_names`.
        storage: The study's storage.
        cells: Settings that are to be scored whatever happens, in canonical order.
        layers: Names of the layers for a search by layer, None for flags of all layers together.
        once: Whether a setting must not be COMPLETE twice; a search by layer may propose one again.
        heartbeat: Seconds between two signs of life of this worker.
        grace: Seconds after which another worker without one is taken for dead.
        max_retries: How often a setting that failed is tried again.
        patience: As of `Mutex`.
    """

    def __init__(
        self,
        study: optuna.Study,
        storage: BaseStorage,
        cells: Sequence[Setting],
        layers: Sequence[str] | None = None,
        *,
        once: bool = True,
        heartbeat: float = 10.0,
        grace: float = 60.0,
        max_retries: int = 2,
        patience: float = PATIENCE,
    ) -> None:
        self.study = study
        self.storage = storage
        self.cells = list(cells)
        self.layers = layers
        self.once = once
        self.max_retries = max_retries
        self.worker = worker_name()
        self.mutex = Mutex(
            storage, study.study_name, self.worker, patience=patience, on_broken=self._adopt_unsigned_claims
        )
        self.heartbeat = Heartbeat(storage, heartbeat)
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._watch = Watch(grace)
        self._mine: dict[int, Claimed | None] = {}  # by trial number; None while it has no setting yet

    # ------------------------------------------------------------------- looking

    def look(self) -> View:
        """What there is; nothing is changed."""
        view = View({setting_code(setting): Cell(setting) for setting in self.cells})
        for trial in self.study.get_trials(deepcopy=False):
            setting = self.setting_of(trial)
            if setting is not None:
                self._sort_in(trial, view.cells.setdefault(setting_code(setting), Cell(setting)))
            elif trial.state == TrialState.RUNNING and "worker" in trial.user_attrs:
                alive = trial.number in self._mine or not self._is_silent(trial)
                (view.proposed if alive else view.abandoned).append(trial)
        return view

    def _sort_in(self, trial: FrozenTrial, cell: Cell) -> None:
        cell.attempts += 1
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED):
            cell.done.append(trial)
        elif trial.state == TrialState.WAITING:
            cell.waiting.append(trial)
        elif trial.state == TrialState.FAIL:
            if not trial.user_attrs.get("given_back", False):
                cell.errors.append(trial.user_attrs.get("error", "failed without saying why"))
            cell.hopeless |= trial.user_attrs.get("again") is False
        elif trial.number in self._mine:
            cell.running.append(trial)
        elif "worker" not in trial.user_attrs:
            cell.elsewhere.append(trial)
        else:
            (cell.silent if self._is_silent(trial) else cell.running).append(trial)

    def setting_of(self, trial: FrozenTrial) -> Setting | None:
        """The setting that a trial is on, None for another trial or one that has no parameters yet."""
        setting = params_setting(trial.params, self.layers)
        return setting or params_setting(trial.system_attrs.get("fixed_params", {}), self.layers)

    def given_up(self, view: View) -> dict[str, str]:
        """Settings that failed too often, with what the last failure said."""
        return {code: cell.errors[-1] for code, cell in view.cells.items() if cell.given_up(self.max_retries)}

    def settled(self, cells: Collection[str] | None = None) -> bool:
        """Whether no worker of this package has, or will have, anything to do with these settings any more.

        Args:
            cells: Codes of settings. Default all, and proposals that have no setting yet.
        """
        view = self.look()
        if self._busy(view, cells):
            return False
        if any(cell.elsewhere for cell in view.cells.values()):
            # Or a worker has just claimed it and not yet signed: it does that under the mutex.
            view = self.exclusively(self.look)
        return not self._busy(view, cells)

    def _busy(self, view: View, cells: Collection[str] | None) -> bool:
        if cells is None and (view.proposed or view.abandoned):
            return True
        chosen = view.cells.values() if cells is None else [view.cells[code] for code in cells]
        return any(
            not cell.done and (cell.waiting or cell.running or cell.silent or cell.missing(self.max_retries))
            for cell in chosen
        )

    def _is_silent(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs["worker"]
        unchanged = self._watch.unchanged(trial.number, (worker, trial.user_attrs.get("beat")))
        return unchanged or is_gone(worker)

    # ------------------------------------------------------------------ claiming

    def claim(self, workers: int) -> list[Claimed]:
        """Take this worker's share of the settings that are still to be scored.

        First brings the queue in order: trials of dead workers become FAIL, settings without a trial get one.

        Args:
            workers: How many processes are at work; 1 takes all that is left.

        Returns:
            The trials, RUNNING now and this worker's; none if there is nothing to do at the moment.
        """
        view = self.look()
        if not view.abandoned and not any(
            cell.waiting or cell.silent or cell.missing(self.max_retries) for cell in view.cells.values()
        ):
            return []
        return self.exclusively(lambda: self._claim(workers))

    def reconcile(self) -> View:
        """Bring the queue in order as `claim` does, and claim nothing; under the mutex."""
        view = self.look()
        for trial in [*view.abandoned, *(trial for cell in view.cells.values() for trial in cell.silent)]:
            worker = "/".join(str(trial.user_attrs["worker"]).split("/")[:2])
            log.warning("trial %d is queued again: worker %s fell silent", trial.number, worker)
            self._fail(trial.number, f"worker {worker} fell silent", given_back=True)
        for cell in view.cells.values():
            # More than one trial of a setting: after a mutex was broken, or where other code queued or asked for it.
            needed = 0 if cell.done or cell.running or cell.elsewhere else 1
            for trial in cell.waiting[needed:] if self.once else ():
                if self._start(trial.number):
                    self._fail(trial.number, "another trial has this setting", given_back=True)
        for cell in self.look().cells.values():
            if cell.missing(self.max_retries):
                self.enqueue(cell.setting, cell.attempts + 1)
        return self.look()

    def _claim(self, workers: int) -> list[Claimed]:
        cells = self.reconcile().cells.values()
        left = [cell for cell in cells if not cell.done and not cell.given_up(self.max_retries)]
        waiting = [trial for cell in cells for trial in cell.waiting]
        chosen = waiting[: math.ceil(max(len(left), len(waiting)) / workers)]
        # Whoever finds this worker dead between the next two steps must know that these were its trials.
        self.mutex.note(claiming=[trial.number for trial in chosen])
        for trial in chosen:
            setting = self.setting_of(trial)
            if setting is None:
                continue
            trial_id = self.trial_id(trial.number)
            # Before it is RUNNING: Ctrl-C between the next steps gives back what is this worker's, and nothing else.
            self._own(trial.number, trial_id, setting)
            if not self._start(trial.number):
                self._forget(trial.number)
                continue
            self.storage.set_trial_user_attr(trial_id, "worker", self.worker)
            self.storage.set_trial_user_attr(trial_id, "beat", 0)
            for name, value in setting_params(setting, self.layers).items():
                if name not in trial.params:  # queued by study.enqueue_trial
                    self.storage.set_trial_param(trial_id, name, FLAG.to_internal_repr(value), FLAG)
        return [claimed for claimed in self._mine.values() if claimed is not None]

    def propose(self) -> None:
        """Make a RUNNING trial of this worker that has no setting yet; under the mutex. `sign` follows."""
        attrs = {"attempt": 1, "worker": self.worker, "beat": 0}
        trial = create_trial(state=TrialState.RUNNING, user_attrs=attrs)
        trial_id = self.storage.create_new_trial(self._study_id, template_trial=trial)
        self._own(self.storage.get_trial_number_from_id(trial_id), trial_id, None)

    @property
    def unsigned(self) -> list[int]:
        """Numbers of this worker's trials that have no setting yet."""
        return [number for number, claimed in self._mine.items() if claimed is None]

    def sign(self, number: int) -> Claimed:
        """The proposal has its setting now."""
        trial_id = self.trial_id(number)
        setting = self.setting_of(self.storage.get_trial(trial_id))
        assert setting is not None, "every flag was suggested"
        claimed = self._mine[number] = Claimed(number, trial_id, setting)
        return claimed

    def _start(self, number: int) -> bool:
        """Take a waiting trial; False if `optuna ask` was faster, which knows no mutex."""
        try:
            return self.storage.set_trial_state_values(self.trial_id(number), TrialState.RUNNING)
        except UpdateFinishedTrialError:
            return False

    def _own(self, number: int, trial_id: int, setting: Setting | None) -> None:
        self._mine[number] = None if setting is None else Claimed(number, trial_id, setting)
        self.heartbeat.add([trial_id])

    def enqueue(self, setting: Setting, attempt: int) -> None:
        """Queue a setting; ``optuna ask`` takes it from the queue too."""
        params = setting_params(setting, self.layers)
        self.study.add_trial(
            create_trial(
                state=TrialState.WAITING,
                params=params,
                distributions=dict.fromkeys(params, FLAG),
                user_attrs={"attempt": attempt},
            )
        )

    def _adopt_unsigned_claims(self, holder: dict[str, Any]) -> None:
        """Sign the trials that a worker had claimed when it died before it could sign them itself."""
        claiming = set(holder.get("claiming", ()))
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number in claiming and "worker" not in trial.user_attrs:
                trial_id = self.trial_id(trial.number)
                self.storage.set_trial_user_attr(trial_id, "worker", holder["worker"])

    def shares(self, workers: int, cells: Collection[str] | None = None) -> Iterator[list[Claimed]]:
        """This worker's share of what is waiting, again and again, until nobody works on ``cells`` any more.

        A share that another worker has may come back, so this waits for it.

        Args:
            workers: How many processes are at work.
            cells: Codes of the settings that must be done. Default all.
        """
        pause = 0.02
        while True:
            claimed = self.claim(workers)
            if claimed:
                pause = 0.02
                yield claimed
                continue
            if self.settled(cells):
                return
            time.sleep(pause)
            pause = min(pause * 1.5, POLL_SECONDS)

    # ----------------------------------------------------------------- finishing

    def record(self, claimed: Claimed, attrs: dict[str, Any]) -> None:
        """Write a trial's attributes; one that another worker has taken over is left alone."""
        with contextlib.suppress(UpdateFinishedTrialError):
            for name, value in attrs.items():
                self.storage.set_trial_user_attr(claimed.trial_id, name, value)

    def finish(self, results: Iterable[tuple[Claimed, CellScore, float | None, dict[str, Any]]]) -> None:
        """Write what was scored: COMPLETE with the value, PRUNED, or FAIL with the error.

        Args:
            results: (trial, score, value, further attributes). The value of a failed one is not looked at.
        """
        ready = []
        for claimed, score, value, attrs in results:
            error = score.error
            if error is None and value is not None and math.isnan(value):
                # Optuna holds no NaN, and the next try on the same data would give it again.
                error, attrs = "the value is NaN", attrs | {"again": False}
            self.record(claimed, attrs | ({"error": error} if error else score_attrs(score)))
            ready.append((claimed, error, score.pruned, value))

        def write() -> None:
            cells = self.look().cells
            for claimed, error, pruned, value in ready:
                if claimed.number not in self._mine:
                    continue  # written before the mutex was lost
                self.mutex.check()
                others = [trial for trial in cells[claimed.code].done if trial.number != claimed.number]
                if error:
                    self._fail(claimed.number, error)
                elif others and self.once:
                    self._fail(claimed.number, f"trial {others[0].number} had this setting first", given_back=True)
                else:
                    state = TrialState.PRUNED if pruned else TrialState.COMPLETE
                    self._close(claimed, state, None if value is None else [value])
                self._forget(claimed.number)

        self.exclusively(write)

    def give_back(self, reason: str) -> None:
        """This worker stops: its trials become FAIL, and their settings are queued again at once."""
        if not self._mine:
            return

        def write() -> None:
            for number in list(self._mine):
                self._fail(number, reason, given_back=True)
                self._forget(number)
            self.reconcile()

        self.exclusively(write)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """The heartbeat goes inside; whatever ends it early, this worker's trials are given back."""
        with self.heartbeat:
            try:
                yield
            except BaseException as error:
                # Ctrl-C, too: whoever comes next need not wait until this worker is missed.
                what = str(error).strip().splitlines()
                self.give_back(f"interrupted by {type(error).__name__}" + (f": {what[0]}" if what else ""))
                raise

    def _fail(self, number: int, error: str, *, given_back: bool = False) -> None:
        trial_id = self.trial_id(number)
        with contextlib.suppress(UpdateFinishedTrialError):
            self.storage.set_trial_user_attr(trial_id, "error", error)
            if given_back:
                self.storage.set_trial_user_attr(trial_id, "given_back", True)
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)

    def _close(self, claimed: Claimed, state: TrialState, values: list[float] | None) -> None:
        try:
            self.storage.set_trial_state_values(claimed.trial_id, state, values)
        except UpdateFinishedTrialError:
            log.warning("trial %d was finished by another worker, which took this one for dead", claimed.number)

    def _forget(self, number: int) -> None:
        del self._mine[number]
        self.heartbeat.remove([self.trial_id(number)])

    def exclusively(self, work: Callable[[], T]) -> T:
        """Do it under the mutex; from the beginning if it was lost."""
        while True:
            try:
                with self.mutex.hold():
                    return work()
            except MutexLostError:
                log.warning("the mutex was taken from this worker, which starts over")

    def trial_id(self, number: int) -> int:
        """The storage's name for a trial."""
        return self.storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
