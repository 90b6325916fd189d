"""The speed benchmarks measure what they say. No test here depends on how fast anything is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tolerances import SUMMED, assert_close
from torch import nn

from benchmarks import first_use, layers, models, plots, run, summary, timing, verify
from benchmarks.layers import Line

IMAGE = Line("small", (4, 3, 2, 2), "channels_last")
LINES = (IMAGE, Line("small", (4, 5, 3)), Line("small", (4, 3), dtype="bfloat16"))


class FakeClock(timing.Clock):
    """A clock that only work moves."""

    def __init__(self) -> None:
        super().__init__("cpu")
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def work(self, seconds: Callable[[], float]) -> timing.Contender:
        def contender(mark: Callable[[], float]) -> dict[str, tuple[float, float]]:
            start = mark()
            self.now += seconds()
            return {"step": (start, mark())}

        return contender


def quick_rows(line: Line = IMAGE, ratios: bool = True) -> list[dict[str, Any]]:
    rows = layers.measure_line(line, "cpu", 3, 0.0, compiled=False, ratios=ratios)
    return [row | timing.environment("cpu") for row in rows]


# ------------------------------------------------------------------- timing


def test_a_ratio_is_taken_within_a_round() -> None:
    clock = FakeClock()
    # One call of each warms up; then every round is disturbed differently, and both contenders by the same.
    factors = iter([1, 1] + [factor for factor in (1, 8, 3, 5, 2) for _ in range(2)])
    contenders = {"a": clock.work(lambda: 2 * next(factors)), "b": clock.work(lambda: 6 * next(factors))}
    timings = timing.measure(contenders, clock, rounds=5, seconds=1e9)
    assert list(timings["a", "step"].values()) == [2, 16, 6, 10, 4]
    assert timing.ratio(timings, "b", "step", ["a"]) == (3, 3, 3)
    assert timing.ratio(timings, "b", "step", ["a", "b"]) == (0.75, 0.75, 0.75)
    assert timing.ratio(timings, "b", "step", ["absent"]) is None


def test_a_turn_is_many_calls_of_a_fast_contender() -> None:
    clock, calls = FakeClock(), []

    def once() -> float:
        calls.append(1)
        return 2.0**-10

    timings = timing.measure({"a": clock.work(once)}, clock, rounds=3, seconds=1e9, round_seconds=2.0**-8)
    assert len(calls) == 2 + 3 * (2 + 4), "two calls warm up, and the first two of each turn do not count"
    assert timings["a", "step"] == {0: 2.0**-10, 1: 2.0**-10, 2: 2.0**-10}


def test_a_slow_contender_sits_out_rounds_and_keeps_three_turns() -> None:
    clock = FakeClock()
    contenders = {name: clock.work(lambda cost=cost: cost) for name, cost in (("a", 0.01), ("b", 0.1), ("c", 50.0))}
    timings = timing.measure(contenders, clock, rounds=12, seconds=0.7)
    assert list(timings["a", "step"]) == list(range(12))
    assert list(timings["b", "step"]) == [0, 2, 4, 6, 8, 10]
    assert list(timings["c", "step"]) == [0, 4, 8]


def test_spread_is_the_median_with_quartiles() -> None:
    assert timing.spread([5, 1, 2, 4, 3]) == (3, 2, 4)
    assert timing.spread([7]) == (7, 7, 7)


def test_saved_bytes_count_each_storage_once_and_leave_out_what_exists_anyway() -> None:
    x = torch.randn(8, 3, 4, 4, requires_grad=True)
    assert timing.saved_bytes(lambda: x * x, []) == x.nbytes
    norm = nn.BatchNorm2d(3)
    # The input, and a mean and an inverse deviation for each channel.
    assert timing.saved_bytes(lambda: norm(x), timing.tensors_of(norm)) == x.nbytes + 2 * 3 * 4


def test_peak_bytes_are_those_held_at_one_time() -> None:
    x = torch.randn(64, 1024)
    # Numbers such as 1 become tensors of a few bytes.
    assert timing.peak_bytes(lambda: x + 1, "cpu") == pytest.approx(x.nbytes, abs=100)
    assert timing.peak_bytes(lambda: (x + 1) + (x + 2), "cpu") == pytest.approx(3 * x.nbytes, abs=100)
    assert timing.peak_bytes(lambda: x + 1 + 2 + 3, "cpu") == pytest.approx(2 * x.nbytes, abs=100)


def test_a_part_of_a_benchmark_does_not_replace_the_committed_results() -> None:
    parser = argparse.ArgumentParser()
    timing.add_options(parser)
    assert timing.out_folder(parser.parse_args([])) == timing.RESULTS
    for part in (["--quick"], ["--only", "x"], ["--unverified"]):
        assert timing.out_folder(parser.parse_args(part)) is None
        assert timing.out_folder(parser.parse_args([*part, "--out", "there"])) == Path("there")


def test_only_without_a_match_lists_the_lines() -> None:
    with pytest.raises(SystemExit, match="the lines are\n  small 4x3x2x2 channels_last float32"):
        timing.chosen([IMAGE], argparse.Namespace(only="nothing"))
    assert timing.chosen(LINES, argparse.Namespace(only="BFLOAT16")) == [LINES[2]]


def test_rows_survive_a_csv_file(tmp_path: Path) -> None:
    rows = [{"name": "a", "rounds": 3, "seconds": 0.123456, "ratio": None}]
    timing.write_csv(tmp_path / "new" / "rows.csv", rows)
    assert timing.read_csv(tmp_path / "new" / "rows.csv") == [rows[0] | {"seconds": 0.1235}]


def test_a_result_of_another_device_has_its_name() -> None:
    for policy, name in (("passive", "layers"), ("active", "layers_spinning"), ("unset", "layers_spinning")):
        assert timing.result_name("layers", {"device": "cpu", "device_name": "any", "wait_policy": policy}) == name
    assert timing.result_name("layers", {"device": "cuda", "device_name": "NVIDIA H200"}) == "layers_nvidia-h200"


# ------------------------------------------------------------------- layers


@pytest.mark.parametrize("line", LINES, ids=str)
def test_the_plain_composition_computes_what_the_layer_does(line: Line) -> None:
    found = layers.layers(line, "cpu", compiled=False)
    bln, plain = found["bln"], found["plain"]
    x = line.input("cpu")
    grad = torch.randn_like(x)
    for name in found:
        assert found[name].train(x).shape == x.shape
    ys = [layer.train(x) for layer in (bln, plain)]
    assert_close(ys[0], ys[1])
    for a, b in zip(*(torch.autograd.grad(y, [x, *bln.parameters], grad) for y in ys), strict=True):
        assert_close(a, b, dtype=x.dtype, table=SUMMED)
    # The population is that of the batch that `layers` showed to it, for both.
    fresh = layers.layers(line, "cpu", compiled=False)
    fresh["bln"].modules[0].eval()
    assert_close(fresh["bln"].infer(x), fresh["plain"].infer(x))


def test_the_layer_norm_normalises_over_the_features() -> None:
    for line in LINES[:2]:
        y = layers.layers(line, "cpu", compiled=False)["ln"].train(line.input("cpu"))
        torch.testing.assert_close(y.mean(line.feature_dim), torch.zeros_like(y.mean(line.feature_dim)))


def test_the_batch_norm_of_sequences_normalises_over_samples_and_times() -> None:
    y = layers.layers(LINES[1], "cpu", compiled=False)["bn"].train(LINES[1].input("cpu"))
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(3))


def test_a_line_has_every_contender_in_every_mode() -> None:
    rows = quick_rows()
    assert {(row["contender"], row["mode"]) for row in rows} == {
        (name, mode)
        for name in ("bln", "bn", "ln", "plain", "copy")
        for mode in ("forward", "backward", "forward_backward", "inference")
    }
    for row in rows:
        assert row["rounds"] == 3
        assert row["seconds_q1"] <= row["seconds"] <= row["seconds_q3"]
        assert row["vs_bn_ln"] < min(row["vs_bn"], row["vs_ln"])
        has_memory = row["mode"] == "forward_backward" and row["contender"] != "copy"
        assert (row["saved_bytes"] is not None) == (row["peak_bytes"] is not None) == has_memory


def test_every_shape_is_of_a_kind_that_is_measured() -> None:
    assert {line.kind for line in layers.LINES} == {"image", "sequence", "dense"}
    assert {shape for _, shape in layers.SHAPES} >= layers.QUICK
    assert len(set(map(str, layers.LINES))) == len(layers.LINES)


def test_unverified_gives_times_and_no_ratios(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(layers, "LINES", LINES)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    arguments = ["--unverified", "--no-compile", "--repeats", "3", "--seconds", "0", "--out", str(tmp_path)]
    layers.main(arguments)
    rows = timing.read_csv(tmp_path / "layers.csv")
    assert all(row["seconds"] > 0 for row in rows)
    assert all(value is None for row in rows for name, value in row.items() if name.startswith("vs_"))
    printed = capsys.readouterr().out
    assert "small 4x3x2x2 channels_last float32: step in ms: bln" in printed
    assert "times bn" not in printed
    assert "bln's times" not in printed
    assert "geometric mean" not in printed
    assert not (tmp_path / "layers.png").exists()


@pytest.mark.parametrize("benchmark", [layers, models])
def test_a_kernel_with_red_tests_is_not_measured(benchmark, monkeypatch) -> None:
    monkeypatch.setattr(verify, "is_green", lambda device: False)
    monkeypatch.setattr(benchmark, "run", lambda *_: pytest.fail("measured all the same"))
    with pytest.raises(SystemExit, match=r"those of the cpu kernel are not green .* call the benchmark with --unverif"):
        benchmark.main([])


def test_a_green_kernel_gets_ratios_a_summary_and_a_picture(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(verify, "is_green", lambda device: True)
    monkeypatch.setattr(layers, "LINES", LINES)
    layers.main(["--no-compile", "--repeats", "3", "--seconds", "0", "--out", str(tmp_path)])
    assert "images, channels_last: step" in capsys.readouterr().out
    assert 0 < (tmp_path / "layers.png").stat().st_size < 2**20


# ------------------------------------------------------------------- verify


def test_only_a_green_run_is_remembered(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("LIGHTNING_BLN_CACHE", str(tmp_path))
    red = [sys.executable, "-c", "print('1 failed'); raise SystemExit(1)"]
    assert not verify.is_green("cpu", red)
    assert "1 failed" in capsys.readouterr().out
    assert verify.is_green("cpu", [sys.executable, "-c", ""])
    assert verify.is_green("cpu", red), "remembered, not run"
    assert not verify.is_green("cuda", red), "another device's kernel"


def test_a_changed_source_is_tested_anew(tmp_path: Path) -> None:
    (tmp_path / "ops" / "__pycache__").mkdir(parents=True)
    source = tmp_path / "ops" / "cpu.cpp"
    source.write_text("1")

    def fingerprint() -> str:
        return verify.fingerprint("cpu", tmp_path, ["ops"])

    before = fingerprint()
    (tmp_path / "ops" / "__pycache__" / "cpu.pyc").write_text("compiled")
    assert fingerprint() == before
    source.write_text("2")
    assert fingerprint() != before
    source.write_text("1")
    assert fingerprint() == before
    source.rename(source.with_name("cuda.py"))
    assert fingerprint() != before


def test_what_is_verified_exists() -> None:
    assert [path for path in (*verify.TESTS, *verify.SOURCES) if not (verify.ROOT / path).exists()] == []


# --------------------------------------------------- summary, plots, models


def test_the_summary_is_the_geometric_mean_and_the_worst_shape() -> None:
    rows = quick_rows()
    own = [row for row in rows if row["contender"] == "bln" and row["mode"] == "forward_backward"]
    other = [row | {"shape": "other", "vs_bn": own[0]["vs_bn"] * 4} for row in own]
    batch_norm = [row | {"shape": "other"} for row in rows if row["contender"] == "bn"]
    found = summary.layer_findings([*rows, *other, *batch_norm])
    (step,) = (finding for finding in found if finding.what == "images, channels_last: step")
    assert (step.against, step.target) == ("BatchNorm2d", 1.0)
    cell = step.cells["float32"]
    assert cell.mean == pytest.approx(2 * own[0]["vs_bn"])
    assert (cell.worst, cell.where, cell.count) == (other[0]["vs_bn"], "other", 2)
    (line,) = (line for line in summary.as_markdown(found) if "channels_last: step" in line)
    assert line == f"| images, channels_last: step | BatchNorm2d | {cell.mean:.2f} (at most {cell.worst:.2f}: other) |"
    (saved,) = (finding for finding in found if finding.what == "images: saved for backward")
    norm = next(row for row in batch_norm if row["mode"] == "forward_backward")
    assert saved.cells["float32"].mean == pytest.approx(own[0]["saved_bytes"] / norm["saved_bytes"])


def test_no_summary_and_no_picture_without_ratios(tmp_path: Path) -> None:
    rows = quick_rows(ratios=False)
    assert summary.layer_findings(rows) == []
    plots.plot_layers(rows, tmp_path / "layers.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_a_workload_is_measured_as_it_was_and_swapped(norm) -> None:
    work = models.Workload("GRU", lambda: models.GRUClassifier(norm, features=4), (3, 5))
    original, swapped = models.measure_workload(work, "cpu", rounds=3, seconds=0, ratios=True)
    assert (original["contender"], swapped["contender"]) == ("original", "swapped")
    assert (original["norms"], original["vs_original"]) == (2, 1)
    assert swapped["peak_bytes"] > 0
    printed = Console(width=200)
    with printed.capture() as capture:
        printed.print(models.table([original, swapped]))
    assert f"{swapped['vs_original']:.3f} (" in capture.get()


def test_images_of_a_workload_have_its_layout() -> None:
    x = models.Workload("any", nn.Identity, (2, 3, 4, 4), "channels_last").input("cpu")
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert {work.dtype for work in models.workloads("cpu")} == {"float32"}
    assert {work.dtype for work in models.workloads("cuda")} == {"float32", "bfloat16"}


@pytest.mark.slow
def test_first_use_is_measured_in_fresh_processes() -> None:
    rows = first_use.run(1)
    assert [(row["cache"], row["stage"]) for row in rows] == [
        (cache, stage) for cache in ("empty", "filled") for stage in first_use.STAGES
    ]
    assert all(row["seconds"] >= 0 and row["processes"] == 1 for row in rows)


def test_first_use_is_what_an_empty_cache_costs_more() -> None:
    rows = [
        {"cache": cache, "stage": stage, "seconds": seconds}
        for cache, times in (("empty", (9, 1, 4, 0.5)), ("filled", (5, 1, 0.25, 0.25)))
        for stage, seconds in zip(first_use.STAGES, times, strict=True)
    ]
    assert first_use.in_short(rows) == (
        "first use, beyond a later one: 4.00 s (target: 10); loading the kernel later: 0.250 s (target: 0.1)"
    )


# ---------------------------------------------------------------------- run


def test_options_go_to_the_one_benchmark_that_is_named(monkeypatch) -> None:
    called = []
    monkeypatch.setattr(run, "BENCHMARKS", {"a": lambda options: called.append(("a", options)), "b": called.append})
    monkeypatch.setattr(run.readme, "main", lambda arguments: 0)
    assert run.main(["a", "--only", "b"]) == 0
    assert called == [("a", ["--only", "b"])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--quick"], "options follow the name of one benchmark"), (["speed"], "a benchmark is one of preserve, ")],
)
def test_run_says_what_it_can_run(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert message in capsys.readouterr().err


def test_the_committed_results_hold_ratios_and_are_small() -> None:
    for path in timing.RESULTS.glob("layers*"):
        assert path.stat().st_size < 10**6
    rows = timing.read_csv(timing.RESULTS / "layers.csv")
    assert all(row["vs_bn"] is not None for row in rows)
