"""`tune_training`: an Optuna study over whole trainings, the layer's settings together with the user's own."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from lightning_bln.callback import BLNSwap
from lightning_bln.flags import FlagsLike, StatFlags
from lightning_bln.tuning.mutex import Mutex
from lightning_bln.tuning.storage import StorageLike, open_storage
from lightning_bln.tuning.table import check_choices
from lightning_bln.tuning.training_space import check_swap_space, suggest_swap
from lightning_bln.tuning.training_trial import Build, TrialRun
from lightning_bln.tuning.workers import Heartbeat, Watch, is_gone, worker_name

log = logging.getLogger("lightning.pytorch.lightning_bln")

_SAME_FAILURES = 3
"""So many trials that fail alike, with none that works, are not the hyper-parameters' fault."""


def tune_training(
    build: Build,
    *,
    n_trials: int,
    storage: StorageLike = None,
    study_name: str = "lightning-bln-training",
    monitor: str = "val_loss",
    mode: str = "min",
    flags: FlagsLike | bool = "score",
    swap: Mapping[str, Any] | None = {},
    sampler: optuna.samplers.BaseSampler | None = None,
    pruner: optuna.pruners.BasePruner | None = None,
    seed: int | None = 0,
    checkpoint_dir: str | PathLike[str] | None = None,
    heartbeat: float = 10.0,
    grace: float = 60.0,
) -> optuna.Study:
    """Search the layer's settings and your own hyper-parameters together, one training a trial.

        def build(trial):
            model = LitModel(learning_rate=trial.suggest_float("learning_rate", 1e-3, 1, log=True))
            return model, datamodule, {"max_epochs": 10}

        study = tune_training(build, n_trials=30, storage="sqlite:///study.db")
        study.best_trial.params, study.best_trial.user_attrs["setting"]

    Each trial trains with a `BLNSwap` from `suggest_swap`, is stopped early by the pruner (it sees ``monitor`` in the
    first validation of each epoch, under the flags that the swap has then), goes back to the weights of its best
    validation, and is scored on the validation data. **A value is optimistic**: it is the best of several epochs, with
    ``flags="score"`` of 16 settings too, and the study's best the best of many trials, all chosen on the same
    validation data. Measure what you report on data that had no part in it.

    Several processes may work on one study, on one machine or many; ``n_trials`` counts the COMPLETE and PRUNED ones of
    all of them, of earlier calls too, so that an interrupted study goes on where it stopped when it is called again. A
    trial whose process was killed is closed as FAIL by the others (at once on the same machine, from another one after
    ``grace`` seconds), and another takes its place; a call returns when ``n_trials`` are finished. A trial that raises
    is FAIL with the error in ``user_attrs["error"]``, and the study goes on; Ctrl-C closes its trial as FAIL and stops
    this process. A training whose ``monitor`` is never finite is PRUNED, with ``user_attrs["diverged"]``.

    The study's ``user_attrs["lightning_bln"]`` say ``{"version": 1, "kind": "training", "layers": [...], "monitor":
    ..., "mode": ..., "model": None, "confidence": 0.95, "flags": "score" | "search" | "TTFF"}``; a COMPLETE trial's
    ``user_attrs`` are ``setting``, ``loss``, ``metrics``, ``samples``, ``units`` (of the chosen setting, as
    `tune_flags` writes them), ``scores`` (the value of each setting, for "score"), ``swap`` (eps, population,
    momentum, statistics), ``layers``, ``epoch`` (of the best validation), ``seed``, ``seconds``, ``worker``,
    ``beat`` and ``checkpoint``.

    Args:
        build: Called with the trial; suggests your own parameters and returns (LightningModule, data, {Trainer
            arguments}), the last one or two if needed. Data are a LightningDataModule, or [train loader, validation
            loader]. Here a Trainer has by default one device, no logger, no progress bar and no summary.
        n_trials: How many trials the study is to have at last.
        storage: As of `tune_flags`: a URL, a journal file, an Optuna storage; default ``sqlite:///lightning-bln.db``.
        study_name: Default "lightning-bln-training".
        monitor: What is to be best; logged by ``validation_step``. Default "val_loss".
        mode: "min" (default) or "max".
        flags: "score" (default): they are no parameter; all 16 settings are scored in one pass over the validation data
            after each training, and the best is the trial's. True: each flag is a parameter of the trial, as all
            others. Or fixed flags, such as "TTFF".
        swap: Arguments of `suggest_swap` (without flags), such as ``{"eps": 1e-3, "include": "layer4"}``. None:
            ``build`` puts a `BLNSwap` of its own among the callbacks.
        sampler: Default Optuna's, TPE. It is not seeded: processes with the same seed would try the same.
        pruner: Default Optuna's, the median rule; `optuna.pruners.NopPruner()` for none.
        seed: Trial k is built and trained after ``seed_everything(seed + k)``. Default 0; None for no seeding.
        checkpoint_dir: Each complete trial's best weights go there, with the chosen flags; `load_swapped_checkpoint`
            reads them. Default None, none is kept.
        heartbeat: Seconds between the signs of life of a running trial. Default 10.
        grace: A trial without one for so many seconds is given up. Default 60.

    Returns:
        The study.

    Raises:
        ValueError: If an argument does not fit, or the study is another kind of search.
        RuntimeError: If trials fail all the same way, or none is complete in the end.

    Source: Akiba et al., "Optuna", arXiv 1907.10902; pruning by optuna-integration's PyTorchLightningPruningCallback.
    """
    if n_trials < 1:
        raise ValueError(f"n_trials must be at least 1, got {n_trials!r}.")
    check_choices(mode)
    if not 0 < heartbeat < grace:
        raise ValueError(f"heartbeat must be above 0 and below grace, got {heartbeat!r} and {grace!r}; say 10 and 60.")
    all_flags = isinstance(flags, str) and flags == "score"
    kind = "score" if all_flags else "search" if flags is True else StatFlags.parse(flags).code  # type: ignore[arg-type]
    suggest = None
    if swap is not None:
        if "flags" in swap:
            raise ValueError(f"flags are an argument of their own: tune_training(..., flags={swap['flags']!r}).")
        arguments = {**swap, "flags": None if all_flags else flags}
        check_swap_space(arguments)
        suggest = partial(_suggest, arguments)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    run = TrialRun(build, suggest, monitor, mode, all_flags, seed, folder)
    opened = open_storage(storage)
    study = _open_study(opened, study_name, sampler, pruner, {"monitor": monitor, "mode": mode, "flags": kind})
    _Worker(study, opened, run, n_trials, heartbeat, grace).work()
    return study


def _suggest(arguments: Mapping[str, Any], trial: optuna.trial.BaseTrial) -> BLNSwap:
    return suggest_swap(trial, **arguments)


def _open_study(
    storage: BaseStorage,
    study_name: str,
    sampler: optuna.samplers.BaseSampler | None,
    pruner: optuna.pruners.BasePruner | None,
    settings: dict[str, str],
) -> optuna.Study:
    study = optuna.create_study(
        study_name=study_name,
        storage=storage,
        sampler=sampler,
        pruner=pruner,
        direction="minimize" if settings["mode"] == "min" else "maximize",
        load_if_exists=True,
    )
    wanted = {"version": 1, "kind": "training", **settings}
    fresh = not study.get_trials(deepcopy=False)  # looked at first: another process may be making the same study
    present = study.user_attrs.get("lightning_bln")
    if present is None and fresh:
        study.set_user_attr("lightning_bln", wanted | {"layers": [], "model": None, "confidence": 0.95})
    elif present is None or {name: present.get(name) for name in wanted} != wanted:
        found = "none" if present is None else {name: present.get(name) for name in wanted}
        raise ValueError(
            f"The study {study_name!r} must be a search of the same kind, {wanted}, got one with the settings {found}; "
            f"call tune_training(..., study_name=...) with another name, or with the same settings."
        )
    return study


class _Worker:
    """This process's part of the work on a study."""

    def __init__(
        self, study: optuna.Study, storage: BaseStorage, run: TrialRun, n_trials: int, heartbeat: float, grace: float
    ) -> None:
        self.study = study
        self.storage = storage
        self.run = run
        self.n_trials = n_trials
        self.heartbeat = heartbeat
        self.grace = grace
        self.name = worker_name()
        self.mutex = Mutex(storage, study.study_name, self.name)
        self.watch = Watch(grace)
        self.failures: list[str] = []

    def work(self) -> None:
        """Run trials until the study has as many as it is to have."""
        with Heartbeat(self.storage, self.heartbeat) as beats:
            while (done := self._count()[0]) < self.n_trials:
                trial = self._next()
                if trial is None:
                    # Others are at the last ones. Stay, to take the place of one that fails or is killed.
                    time.sleep(min(1.0, self.heartbeat))
                    continue
                trial_id = self._trial_id(trial.number)
                beats.add([trial_id])
                try:
                    self._run(trial)
                finally:
                    beats.remove([trial_id])
                self._give_up_if_hopeless()
        if not self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            raise RuntimeError(
                f"A study needs a complete trial, got {done} that were pruned, in study {self.study.study_name!r}; let "
                f"the pruner be milder, or look whether every training diverges."
            )

    def _next(self) -> optuna.Trial | None:
        """A new trial, or None if those that are done and those that run are enough."""
        # One process at a time, or several would start the last one.
        with self.mutex.hold():
            if sum(self._count()) >= self.n_trials:
                return None
            trial = self.study.ask()
            for name, value in (("worker", self.name), ("beat", 0)):
                trial.set_user_attr(name, value)
        return trial

    def _run(self, trial: optuna.Trial) -> None:
        started = time.monotonic()
        value: float | None = None
        try:
            value = self.run(trial)
        except optuna.TrialPruned as error:
            state, message = TrialState.PRUNED, str(error)
        except Exception as error:
            if isinstance(error, UpdateFinishedTrialError) and self._was_closed(trial):
                return
            state, message = TrialState.FAIL, _one_line(error)
            log.warning("Trial %d failed with the parameters %s.", trial.number, trial.params, exc_info=error)
        except BaseException as error:  # Ctrl-C, or SIGTERM as Lightning raises it
            self._tell(trial, TrialState.FAIL, error=f"Interrupted: {_one_line(error)}")
            raise
        else:
            state, message = TrialState.COMPLETE, f"flags {trial.user_attrs['setting']}"
        attributes: dict[str, Any] = {"seconds": round(time.monotonic() - started, 3)}
        if state is TrialState.FAIL:
            self.failures.append(message)
            attributes["error"] = message
        else:
            shown = "" if value is None else f"{self.run.monitor} {value:.6g}, "
            log.info("Trial %d %s: %s%s", trial.number, state.name, shown, message)
            self._note_layers(trial)
        self._tell(trial, state, value, **attributes)

    def _tell(self, trial: optuna.Trial, state: TrialState, value: float | None = None, **attributes: Any) -> None:
        try:
            for name, attribute in attributes.items():
                trial.set_user_attr(name, attribute)
            self.study.tell(trial, value, state=state)
        except (UpdateFinishedTrialError, ValueError):
            if not self._was_closed(trial):
                raise

    def _was_closed(self, trial: optuna.Trial) -> bool:
        """Whether the trial was finished over this process's head; if so, says so."""
        state = self.study.get_trials(deepcopy=False)[trial.number].state
        if state.is_finished():
            log.warning(
                "Trial %d was closed as %s by another process, which saw no sign of life for %g s; its result is lost. "
                "Call tune_training(..., grace=...) with more.",
                *(trial.number, state.name, self.grace),
            )
        return state.is_finished()

    def _count(self) -> tuple[int, int]:
        """Trials that are done, and that run as far as is known."""
        trials = self.study.get_trials(deepcopy=False)
        done = sum(trial.state in (TrialState.COMPLETE, TrialState.PRUNED) for trial in trials)
        return done, sum(trial.state is TrialState.RUNNING and self._lives(trial) for trial in trials)

    def _lives(self, trial: FrozenTrial) -> bool:
        """Whether a running trial shows signs of life; one of ours that does not is closed."""
        worker, beat = (trial.user_attrs.get(name) for name in ("worker", "beat"))
        sign = (beat, len(trial.intermediate_values), len(trial.params))
        silent = self.watch.unchanged(trial.number, sign)
        gone = worker is not None and is_gone(worker)
        if not silent and not gone:
            return True
        if worker is not None:  # otherwise it was asked for by other means (`optuna ask`), and is theirs to close
            self._close(trial, "its process has ended" if gone else f"no sign of life for {self.grace:g} s")
        return False

    def _close(self, trial: FrozenTrial, why: str) -> None:
        try:
            self.storage.set_trial_user_attr(self._trial_id(trial.number), "error", f"Given up: {why}.")
            self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        except UpdateFinishedTrialError:
            log.info("Trial %d was closed by another process first.", trial.number)
        else:
            log.warning("Trial %d is given up: %s; another takes its place.", trial.number, why)

    def _note_layers(self, trial: optuna.Trial) -> None:
        attributes = self.study.user_attrs["lightning_bln"]
        layers = trial.user_attrs.get("layers")
        if layers and not attributes["layers"]:
            self.study.set_user_attr("lightning_bln", attributes | {"layers": layers})

    def _trial_id(self, number: int) -> int:
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study_id, number)

    def _give_up_if_hopeless(self) -> None:
        last = self.failures[-_SAME_FAILURES:]
        alike = len({re.sub(r"\d+", "#", failure) for failure in last}) == 1
        hopeless = alike and len(last) >= min(_SAME_FAILURES, self.n_trials) and not self._count()[0]
        # Failed trials are replaced by others, so that there must be an end to it.
        endless = len(self.failures) >= max(_SAME_FAILURES, self.n_trials)
        if hopeless or endless:
            listed = "; ".join(dict.fromkeys(last))
            raise RuntimeError(
                f"Trials must not fail all the same way or again and again, got {len(self.failures)} failures in this "
                f"process, in study {self.study.study_name!r}: {listed}. Their tracebacks are in the log."
            )


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0]}" if lines else "")
