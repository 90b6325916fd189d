"""Batch Layer Normalization for CUDA, in Triton: one launch forward and one launch backward.

A program owns one *tile*: a block of positions, a block of features and a few samples. The work has *phases*, which
every tile goes through: statistics, then normalise; in the backward pass (statistics again where they were not saved,
then) sums, then the input's gradient. A tile's later phase needs what all tiles beside it found in the phase before:
those with the same positions and features (batch statistics) and those with the same samples and positions (feature
statistics). Two mechanisms join the phases within one launch:

- *Tickets and groups.* A program draws the next (phase, tile) from a counter, so whatever it waits for was drawn
  before it, by a program that runs or has finished: waiting cannot deadlock, whatever the order in which the device
  starts programs. Tiles write partial results; the last tile of a group to arrive merges the group's partial results,
  always in the same order, and opens the group. No floating-point atomics: results are the same bits in each run.
- *Waves.* With per-position statistics the positions do not depend on each other. They go through the phases in waves
  that fit the level-2 cache: x is read from memory in the first phase, and from the cache in the next.

Numerics: each tile's variance is taken around its own mean, tiles are merged by Chan's formula, in float32, for float64
input in float64. No E[x^2] - E[x]^2 anywhere.
"""

# Kernels are typed by what they are launched with.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_bln.ops import reference
from lightning_bln.ops.reference import Population, needed_statistics

DELTA = tl.constexpr(reference.DELTA)

# Elements that a program holds at once: 32 KiB of float32, 32 registers a thread with 256 threads.
TILE = 8192
# What a program reads in a phase if it can: more costs less for merging, but also less of a wave fits the cache.
PROGRAM_BYTES = 32 * 1024
# What a wave reads: some waves are in flight at once, beside what they write, in the 50 MB of an H100's cache.
WAVE_BYTES = 8 * 1024 * 1024
# Programs that keep a large device busy: an H100 runs 264 at a time, two on each multiprocessor.
ENOUGH_PROGRAMS = 1024
# Elements from which on offsets take 64 bits; far below 2^31, for blocks reach beyond the end.
LARGE = 2**29


class _Cut(NamedTuple):
    """Compile-time constants of both kernels."""

    BLOCK_N: int  # samples, features and positions that a program holds at once
    BLOCK_C: int
    BLOCK_P: int
    BATCH_PARTS: int  # parts of a batch group to merge at once
    FEATURE_PARTS: int  # likewise of a feature group
    PER_CHANNEL: bool
    CHANNELS_INNER: bool  # whether features, not positions, are next to each other in memory
    EPS: float
    INDEX: tl.dtype  # integer that holds every offset
    ACC: tl.dtype  # of the arithmetic


class _Input(NamedTuple):
    """Sizes and strides of x as [n, c, p], and into how many blocks each axis is cut."""

    N: Any
    C: Any
    P: Any
    stride_n: Any
    stride_c: Any
    stride_p: Any
    samples: Any  # in a split; the last one may have fewer
    n_splits: Any
    c_blocks: Any
    p_blocks: Any


class _Tile(NamedTuple):
    """The part of x that a program works on."""

    split: Any
    c_block: Any
    p_block: Any
    first: Any  # sample of the split
    last: Any  # sample after the split
    c: Any  # indices [c]
    p: Any  # indices [p]
    has_c: Any  # which of them exist
    has_p: Any


class _Statistic(NamedTuple):
    """A batch statistic [c, p] or a feature statistic [n, p] in memory."""

    ptr: Any
    stride: Any  # along c or n
    stride_p: Any


class _Used(NamedTuple):
    """The statistics that x is normalised with, each a `_Statistic`; as a constant, something said about each."""

    batch_mean: Any
    batch_var: Any
    feature_mean: Any
    feature_var: Any


class _Own(NamedTuple):
    """Pointers to the mini-batch's statistics, None where not needed; feature statistics are contiguous [n, p]."""

    batch_mean: Any
    batch_var: Any
    feature_mean: Any
    feature_var: Any
    stride_c: Any  # of batch statistics [c, p]
    stride_p: Any  # 0 with per-channel statistics


class _Groups(NamedTuple):
    """A tile's batch group and feature group: counters, and its place among the batch group's tiles."""

    batch: Any
    feature: Any
    tiles: Any  # in the batch group; the feature group has one for each feature block
    part: Any


class _Workspace(NamedTuple):
    """Where partial results are: sets of batch results, each [part, batch place], then of feature results."""

    ptr: Any
    step: Any  # elements of one part of a batch result
    section: Any  # elements of a set of batch results
    place: Any  # the tile's offsets [c, p] in a part, [c, 1] with per-channel statistics
    mask: Any  # which of them exist
    feature_ptr: Any  # sets of feature results, each [feature block, feature place]
    feature_step: Any
    feature_section: Any


@triton.jit
def _draw(counters_ptr, wave, x, PHASES: tl.constexpr):
    """The phase that this program works on, and the tile's split, feature block and position block.

    The order is: phase 0 of wave 0; phase 0 of wave 1, phase 1 of wave 0; phase 0 of wave 2, phase 1 of wave 1, ...
    So whoever waits for a phase of its wave waits while another wave is read. The position block is outside the input
    before the first and after the last wave.
    """
    if PHASES == 1:
        ticket = tl.program_id(0)
    else:
        ticket = tl.atomic_add(counters_ptr, 1, sem="relaxed")
    tiles = wave * x.c_blocks * x.n_splits
    lag = tl.where(wave < x.p_blocks, 1, 0)
    phase = ticket // tiles % PHASES
    # Every other phase goes backwards through its wave: what was read last is still in the cache.
    item = tl.where(phase % 2 == 1, tiles - 1 - ticket % tiles, ticket % tiles)
    p_block = (ticket // (tiles * PHASES) - phase * lag) * wave + item % wave
    return phase, item // (wave * x.c_blocks), item // wave % x.c_blocks, p_block


@triton.jit
def _arrive(counter_ptr):
    """How many tiles of a group came before this one; everything that they wrote can be read."""
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def _open(counter_ptr):
    """Let those go on that wait for a group, after its last tile has written the group's results."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit
def _wait(counter_ptr, tiles):
    """Wait until a group of so many tiles is open."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") <= tiles:
        pass
    tl.debug_barrier()


@triton.jit
def _groups(counters_ptr, x, split, c_block, p_block, CUT: tl.constexpr):
    """The counters of feature groups lie behind those of batch groups."""
    if CUT.PER_CHANNEL:
        batch = counters_ptr + c_block
        feature = counters_ptr + x.c_blocks
        tiles = x.n_splits * x.p_blocks
        part = split * x.p_blocks + p_block
    else:
        batch = counters_ptr + p_block * x.c_blocks + c_block
        feature = counters_ptr + x.p_blocks * x.c_blocks
        tiles = x.n_splits
        part = split
    return _Groups(batch, feature + p_block * x.n_splits + split, tiles, part)


@triton.jit
def _tile(x, split, c_block, p_block, CUT: tl.constexpr):
    first = split * x.samples
    c = (c_block * CUT.BLOCK_C + tl.arange(0, CUT.BLOCK_C)).to(CUT.INDEX)
    p = (p_block * CUT.BLOCK_P + tl.arange(0, CUT.BLOCK_P)).to(CUT.INDEX)
    return _Tile(split, c_block, p_block, first, tl.minimum(first + x.samples, x.N), c, p, c < x.C, p < x.P)


@triton.jit
def _rows(start, tile, CUT: tl.constexpr):
    """Indices [n] of the tile's samples from ``start``, and which [n, p] exist."""
    n = start + tl.arange(0, CUT.BLOCK_N)
    return n.to(CUT.INDEX), (n < tile.last)[:, None] & tile.has_p[None, :]


@triton.jit
def _cube(n, rows, x, tile):
    """Offsets [n, c, p] into x and whatever lies in memory as x does, and which of them exist."""
    offsets = n[:, None, None] * x.stride_n + tile.c[None, :, None] * x.stride_c + tile.p[None, None, :] * x.stride_p
    return offsets, rows[:, None, :] & tile.has_c[None, :, None]


@triton.jit
def _workspace(ptr, tiles, x, tile, BATCH_SETS: tl.constexpr, CUT: tl.constexpr):
    one = tl.full((), 1, CUT.INDEX)
    # In x's order, for neighbours in a tile to be neighbours here.
    if CUT.PER_CHANNEL:
        step = one * x.C
        place = tile.c[:, None]
        mask = tile.has_c[:, None]
    elif CUT.CHANNELS_INNER:
        step = one * x.C * x.P
        place = tile.c[:, None] + tile.p[None, :] * x.C
        mask = tile.has_c[:, None] & tile.has_p[None, :]
    else:
        step = one * x.C * x.P
        place = tile.c[:, None] * x.P + tile.p[None, :]
        mask = tile.has_c[:, None] & tile.has_p[None, :]
    section = tiles * step
    feature_step = one * x.N * x.P
    feature_ptr = ptr + BATCH_SETS * section
    return _Workspace(ptr, step, section, place, mask, feature_ptr, feature_step, x.c_blocks * feature_step)


@triton.jit
def _feature_place(n, x, tile, CUT: tl.constexpr):
    """Offsets [n, p] into one part of a feature result; samples first where a tile has few positions."""
    if CUT.CHANNELS_INNER:
        place = n[:, None] + tile.p[None, :] * x.N
    else:
        place = n[:, None] * x.P + tile.p[None, :]
    return place


@triton.jit
def _mixing_weights(batch_size_ptr, N, CUT: tl.constexpr):
    """``(w_f, w_b)``, as `reference.mixing_weights`."""
    samples = tl.full((), N, CUT.ACC)
    if batch_size_ptr is not None:
        nominal = tl.load(batch_size_ptr).to(CUT.ACC)
        samples = tl.where(nominal > 0, nominal, samples)
    inverse = tl.full((), 1, CUT.ACC) / samples
    delta = tl.full((), DELTA, CUT.ACC)
    return inverse - delta, 1 - (inverse + delta)


@triton.jit
def _scaled_weight(weight_ptr, x, tile, CUT: tl.constexpr):
    """weight / sqrt(C), [1, c, 1]."""
    scale = 1 / tl.sqrt(tl.full((), x.C, CUT.ACC))
    if weight_ptr is None:
        weight = tl.zeros((CUT.BLOCK_C,), CUT.ACC) + scale
    else:
        weight = tl.load(weight_ptr + tile.c, mask=tile.has_c, other=0).to(CUT.ACC) * scale
    return weight[None, :, None]


@triton.jit
def _batch_statistic(statistic, tile, CUT: tl.constexpr):
    """A batch statistic, [1, c, p], 1 where there is none."""
    offsets = tile.c[:, None] * statistic.stride + tile.p[None, :] * statistic.stride_p
    mask = tile.has_c[:, None] & tile.has_p[None, :]
    # From the cache that all multiprocessors share: it may have been written in this launch.
    return tl.load(statistic.ptr + offsets, mask=mask, other=1, cache_modifier=".cg").to(CUT.ACC)[None, :, :]


@triton.jit
def _feature_statistic(statistic, n, rows, tile, CUT: tl.constexpr):
    """A feature statistic, [n, 1, p], 1 where there is none."""
    offsets = n[:, None] * statistic.stride + tile.p[None, :] * statistic.stride_p
    return tl.load(statistic.ptr + offsets, mask=rows, other=1, cache_modifier=".cg").to(CUT.ACC)[:, None, :]


@triton.jit
def _rstd(variance, CUT: tl.constexpr):
    return tl.rsqrt(variance + tl.full((), CUT.EPS, CUT.ACC))


@triton.jit
def _merge(count, mean, m2, other_count, difference, other_m2):
    """Chan's formula: count, mean, squared deviations of two sets together; ``difference`` is that of their means."""
    total = count + other_count
    mean += difference * (other_count / total)
    m2 += other_m2 + difference * difference * (count * other_count / total)
    return total, mean, m2


@triton.jit
def _part_size(index, size, total):
    """Elements of a part of ``size``; the last one may have fewer."""
    return tl.minimum(size, total - index * size)


@triton.jit
def _merge_parts(ptr, section, step, place, mask, parts, sizes, PARTS: tl.constexpr, CUT: tl.constexpr):
    """Mean and biased variance of sets that were cut into parts, from each part's mean and variance.

    Args:
        ptr: Means [part, place], and ``section`` behind them variances.
        section: Elements of the means.
        step: Elements of one part's means.
        place: Offsets [rows, columns] of the sets in one part.
        mask: Which sets exist.
        parts: Number of parts.
        sizes: Part k is k // columns, k % columns in a grid of parts: columns, and along both axes the size of a part
            and of all.
        PARTS: Parts to read at once.
        CUT: Constants.
    """
    columns, size, total_size, column_size, total_column_size = sizes
    mean = tl.load(ptr + place, mask=mask, other=0, cache_modifier=".cg")
    m2 = tl.zeros_like(mean)
    count = tl.full((), 0, CUT.ACC)
    for start in range(0, parts, PARTS):
        k = start + tl.arange(0, PARTS)
        number = _part_size(k // columns, size, total_size).to(CUT.ACC)
        number *= _part_size(k % columns, column_size, total_column_size).to(CUT.ACC)
        number = tl.where(k < parts, number, 0)
        offsets = k.to(CUT.INDEX)[:, None, None] * step + place[None, :, :]
        exists = (k < parts)[:, None, None] & mask[None, :, :]
        # Around the mean so far: the difference of large means is exact, their weighted sum is not.
        deviation = tl.load(ptr + offsets, mask=exists, other=0, cache_modifier=".cg") - mean[None, :, :]
        part_var = tl.load(ptr + section + offsets, mask=exists, other=0, cache_modifier=".cg")
        chunk = tl.sum(number, 0)
        number = number[:, None, None]
        difference = tl.sum(deviation * number, 0) / chunk
        deviation -= difference[None, :, :]
        chunk_m2 = tl.sum((part_var + deviation * deviation) * number, 0)
        count, mean, m2 = _merge(count, mean, m2, chunk, difference, chunk_m2)
    return mean, m2 / count


@triton.jit
def _sum_parts(ptr, step, place, mask, parts, PARTS: tl.constexpr, CUT: tl.constexpr):
    """Sums [rows, columns] of [part, place] over the parts."""
    total = tl.zeros(place.shape, CUT.ACC)
    for start in range(0, parts, PARTS):
        k = start + tl.arange(0, PARTS)
        offsets = k.to(CUT.INDEX)[:, None, None] * step + place[None, :, :]
        exists = (k < parts)[:, None, None] & mask[None, :, :]
        total += tl.sum(tl.load(ptr + offsets, mask=exists, other=0, cache_modifier=".cg"), 0)
    return total


@triton.jit
def _merge_batch(x, tile, tiles, space, own, CUT: tl.constexpr):
    """Batch statistics of a tile's features, and positions, from those of each part."""
    if CUT.PER_CHANNEL:
        sizes = (x.p_blocks, x.samples, x.N, CUT.BLOCK_P, x.P)
        offsets = tile.c[:, None] * own.stride_c
    else:
        sizes = (1, x.samples, x.N, 1, 1)
        offsets = tile.c[:, None] * own.stride_c + tile.p[None, :] * own.stride_p
    mean, variance = _merge_parts(
        space.ptr, space.section, space.step, space.place, space.mask, tiles, sizes, CUT.BATCH_PARTS, CUT
    )
    tl.store(own.batch_mean + offsets, mean, mask=space.mask)
    if own.batch_var is not None:
        tl.store(own.batch_var + offsets, variance, mask=space.mask)


@triton.jit
def _merge_features(x, tile, space, own, CUT: tl.constexpr):
    """Feature statistics of a tile's samples and positions, from those of each feature block."""
    sizes = (1, CUT.BLOCK_C, x.C, 1, 1)
    for start in range(tile.first, tile.last, CUT.BLOCK_N):
        n, rows = _rows(start, tile, CUT)
        place = _feature_place(n, x, tile, CUT)
        mean, variance = _merge_parts(
            space.feature_ptr,
            space.feature_section,
            space.feature_step,
            place,
            rows,
            x.c_blocks,
            sizes,
            CUT.FEATURE_PARTS,
            CUT,
        )
        offsets = n[:, None] * x.P + tile.p[None, :]
        tl.store(own.feature_mean + offsets, mean, mask=rows)
        if own.feature_var is not None:
            tl.store(own.feature_var + offsets, variance, mask=rows)


@triton.jit
def _merge_positions(count, mean, m2, x, tile, CUT: tl.constexpr):
    """Statistics [c, 1] over the positions too, from those [c, p], each over ``count`` samples."""
    positions = _part_size(tile.p_block, CUT.BLOCK_P, x.P).to(CUT.ACC)
    has_p = tile.has_p[None, :]
    # Around the first position's mean.
    origin = tl.sum(tl.where(tl.arange(0, CUT.BLOCK_P)[None, :] == 0, mean, 0), 1)[:, None]
    deviation = tl.where(has_p, mean - origin, 0)
    difference = (tl.sum(deviation, 1) / positions)[:, None]
    deviation = tl.where(has_p, deviation - difference, 0)
    m2 = tl.sum(tl.where(has_p, m2, 0) + count * deviation * deviation, 1)[:, None]
    return count * positions, origin + difference, m2


@triton.jit
def _statistics_phase(
    x_ptr, x, tile, groups, workspace_ptr, own, BATCH: tl.constexpr, FEATURE: tl.constexpr, CUT: tl.constexpr
):
    """A tile's own statistics; where it is the last of a group, the group's.

    In the workspace: batch means, batch variances, if BATCH; then feature means, feature variances.
    """
    space = _workspace(workspace_ptr, groups.tiles, x, tile, 2 if BATCH else 0, CUT)
    channels = _part_size(tile.c_block, CUT.BLOCK_C, x.C).to(CUT.ACC)
    # Around the first sample, and around a row's first feature: differences of large numbers near each other are exact.
    if BATCH:
        origin_ptr = x_ptr + tile.first.to(CUT.INDEX) * x.stride_n
        origin_offsets = tile.c[:, None] * x.stride_c + tile.p[None, :] * x.stride_p
        origin_mask = tile.has_c[:, None] & tile.has_p[None, :]
        mean = tl.load(origin_ptr + origin_offsets, mask=origin_mask, other=0).to(CUT.ACC)
        m2 = tl.zeros_like(mean)
        count = tl.full((), 0, CUT.ACC)
    for start in range(tile.first, tile.last, CUT.BLOCK_N):
        n, rows = _rows(start, tile, CUT)
        offsets, mask = _cube(n, rows, x, tile)
        value = tl.load(x_ptr + offsets, mask=mask, other=0).to(CUT.ACC)
        if BATCH:
            number = tl.minimum(tile.last - start, CUT.BLOCK_N).to(CUT.ACC)
            deviation = tl.where(mask, value - mean[None, :, :], 0)
            difference = tl.sum(deviation, 0) / number
            deviation = tl.where(mask, deviation - difference[None, :, :], 0)
            count, mean, m2 = _merge(count, mean, m2, number, difference, tl.sum(deviation * deviation, 0))
        if FEATURE:
            row_ptr = x_ptr + (tile.c_block * CUT.BLOCK_C).to(CUT.INDEX) * x.stride_c
            row_offsets = n[:, None] * x.stride_n + tile.p[None, :] * x.stride_p
            row = tl.load(row_ptr + row_offsets, mask=rows, other=0).to(CUT.ACC)
            row_deviation = tl.where(mask, value - row[:, None, :], 0)
            row_difference = tl.sum(row_deviation, 1) / channels
            row_deviation = tl.where(mask, row_deviation - row_difference[:, None, :], 0)
            row_var = tl.sum(row_deviation * row_deviation, 1) / channels
            place = tile.c_block.to(CUT.INDEX) * space.feature_step + _feature_place(n, x, tile, CUT)
            tl.store(space.feature_ptr + place, row + row_difference, mask=rows)
            tl.store(space.feature_ptr + space.feature_section + place, row_var, mask=rows)

    if BATCH:
        if CUT.PER_CHANNEL:
            count, mean, m2 = _merge_positions(count, mean, m2, x, tile, CUT)
        part_ptr = space.ptr + groups.part.to(CUT.INDEX) * space.step
        tl.store(part_ptr + space.place, mean, mask=space.mask)
        tl.store(part_ptr + space.section + space.place, m2 / count, mask=space.mask)
        if _arrive(groups.batch) == groups.tiles - 1:
            _merge_batch(x, tile, groups.tiles, space, own, CUT)
            _open(groups.batch)
    if FEATURE and _arrive(groups.feature) == x.c_blocks - 1:
        _merge_features(x, tile, space, own, CUT)
        _open(groups.feature)


@triton.jit
def _normalize_phase(
    x_ptr,
    x,
    tile,
    groups,
    used,
    y_ptr,
    weight_ptr,
    bias_ptr,
    batch_size_ptr,
    BATCH: tl.constexpr,
    FEATURE: tl.constexpr,
    CUT: tl.constexpr,
):
    """A tile of y, once the statistics that it needs are there."""
    if BATCH:
        _wait(groups.batch, groups.tiles)
    if FEATURE:
        _wait(groups.feature, x.c_blocks)
    w_f, w_b = _mixing_weights(batch_size_ptr, x.N, CUT)
    weight = _scaled_weight(weight_ptr, x, tile, CUT)
    batch_mean = _batch_statistic(used.batch_mean, tile, CUT)
    batch_scale = w_b * _rstd(_batch_statistic(used.batch_var, tile, CUT), CUT)
    for start in range(tile.first, tile.last, CUT.BLOCK_N):
        n, rows = _rows(start, tile, CUT)
        offsets, mask = _cube(n, rows, x, tile)
        value = tl.load(x_ptr + offsets, mask=mask, other=0, eviction_policy="evict_first").to(CUT.ACC)
        feature_mean = _feature_statistic(used.feature_mean, n, rows, tile, CUT)
        feature_scale = w_f * _rstd(_feature_statistic(used.feature_var, n, rows, tile, CUT), CUT)
        y = ((value - batch_mean) * batch_scale + (value - feature_mean) * feature_scale) * weight
        if bias_ptr is not None:
            y += tl.load(bias_ptr + tile.c, mask=tile.has_c, other=0).to(CUT.ACC)[None, :, None]
        # Streamed: y must not displace what the next phases read again.
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit
def _sum_batch(tiles, x, space, totals_ptr, batch_size_ptr, CUT: tl.constexpr):
    """The three sums over samples, from those of each part; stores the first two.

    Returns:
        What they contribute to the gradients of weight and of bias, [c, p] or [c, 1].
    """
    g = _sum_parts(space.ptr, space.step, space.place, space.mask, tiles, CUT.BATCH_PARTS, CUT)
    g_b = _sum_parts(space.ptr + space.section, space.step, space.place, space.mask, tiles, CUT.BATCH_PARTS, CUT)
    g_f = _sum_parts(space.ptr + 2 * space.section, space.step, space.place, space.mask, tiles, CUT.BATCH_PARTS, CUT)
    tl.store(totals_ptr + space.place, g, mask=space.mask)
    tl.store(totals_ptr + space.step + space.place, g_b, mask=space.mask)
    w_f, w_b = _mixing_weights(batch_size_ptr, x.N, CUT)
    return (g_b * w_b + g_f * w_f) / tl.sqrt(tl.full((), x.C, CUT.ACC)), g


@triton.jit
def _sum_features(x, tile, space, totals_ptr, CUT: tl.constexpr):
    """Both sums over features of a tile's samples and positions, from those of each feature block."""
    for start in range(tile.first, tile.last, CUT.BLOCK_N):
        n, rows = _rows(start, tile, CUT)
        place = _feature_place(n, x, tile, CUT)
        for which in tl.static_range(2):
            ptr = space.feature_ptr + which * space.feature_section
            total = _sum_parts(ptr, space.feature_step, place, rows, x.c_blocks, CUT.FEATURE_PARTS, CUT)
            tl.store(totals_ptr + which * space.feature_step + place, total, mask=rows)


@triton.jit
def _sum_positions(
    x, tile, parts_ptr, for_weight, for_bias, counter_ptr, grad_weight_ptr, grad_bias_ptr, CUT: tl.constexpr
):
    """Gradients of weight and of bias, from what each position contributes, [c, p]; the last block stores them."""
    step = tl.full((), 1, CUT.INDEX) * x.C
    section = x.p_blocks * step
    part_ptr = parts_ptr + tile.p_block.to(CUT.INDEX) * x.C
    tl.store(part_ptr + tile.c, tl.sum(for_weight, 1), mask=tile.has_c)
    tl.store(part_ptr + section + tile.c, tl.sum(for_bias, 1), mask=tile.has_c)
    if _arrive(counter_ptr + tile.c_block) == x.p_blocks - 1:
        c = tile.c[:, None]
        mask = tile.has_c[:, None]
        # As many as fill a tile.
        PARTS: tl.constexpr = CUT.BLOCK_N * CUT.BLOCK_P
        tl.store(grad_weight_ptr + c, _sum_parts(parts_ptr, step, c, mask, x.p_blocks, PARTS, CUT), mask=mask)
        tl.store(grad_bias_ptr + c, _sum_parts(parts_ptr + section, step, c, mask, x.p_blocks, PARTS, CUT), mask=mask)


@triton.jit
def _sums_phase(
    grad_y_ptr,
    x_ptr,
    x,
    tile,
    groups,
    used,
    workspace_ptr,
    totals_ptr,
    weight_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    weight_counters_ptr,
    batch_size_ptr,
    FEATURE: tl.constexpr,
    CUT: tl.constexpr,
):
    """A tile's sums over samples and over features; where it is the last of a group, the group's.

    With g the gradient of y, over samples (and positions, per channel): g; g x_b; g x_f. Over features, where a feature
    statistic is the mini-batch's (FEATURE): g weight / sqrt(C); g weight / sqrt(C) x_f.

    In the workspace: the three sums over samples; if FEATURE, the two over features; with per-position statistics the
    gradients of weight and of bias, each [position block, c]. Results in totals_ptr: the first two sums over samples,
    each [batch place]; the two over features, each [feature place].
    """
    space = _workspace(workspace_ptr, groups.tiles, x, tile, 3, CUT)
    weight = _scaled_weight(weight_ptr, x, tile, CUT)
    batch_mean = _batch_statistic(used.batch_mean, tile, CUT)
    batch_rstd = _rstd(_batch_statistic(used.batch_var, tile, CUT), CUT)
    sum_g = tl.zeros((CUT.BLOCK_C, CUT.BLOCK_P), CUT.ACC)
    sum_g_b = tl.zeros((CUT.BLOCK_C, CUT.BLOCK_P), CUT.ACC)
    sum_g_f = tl.zeros((CUT.BLOCK_C, CUT.BLOCK_P), CUT.ACC)
    for start in range(tile.first, tile.last, CUT.BLOCK_N):
        n, rows = _rows(start, tile, CUT)
        offsets, mask = _cube(n, rows, x, tile)
        # What is masked has gradient 0, so no sum needs a mask of its own.
        g = tl.load(grad_y_ptr + offsets, mask=mask, other=0).to(CUT.ACC)
        value = tl.load(x_ptr + offsets, mask=mask, other=0).to(CUT.ACC)
        feature_mean = _feature_statistic(used.feature_mean, n, rows, tile, CUT)
        feature_rstd = _rstd(_feature_statistic(used.feature_var, n, rows, tile, CUT), CUT)
        g_f = g * ((value - feature_mean) * feature_rstd)
        sum_g += tl.sum(g, 0)
        sum_g_b += tl.sum(g * ((value - batch_mean) * batch_rstd), 0)
        sum_g_f += tl.sum(g_f, 0)
        if FEATURE:
            place = tile.c_block.to(CUT.INDEX) * space.feature_step + _feature_place(n, x, tile, CUT)
            tl.store(space.feature_ptr + place, tl.sum(g * weight, 1), mask=rows)
            tl.store(space.feature_ptr + space.feature_section + place, tl.sum(g_f * weight, 1), mask=rows)

    if CUT.PER_CHANNEL:
        sum_g = tl.sum(sum_g, 1)[:, None]
        sum_g_b = tl.sum(sum_g_b, 1)[:, None]
        sum_g_f = tl.sum(sum_g_f, 1)[:, None]
    part_ptr = space.ptr + groups.part.to(CUT.INDEX) * space.step
    tl.store(part_ptr + space.place, sum_g, mask=space.mask)
    tl.store(part_ptr + space.section + space.place, sum_g_b, mask=space.mask)
    tl.store(part_ptr + 2 * space.section + space.place, sum_g_f, mask=space.mask)
    if _arrive(groups.batch) == groups.tiles - 1:
        for_weight, for_bias = _sum_batch(groups.tiles, x, space, totals_ptr, batch_size_ptr, CUT)
        _open(groups.batch)
        if CUT.PER_CHANNEL:
            tl.store(grad_weight_ptr + space.place, for_weight, mask=space.mask)
            tl.store(grad_bias_ptr + space.place, for_bias, mask=space.mask)
        else:
            parts_ptr = space.feature_ptr
            if FEATURE:
                parts_ptr += 2 * space.feature_section
            _sum_positions(
                x, tile, parts_ptr, for_weight, for_bias, weight_counters_ptr, grad_weight_ptr, grad_bias_ptr, CUT
            )
    if FEATURE and _arrive(groups.feature) == x.c_blocks - 1:
        _sum_features(x, tile, space, totals_ptr + 2 * space.step, CUT)
        _open(groups.feature)


@triton.jit
def _gradient_phase(
    grad_y_ptr,
    x_ptr,
    x,
    tile,
    groups,
    used,
    own,
    totals_ptr,
    weight_ptr,
    grad_x_ptr,
    batch_size_ptr,
    OWN: tl.constexpr,
    CUT: tl.constexpr,
):
    """A tile of x's gradient, once the sums that it needs are there; the formula is `reference.input_gradient`'s.

    OWN says which of the four statistics in ``used`` are the mini-batch's; totals_ptr is as `_sums_phase` leaves it.
    """
    if OWN.batch_mean or OWN.batch_var:
        _wait(groups.batch, groups.tiles)
    if OWN.feature_mean or OWN.feature_var:
        _wait(groups.feature, x.c_blocks)
    w_f, w_b = _mixing_weights(batch_size_ptr, x.N, CUT)
    weight = _scaled_weight(weight_ptr, x, tile, CUT)
    batch_rstd = _rstd(_batch_statistic(used.batch_var, tile, CUT), CUT)
    space = _workspace(totals_ptr, 1, x, tile, 2, CUT)
    number = tl.full((), x.N, CUT.ACC)
    if CUT.PER_CHANNEL:
        number *= tl.full((), x.P, CUT.ACC)
    if OWN.batch_mean:
        total = tl.load(space.ptr + space.place, mask=space.mask, other=0, cache_modifier=".cg")
        batch_average = total[None, :, :] * weight / number
    if OWN.batch_var:
        total_b = tl.load(space.ptr + space.step + space.place, mask=space.mask, other=0, cache_modifier=".cg")
        batch_slope = total_b[None, :, :] * weight / number * batch_rstd
        own_batch_mean = _batch_statistic(_Statistic(own.batch_mean, own.stride_c, own.stride_p), tile, CUT)
    for start in range(tile.first, tile.last, CUT.BLOCK_N):
        n, rows = _rows(start, tile, CUT)
        offsets, mask = _cube(n, rows, x, tile)
        place = _feature_place(n, x, tile, CUT)
        g_b = tl.load(grad_y_ptr + offsets, mask=mask, other=0, eviction_policy="evict_first").to(CUT.ACC) * weight
        g_f = g_b
        feature_rstd = _rstd(_feature_statistic(used.feature_var, n, rows, tile, CUT), CUT)
        if OWN.batch_var or OWN.feature_var:
            value = tl.load(x_ptr + offsets, mask=mask, other=0, eviction_policy="evict_first").to(CUT.ACC)
        if OWN.batch_mean:
            g_b -= batch_average
        if OWN.batch_var:
            g_b -= (value - own_batch_mean) * batch_slope
        if OWN.feature_mean:
            average = tl.load(space.feature_ptr + place, mask=rows, other=0, cache_modifier=".cg") / x.C
            g_f -= average[:, None, :]
        if OWN.feature_var:
            slope_ptr = space.feature_ptr + space.feature_step
            slope = tl.load(slope_ptr + place, mask=rows, other=0, cache_modifier=".cg") / x.C
            own_feature_mean = _feature_statistic(_Statistic(own.feature_mean, x.P, 1), n, rows, tile, CUT)
            g_f -= (value - own_feature_mean) * (slope[:, None, :] * feature_rstd)
        grad_x = g_b * (w_b * batch_rstd) + g_f * (w_f * feature_rstd)
        tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask, cache_modifier=".cs")


# One compiled kernel serves any number of samples and any statistic's strides.
_GENERIC = [
    "N",
    "samples",
    "wave",
    "own_stride_c",
    "own_stride_p",
    *(f"{statistic}_{axis}" for statistic in ("batch_mean", "batch_var") for axis in "cp"),
    *(f"{statistic}_{axis}" for statistic in ("feature_mean", "feature_var") for axis in "np"),
]


@triton.jit(do_not_specialize=_GENERIC)
def _forward_kernel(
    x_ptr,  # input, strides (stride_n, stride_c, stride_p)
    y_ptr,  # output, as x
    weight_ptr,  # (C,) or None
    bias_ptr,  # (C,) or None
    batch_mean_ptr,  # to normalise with: [c, p], strides (batch_mean_c, batch_mean_p)
    batch_var_ptr,  # likewise
    feature_mean_ptr,  # to normalise with: [n, p], strides (feature_mean_n, feature_mean_p)
    feature_var_ptr,  # likewise
    own_batch_mean_ptr,  # results: [c, p], strides (own_stride_c, own_stride_p); None where not needed
    own_batch_var_ptr,  # likewise
    own_feature_mean_ptr,  # results: (N, P); None where not needed
    own_feature_var_ptr,  # likewise
    counters_ptr,  # zeros: tickets, then a counter for each batch group and for each feature group; None for one phase
    workspace_ptr,  # see _statistics_phase; None for one phase
    batch_size_ptr,  # nominal B, an integer, 0 for N; None for N
    N,
    C,
    P,
    stride_n,
    stride_c,
    stride_p,
    batch_mean_c,
    batch_mean_p,
    batch_var_c,
    batch_var_p,
    feature_mean_n,
    feature_mean_p,
    feature_var_n,
    feature_var_p,
    own_stride_c,
    own_stride_p,
    samples,  # in a split
    wave,  # position blocks in a wave
    BATCH: tl.constexpr,  # whether batch statistics are to be computed
    FEATURE: tl.constexpr,  # whether feature statistics are to be computed
    CUT: tl.constexpr,
):
    n_splits, c_blocks, p_blocks = tl.cdiv(N, samples), tl.cdiv(C, CUT.BLOCK_C), tl.cdiv(P, CUT.BLOCK_P)
    x = _Input(N, C, P, stride_n, stride_c, stride_p, samples, n_splits, c_blocks, p_blocks)
    used = _Used(
        _Statistic(batch_mean_ptr, batch_mean_c, batch_mean_p),
        _Statistic(batch_var_ptr, batch_var_c, batch_var_p),
        _Statistic(feature_mean_ptr, feature_mean_n, feature_mean_p),
        _Statistic(feature_var_ptr, feature_var_n, feature_var_p),
    )
    PHASES: tl.constexpr = 2 if BATCH or FEATURE else 1
    phase, split, c_block, p_block = _draw(counters_ptr, wave, x, PHASES)
    if (p_block >= 0) & (p_block < p_blocks):
        tile = _tile(x, split, c_block, p_block, CUT)
        if PHASES == 1:
            _normalize_phase(
                x_ptr, x, tile, None, used, y_ptr, weight_ptr, bias_ptr, batch_size_ptr, BATCH, FEATURE, CUT
            )
        else:
            groups = _groups(counters_ptr + 1, x, split, c_block, p_block, CUT)
            if phase == 0:
                own = _Own(
                    own_batch_mean_ptr,
                    own_batch_var_ptr,
                    own_feature_mean_ptr,
                    own_feature_var_ptr,
                    own_stride_c,
                    own_stride_p,
                )
                _statistics_phase(x_ptr, x, tile, groups, workspace_ptr, own, BATCH, FEATURE, CUT)
            else:
                _normalize_phase(
                    x_ptr, x, tile, groups, used, y_ptr, weight_ptr, bias_ptr, batch_size_ptr, BATCH, FEATURE, CUT
                )


@triton.jit(do_not_specialize=_GENERIC)
def _backward_kernel(
    grad_y_ptr,  # gradient of y, as x
    x_ptr,  # input, strides (stride_n, stride_c, stride_p)
    weight_ptr,  # (C,) or None
    grad_x_ptr,  # result, as x
    grad_weight_ptr,  # result, (C,)
    grad_bias_ptr,  # result, (C,)
    batch_mean_ptr,  # that y was normalised with: [c, p], strides (batch_mean_c, batch_mean_p)
    batch_var_ptr,  # likewise
    feature_mean_ptr,  # that y was normalised with: [n, p], strides (feature_mean_n, feature_mean_p)
    feature_var_ptr,  # likewise
    own_batch_mean_ptr,  # [c, p], strides (own_stride_c, own_stride_p), results if recomputed; None where not needed
    own_batch_var_ptr,  # likewise
    own_feature_mean_ptr,  # (N, P), results if recomputed; None where not needed
    own_feature_var_ptr,  # likewise
    counters_ptr,  # zeros: tickets; groups of sums, batch then feature; one for each feature block, for weights;
    # if statistics are recomputed: their groups, batch then feature
    workspace_ptr,  # see _sums_phase
    totals_ptr,  # see _sums_phase
    statistics_workspace_ptr,  # see _statistics_phase; None if nothing is recomputed
    batch_size_ptr,  # nominal B, an integer, 0 for N; None for N
    N,
    C,
    P,
    stride_n,
    stride_c,
    stride_p,
    batch_mean_c,
    batch_mean_p,
    batch_var_c,
    batch_var_p,
    feature_mean_n,
    feature_mean_p,
    feature_var_n,
    feature_var_p,
    own_stride_c,
    own_stride_p,
    samples,  # in a split
    wave,  # position blocks in a wave
    OWN: tl.constexpr,  # for each of the four statistics, whether it is the mini-batch's
    RECOMPUTE_BATCH: tl.constexpr,  # whether the mini-batch's were not saved
    RECOMPUTE_FEATURE: tl.constexpr,
    CUT: tl.constexpr,
):
    n_splits, c_blocks, p_blocks = tl.cdiv(N, samples), tl.cdiv(C, CUT.BLOCK_C), tl.cdiv(P, CUT.BLOCK_P)
    x = _Input(N, C, P, stride_n, stride_c, stride_p, samples, n_splits, c_blocks, p_blocks)
    used = _Used(
        _Statistic(batch_mean_ptr, batch_mean_c, batch_mean_p),
        _Statistic(batch_var_ptr, batch_var_c, batch_var_p),
        _Statistic(feature_mean_ptr, feature_mean_n, feature_mean_p),
        _Statistic(feature_var_ptr, feature_var_n, feature_var_p),
    )
    own = _Own(
        own_batch_mean_ptr, own_batch_var_ptr, own_feature_mean_ptr, own_feature_var_ptr, own_stride_c, own_stride_p
    )
    RECOMPUTE: tl.constexpr = RECOMPUTE_BATCH or RECOMPUTE_FEATURE
    FEATURE: tl.constexpr = OWN.feature_mean or OWN.feature_var
    PHASES: tl.constexpr = 3 if RECOMPUTE else 2
    phase, split, c_block, p_block = _draw(counters_ptr, wave, x, PHASES)
    if (p_block >= 0) & (p_block < p_blocks):
        tile = _tile(x, split, c_block, p_block, CUT)
        groups = _groups(counters_ptr + 1, x, split, c_block, p_block, CUT)
        batch_groups = c_blocks if CUT.PER_CHANNEL else c_blocks * p_blocks
        weight_counters_ptr = counters_ptr + 1 + batch_groups + n_splits * p_blocks
        if phase == PHASES - 1:
            _gradient_phase(
                grad_y_ptr,
                x_ptr,
                x,
                tile,
                groups,
                used,
                own,
                totals_ptr,
                weight_ptr,
                grad_x_ptr,
                batch_size_ptr,
                OWN,
                CUT,
            )
        else:
            if RECOMPUTE:
                made = _groups(weight_counters_ptr + c_blocks, x, split, c_block, p_block, CUT)
                if phase == 0:
                    _statistics_phase(
                        x_ptr, x, tile, made, statistics_workspace_ptr, own, RECOMPUTE_BATCH, RECOMPUTE_FEATURE, CUT
                    )
                else:
                    if RECOMPUTE_BATCH:
                        _wait(made.batch, made.tiles)
                    if RECOMPUTE_FEATURE:
                        _wait(made.feature, c_blocks)
            if phase == PHASES - 2:
                _sums_phase(
                    grad_y_ptr,
                    x_ptr,
                    x,
                    tile,
                    groups,
                    used,
                    workspace_ptr,
                    totals_ptr,
                    weight_ptr,
                    grad_weight_ptr,
                    grad_bias_ptr,
                    weight_counters_ptr,
                    batch_size_ptr,
                    FEATURE,
                    CUT,
                )


class Plan(NamedTuple):
    """How the work is cut up: a tile's blocks, the samples that one program goes through, position blocks in a wave."""

    block_n: int
    block_c: int
    block_p: int
    samples: int
    wave: int


def plan(N: int, C: int, P: int, itemsize: int, *, channels_inner: bool, waves: bool, tensors: int) -> Plan:
    """Cut up an input of N samples, C features and P positions.

    Args:
        N: Samples.
        C: Features.
        P: Positions.
        itemsize: Bytes of an element.
        channels_inner: Whether features, not positions, are next to each other in memory.
        waves: Whether positions are independent of each other, so that some may go ahead.
        tensors: How many tensors of the input's size are read.
    """
    limits = [triton.next_power_of_2(size) for size in (N, C, P)]
    # Whole sectors of memory along the inner axis; merging costs 1 / block_n + 1 / block_c, so a position more is last.
    block = [
        min(size, limit) for size, limit in zip((32, 128, 1) if channels_inner else (16, 32, 16), limits, strict=True)
    ]
    elements = TILE * 4 // max(itemsize, 4)
    while math.prod(block) < elements and block != limits:
        axis = min((d for d in range(3) if block[d] < limits[d]), key=lambda d: (d == 2, block[d]))
        block[axis] *= 2
    block_n, block_c, block_p = block
    p_blocks = -(-P // block_p)
    block_bytes = N * C * block_p * itemsize * tensors
    tiles = -(-N // block_n) * -(-C // block_c) * p_blocks
    wave = p_blocks
    longest = 8
    if waves and block_bytes <= WAVE_BYTES < block_bytes * p_blocks:
        wave = -(-p_blocks // -(-block_bytes * p_blocks // WAVE_BYTES))
        longest = max(1, PROGRAM_BYTES // (math.prod(block) * itemsize))
    repeats = 1
    while repeats < longest and tiles >= 2 * repeats * ENOUGH_PROGRAMS:
        repeats *= 2
    return Plan(block_n, block_c, block_p, block_n * repeats, wave)


class _Geometry(NamedTuple):
    """x as [n, c, p]: sizes, strides, and the strides of batch statistics, which are contiguous as x.shape[1:]."""

    N: int
    C: int
    P: int
    stride_n: int
    stride_c: int
    stride_p: int
    channels_inner: bool
    own_stride_c: int
    own_stride_p: int


def _same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike; the stride of an axis of size 1 says nothing."""
    s, t = a.stride(), b.stride()
    return s == t or all(s[d] == t[d] for d in range(a.ndim) if a.shape[d] != 1)


def _geometry(shape: torch.Size, strides: tuple[int, ...], axis: int) -> _Geometry | None:
    """None if the positions have no common stride, or neither they nor the features are next to each other."""
    N, C = shape[0], shape[axis]
    before, after = math.prod(shape[1:axis]), math.prod(shape[axis + 1 :])
    positions = [(shape[d], strides[d]) for d in range(1, len(shape)) if d != axis and shape[d] != 1]
    apart = any(outer[1] != inner[0] * inner[1] for outer, inner in itertools.pairwise(positions))
    stride_p = positions[-1][1] if positions else 1
    stride_c = strides[axis] if C != 1 else 1
    channels_inner = not positions or stride_p != 1
    if apart or (before != 1 and after != 1) or (channels_inner and stride_c != 1):
        return None
    own = (after, 1) if before == 1 else (1, C)
    return _Geometry(N, C, before * after, strides[0], stride_c, stride_p, channels_inner, *own)


def _batch_strides(stat: Tensor, ndim: int, geometry: _Geometry) -> tuple[Tensor, int, int]:
    """A batch statistic, x.shape[1:] or (C,), with its strides as [c, p]."""
    stat = stat.contiguous()
    if stat.ndim == ndim - 1:
        return stat, geometry.own_stride_c, geometry.own_stride_p
    return stat, 1, 0


def _feature_strides(stat: Tensor, ndim: int, geometry: _Geometry) -> tuple[Tensor, int, int]:
    """A feature statistic, with the sample axis, without it or (), with its strides as [n, p]."""
    stat = stat.contiguous()
    if stat.ndim == ndim - 1:
        return stat, geometry.P, 1
    return stat, 0, min(stat.ndim, 1)


def _vector(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make ``device`` current for a launch; nothing to do for the interpreter's CPU tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class _Launch:
    """What the two kernels' launches have in common, as arguments, and the sizes of their workspaces.

    Args:
        geometry: Of x.
        dtype: Of x.
        batch: Whether a batch statistic is the mini-batch's.
        per_channel: Batch statistics over samples and positions.
        eps: Added to variances.
        tensors: How many tensors of x's size the kernel reads.
    """

    def __init__(
        self,
        geometry: _Geometry,
        dtype: torch.dtype,
        batch: bool,
        per_channel: bool,
        eps: float,
        tensors: int,
    ) -> None:
        N, C, P = geometry[:3]
        self.geometry = geometry
        # Statistics over positions need every position before anything else can start.
        waves = not (per_channel and batch)
        inner = geometry.channels_inner
        cut = plan(N, C, P, dtype.itemsize, channels_inner=inner, waves=waves, tensors=tensors)
        n_splits, c_blocks, p_blocks = -(-N // cut.samples), -(-C // cut.block_c), -(-P // cut.block_p)
        wave = cut.wave if waves else p_blocks
        self.rounds = -(-p_blocks // wave)
        self.tiles = wave * c_blocks * n_splits
        self.feature_blocks = c_blocks
        self.groups = n_splits * p_blocks + (c_blocks if per_channel else c_blocks * p_blocks)
        # Elements of one sum or statistic in the workspace, and of the final one.
        self.batch_size, self.feature_size = (C if per_channel else C * P), N * P
        self.batch_parts = self.batch_size * (n_splits * p_blocks if per_channel else n_splits)
        self.feature_parts = self.feature_size * c_blocks
        self.weight_parts = 0 if per_channel else p_blocks * C
        # Nothing that a kernel addresses is larger than its workspace or x.
        largest = max(N * C * P, 3 * self.batch_parts + 2 * self.feature_parts + 2 * self.weight_parts)
        self.sizes = (*geometry[:6],)
        self.own_strides = (1, 0) if per_channel else (geometry.own_stride_c, geometry.own_stride_p)
        self.pace = (cut.samples, wave)
        self.cut = _Cut(
            BLOCK_N=cut.block_n,
            BLOCK_C=cut.block_c,
            BLOCK_P=cut.block_p,
            # A quarter of a tile at once: more would take more registers than the tile itself.
            BATCH_PARTS=max(1, cut.block_n * (cut.block_p if per_channel else 1) // 4),
            FEATURE_PARTS=max(1, cut.block_c // 4),
            PER_CHANNEL=per_channel,
            CHANNELS_INNER=inner,
            EPS=eps,
            INDEX=tl.int64 if largest >= LARGE else tl.int32,
            ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        )
        self.options = {
            # Triton asks for a choice: multiplications and additions may be contracted, as in PyTorch's kernels.
            "enable_fp_fusion": True,
            # Two programs of 256 threads for each multiprocessor; only what merges partial results would take more.
            "maxnreg": 128,
            "num_warps": max(1, min(8, cut.block_n * cut.block_c * cut.block_p // 1024)),
        }

    def grid(self, phases: int) -> tuple[int]:
        """Programs for every wave in every phase; waves start one after the other, so the last phase ends later."""
        lag = 0 if self.rounds == 1 else phases - 1
        return ((self.rounds + lag) * phases * self.tiles,)


@functools.lru_cache(maxsize=1024)
def prepare(shape: torch.Size, strides: tuple[int, ...], axis: int, *settings: Any) -> _Launch | None:
    """The launch for a dense input, with the settings of `_Launch` after its geometry; None if it must be copied.

    Kept, for a layer sees the same few inputs again and again, and small ones take less time than this.
    """
    geometry = _geometry(shape, strides, axis)
    return None if geometry is None else _Launch(geometry, *settings)


def _strided(used: list[Tensor], ndim: int, geometry: _Geometry) -> tuple[list[Tensor], list[int]]:
    """The four statistics to normalise with, and each one's two strides."""
    strided = [_batch_strides(stat, ndim, geometry) for stat in used[:2]]
    strided += [_feature_strides(stat, ndim, geometry) for stat in used[2:]]
    return [stat for stat, *_ in strided], [stride for _, *strides in strided for stride in strides]


def _nominal(batch_size: Tensor | None, x: Tensor) -> Tensor | None:
    return None if batch_size is None else batch_size.to(x.device)


def _own_statistics(x: Tensor, population: Population, axis: int, per_channel: bool) -> list[Tensor]:
    """Memory for those of the mini-batch's statistics that are needed, shape (0,) for the others."""
    make = torch.empty if x.numel() else torch.zeros
    batch, feature = (x.shape[axis : axis + 1] if per_channel else x.shape[1:]), x.shape[:axis] + x.shape[axis + 1 :]
    return [
        make(shape if needed else (0,), dtype=reference.accumulation_dtype(x.dtype), device=x.device)
        for shape, needed in zip((batch, batch, feature, feature), needed_statistics(population), strict=True)
    ]


def _batch_to_first(stat: Any, axis: int) -> Any:
    """A batch statistic of x, or None, for x.movedim(axis, 1)."""
    return stat if stat is None or stat.ndim <= 1 else stat.movedim(axis - 1, 0)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    batch_mean: Tensor | None,
    batch_var: Tensor | None,
    feature_mean: Tensor | None,
    feature_var: Tensor | None,
    batch_size: Tensor | None,
    feature_dim: int,
    per_channel: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op ``lightning_bln::batch_layer_norm``; the same contract as `reference.normalize`.

    Returns:
        y, laid out as ``torch.empty_like(x)``, and the mini-batch's statistics, of shape (0,) where not needed.
    """
    population = Population(batch_mean, batch_var, feature_mean, feature_var)
    y = torch.empty_like(x)
    own = _own_statistics(x, population, feature_dim, per_channel)
    if x.numel() == 0:
        return y, own[0], own[1], own[2], own[3]

    dense = x if _same_strides(x, y) else torch.empty_like(x).copy_(x)
    batch, _, feature, _ = needed_statistics(population)
    launch = prepare(dense.shape, dense.stride(), feature_dim, x.dtype, batch, per_channel, eps, 1)
    if launch is None:
        moved = [_batch_to_first(stat, feature_dim) for stat in population[:2]]
        first = x.movedim(feature_dim, 1).contiguous()
        z, own_mean, own_var, *features = forward(
            first, weight, bias, moved[0], moved[1], feature_mean, feature_var, batch_size, 1, per_channel, eps
        )
        back = [
            stat if stat.ndim <= 1 else stat.movedim(0, feature_dim - 1).contiguous() for stat in (own_mean, own_var)
        ]
        return y.copy_(z.movedim(1, feature_dim)), back[0], back[1], features[0], features[1]

    used = [mine if given is None else given for given, mine in zip(population, own, strict=True)]
    used, strides = _strided(used, x.ndim, launch.geometry)
    phases = 1
    counters = workspace = None
    if batch or feature:
        phases = 2
        counters = torch.zeros(1 + launch.groups, dtype=torch.int32, device=x.device)
        elements = 2 * (batch * launch.batch_parts + feature * launch.feature_parts)
        workspace = torch.empty(elements, dtype=own[0].dtype, device=x.device)
    with _on(x.device):
        _forward_kernel[launch.grid(phases)](
            dense,
            y,
            _vector(weight),
            _vector(bias),
            *used,
            *(stat if stat.numel() else None for stat in own),
            counters,
            workspace,
            _nominal(batch_size, x),
            *launch.sizes,
            *strides,
            *launch.own_strides,
            *launch.pace,
            BATCH=batch,
            FEATURE=feature,
            CUT=launch.cut,
            **launch.options,
        )
    return y, own[0], own[1], own[2], own[3]


def backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    own_batch_mean: Tensor,
    own_batch_var: Tensor,
    own_feature_mean: Tensor,
    own_feature_var: Tensor,
    batch_mean: Tensor | None,
    batch_var: Tensor | None,
    feature_mean: Tensor | None,
    feature_var: Tensor | None,
    batch_size: Tensor | None,
    feature_dim: int,
    per_channel: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op ``lightning_bln::batch_layer_norm_backward``; the same contract as `reference.gradients`.

    A pair of own statistics (batch or feature) that is needed and has shape (0,) was not saved: it is recomputed.

    Returns:
        The gradients of x, laid out as ``torch.empty_like(x)``, and of weight and bias, in the accumulation dtype.
    """
    population = Population(batch_mean, batch_var, feature_mean, feature_var)
    grad_x = torch.empty_like(x)
    dtype = reference.accumulation_dtype(x.dtype)
    make = torch.empty if x.numel() else torch.zeros
    grad_weight, grad_bias = (make(x.shape[feature_dim], dtype=dtype, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return grad_x, grad_weight, grad_bias

    dense = x if _same_strides(x, grad_x) else torch.empty_like(x).copy_(x)
    batch, _, feature, _ = needed_statistics(population)
    launch = prepare(dense.shape, dense.stride(), feature_dim, x.dtype, batch, per_channel, eps, 2)
    if launch is None:
        moved = [_batch_to_first(stat, feature_dim) for stat in (own_batch_mean, own_batch_var, batch_mean, batch_var)]
        z, grad_weight, grad_bias = backward(
            grad_y.movedim(feature_dim, 1),
            x.movedim(feature_dim, 1).contiguous(),
            weight,
            moved[0],
            moved[1],
            own_feature_mean,
            own_feature_var,
            moved[2],
            moved[3],
            feature_mean,
            feature_var,
            batch_size,
            1,
            per_channel,
            eps,
        )
        return grad_x.copy_(z.movedim(1, feature_dim)), grad_weight, grad_bias

    if not _same_strides(grad_y, grad_x):
        grad_y = torch.empty_like(grad_x, dtype=grad_y.dtype).copy_(grad_y)
    own = [stat.contiguous() for stat in (own_batch_mean, own_batch_var, own_feature_mean, own_feature_var)]
    # Of the batch pair the mean alone may have been saved: the phase that finds the variance finds it again.
    recompute_batch = batch and (own_batch_mean.numel() == 0 or (batch_var is None and own_batch_var.numel() == 0))
    recompute_feature = feature and own_feature_mean.numel() == 0
    counters = 1 + launch.groups + launch.feature_blocks
    phases = 2
    statistics_workspace = None
    if recompute_batch or recompute_feature:
        phases = 3
        counters += launch.groups
        fresh = _own_statistics(x, population, feature_dim, per_channel)
        own[:2] = fresh[:2] if recompute_batch else own[:2]
        own[2:] = fresh[2:] if recompute_feature else own[2:]
        elements = 2 * (recompute_batch * launch.batch_parts + recompute_feature * launch.feature_parts)
        statistics_workspace = torch.empty(elements, dtype=dtype, device=x.device)
    elements = 3 * launch.batch_parts + 2 * (feature * launch.feature_parts + launch.weight_parts)
    elements += -elements % 16  # for the totals behind them to be aligned
    totals = 2 * (launch.batch_size + feature * launch.feature_size)
    workspace = torch.empty(elements + totals, dtype=dtype, device=x.device)
    used = [mine if given is None else given for given, mine in zip(population, own, strict=True)]
    used, strides = _strided(used, x.ndim, launch.geometry)
    with _on(x.device):
        _backward_kernel[launch.grid(phases)](
            grad_y,
            dense,
            _vector(weight),
            grad_x,
            grad_weight,
            grad_bias,
            *used,
            *(stat if stat.numel() else None for stat in own),
            torch.zeros(counters, dtype=torch.int32, device=x.device),
            workspace,
            workspace[elements:],
            statistics_workspace,
            _nominal(batch_size, x),
            *launch.sizes,
            *strides,
            *launch.own_strides,
            *launch.pace,
            OWN=_Used(*(stat is None for stat in population)),
            RECOMPUTE_BATCH=recompute_batch,
            RECOMPUTE_FEATURE=recompute_feature,
            CUT=launch.cut,
            **launch.options,
        )
    return grad_x, grad_weight, grad_bias
