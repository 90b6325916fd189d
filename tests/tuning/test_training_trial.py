"""One trial after the other: what is trained, pruned, scored and kept, under a real Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
import pytest
import torch
from lit import LitNet
from torch import Tensor
from torch.nn import functional as F
from training_study import FLAGS, QUICK, build, loaders, states, validated

from lightning_bln import StatFlags, load_swapped_checkpoint, set_flags_
from lightning_bln.surgery import bln_layers
from lightning_bln.tuning.training import tune_training
from lightning_bln.tuning.training_space import suggest_swap

EMA = getattr(pl.callbacks, "EMAWeightAveraging", None)


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are tiny: a second thread waits more than it works."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'study.db'}"


class TestValues:
    def test_all_16_settings_are_scored_and_the_best_is_the_trials(self, url: str, tmp_path: Path) -> None:
        study = tune_training(build, n_trials=2, storage=url, checkpoint_dir=tmp_path / "kept")
        assert states(study) == ["COMPLETE"] * 2
        for trial in study.trials:
            attributes = trial.user_attrs
            assert {"learning_rate", "bln.eps", "bln.population", "bln.statistics"} <= set(trial.params)
            assert not set(FLAGS) & set(trial.params), "one training serves all 16"
            assert Path(attributes["checkpoint"]).parent == tmp_path / "kept"
            model = load_swapped_checkpoint(LitNet, attributes["checkpoint"])
            layers = bln_layers(model).values()
            assert {layer.flags.code for layer in layers} == {attributes["setting"]}
            assert {layer.eps for layer in layers} == {trial.params["bln.eps"]}
            assert validated(model) == pytest.approx(trial.value, rel=1e-6)
            one_by_one = {}
            for flags in StatFlags.all():
                set_flags_(model, flags)
                one_by_one[flags.code] = validated(model)
            assert attributes["scores"] == pytest.approx(one_by_one, rel=1e-6)
            assert trial.value == min(attributes["scores"].values())
            assert attributes["scores"][attributes["setting"]] == trial.value

    def test_what_a_study_and_its_trials_say(self, url: str) -> None:
        study = tune_training(
            build, n_trials=1, storage=url, study_name="mine", swap={"population": "ema", "momentum": 0.3}
        )
        assert study.study_name == "mine"
        assert study.direction.name == "MINIMIZE"
        assert optuna.load_study(study_name="mine", storage=url).user_attrs["lightning_bln"] == {
            "version": 1,
            "kind": "training",
            "layers": ["net.1", "net.5"],
            "monitor": "val_loss",
            "mode": "min",
            "model": None,
            "confidence": 0.95,
            "flags": "score",
        }
        (trial,) = study.trials
        attributes = trial.user_attrs
        assert attributes["swap"] == {
            "eps": trial.params["bln.eps"],
            "population": "ema",
            "momentum": 0.3,
            "statistics": trial.params["bln.statistics"],
        }
        assert attributes["metrics"]["val_loss"] == trial.value
        assert attributes["samples"] == 24 == sum(n for n, _ in attributes["units"])
        assert sum(total for _, total in attributes["units"]) / 24 == pytest.approx(attributes["loss"], rel=1e-6)
        assert attributes["loss"] == pytest.approx(trial.value, rel=1e-6)
        assert attributes["layers"] == ["net.1", "net.5"]
        assert attributes["seed"] == 0
        assert attributes["seconds"] > 0
        assert attributes["worker"].split("/")[1] == str(os.getpid())
        assert attributes["beat"] == 0
        assert "error" not in attributes
        assert "checkpoint" not in attributes

    @pytest.mark.parametrize("flags", [True, "FFFT"])
    def test_flags_as_parameters_or_fixed_are_those_of_training_and_value(
        self, flags: Any, url: str, tmp_path: Path
    ) -> None:
        study = tune_training(build, n_trials=2, storage=url, flags=flags, checkpoint_dir=tmp_path)
        assert study.user_attrs["lightning_bln"]["flags"] == ("search" if flags is True else "FFFT")
        for trial in study.trials:
            chosen = StatFlags(*(trial.params[name] for name in FLAGS)).code if flags is True else "FFFT"
            assert trial.user_attrs["setting"] == chosen
            assert "scores" not in trial.user_attrs
            # Validated during training under the same flags: the value is that of the best epoch.
            assert trial.value == pytest.approx(min(trial.intermediate_values.values()), rel=1e-6)
            assert validated(load_swapped_checkpoint(LitNet, trial.user_attrs["checkpoint"])) == pytest.approx(
                trial.value
            )

    def test_the_weights_are_those_of_the_best_validation(self, url: str, tmp_path: Path) -> None:
        class Worsening(LitNet):
            """Learns in the first epoch, and is ruined in the second."""

            def on_train_epoch_start(self) -> None:
                if self.current_epoch == 1:
                    for group in self.optimizers().param_groups:
                        group["lr"] = 3.0

        def worsening(trial: optuna.Trial) -> Any:
            return Worsening(), loaders(), QUICK

        study = tune_training(worsening, n_trials=1, storage=url, flags="TTFF", checkpoint_dir=tmp_path)
        (trial,) = study.trials
        assert trial.user_attrs["epoch"] == 0
        assert trial.intermediate_values[0] < trial.intermediate_values[1]
        assert trial.value == pytest.approx(trial.intermediate_values[0], rel=1e-6)
        assert validated(load_swapped_checkpoint(Worsening, trial.user_attrs["checkpoint"])) == pytest.approx(
            trial.value
        )

    def test_the_largest_value_of_another_name(self, url: str) -> None:
        class WithAccuracy(LitNet):
            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                super().validation_step(batch, batch_idx)
                accuracy = (self(batch[0]).argmax(1) == batch[1]).float().mean()
                self.log("val_acc", accuracy, batch_size=len(batch[0]))

        def accurate(trial: optuna.Trial) -> Any:
            return WithAccuracy(), loaders(), QUICK

        study = tune_training(accurate, n_trials=2, storage=url, monitor="val_acc", mode="max")
        assert study.direction.name == "MAXIMIZE"
        for trial in study.trials:
            assert trial.value == max(trial.user_attrs["scores"].values())
            assert trial.value == trial.user_attrs["metrics"]["val_acc"]
            assert trial.value >= max(trial.intermediate_values.values()), "the best of 16 and not that of one"
        assert study.best_value == max(trial.value for trial in study.trials)

    @pytest.mark.skipif(EMA is None, reason="needs Lightning's EMAWeightAveraging (2.6)")
    def test_averaged_weights_are_scored_as_they_were_validated(self, url: str) -> None:
        class Plain(LitNet):
            """Averaging warns about a model that builds layers late."""

            setup = pl.LightningModule.setup
            configure_model = pl.LightningModule.configure_model

        def averaged(trial: optuna.Trial) -> Any:
            return Plain(), loaders(), QUICK | {"callbacks": EMA(decay=0.9)}

        (trial,) = tune_training(averaged, n_trials=1, storage=url, flags="TTFF").trials
        assert trial.value == pytest.approx(min(trial.intermediate_values.values()), rel=1e-6)

    def test_a_trials_seed_repeats_it(self, tmp_path: Path) -> None:
        def values(name: str, **kwargs: Any) -> list[float | None]:
            study = tune_training(
                build,
                n_trials=2,
                storage=f"sqlite:///{tmp_path / name}",
                sampler=optuna.samplers.RandomSampler(seed=0),
                **kwargs,
            )
            wanted = kwargs.get("seed", 0)
            assert [trial.user_attrs["seed"] for trial in study.trials] == [wanted, wanted + 1]
            return [trial.value for trial in study.trials]

        assert values("a.db") == values("b.db") != values("c.db", seed=5)

    def test_without_a_seed_the_generators_are_left_alone(self, url: str) -> None:
        drawn = []

        def drawing(trial: optuna.Trial) -> Any:
            drawn.append(torch.rand(1).item())
            return LitNet(), loaders(), QUICK | {"max_epochs": 1}

        torch.manual_seed(3)
        expected = torch.rand(1).item()
        torch.manual_seed(3)
        study = tune_training(drawing, n_trials=1, storage=url, seed=None)
        assert drawn == [expected]
        assert "seed" not in study.trials[0].user_attrs


class TestBuild:
    def test_data_modules_and_the_modules_own_loaders(self, tmp_path: Path) -> None:
        class Data(pl.LightningDataModule):
            def train_dataloader(self) -> Any:
                return loaders()[0]

            def val_dataloader(self) -> Any:
                return loaders()[1]

        class Own(LitNet):
            train_dataloader = Data.train_dataloader
            val_dataloader = Data.val_dataloader

        def value(name: str, make: Callable[[], Any]) -> float:
            storage = f"sqlite:///{tmp_path / name}"
            swap = {"eps": 1e-3, "population": "epoch", "statistics": "per_position"}
            return tune_training(lambda trial: make(), n_trials=1, storage=storage, swap=swap).best_value

        pair = value("a.db", lambda: (LitNet(), loaders(), QUICK))
        assert value("b.db", lambda: (LitNet(), Data(), QUICK)) == pair
        assert value("c.db", lambda: (Own(), None, QUICK)) == pair

    def test_limits_of_the_trainer_hold_for_the_scoring_too(self, url: str) -> None:
        def limited(trial: optuna.Trial) -> Any:
            return LitNet(), loaders(), QUICK | {"limit_val_batches": 2}

        (trial,) = tune_training(limited, n_trials=1, storage=url).trials
        assert trial.user_attrs["samples"] == 16

    def test_a_swap_of_ones_own(self, url: str) -> None:
        def own(trial: optuna.Trial) -> Any:
            swap = suggest_swap(trial, flags=None, eps=(1e-3, 1e-2), population="epoch", statistics="per_channel")
            return LitNet(), loaders(), QUICK | {"callbacks": [swap]}

        study = tune_training(own, n_trials=1, storage=url, swap=None)
        assert set(study.trials[0].params) == {"bln.eps"}
        with pytest.raises(
            RuntimeError, match=r"one BLNSwap: from tune_training\(swap=.*; got swap=\{...\} and 1 there"
        ):
            tune_training(own, n_trials=1, storage=url, study_name="two")
        with pytest.raises(RuntimeError, match=r"got swap=None and 0 there"):
            tune_training(build, n_trials=1, storage=url, study_name="none", swap=None)

    def test_the_users_checkpoint_callback_is_no_hindrance(self, url: str, tmp_path: Path) -> None:
        def saving(trial: optuna.Trial) -> Any:
            callback = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", mode="min")
            return LitNet(), loaders(), QUICK | {"callbacks": [callback]}

        assert states(tune_training(saving, n_trials=1, storage=url)) == ["COMPLETE"]
        assert list(tmp_path.glob("*.ckpt"))

    @pytest.mark.parametrize(
        ("returned", "message"),
        [
            ("model", r"build\(trial\) must return \(LightningModule, .*, got \(str\); return for example"),
            ((None, None), r"got \(NoneType, NoneType\)"),
            ((LitNet(), 3), r"got \(LitNet, int\)"),
            ((LitNet(), [1]), r"got \(LitNet, list\)"),
            ((LitNet(), None, 5), r"got \(LitNet, NoneType, int\)"),
            ((LitNet(), None, {}, {}), r"got \(LitNet, NoneType, dict, dict\)"),
            ((LitNet(), loaders(), QUICK | {"devices": 2}), "on one device, got a Trainer with 2; give devices=1"),
            ((LitNet(), loaders(), QUICK | {"limit_val_batches": 0}), "valued by 'val_loss' of its validations, got"),
        ],
    )
    def test_what_cannot_be_trained_is_an_error(self, returned: Any, message: str, url: str) -> None:
        with pytest.raises(RuntimeError, match=message):
            tune_training(lambda trial: returned, n_trials=1, storage=url)


class TestPruning:
    def test_a_bad_trial_is_stopped_after_its_first_epoch(self, url: str) -> None:
        epochs: dict[int, int] = {}

        class Shifted(LitNet):
            shift, number = 0.0, 0

            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                loss = F.cross_entropy(self(batch[0]), batch[1]) + self.shift
                self.log("val_loss", loss, batch_size=len(batch[0]))

            def on_train_epoch_start(self) -> None:
                epochs[self.number] = epochs.get(self.number, 0) + 1

        def shifted(trial: optuna.Trial) -> Any:
            model = Shifted()
            model.number = trial.number
            model.shift = 100.0 * (trial.number == 2)
            return model, loaders(), QUICK

        pruner = optuna.pruners.MedianPruner(n_startup_trials=2)
        study = tune_training(shifted, n_trials=4, storage=url, pruner=pruner)
        assert states(study)[:3] == ["COMPLETE", "COMPLETE", "PRUNED"]
        assert len(study.trials) == 4, "a pruned trial counts"
        assert (epochs[0], epochs[2]) == (2, 1)
        pruned = study.trials[2]
        assert pruned.value == pruned.intermediate_values[0] > 100
        assert "setting" not in pruned.user_attrs, "it is not scored"
        assert pruned.user_attrs["seconds"] > 0

    def test_several_validations_in_an_epoch_report_the_first_and_value_the_best(self, url: str) -> None:
        reported: list[float] = []

        class Watch(pl.Callback):
            def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
                if not trainer.sanity_checking:
                    reported.append(trainer.callback_metrics["val_loss"].item())

        def often(trial: optuna.Trial) -> Any:
            return LitNet(), loaders(), QUICK | {"val_check_interval": 0.5, "callbacks": Watch()}

        (trial,) = tune_training(often, n_trials=1, storage=url, flags="TTFF").trials
        assert len(reported) == 4
        assert trial.intermediate_values == {0: reported[0], 1: reported[2]}
        assert trial.value == pytest.approx(min(reported), rel=1e-6)

    def test_a_training_that_diverges_is_pruned_and_only_such_ones_are_an_error(self, url: str) -> None:
        class Diverging(LitNet):
            def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
                self.log("val_loss", torch.tensor(float("nan")), batch_size=len(batch[0]))

        def diverging(trial: optuna.Trial) -> Any:
            return Diverging(), loaders(), QUICK | {"max_epochs": 1}

        with pytest.raises(
            RuntimeError, match=r"needs a complete trial, got 2 that were pruned.*every training diverges"
        ):
            tune_training(diverging, n_trials=2, storage=url)
        study = optuna.load_study(study_name="lightning-bln-training", storage=url)
        assert [(trial.state.name, trial.user_attrs["diverged"]) for trial in study.trials] == [("PRUNED", True)] * 2
