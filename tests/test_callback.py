"""`BLNSwap` under a real Trainer."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from lit import BATCH, SAMPLES, LitNet, dataset, loader, trainer
from torch import nn

from lightning_bln import BatchLayerNorm, BLNSwap, StatFlags, set_flags_
from lightning_bln.layer import RUNNING
from lightning_bln.surgery import bln_layers

EMA = getattr(pl.callbacks, "EMAWeightAveraging", None)
needs_ema = pytest.mark.skipif(EMA is None, reason="needs Lightning's EMAWeightAveraging (2.6)")


def fit(model: pl.LightningModule, *callbacks: pl.Callback, **kwargs: Any) -> pl.Trainer:
    run = trainer(*callbacks, **kwargs)
    run.fit(model, loader(), loader(24, seed=1))
    return run


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{running}": getattr(layer, running).clone()
        for name, layer in bln_layers(model).items()
        for running in RUNNING
    }


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Plain(LitNet):
    """Builds nothing late."""

    setup = pl.LightningModule.setup
    configure_model = pl.LightningModule.configure_model


class Spy(pl.Callback):
    """Calls a function in a hook."""

    def __init__(self, **hooks: Any) -> None:
        for name, function in hooks.items():
            setattr(self, name, lambda trainer, module, *rest, _f=function: _f(trainer, module, *rest))


class TestSwap:
    @pytest.mark.parametrize("late", [None, "setup", "configure_model"])
    def test_layers_are_swapped_wherever_they_are_built_and_are_trained(self, late: str | None) -> None:
        model = LitNet(late)
        swap = BLNSwap()
        before: dict[str, torch.Tensor] = {}
        seen: list[int] = []

        def remember(run: pl.Trainer, module: pl.LightningModule) -> None:
            before.update({name: p.detach().clone() for name, p in module.named_parameters()})
            optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
            seen.append(len({id(p) for p in module.parameters()} - optimized))

        fit(model, swap, Spy(on_train_start=remember))
        expected = {"net.1": "BatchNorm2d", "net.5": "LayerNorm"} | ({"last": "BatchNorm1d"} if late else {})
        assert swap.report is not None
        assert {entry.name: entry.old for entry in swap.report.swapped} == expected
        assert set(bln_layers(model)) == set(expected)
        assert seen == [0], "the optimizer must hold every parameter"
        unchanged = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
        assert unchanged == []
        assert "configure_model" not in vars(model)

    def test_an_optimizer_made_before_the_swap_trains_the_new_layers(self) -> None:
        # LightningCLI makes its optimizer from model.parameters() when it builds the model.
        class Early(LitNet):
            def __init__(self) -> None:
                super().__init__()
                self.early = torch.optim.SGD(self.parameters(), lr=0.05)

            def configure_optimizers(self) -> torch.optim.Optimizer:
                return self.early

        model = Early()
        weight = model.net[1].weight
        fit(model, BLNSwap(), max_epochs=1)
        assert model.net[1].weight is weight
        assert isinstance(model.net[1], BatchLayerNorm)
        assert not torch.equal(weight, torch.full_like(weight, 2.0)), "sqrt(4) is the start value"

    def test_it_is_idempotent_over_fit_validate_test_and_predict(self) -> None:
        model = LitNet("setup")
        run = fit(model, BLNSwap())
        layers = bln_layers(model)
        weight = model.net[1].weight.detach().clone()
        first = run.validate(model, loader(24, seed=1), verbose=False)
        assert run.test(model, loader(24, seed=1), verbose=False) == first
        run.predict(model, loader(24, seed=1))
        run.fit_loop.max_epochs = 3
        run.fit(model, loader(), loader(24, seed=1))
        assert bln_layers(model).keys() == layers.keys()
        assert all(layers[name] is layer for name, layer in bln_layers(model).items())
        assert (model.net[1].weight - weight).abs().max() < 1, "a second scaling by sqrt(C) would show"

    @pytest.mark.parametrize("call", ["fit", "validate", "test", "predict"])
    def test_a_model_with_nothing_to_swap_is_an_error_that_lists_its_layers(self, call: str) -> None:
        model = LitNet(first=nn.Identity())
        model.net[5] = nn.Identity()
        with pytest.raises(ValueError, match=r"at least one normalization layer.*LitNet.*Linear x2"):
            getattr(trainer(BLNSwap()), call)(model, loader())
        assert "configure_model" not in vars(model)

    def test_patterns_and_families_reach_the_surgery(self) -> None:
        model = LitNet()
        fit(model, BLNSwap(exclude="net.5", statistics="per_channel", flags="FFFF"), max_epochs=1)
        assert list(bln_layers(model)) == ["net.1"]
        assert model.net[1].statistics == "per_channel"
        assert model.net[1].flags == StatFlags.parse("FFFF")
        assert model.net[1].eps == 1e-5, "the old layer's"
        fit(model := LitNet(), BLNSwap(eps=0.02), max_epochs=1)
        assert [layer.eps for layer in bln_layers(model).values()] == [0.02, 0.02]
        with pytest.raises(ValueError, match=r"include pattern.*'nett"):
            fit(LitNet(), BLNSwap(include="nett.*"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"flags": "TTXF"}, "'TTXF'.*write for example 'TTFF'"),
            ({"statistics": "per_pixel"}, "statistics must be one of"),
            ({"affine": "keep"}, "affine must be"),
            ({"norms": "batch"}, "norms must be a sequence"),
            ({"sync": "always"}, "sync must be"),
            ({"eps": 0}, "eps must be above 0"),
            ({"precise_batches": 0}, "precise_batches must be at least 1"),
        ],
    )
    def test_settings_that_cannot_work_fail_when_the_callback_is_made(
        self, arguments: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            BLNSwap(**arguments)

    def test_it_logs_what_was_swapped_and_why_not(self, caplog: pytest.LogCaptureFixture) -> None:
        model = LitNet()
        model.group = nn.GroupNorm(2, 4)
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.lightning_bln"):
            fit(model, BLNSwap(), max_epochs=1)
        text = caplog.text
        assert "2 layers swapped (1 BatchNorm2d, 1 LayerNorm), 1 skipped" in text
        assert "net.1" in text
        assert "group normalization is swapped on" in text

    @pytest.mark.filterwarnings("ignore:The averaged weights of StochasticWeightAveraging:UserWarning")
    @pytest.mark.parametrize("averaging", [pytest.param(EMA, marks=needs_ema), lambda: StochasticWeightAveraging(0.01)])
    def test_it_warns_when_an_averaging_callback_stands_before_it(self, averaging: Any) -> None:
        swap = BLNSwap()
        run = trainer(averaging(), swap)
        with pytest.warns(UserWarning, match=r"BLNSwap must stand before (EMA|Stochastic)WeightAveraging"):
            swap.setup(run, LitNet(), "fit")

    def test_no_warning_when_it_stands_first(self, recwarn: pytest.WarningsRecorder) -> None:
        swap = BLNSwap()
        swap.setup(trainer(swap, StochasticWeightAveraging(0.01)), LitNet(), "fit")
        assert not [w for w in recwarn if "BLNSwap" in str(w.message)]

    def test_nothing_is_left_behind_after_an_exception(self) -> None:
        class StopError(Exception):
            pass

        def stop(*_: Any) -> None:
            raise StopError

        model = LitNet("configure_model")
        with pytest.raises(StopError):
            fit(model, BLNSwap(), Spy(on_sanity_check_start=stop))
        assert "configure_model" not in vars(model)
        fit(model, BLNSwap(), max_epochs=1)
        assert len(bln_layers(model)) == 3

    def test_the_other_namespace_works_too(self) -> None:
        # In a process of its own: the two namespaces must not be mixed in one.
        code = """
import torch, pytorch_lightning as pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from lightning_bln import BLNSwap, BatchLayerNorm
class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
model = Net()
pl.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
           enable_model_summary=False, callbacks=[BLNSwap()]).fit(
    model, DataLoader(TensorDataset(torch.randn(12, 3)), batch_size=4))
assert isinstance(model.net[1], BatchLayerNorm) and int(model.net[1].num_samples) == 12
print("swapped")
"""
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "swapped" in done.stdout

    @pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model:UserWarning")
    @needs_ema
    def test_averaging_callbacks_copy_the_model_and_not_the_data(self) -> None:
        class Data(torch.utils.data.TensorDataset):
            def __deepcopy__(self, memo: Any) -> Any:
                raise AssertionError("the dataset was copied")

        data = torch.utils.data.DataLoader(Data(*dataset().tensors), batch_size=BATCH)
        model = LitNet("configure_model")
        trainer(BLNSwap(), EMA(), max_epochs=1).fit(model, data, loader(24, seed=1))
        assert len(bln_layers(model)) == 3

    @pytest.mark.parametrize("late", [None, "setup"])
    def test_a_mistyped_pattern_leaves_the_model_as_it_was(self, late: str | None) -> None:
        model = LitNet(late) if late else Plain()
        with pytest.raises(ValueError, match=r"exclude pattern.*'net\.7'"):
            fit(model, BLNSwap(exclude=["net.1", "net.7"]))
        assert not bln_layers(model)

    def test_a_filter_is_called_with_the_models_layers_only(self) -> None:
        seen: list[str] = []
        model = Plain()
        fit(model, BLNSwap(filter_fn=lambda name, layer: seen.append(name) is None), max_epochs=1)
        assert set(seen) == {"net.1", "net.5"}

    def test_after_swa_the_statistics_are_to_be_recomputed(self) -> None:
        swap = BLNSwap()
        with pytest.warns(UserWarning, match=r"call update_statistics\(model, train_dataloader\) after fit"):
            swap.setup(trainer(swap, StochasticWeightAveraging(0.01)), LitNet(), "fit")


class TestEpochs:
    def test_each_epoch_accumulates_afresh_and_keeps_the_last_averages_until_then(self) -> None:
        counts: list[int] = []
        before: list[dict[str, torch.Tensor]] = []
        kept: list[bool] = []

        def batch_end(run: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            counts.append(int(module.net[1].num_samples))

        def epoch_end(run: pl.Trainer, module: pl.LightningModule) -> None:
            before.append(statistics(module))

        def batch_start(run: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
            if before and batch_idx == 0:
                kept.append(equal(before[-1], statistics(module)))

        spy = Spy(on_train_batch_end=batch_end, on_train_epoch_end=epoch_end, on_train_batch_start=batch_start)
        fit(LitNet(), BLNSwap(), spy)
        epoch = [8, 16, 24, 32, 40, 48, 50]
        assert counts == epoch * 2
        assert kept == [True]
        assert not equal(*before)

    def test_the_population_is_the_sample_weighted_average_of_the_epoch(self) -> None:
        model = LitNet(learning_rate=0.0)
        fit(model, BLNSwap(), max_epochs=3)
        layer = model.net[1]
        with torch.no_grad():
            inputs = [model.net[0](batch[0]) for batch in loader()]
        mean = sum(x.mean(0) * len(x) for x in inputs) / SAMPLES
        var = sum(x.var(0, correction=1) * len(x) for x in inputs) / SAMPLES
        torch.testing.assert_close(layer.running_batch_mean, mean)
        torch.testing.assert_close(layer.running_batch_var, var)
        assert int(layer.nominal_batch_size) == BATCH

    def test_the_sanity_check_and_validation_leave_the_statistics_alone(self) -> None:
        seen: list[Any] = []

        def sanity_end(run: pl.Trainer, module: pl.LightningModule) -> None:
            seen.append((module.net[1].has_population, int(module.net[1].num_samples)))

        def validation_start(run: pl.Trainer, module: pl.LightningModule) -> None:
            if not run.sanity_checking:
                seen.append(statistics(module))

        def validation_end(run: pl.Trainer, module: pl.LightningModule) -> None:
            if not run.sanity_checking:
                seen.append(equal(seen.pop(), statistics(module)))

        spy = Spy(
            on_sanity_check_end=sanity_end, on_validation_start=validation_start, on_validation_end=validation_end
        )
        fit(LitNet(), BLNSwap(), spy, val_check_interval=0.5)
        assert seen == [(False, 0), True, True, True, True]

    def test_gradient_accumulation_counts_every_micro_batch(self) -> None:
        model = LitNet()
        fit(model, BLNSwap(), max_epochs=1, accumulate_grad_batches=3)
        assert int(model.net[1].num_samples) == SAMPLES

    def test_limits_and_fast_dev_run(self) -> None:
        model = LitNet()
        fit(model, BLNSwap(), max_epochs=2, limit_train_batches=2)
        assert int(model.net[1].num_samples) == 2 * BATCH
        model = LitNet()
        fit(model, BLNSwap(), fast_dev_run=1)
        assert int(model.net[1].num_samples) == BATCH

    def test_a_second_run_from_the_start_begins_anew(self) -> None:
        model = LitNet()
        fit(model, BLNSwap(), max_epochs=1)
        fit(model, BLNSwap(), max_epochs=1)
        assert int(model.net[1].num_samples) == SAMPLES

    @pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training:UserWarning")
    def test_a_frozen_part_keeps_its_statistics(self) -> None:
        model = LitNet()
        fit(model, BLNSwap(), max_epochs=1)
        frozen = statistics(model)
        model.net.eval()
        fit(model, BLNSwap(), max_epochs=1)
        assert not model.net[1].training
        assert equal(frozen, statistics(model))

    def test_learning_rate_finder_and_batch_size_finder_restore_the_model(self, tmp_path: Path) -> None:
        class Sized(LitNet):
            batch_size = 2

            def train_dataloader(self) -> Any:
                return loader(batch_size=self.batch_size)

            def val_dataloader(self) -> Any:
                return loader(24, seed=1)

        model = Sized()
        run = trainer(BLNSwap(), max_epochs=1, default_root_dir=tmp_path)
        Tuner(run).lr_find(model, num_training=3, update_attr=False)
        Tuner(run).scale_batch_size(model, max_trials=2, steps_per_trial=2)
        run = trainer(BLNSwap(), max_epochs=1)
        run.fit(model)
        assert int(model.net[1].num_samples) == SAMPLES


class TestPrecise:
    def test_statistics_are_those_of_the_last_batches_under_the_present_weights(self) -> None:
        model = LitNet()
        checked: list[bool] = []

        def validation_start(run: pl.Trainer, module: pl.LightningModule) -> None:
            if run.sanity_checking:
                return
            with torch.no_grad():
                inputs = [module.net[0](batch[0]) for batch in list(loader())[-3:]]
            mean = sum(x.mean(0) * len(x) for x in inputs) / sum(len(x) for x in inputs)
            torch.testing.assert_close(module.net[1].running_batch_mean, mean)
            checked.append(module.net[1].training)

        fit(model, BLNSwap(population="precise", precise_batches=3), Spy(on_validation_start=validation_start))
        assert checked == [False, False]
        assert len(model._forward_pre_hooks) == 0, "the recorder must go when the run ends"

    def test_it_does_not_change_the_training(self) -> None:
        weights = []
        for population in ("epoch", "precise"):
            torch.manual_seed(3)
            model = LitNet()
            model.net.append(nn.Dropout(0.2))
            fit(model, BLNSwap(population=population))
            weights.append(model.net[0].weight.detach())
        assert torch.equal(*weights)

    def test_under_ddp_and_with_frozen_layers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Lightning leaves its ranks in the environment, where processes that other tests start would find them.
        monkeypatch.setattr(os, "environ", os.environ.copy())
        model = LitNet()
        model.net[5].eval()

        def freeze(run: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
            module.net[5].eval()

        spy = Spy(on_train_batch_start=freeze)
        strategy = DDPStrategy(process_group_backend="gloo")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on distributed runs is not this test's matter
            fit(model, spy, BLNSwap(population="precise"), max_epochs=1, strategy=strategy)
        torch.distributed.destroy_process_group()
        with torch.no_grad():
            inputs = [model.net[0](batch[0]) for batch in loader()]
        mean = sum(x.mean(0) * len(x) for x in inputs) / SAMPLES
        torch.testing.assert_close(model.net[1].running_batch_mean, mean)
        assert not model.net[5].has_population

    def test_the_policy_of_a_checkpoint_counts_and_is_told(self, tmp_path: Path) -> None:
        run = fit(LitNet(), BLNSwap(population="precise"), max_epochs=1)
        run.save_checkpoint(tmp_path / "precise.ckpt")
        model = LitNet()
        resumed = trainer(BLNSwap(), max_epochs=2)
        with pytest.warns(UserWarning, match=r"'net\.1' has population='precise', this BLNSwap has population='epoch'"):
            resumed.fit(model, loader(), loader(24, seed=1), ckpt_path=tmp_path / "precise.ckpt")
        with torch.no_grad():
            inputs = [model.net[0](batch[0]) for batch in loader()]
        mean = sum(x.mean(0) * len(x) for x in inputs) / SAMPLES
        torch.testing.assert_close(model.net[1].running_batch_mean, mean)

    def test_the_eps_of_a_checkpoint_counts_and_is_told(self, tmp_path: Path) -> None:
        fit(LitNet(), BLNSwap(eps=0.02), max_epochs=1).save_checkpoint(tmp_path / "eps.ckpt")
        model = LitNet()
        with pytest.warns(UserWarning, match=r"'net\.1' has eps=0\.02, this BLNSwap has eps=0\.5"):
            trainer(BLNSwap(eps=0.5)).validate(model, loader(), ckpt_path=tmp_path / "eps.ckpt")
        assert model.net[1].eps == 0.02

    def test_a_step_of_several_calls_is_warned_about(self) -> None:
        class Parts(LitNet):
            def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
                x = batch[0]
                for part in self.net:
                    x = part(x)
                return nn.functional.cross_entropy(x, batch[1])

        with pytest.warns(UserWarning, match="calls the model once.*BatchLayerNorm, BatchLayerNorm in turn"):
            fit(Parts(), BLNSwap(population="precise"), max_epochs=1)

    def test_without_validation_the_last_checkpoint_has_them(self, tmp_path: Path) -> None:
        model = LitNet()
        run = trainer(BLNSwap(population="precise"), ModelCheckpoint(tmp_path), max_epochs=1)
        run.fit(model, loader())
        saved = torch.load(run.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
        with torch.no_grad():
            inputs = [model.net[0](batch[0]) for batch in loader()]
        mean = sum(x.mean(0) * len(x) for x in inputs) / SAMPLES
        torch.testing.assert_close(saved["net.1.running_batch_mean"], mean)


# Testing with fewer callbacks than trained with is the point.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used:UserWarning")
class TestCheckpoints:
    @pytest.mark.parametrize("weights_only", [False, True])
    @pytest.mark.parametrize(
        ("population", "interval"), [("epoch", 1.0), ("epoch", 0.5), ("ema", 1.0), ("precise", 1.0)]
    )
    def test_the_best_checkpoint_reproduces_its_logged_loss(
        self, population: str, interval: float, weights_only: bool, tmp_path: Path
    ) -> None:
        best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, save_weights_only=weights_only)
        swap = BLNSwap(population=population)
        run = fit(LitNet("setup"), swap, best, max_epochs=3, val_check_interval=interval)
        assert len(best.best_k_models) == 3 / interval
        for path, logged in best.best_k_models.items():
            tested = trainer(BLNSwap(population=population)).test(
                LitNet("setup"), loader(24, seed=1), ckpt_path=path, verbose=False
            )
            assert tested[0]["val_loss"] == logged.item()
        again = run.test(ckpt_path="best", dataloaders=loader(24, seed=1), verbose=False)
        assert again[0]["val_loss"] == best.best_model_score.item()

    @needs_ema
    @pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model:UserWarning")
    def test_an_averaged_model_is_tested_as_it_was_validated(self, tmp_path: Path) -> None:
        best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1)
        model = LitNet()
        fit(model, BLNSwap(), EMA(decay=0.9), best, max_epochs=3)
        assert int(model.net[1].nominal_batch_size) == BATCH
        for path, logged in best.best_k_models.items():
            tested = trainer(BLNSwap()).test(LitNet(), loader(24, seed=1), ckpt_path=path, verbose=False)
            assert tested[0]["val_loss"] == pytest.approx(logged.item(), rel=1e-6)

    def test_explicit_flags_win_over_the_checkpoint_and_default_ones_do_not(self, tmp_path: Path) -> None:
        run = fit(LitNet(), BLNSwap(), max_epochs=1)
        set_flags_(run.lightning_module, "FTFT")
        path = tmp_path / "flags.ckpt"
        run.save_checkpoint(path)
        for flags, expected in ((None, "FTFT"), ("TTTT", "TTTT")):
            model = LitNet()
            trainer(BLNSwap(flags=flags)).test(model, loader(), ckpt_path=path, verbose=False)
            assert model.net[1].flags.code == expected

    def test_a_checkpoint_of_one_process_resumes_without_the_callback_state(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = LitNet()
        start = copy.deepcopy(model.state_dict())
        fit(model, BLNSwap(), max_epochs=3)
        first = LitNet()
        first.load_state_dict(start)
        run = fit(first, BLNSwap(), max_epochs=2)
        run.save_checkpoint(tmp_path / "two.ckpt")
        second = LitNet()
        trainer(BLNSwap(), max_epochs=3).fit(second, loader(), loader(24, seed=1), ckpt_path=tmp_path / "two.ckpt")
        for name, value in model.state_dict().items():
            if torch.is_tensor(value):
                assert torch.equal(value, second.state_dict()[name]), name


DISTRIBUTED = """
import atexit, multiprocessing, os, sys, time, torch
from lit import LitNet, dataset, loader, trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, Sampler
from lightning_bln import BLNSwap, swap_norms_

# Where a thread of gloo still holds a tensor when Python ends, as on a busy machine, that aborts the process, after all
# work is done. Spawned processes leave without that end, others give it time to let go.
if multiprocessing.parent_process() is not None:
    atexit.register(os._exit, 0)
else:
    atexit.register(time.sleep, 0.5)

class Shard(Sampler):
    def __iter__(self):
        rank = torch.distributed.get_rank()
        return iter(range(0, 30) if rank == 0 else range(30, 56))  # as many batches, the last ones of 6 and of 2
    def __len__(self):
        return 30 if torch.distributed.get_rank() == 0 else 26

if __name__ == "__main__":
    path, sync, start_method = sys.argv[1], sys.argv[2] == "True", sys.argv[3]
    torch.manual_seed(0)
    model = LitNet(learning_rate=0.0)
    if start_method != "popen":
        swap_norms_(model)
    run = trainer(BLNSwap(sync=sync), max_epochs=2, devices=2, use_distributed_sampler=False,
                  strategy=DDPStrategy(process_group_backend="gloo", start_method=start_method))
    data = dataset(56)
    run.fit(model, DataLoader(data, batch_size=8, sampler=Shard()), loader(24, seed=1))
    if run.is_global_zero:
        torch.save({k: v for k, v in run.lightning_module.state_dict().items() if torch.is_tensor(v)}, path)
"""


@pytest.mark.slow
class TestDistributed:
    @pytest.mark.parametrize(("sync", "start_method"), [(False, "popen"), (True, "popen"), (False, "spawn")])
    def test_the_population_is_that_of_one_process_seeing_all_samples(
        self, sync: bool, start_method: str, tmp_path: Path
    ) -> None:
        script = tmp_path / "train.py"
        script.write_text(DISTRIBUTED)
        here = Path(__file__).parent
        for _ in range(3):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", str(script), str(tmp_path / "state.pt"), str(sync), start_method],
                capture_output=True,
                text=True,
                env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}", "CUDA_VISIBLE_DEVICES": ""},
                cwd=tmp_path,
            )
            # How it would end all the same.
            if "terminate called without an active exception" not in done.stderr:
                break
        assert done.returncode == 0, done.stderr
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        for name, value in self.expected(sync).items():
            torch.testing.assert_close(state[name], value, msg=lambda text, name=name: f"{name}: {text}")

    def expected(self, sync: bool) -> dict[str, torch.Tensor]:
        """One process that sees each process's micro-batches, or with sync those of both at once."""
        torch.manual_seed(0)
        model = LitNet(learning_rate=0.0)
        images = dataset(56).tensors[0]
        shards = [images[:30].split(BATCH), images[30:].split(BATCH)]
        batches = [torch.cat(pair) for pair in zip(*shards, strict=True)] if sync else [x for s in shards for x in s]
        with torch.no_grad():
            inputs = [model.net[0](batch) for batch in batches]
        total = sum(len(x) for x in inputs)
        return {
            "net.1.running_batch_mean": sum(x.mean(0) * len(x) for x in inputs) / total,
            "net.1.running_batch_var": sum(x.var(0, correction=1) * len(x) for x in inputs) / total,
            "net.1.num_samples": torch.tensor(total),
            "net.1.nominal_batch_size": torch.tensor(2 * BATCH if sync else BATCH),
        }

    @pytest.mark.parametrize("late", [None, "setup"])
    def test_processes_started_from_this_one_are_warned_about(self, late: str | None) -> None:
        model = LitNet(late) if late else Plain()
        swap = BLNSwap()
        run = trainer(swap, strategy="ddp_spawn", devices=2)

        def set_up() -> None:
            swap.setup(run, model, "fit")
            model.configure_model()

        with pytest.warns(UserWarning, match=r"swapped too.*DDPStrategy.*Call swap_norms_\(model"):
            set_up()


class Data(pl.LightningDataModule):
    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader(24, seed=1)


class CLINet(LitNet):
    """Leaves its optimizer to LightningCLI, which makes it from model.parameters() before anything is swapped."""

    configure_optimizers = pl.LightningModule.configure_optimizers


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's own use of jsonargparse
def test_lightning_cli_configures_the_callback_and_its_early_optimizer_trains_the_new_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lightning.pytorch.cli import LightningCLI

    arguments = [
        "train.py",
        "fit",
        "--optimizer=SGD",
        "--optimizer.lr=0.05",
        "--trainer.max_epochs=1",
        "--trainer.accelerator=cpu",
    ]
    arguments += ["--trainer.callbacks=lightning_bln.BLNSwap", "--trainer.callbacks.flags=TFTF"]
    arguments += ["--trainer.callbacks.statistics=per_channel"]
    arguments += ["--trainer.callbacks.eps=1e-2", "--trainer.logger=false"]
    arguments += ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    monkeypatch.setattr(sys, "argv", arguments)
    cli = LightningCLI(CLINet, Data, save_config_callback=None, seed_everything_default=False)
    layer = cli.model.net[1]
    assert isinstance(layer, BatchLayerNorm)
    assert (layer.flags.code, layer.statistics, layer.eps) == ("TFTF", "per_channel", 0.01)
    assert not torch.equal(layer.weight, torch.full_like(layer.weight, 2.0)), "sqrt(4) is the start value"
    optimized = {id(p) for group in cli.trainer.optimizers[0].param_groups for p in group["params"]}
    assert {id(p) for p in cli.model.parameters()} == optimized
