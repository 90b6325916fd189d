"""GRU classifiers: against torch's GRU, padding, time steps, directions."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from conftest import two_processes
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import zoo
from lightning_bln import BatchLayerNorm, batch_layer_norm
from zoo.gru import GRUClassifier, NormGRU, _reversed_rows

LENGTHS = torch.tensor([3, 7, 1, 7, 5])


def tokens(n: int = 5, steps: int = 7) -> Tensor:
    drawn = torch.randint(1, 50, (n, steps), generator=torch.Generator().manual_seed(0))
    return drawn.masked_fill(torch.arange(steps) >= LENGTHS[:n, None], 0)


def classifier(norm: str = "bln", **kwargs: object) -> GRUClassifier:
    torch.manual_seed(0)
    sizes = {"vocabulary_size": 50, "embedding_size": 6, "hidden_size": 8, "max_steps": 7, "batch_size": 5}
    return GRUClassifier(norm, 3, **{**sizes, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("norm", "recurrent", "bidirectional"),
    list(itertools.product(("bln", "bn", "ln", "gn"), (False, True), (False, True))),
)
def test_padding_changes_nothing(norm: str, recurrent: bool, bidirectional: bool) -> None:
    model = classifier(norm, recurrent_norm=recurrent, bidirectional=bidirectional, dropout=0.0)
    x = tokens()
    more = torch.cat([x, torch.zeros(5, 4, dtype=torch.int64)], 1)
    junk = more.masked_fill((more == 0), 9)  # and what the padding is does not matter either
    for mode in (True, False):
        model.train(mode)
        expected = model(x, LENGTHS)
        for padded in (more, junk):
            torch.testing.assert_close(model(padded, LENGTHS), expected)


@pytest.mark.parametrize("norm", ["bln", "bn"])
def test_statistics_between_layers_are_over_the_valid_steps(norm: str) -> None:
    model = classifier(norm, num_layers=1, dropout=0.0)
    model(tokens(), LENGTHS)
    packed = pack_padded_sequence(model.embedding(tokens()), LENGTHS, batch_first=True, enforce_sorted=False)
    rows = model.layers[0](packed)[0].data
    layer = model.norms[0]
    mean = layer.running_batch_mean if norm == "bln" else layer.running_mean / layer.momentum
    torch.testing.assert_close(mean, rows.mean(0))
    if norm == "bln":
        assert int(layer.nominal_batch_size) == 5  # sequences, not steps
        expected = batch_layer_norm(rows, layer.weight, layer.bias, batch_size=5, eps=layer.eps)
        torch.testing.assert_close(layer(rows), expected)


def test_norm_gru_without_norms_is_a_gru() -> None:
    torch.manual_seed(0)
    ours, theirs = NormGRU(6, 8, nn.Identity, bidirectional=True), nn.GRU(6, 8, bidirectional=True)
    with torch.no_grad():
        for cell, end in zip(ours.cells, ("", "_reverse"), strict=True):
            getattr(theirs, f"weight_ih_l0{end}").copy_(cell.input_weight)
            getattr(theirs, f"weight_hh_l0{end}").copy_(cell.hidden_weight)
            getattr(theirs, f"bias_ih_l0{end}").zero_()
            getattr(theirs, f"bias_hh_l0{end}").copy_(cell.bias.uniform_())
            cell.weight.fill_(1)
    packed = pack_padded_sequence(torch.randn(5, 7, 6), LENGTHS, batch_first=True, enforce_sorted=False)
    (a, _), (b, _) = ours(packed), theirs(packed)
    torch.testing.assert_close(a.data, b.data)
    assert torch.equal(pad_packed_sequence(a, batch_first=True)[1], LENGTHS)


def test_each_time_step_has_statistics_of_its_own() -> None:
    model = classifier(recurrent_norm=True, num_layers=1, max_steps=5, dropout=0.0)
    model(tokens(), LENGTHS)
    cell = model.layers[0].cells[0]
    counts = [int(layer.num_samples) for layer in cell.step_norms]
    assert counts == [5, 4, 4, 3, 3 + 2 + 2]  # sequences that long; the last one also takes steps 6 and 7
    assert (cell.step_norms[0].running_batch_mean == 0).all()  # the first state is zero
    means = [layer.running_batch_mean for layer in cell.step_norms[1:4]]
    assert not any(torch.allclose(a, b) for a, b in itertools.combinations(means, 2))
    assert sum(isinstance(m, BatchLayerNorm) for m in model.modules()) == 6
    names = [name for name, _ in cell.named_parameters()]
    assert names == ["input_weight", "hidden_weight", "weight", "bias", "input_norm.weight", "input_norm.bias"]


@pytest.mark.parametrize("norm", ["bln", "bn"])
def test_beyond_the_training_sequences_the_last_steps_statistics_hold(norm: str) -> None:
    model = classifier(norm, recurrent_norm=True, num_layers=1, max_steps=12, dropout=0.0)
    short = tokens()[:, :4]
    for _ in range(2):
        model(short, LENGTHS.clamp(max=4))
    norms = model.layers[0].cells[0].step_norms
    seen = [
        norm.running_batch_mean.numel() > 0 if norm_is_bln(norm) else norm.num_batches_tracked > 0 for norm in norms
    ]
    assert sum(seen) == 4
    model.eval()
    together = model(tokens(), LENGTHS)
    alone = torch.cat([model(tokens()[i : i + 1], LENGTHS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def norm_is_bln(norm: nn.Module) -> bool:
    return isinstance(norm, BatchLayerNorm)


def lengths_that_differ_by_process(rank: int) -> list[float]:
    model = torch.nn.parallel.DistributedDataParallel(classifier(recurrent_norm=True, dropout=0.0))
    lengths = LENGTHS.clamp(max=7 if rank == 0 else 3)
    for _ in range(2):
        model(tokens(), lengths).sum().backward()
    return [norm.running_batch_mean.numel() for norm in model.module.layers[0].cells[0].step_norms]


def test_processes_may_have_sequences_of_other_lengths(tmp_path: Path) -> None:
    assert two_processes(lengths_that_differ_by_process, tmp_path) == [[24] * 7, [24] * 7]


def test_recurrent_step_is_the_formula() -> None:
    model = classifier(recurrent_norm=True, num_layers=1, dropout=0.0)
    cell = model.layers[0].cells[0]
    x = torch.randn(4 + 4, 6)
    states = cell(x, [4, 4])
    inputs = cell.input_norm(x @ cell.input_weight.T)
    h = torch.zeros(4, 8)
    for step in range(2):
        plain = batch_layer_norm(h @ cell.hidden_weight.T, eps=1e-5) * 24**0.5
        gh = cell.weight * plain + cell.bias
        gx = inputs[4 * step : 4 * step + 4]
        r, z = torch.sigmoid(gx[:, :8] + gh[:, :8]), torch.sigmoid(gx[:, 8:16] + gh[:, 8:16])
        h = (1 - z) * torch.tanh(gx[:, 16:] + r * gh[:, 16:]) + z * h
        torch.testing.assert_close(states[4 * step : 4 * step + 4], h)


def test_reversed_rows() -> None:
    packed = pack_padded_sequence(torch.arange(10).reshape(2, 5), torch.tensor([5, 3]), batch_first=True)
    assert packed.data.tolist() == [0, 5, 1, 6, 2, 7, 3, 4]
    index = _reversed_rows(packed.batch_sizes)
    assert packed.data[index].tolist() == [4, 7, 3, 6, 2, 5, 1, 0]


def test_dropout_takes_whole_words_and_features() -> None:
    model = classifier(dropout=0.5)
    x = model._embed(tokens())
    dropped = x == 0
    valid = tokens() != 0
    per_word = dropped.all(2)[valid]
    assert per_word.any()
    assert not per_word.all()
    kept = ~dropped.all(2) & valid
    for n in range(5):
        pattern = dropped[n][kept[n]]
        assert (pattern == pattern[:1]).all() if len(pattern) else True


def test_features_instead_of_tokens_and_no_classes() -> None:
    model = zoo.create_model("gru_bln", vocabulary_size=None, embedding_size=6, num_classes=0, hidden_size=8)
    assert model(torch.randn(4, 9, 6)).shape == (4, 8)


def test_bad_input() -> None:
    with pytest.raises(
        ValueError, match=r"be tokens \(N, T\) and lengths \(N,\) from 1 to T, got shapes \(5, 7, 1\) and \(5,\)"
    ):
        classifier()(tokens().unsqueeze(2), LENGTHS)
    for wrong in (LENGTHS + 1, LENGTHS - 1):
        with pytest.raises(ValueError, match=r"lengths \(N,\) from 1 to T, got shapes .* and lengths \["):
            classifier()(tokens(), wrong)
    with pytest.raises(ValueError, match="norm must be one of 'bln'"):
        classifier("batch")


@pytest.mark.parametrize("recurrent", [False, True])
def test_under_autocast(recurrent: bool) -> None:
    model = classifier(recurrent_norm=recurrent, dropout=0.0)
    expected = model(tokens(), LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        given = model(tokens(), LENGTHS)
    given.sum().backward()
    torch.testing.assert_close(given.float(), expected, atol=0.05, rtol=0.05)
