"""score_flags on plain modules: one pass gives what a separate evaluation of each setting gives."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from lightning_bln import BatchLayerNorm, StatFlags, set_flags_
from lightning_bln.surgery import bln_layers
from lightning_bln.tuning import ScoreTable, score_flags
from lightning_bln.tuning.sharing import InputChangedError
from lightning_bln.tuning.space import parse_setting
from lightning_bln.variants import BatchLayerNormAct
from tests.tuning.networks import PreNorm, cnn, images, with_statistics

ACCURACY = MulticlassAccuracy(4, average="micro")


def separately(
    model: nn.Module, loader: DataLoader, settings=None, loss=F.cross_entropy
) -> dict[str, tuple[float, float]]:
    """Loss and accuracy of each setting, by a plain loop over all the data for each."""
    results = {}
    before = {name: layer.flags for name, layer in bln_layers(model).items()}
    for setting in settings or StatFlags.all():
        set_flags_(model, setting)
        total = hits = samples = 0
        with torch.no_grad():
            for x, target in loader:
                output = model(x.clone())
                total += loss(output, target).item() * len(x)
                hits += (output.argmax(1) == target).sum().item()
                samples += len(x)
        code = setting.code if isinstance(setting, StatFlags) else ",".join(f"{n}={f.code}" for n, f in setting.items())
        results[code] = total / samples, hits / samples
    set_flags_(model, before)
    return results


def assert_same(table: ScoreTable, expected: dict[str, tuple[float, float]]) -> None:
    assert {score.code for score in table} == set(expected)
    for score in table:
        loss, accuracy = expected[score.code]
        assert score.loss == pytest.approx(loss, rel=1e-6, abs=1e-6)
        if score.metrics:
            assert score.metrics["MulticlassAccuracy"] == pytest.approx(accuracy, abs=1e-6)


@pytest.mark.parametrize("batch_size", [1, 8, 50])
@pytest.mark.parametrize("statistics", ["per_position", "per_channel"])
def test_all_settings_equal_separate_passes(batch_size: int, statistics: str) -> None:
    model, loader = cnn(statistics=statistics), images(batch_size=batch_size)
    table = score_flags(model, loader, F.cross_entropy, ACCURACY)
    assert_same(table, separately(model, loader))
    assert len({round(score.loss, 9) for score in table}) > 8  # the settings do differ


@pytest.mark.parametrize("together", [0, 1 << 30], ids=["one by one", "together"])
@pytest.mark.parametrize(
    "build",
    [
        cnn,
        lambda: with_statistics(PreNorm()),
        lambda: with_statistics(PreNorm(inplace=True)),
        lambda: cnn().to(memory_format=torch.channels_last),
        lambda: cnn(affine=False),
    ],
    ids=["cnn", "pre-norm", "in place", "channels_last", "no affine"],
)
def test_one_by_one_and_together(build, together: int, monkeypatch) -> None:
    monkeypatch.setattr("lightning_bln.tuning.sharing.TOGETHER_BYTES", together)
    model, loader = build(), images()
    assert_same(score_flags(model, loader, F.cross_entropy, ACCURACY), separately(model, loader))


def counted(model: nn.Module) -> list[int]:
    """The numbers of samples that come out of the model, call by call."""
    samples: list[int] = []
    model.register_forward_hook(lambda module, args, output: samples.append(len(output)))
    return samples


def test_small_batches_run_together() -> None:
    model = cnn()
    calls = counted(model)
    score_flags(model, images(samples=52), F.cross_entropy)
    # The first batch one by one; then in one call, which is compared with one by one for each new size.
    assert calls == 16 * [8] + [128] + 16 * [8] + 4 * [128] + [64] + 16 * [4]


def test_large_batches_run_one_by_one(monkeypatch) -> None:
    monkeypatch.setattr("lightning_bln.tuning.sharing.TOGETHER_BYTES", 5 * 8 * 4 * 16 * 4)  # five settings' samples
    model = cnn()
    calls = counted(model)
    score_flags(model, images(samples=24), F.cross_entropy)
    assert calls == 16 * [8] + 4 * [32] + 16 * [8] + 4 * [32]
    calls.clear()
    score_flags(model, images(samples=24, batch_size=12), F.cross_entropy)
    assert set(calls) == {12}


class Mixes(nn.Module):
    """Samples act on each other: each is seen beside the mean of its mini-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()

    def forward(self, x: Tensor) -> Tensor:
        y = self.net(x)
        return y - y.mean(0)


class Fixed(nn.Module):
    """Written for the batch size at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn()

    def forward(self, x: Tensor) -> Tensor:
        return self.net[6:](self.net[:6](x).reshape(len(x), -1))


@pytest.mark.parametrize("kind", [Mixes, Fixed, lambda: with_statistics(PreNorm())], ids=["mixes", "fixed", "pre-norm"])
def test_models_whose_settings_cannot_run_together(kind, caplog) -> None:
    caplog.set_level("INFO", logger="lightning_bln.tuning.sharing")
    model, loader = kind().eval(), images(samples=16)
    expected = separately(model, loader)
    calls = counted(model)
    assert_same(score_flags(model, loader, F.cross_entropy, ACCURACY), expected)
    assert "settings run one by one" in caplog.text
    assert calls.count(8) >= 2 * 16


def test_a_metric_may_write_into_outputs(monkeypatch) -> None:
    class Writes(MulticlassAccuracy):
        def update(self, preds: Tensor, target: Tensor) -> None:
            super().update(preds.mul_(2), target)

    monkeypatch.setattr("lightning_bln.tuning.scoring.ONE_LOSS_BYTES", 0)
    model, loader = cnn(), images()
    table = score_flags(model, loader, F.cross_entropy, {"MulticlassAccuracy": Writes(4, average="micro")})
    assert_same(table, separately(model, loader))


def test_python_code_that_depends_on_values() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            return y if y.sum() > 0 else 2 * y

    model, loader = Branching().eval(), images()
    assert_same(score_flags(model, loader, F.cross_entropy), separately(model, loader))


class Operations(TorchDispatchMode):
    """Counts the operations that are really computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func.overloadpacket)
        # Under inference_mode they arrive as what they were called as.
        self.counts[{"aten.conv2d": "aten.convolution", "aten.linear": "aten.addmm"}.get(name, name)] += 1
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module, cells: list, monkeypatch, batches: int = 3) -> Counter[str]:
    """What a pass computes for each batch after the first, setting by setting."""
    monkeypatch.setattr("lightning_bln.tuning.sharing.TOGETHER_BYTES", 0)
    counts = []
    for count in (1, batches + 1):
        with Operations() as operations:
            score_flags(model, images(samples=8 * 6), F.cross_entropy, cells=cells, limit_batches=count)
        counts.append(operations.counts)
    found = Counter({name: count / batches for name, count in (counts[1] - counts[0]).items()})
    # With own statistics and without.
    found["norms"] = found["lightning_bln.batch_layer_norm"] + found["lightning_bln.infer"]
    return found


def test_what_comes_before_the_first_layer_is_computed_once(monkeypatch) -> None:
    counts = operations(cnn(), list(StatFlags.all()), monkeypatch)
    assert counts["aten.convolution"] == 1 + 16
    assert counts["aten.tanh"] == 1
    assert counts["aten.addmm"] == 2 * 16
    # and once for the mini-batch's statistics that 12 settings take in the first layer
    assert counts["norms"] == 3 * 16 + 1


class Branches(nn.Module):
    """Two layers of other kinds on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.a = BatchLayerNorm(4)
        self.b = BatchLayerNorm(4, statistics="per_channel")
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(torch.cat([self.a(x).tanh().mean((2, 3)), self.b(x).tanh().amax((2, 3))], 1))


def test_layers_on_one_input_have_statistics_of_their_own() -> None:
    model = with_statistics(Branches())
    cells = [StatFlags(False, False, a, b) for a in (True, False) for b in (True, False)]
    assert_same(score_flags(model, images(), F.cross_entropy, cells=cells), separately(model, images(), list(cells)))


def test_a_layer_that_does_more_than_normalize_still_does() -> None:
    torch.manual_seed(0)
    layer = BatchLayerNormAct(4, act=nn.ReLU())
    model = with_statistics(nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Flatten(), nn.Linear(64, 4)))
    assert_same(score_flags(model, images(), F.cross_entropy), separately(model, images()))


def test_a_loader_may_fill_the_same_memory_again() -> None:
    """Through NumPy, so that no version counter of the tensor tells."""
    torch.manual_seed(0)
    model = with_statistics(nn.Sequential(BatchLayerNorm(3), nn.Flatten(), nn.Linear(108, 4)))
    batches = [batch for batch in images() if len(batch[0]) == 8]
    memory = batches[0][0].numpy().copy()
    shared = torch.from_numpy(memory)

    class Refilling:
        def __len__(self) -> int:
            return len(batches)

        def __iter__(self):
            for x, target in batches:
                memory[:] = x.numpy()
                yield shared, target

    expected = separately(model, batches)
    assert_same(score_flags(model, Refilling(), F.cross_entropy), expected)


def test_settings_that_agree_so_far_share_work(monkeypatch) -> None:
    model = cnn()
    first, second, third = bln_layers(model)

    def setting(*codes: str) -> dict[str, str]:
        return dict(zip((first, second, third), codes, strict=True))

    cells = [setting("TTFF", "TTFF", last) for last in ("TTFF", "FFFF", "TTTT")]
    counts = operations(model, cells, monkeypatch)
    assert counts["aten.convolution"] == 2
    assert counts["norms"] == 1 + 1 + 3
    assert counts["aten.addmm"] == 1 + 3

    # A tree: in whatever order they are given, two share the second layer and all three the first.
    cells = [setting("TTFF", "FFFF", "TTFF"), setting("TTFF", "TTFF", "FFFF"), setting("TTFF", "FFFF", "FFFF")]
    counts = operations(model, cells, monkeypatch)
    assert counts["aten.convolution"] == 2
    assert counts["norms"] == 1 + 2 + 3

    expected = separately(model, images(), [parse_setting(cell) for cell in cells])
    assert_same(score_flags(model, images(), F.cross_entropy, cells=cells), expected)


def test_flags_that_make_no_difference_cost_nothing(monkeypatch) -> None:
    fresh = cnn()
    for layer in bln_layers(fresh).values():
        layer.reset_statistics()  # without a population every flag means the mini-batch
    counts = operations(fresh, list(StatFlags.all()), monkeypatch)
    assert counts["aten.convolution"] == 2
    assert counts["norms"] == 3
    assert len({score.loss for score in score_flags(fresh, images(), F.cross_entropy)}) == 1


def test_in_place_writes_are_noticed() -> None:

    class Writes(nn.Module):
        """Writes into its input and into what comes before the first layer, after that layer."""

        def __init__(self, start: int) -> None:
            super().__init__()
            self.net, self.calls, self.start = cnn(), 0, start

        def forward(self, x: Tensor) -> Tensor:
            h = self.net[:2](x)
            y = self.net[2:](h)
            self.calls += 1
            if self.calls > self.start:
                h.zero_()
                x.add_(1)
            return y

    model, loader = Writes(0).eval(), images()
    assert_same(score_flags(model, [[x.clone(), t] for x, t in loader], F.cross_entropy), separately(model, loader))
    for start in (18, 40):
        with pytest.raises(InputChangedError, match="must leave its input as it is, got one that wrote into it"):
            score_flags(Writes(start).eval(), [[x.clone(), t] for x, t in loader], F.cross_entropy)


def test_batchnorm_statistics_inside_no_grad_and_half_precision_blocks() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                h = self.net[:4](x)
            return self.net[4:](h.float())

    model, loader = Blocks().eval(), images()
    assert_same(score_flags(model, loader, F.cross_entropy, ACCURACY), separately(model, loader))


@pytest.mark.parametrize("whole", [True, False], ids=["compiled model", "compiled layer"])
def test_compiled_models_are_run_eagerly(whole: bool) -> None:
    model, loader = cnn(), images()
    expected = separately(model, loader)
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model[2].compile(backend="eager")
    assert_same(score_flags(model, loader, F.cross_entropy), expected)


def test_recurrent_networks() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.GRU(18, 8, batch_first=True)
            self.norm = BatchLayerNorm(8, feature_dim=-1)
            self.second = nn.LSTM(8, 8, batch_first=True)
            self.last = BatchLayerNorm(8)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            y, _ = self.first(x.flatten(2).transpose(1, 2).reshape(len(x), 6, 18))
            y, (h, _) = self.second(self.norm(y))
            return self.head(self.last(h[-1]))

    model, loader = with_statistics(Recurrent()), images()
    assert_same(score_flags(model, loader, F.cross_entropy, ACCURACY), separately(model, loader))


def test_the_model_is_left_as_it_was() -> None:
    model = cnn()
    set_flags_(model, {"2": "FTFT"})
    model.train()
    model[5].eval()
    before = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    modes = {name: module.training for name, module in model.named_modules()}
    score_flags(model, images(), F.cross_entropy)

    def broken(output: Tensor, target: Tensor) -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        score_flags(model, images(), broken)
    assert {name: layer.flags.code for name, layer in bln_layers(model).items()} == {
        "2": "FTFT",
        "5": "TTFF",
        "8": "TTFF",
    }
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert not any("forward" in vars(layer) for layer in bln_layers(model).values())


# ------------------------------------------------------------------------------ losses and metrics


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        partial(F.cross_entropy, label_smoothing=0.1),
        lambda output, target: F.cross_entropy(output, target),
        lambda output, target: F.cross_entropy(output, target, reduction="none"),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0])),
        nn.CrossEntropyLoss(ignore_index=1),
    ],
    ids=["module", "partial", "function of a batch", "a value a sample", "class weights", "ignored targets"],
)
def test_the_loss_is_the_mean_over_samples_of_what_each_batch_gives(loss) -> None:
    model, loader = cnn(), images()
    expected = separately(model, loader, loss=lambda output, target: loss(output, target).mean())
    assert_same(score_flags(model, loader, loss), expected)


def test_intervals_come_from_losses_paired_by_batch() -> None:
    model, loader = cnn(), images(samples=100, batch_size=5)
    table = score_flags(model, loader, F.cross_entropy)
    best, other = table.best, table[-1]
    assert len(best.units) == 20
    assert [n for n, _ in best.units] == [5] * 20
    difference, low, high = table.compared(other)
    assert difference == pytest.approx(other.loss - best.loss, abs=1e-9)
    assert low < difference < high
    # Few batches: the samples are the units, so that there is an interval at all.
    few = score_flags(model, images(samples=50, batch_size=25), F.cross_entropy)
    assert [n for n, _ in few.best.units] == [1] * 50
    assert few.best.loss == pytest.approx(sum(total for _, total in few.best.units) / 50)


def test_metrics_of_every_form() -> None:
    model, loader = cnn(), images()
    collection = MetricCollection({"top1": MulticlassAccuracy(4, average="micro"), "cm": MulticlassConfusionMatrix(4)})
    table = score_flags(model, loader, F.cross_entropy, collection)
    expected = separately(model, loader)
    for score in table:
        assert score.metrics["top1"] == pytest.approx(expected[score.code][1], abs=1e-6)
        assert sum(score.metrics[f"cm_{i}"] for i in range(16)) == 50
    by_name = score_flags(model, loader, F.cross_entropy, {"acc": ACCURACY}, monitor="acc", mode="max")
    assert by_name.best.metrics["acc"] == pytest.approx(max(accuracy for _, accuracy in expected.values()))
    assert ACCURACY.update_called is False  # the user's own metric is not touched


# ----------------------------------------------------------------------------------- what goes wrong


def test_a_setting_that_raises_is_kept_apart() -> None:
    class Raises(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            if self.net[2].flags.code == "FTFT":
                raise FloatingPointError("overflow\nin the last layer")
            return y

    model, loader = Raises().eval(), images()
    with pytest.raises(FloatingPointError, match="overflow"):
        score_flags(model, loader, F.cross_entropy)
    table = score_flags(model, loader, F.cross_entropy, errors="keep")
    failed = [score for score in table if not score.complete]
    assert [(score.code, score.error) for score in failed] == [("FTFT", "FloatingPointError: overflow")]
    assert math.isnan(failed[0].loss)
    expected = separately(model.net, loader)
    del expected["FTFT"]
    assert_same(ScoreTable([score for score in table if score.complete]), expected)
    assert table[-1] is failed[0]


def test_a_setting_that_raises_late_is_kept_apart() -> None:
    class Late(nn.Module):
        """Fails for one setting from some batch on, also where several run in one call."""

        def __init__(self, start: int) -> None:
            super().__init__()
            self.net, self.start, self.seen = cnn(), start, 0.0

        def forward(self, x: Tensor) -> Tensor:
            y = self.net(x)
            if x[0, 0, 0, 0] == self.start and (len(y) > len(x) or self.net[2].flags.code == "FTFT"):
                raise FloatingPointError("overflow")
            return y

    loader = list(images(samples=48))
    for batch in (1, 3):  # when sizes are checked, and after that
        model = Late(loader[batch][0][0, 0, 0, 0].item()).eval()
        table = score_flags(model, loader, F.cross_entropy, errors="keep")
        assert [(score.code, score.error) for score in table if score.error] == [
            ("FTFT", "FloatingPointError: overflow")
        ]
        expected = separately(model.net, loader)
        del expected["FTFT"]
        assert_same(ScoreTable([score for score in table if score.complete]), expected)
        with pytest.raises(FloatingPointError, match="overflow"):
            score_flags(model, loader, F.cross_entropy)


def test_dropped_settings() -> None:
    seen = []

    def drop(batch: int, losses: dict[int, tuple[int, float]]) -> list[int]:
        seen.append((batch, sorted(losses)))
        assert all(samples == 8 and total > 0 for samples, total in losses.values())
        return [3] if batch == 1 else []

    table = score_flags(
        cnn(), images(samples=32), F.cross_entropy, cells=["TTTT", "TTFF", "FFFF", "FTFT"], on_batch=drop
    )
    assert seen == [(0, [0, 1, 2, 3]), (1, [0, 1, 2, 3]), (2, [0, 1, 2]), (3, [0, 1, 2])]
    pruned = [score for score in table if score.pruned]
    assert [(score.code, score.samples) for score in pruned] == [("FTFT", 16)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cells": ["TTXF"]}, "four letters T .population. or F"),
        ({"cells": []}, "cells must hold each setting once, at least one, got none"),
        ({"cells": ["TTFF", "ttff"]}, "each setting once, at least one, got TTFF"),
        ({"cells": "TTFF"}, r"write cells=\['TTFF'\]"),
        (
            {"cells": [{"2": "TTFF"}]},
            "must name every BatchLayerNorm of the model once .2, 5, 8., got 2; missing: 5, 8",
        ),
        ({"loss": None}, "needs? a loss|scored by a loss of .output, target. on a data loader, got no loss"),
        ({"errors": "ignore"}, "errors must be 'raise' or 'keep', got 'ignore'"),
        ({"limit_batches": 0}, "limit_batches must be at least 1"),
        ({"monitor": "accuracy"}, "monitor must be 'loss' or one of the metrics MulticlassAccuracy, got 'accuracy'"),
        ({"mode": "best"}, "mode must be 'min' or 'max', got 'best'"),
        ({"confidence": 95}, "confidence lies between 0 and 1, got 95"),
        ({"dataloader": []}, "at least one batch, got a data loader without any"),
        ({"dataloader": [torch.zeros(2, 3, 6, 6)]}, r"batches \(\*inputs, target\) of tensors, got a Tensor"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    model = cnn()
    call = {"dataloader": images(), "loss": F.cross_entropy, "metrics": ACCURACY} | arguments
    with pytest.raises(ValueError, match=message):
        score_flags(model, **call)
    assert not any("forward" in vars(layer) for layer in bln_layers(model).values())


def test_a_model_without_layers() -> None:
    with pytest.raises(ValueError, match=r"got a Sequential without any; train it with BLNSwap\(\) first"):
        score_flags(nn.Sequential(nn.Linear(3, 4)), images(), F.cross_entropy)


def test_arguments_are_checked_before_the_data_is_read() -> None:
    def batches():
        raise AssertionError("the data was read")
        yield

    for arguments in ({"mode": "best"}, {"confidence": 2.0}, {"cells": ["?"]}):
        with pytest.raises(ValueError, match="got"):
            score_flags(cnn(), batches(), F.cross_entropy, **arguments)
