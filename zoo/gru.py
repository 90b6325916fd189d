"""GRU classifiers of token sequences, with norms between the layers or inside the gates.

Sources: Ziaee and Cano, "Batch Layer Normalization", arXiv 2209.08898 (norms between layers); Cooijmans, Ballas,
Laurent, Gülçehre, Courville, "Recurrent Batch Normalization", 2016 (statistics for each time step inside the gates);
Laurent, Pereyra, Brakel, Zhang, Bengio, "Batch Normalized Recurrent Neural Networks", 2016 (one statistic for the
input projections of all steps).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_bln import BatchLayerNorm
from zoo._norms import NORMS, Norm, norm_layer
from zoo._registry import register

__all__ = ["GRUClassifier", "NormGRU", "gru", "gru_recurrent"]


class GRUClassifier(nn.Module):
    """Embedding, GRU layers with a norm after each, the mean over a sequence's steps, a dense layer.

    Reads tokens, or features as they are with ``vocabulary_size=None``.

    Padding never enters a state or a statistic: between the layers there are the valid steps of all sequences only, as
    rows (M, C) of a `PackedSequence`, and the norms' batch statistics are taken over them, one for each feature. B of
    BLN's weights 1/B is then the number of sequences, ``batch_size``, and not that of rows.

    `torch.export` (`zoo.export`) takes it in eval mode, for one T and any N and lengths, which the program does not
    check, where batch statistics are the population's; not with BatchNorm inside the gates.

    Shapes: tokens (N, T), int64, or features (N, T, embedding_size), padded behind; lengths (N,), int64, at least 1,
    or None: all T; output (N, num_classes).

    Args:
        norm: "bln" (default), "bn", "ln", "gn", or a callable that takes the number of features.
        num_classes: Default 2; 1 for a logit; 0 for features (N, hidden_size or twice that).
        recurrent_norm: Norms inside the gates, in place of those between layers: see `NormGRU`. Default False.
        vocabulary_size: Numbers of tokens, 0 being padding; None for features. Default 20,000.
        embedding_size: Features of a step. Default 64.
        hidden_size: Of each layer and direction. Default 64.
        num_layers: Default 2.
        bidirectional: Also read each sequence from its end. Default False.
        dropout: Of embeddings, as whole words and features, and of the pooled features. Default 0.5.
        batch_size: B, the number of sequences in a training batch, where norms are between layers. Default 64.
        max_steps: Time steps with population statistics of their own, where norms are inside. Default 200.

    Raises:
        ValueError: If ``norm`` is not known or lengths do not fit.
    """

    classifier: ClassVar[str] = "fc"

    def __init__(
        self,
        norm: Norm = "bln",
        num_classes: int = 2,
        *,
        recurrent_norm: bool = False,
        vocabulary_size: int | None = 20_000,
        embedding_size: int = 64,
        hidden_size: int = 64,
        num_layers: int = 2,
        bidirectional: bool = False,
        dropout: float = 0.5,
        batch_size: int = 64,
        max_steps: int = 200,
    ) -> None:
        super().__init__()
        self.embedding: nn.Module = nn.Identity()
        if vocabulary_size is not None:
            table = torch.randn(vocabulary_size, embedding_size) * 0.1
            table[0] = 0
            self.embedding = nn.Embedding.from_pretrained(table, freeze=False, padding_idx=0)
        self.dropout = dropout
        self.layers = nn.ModuleList()
        self.norms = nn.ModuleList()
        size = embedding_size
        for _ in range(num_layers):
            if recurrent_norm:
                self.layers.append(NormGRU(size, hidden_size, norm, bidirectional=bidirectional, max_steps=max_steps))
            else:
                self.layers.append(nn.GRU(size, hidden_size, batch_first=True, bidirectional=bidirectional))
            size = hidden_size * (2 if bidirectional else 1)
            if not recurrent_norm:
                self.norms.append(norm_layer(norm, size, rows=True, batch_size=batch_size))
        self.fc: nn.Module = nn.Linear(size, num_classes) if num_classes else nn.Identity()

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Class scores."""
        if lengths is None:
            lengths = torch.full(tokens.shape[:1], tokens.shape[1], device=tokens.device)
        if torch.compiler.is_exporting():
            return self._forward_padded(tokens, lengths)
        dims = 3 if isinstance(self.embedding, nn.Identity) else 2
        if (
            tokens.ndim != dims
            or lengths.shape != tokens.shape[:1]
            or not 1 <= int(lengths.min()) <= int(lengths.max()) <= tokens.shape[1]
        ):
            wanted = "features (N, T, C)" if dims == 3 else "tokens (N, T)"
            raise ValueError(
                f"The input must be {wanted} and lengths (N,) from 1 to T, got shapes {tuple(tokens.shape)} and "
                f"{tuple(lengths.shape)} and lengths {lengths.tolist()[:8]}; zoo.text.Tokenizer makes both of a "
                f"list of texts."
            )
        x = self._embed(tokens)
        sequence = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        for index, layer in enumerate(self.layers):
            sequence = _states(layer, sequence)
            if self.norms:
                rows = self.norms[index](sequence.data)
                sequence = PackedSequence(rows, *sequence[1:])
        states, _ = pad_packed_sequence(sequence, batch_first=True)
        features = states.sum(1) / lengths.to(states.device, states.dtype).unsqueeze(1)
        return self.fc(F.dropout(features, self.dropout, self.training))

    def _forward_padded(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """As `forward` in eval mode, all sequences to the end: an exported program has no packed sequences.

        What comes behind a sequence's end stays out of its states and of the mean, and out of statistics because none
        are taken over rows.
        """
        if self.training:
            raise ValueError("A GRU classifier must be in eval mode to be exported; call model.eval() first.")
        lengths = lengths.to(tokens.device)
        x = self.embedding(tokens)
        for index, layer in enumerate(self.layers):
            x = _padded_states(layer, x, lengths)
            if self.norms:
                _check_of_population(self.norms[index])
                x = self.norms[index](x.flatten(0, 1)).unflatten(0, x.shape[:2])
        behind = torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)
        features = x.masked_fill(behind.unsqueeze(2), 0).sum(1) / lengths.to(x.dtype).unsqueeze(1)
        return self.fc(features)

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if not self.training or not self.dropout:
            return x
        # Whole words, since a sentiment must not hang on one, and whole features, the same in all steps.
        words = F.dropout(x.new_ones(x.shape[0], x.shape[1], 1), self.dropout / 2)
        features = F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.dropout)
        return x * words * features


def _states(layer: nn.Module, sequence: PackedSequence) -> PackedSequence:
    """All states of a layer."""
    if not isinstance(layer, nn.GRU) or layer.bidirectional:
        return layer(sequence)[0]
    # On a CPU torch takes several times as long for a packed sequence as for a padded one, and what stands behind a
    # sequence's end cannot change the states before it.
    padded, lengths = pad_packed_sequence(sequence, batch_first=True)
    return pack_padded_sequence(layer(padded)[0], lengths, batch_first=True, enforce_sorted=False)


def _padded_states(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    """All states of a layer, (N, T, C), with anything at all behind a sequence's end."""
    if not isinstance(layer, nn.GRU):
        return layer.padded(x, lengths)  # type: ignore[operator]
    states = layer(x)[0]
    if not layer.bidirectional:
        return states
    # The way back must begin at a sequence's last step: with its padding in front that is where all of them end.
    size, steps = layer.hidden_size, torch.arange(x.shape[1], device=x.device)
    ends_aligned = _at_steps(x, (steps + lengths.unsqueeze(1)) % x.shape[1])
    backward = _at_steps(layer(ends_aligned)[0][..., size:], (steps - lengths.unsqueeze(1)) % x.shape[1])
    return torch.cat([states[..., :size], backward], 2)


def _at_steps(x: Tensor, index: Tensor) -> Tensor:
    """x[n, index[n, t]], for x (N, T, C) and index (N, T)."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _check_of_population(norm: nn.Module) -> None:
    """Raise ValueError if a norm takes batch statistics at inference, which padding would enter."""
    if isinstance(norm, BatchLayerNorm):
        known = norm.has_population and norm.flags.batch_moving_mean and norm.flags.batch_moving_var
        remedy = "train the model, or call set_flags_(model, 'TTFF')"
    else:
        known = not isinstance(norm, _BatchNorm) or norm.running_mean is not None
        remedy = "make the layer with track_running_stats=True"
    if not known:
        raise ValueError(
            f"A GRU classifier is exported with padded sequences, so batch statistics must be those of the population, "
            f"got {norm}, which takes them from the mini-batch; {remedy}."
        )


class NormGRU(nn.Module):
    """One GRU layer with norms on both terms of its gates, for packed sequences.

        r, z = sigmoid(N_x(W_x x_t) + N_h,t(W_h h_{t-1}))      (their two thirds)
        n    = tanh(N_x(W_x x_t) + r * N_h,t(W_h h_{t-1}))     (the last third)
        h_t  = (1 - z) * n + z * h_{t-1}

    N_x runs once, over the valid steps of all sequences; its batch statistics are over all of them. N_h,t has
    statistics of its own for each time step t, over the sequences that are so long, and shares weight and bias with
    all steps. Beyond ``max_steps``, and at inference beyond the steps of the training sequences, the last one's are
    used. The norms' biases are the gates' biases. BLN's B is the
    number of sequences in N_h,t; in N_x it is the number of valid steps.

    Shapes: `PackedSequence` of (M, input_size) to one of (M, hidden_size), twice that for both directions.

    Args:
        input_size: Features of an input step.
        hidden_size: Features of a state.
        norm: "bln" (default), "bn", "ln", "gn", or a callable that takes the number of features.
        bidirectional: Also read each sequence from its end; both directions have weights of their own. Default False.
        max_steps: Default 200.

    Source: Cooijmans et al., "Recurrent Batch Normalization", 2016, section 3, for the LSTM, weights starting at 0.1;
    Laurent et al. 2016 for N_x.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        norm: Norm = "bln",
        *,
        bidirectional: bool = False,
        max_steps: int = 200,
    ) -> None:
        super().__init__()
        directions = 2 if bidirectional else 1
        self.cells = nn.ModuleList(_NormCell(input_size, hidden_size, norm, max_steps) for _ in range(directions))

    def forward(self, sequence: PackedSequence) -> tuple[PackedSequence, None]:
        """All states."""
        sizes = [int(size) for size in sequence.batch_sizes]
        rows = self.cells[0](sequence.data, sizes)
        if len(self.cells) == 2:
            reverse = _reversed_rows(sequence.batch_sizes).to(rows.device)
            # Reversing twice is the identity, so the same index leads back.
            rows = torch.cat([rows, self.cells[1](sequence.data[reverse], sizes)[reverse]], 1)
        return PackedSequence(rows, *sequence[1:]), None

    def padded(self, x: Tensor, lengths: Tensor) -> Tensor:
        """All states (N, T, hidden_size) in eval mode, for sequences (N, T, input_size), padded behind."""
        cells: list[Any] = list(self.cells)
        states = cells[0].padded(x)
        if len(cells) == 1:
            return states
        steps, ends = torch.arange(x.shape[1], device=x.device), lengths.unsqueeze(1)
        reverse = torch.where(steps < ends, ends - 1 - steps, steps)
        return torch.cat([states, _at_steps(cells[1].padded(_at_steps(x, reverse)), reverse)], 2)


class _NormCell(nn.Module):
    """One direction of `NormGRU`: rows (M, input_size), ordered by step, to rows (M, hidden_size)."""

    def __init__(self, input_size: int, hidden_size: int, norm: Norm, max_steps: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.input_weight = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.hidden_weight = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.input_norm = norm_layer(norm, 3 * hidden_size, rows=True)
        self.weight = nn.Parameter(torch.full((3 * hidden_size,), 0.1))
        self.bias = nn.Parameter(torch.zeros(3 * hidden_size))
        # Statistics for each step; weight and bias are the same in all of them, so they are the cell's.
        self.step_norms = nn.ModuleList(_unit_norm(norm, 3 * hidden_size) for _ in range(max_steps))
        nn.init.xavier_uniform_(self.input_weight)
        for gate in self.hidden_weight.detach().split(hidden_size):
            nn.init.orthogonal_(gate)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        norms = self._norms_of_steps(len(sizes))
        # Autocast is for the products: the state is kept in the parameters' precision.
        dtype = self.bias.dtype
        inputs = self.input_norm(F.linear(x, self.input_weight)).to(dtype)
        h = x.new_zeros(sizes[0], self.hidden_size, dtype=dtype)
        states = []
        for step, from_input in enumerate(inputs.split(sizes)):
            h = h[: sizes[step]]  # the longest sequences come first
            normed = norms[step](F.linear(h, self.hidden_weight)).to(dtype)
            from_state = torch.addcmul(self.bias, normed, self.weight)
            input_gates, input_new = from_input.split([2 * self.hidden_size, self.hidden_size], 1)
            state_gates, state_new = from_state.split([2 * self.hidden_size, self.hidden_size], 1)
            r, z = torch.sigmoid(input_gates + state_gates).chunk(2, 1)
            h = torch.lerp(torch.tanh(torch.addcmul(input_new, r, state_new)), h, z)
            states.append(h)
        return torch.cat(states)

    def padded(self, x: Tensor) -> Tensor:
        """As `forward` for sequences (N, T, input_size) of one length, to (N, T, hidden_size)."""
        n, steps = x.shape[:2]
        for norm in (self.input_norm, *self._norms_of_steps(steps)):
            _check_of_population(norm)
        rows = self(x.transpose(0, 1).flatten(0, 1), [n] * steps)
        return rows.unflatten(0, (steps, n)).transpose(0, 1)

    def _norms_of_steps(self, steps: int) -> list[nn.Module]:
        norms = list(self.step_norms)
        if not self.training:
            norms = [norm for norm in norms if _was_trained(norm)] or norms
        elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            # Another process may have longer sequences: DDP needs the same buffers in all of them.
            for norm in norms[steps:]:
                norm(self.hidden_weight.new_empty(0, 3 * self.hidden_size))
        return norms[:steps] + norms[-1:] * (steps - len(norms))


def _was_trained(norm: nn.Module) -> bool:
    """Whether a norm has statistics of its own for inference, or needs none."""
    if isinstance(norm, BatchLayerNorm):
        return norm.has_population
    if not isinstance(norm, nn.BatchNorm1d) or norm.num_batches_tracked is None:
        return True
    if torch.compiler.is_exporting():
        raise ValueError(
            "A model must not depend on values of its buffers to be exported, got BatchNorm inside the gates, whose "
            "counts tell which steps were trained; use norm='bln', or norms between the layers."
        )
    return bool(norm.num_batches_tracked)


def _unit_norm(norm: Norm, features: int) -> nn.Module:
    """A norm for rows with output of unit scale and no parameters."""
    layer = norm_layer(norm, features, rows=True)
    if isinstance(layer, BatchLayerNorm):
        plain = BatchLayerNorm(features, eps=layer.eps, affine=False)
        plain.gain = math.sqrt(features)
        return plain
    if isinstance(layer, nn.BatchNorm1d):
        return _StepBatchNorm1d(features, affine=False)
    if isinstance(layer, nn.LayerNorm):
        return nn.LayerNorm(features, elementwise_affine=False)
    if isinstance(layer, nn.GroupNorm):
        return nn.GroupNorm(layer.num_groups, features, affine=False)
    return layer


class _StepBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` that takes the population's statistics for a single row, which has no variance."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and len(input) == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps)
        return super().forward(input)


def _reversed_rows(batch_sizes: Tensor) -> Tensor:
    """For each row of a packed sequence the row of the same sequence that is as far from its end."""
    starts = F.pad(batch_sizes.cumsum(0), (1, 0))[:-1]
    number = int(batch_sizes[0])
    lengths = (batch_sizes.unsqueeze(1) > torch.arange(number)).sum(0)
    index = [starts[lengths[:size] - 1 - step] + torch.arange(size) for step, size in enumerate(batch_sizes.tolist())]
    return torch.cat(index)


def gru(norm: Norm = "bln", num_classes: int = 2, **kwargs: object) -> GRUClassifier:
    """`GRUClassifier` with a norm after each layer, as in the paper."""
    return GRUClassifier(norm, num_classes, **kwargs)  # type: ignore[arg-type]


def gru_recurrent(norm: Norm = "bln", num_classes: int = 2, **kwargs: object) -> GRUClassifier:
    """`GRUClassifier` with norms inside the gates, statistics for each time step."""
    return GRUClassifier(norm, num_classes, recurrent_norm=True, **kwargs)  # type: ignore[arg-type]


for _builder in (gru, gru_recurrent):
    for _norm in NORMS:
        register(f"{_builder.__name__}_{_norm}", partial(_builder, norm=_norm))
