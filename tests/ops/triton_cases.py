"""The Triton kernels against the reference; run by test_cuda.py in a process of its own, in one of three ways.

TRITON_CASES=interpret: on CPU tensors in Triton's interpreter. TRITON_CASES=compile: nothing runs, everything that the
kernels are launched with is compiled for a Hopper GPU, which the interpreter does not do. TRITON_CASES=cuda: on a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable

import pytest
import torch
import triton
from conftest import LAYOUTS, Layout
from test_library import BACKWARD, FORWARD, MODES, TRAINING, check_gradients, chosen_population
from tolerances import SUMMED, assert_close
from torch import Tensor

from lightning_bln import batch_layer_norm
from lightning_bln.ops import cuda, reference
from lightning_bln.ops.reference import Population

WAY = os.environ["TRITON_CASES"]
DEVICE = "cuda" if WAY == "cuda" else "cpu"
HALVES = (torch.bfloat16, torch.float16)

runs = pytest.mark.skipif(WAY == "compile", reason="needs the interpreter or a GPU")
compiles = pytest.mark.skipif(WAY != "compile", reason="needs a driver that launches nothing")
gpu = pytest.mark.skipif(WAY != "cuda", reason="needs a GPU")

# Blocks smaller than the inputs here: every axis is split, the loop over samples repeats, there are several waves.
SMALL = cuda.Plan(block_n=2, block_c=4, block_p=2, samples=4, wave=1)


@pytest.fixture(autouse=True)
def _plans_are_made_anew():
    cuda.prepare.cache_clear()
    yield
    cuda.prepare.cache_clear()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "plan", lambda *_, **__: SMALL)


def compare(
    x: Tensor,
    axis: int,
    per_channel: bool,
    population: Population = Population(),  # noqa: B008
    *,
    affine: bool = True,
    nominal: int | None = 3,
    recompute: tuple[bool | str, bool] = (False, False),  # "variance": the batch mean was saved without it
    grad_y: Tensor | None = None,
) -> None:
    """Outputs, own statistics and gradients against the reference's, strides and shapes too."""
    x = x.to(DEVICE) if x.device.type != DEVICE else x
    population = Population(*(None if stat is None else stat.to(DEVICE) for stat in population))
    weight, bias = (torch.randn(x.shape[axis], device=DEVICE) if affine else None for _ in range(2))
    batch_size = None if nominal is None else torch.tensor(nominal, device=DEVICE)
    rest = (*population, batch_size, axis, per_channel, 1e-3)
    settings = (population, *rest[4:])

    y, *own = cuda.forward(x, weight, bias, *rest)
    expected, expected_own = reference.normalize(x, weight, bias, *settings)
    assert_close(y, expected)
    assert y.stride() == torch.empty_like(x).stride()
    for ours, theirs in zip(own, expected_own, strict=True):
        assert_close(ours, theirs)
        assert ours.is_contiguous()
        assert ours.dtype == theirs.dtype

    grad_y = torch.randn(x.shape, dtype=x.dtype, device=DEVICE) if grad_y is None else grad_y.to(DEVICE)
    missing = [recompute[0] is True, bool(recompute[0]), recompute[1], recompute[1]]
    gone = [stat.new_empty(0) if absent else stat for absent, stat in zip(missing, own, strict=True)]
    grad_x, *sums = cuda.backward(grad_y, x, weight, *gone, *rest)
    expected_x, *expected_sums = reference.gradients(grad_y, x, weight, expected_own, *settings)
    assert_close(grad_x, expected_x)
    assert grad_x.stride() == torch.empty_like(x).stride()
    for ours, theirs in zip(sums, expected_sums, strict=True):
        assert_close(ours, theirs, table=SUMMED)
        assert ours.dtype == theirs.dtype


@runs
@pytest.mark.usefixtures("_poisoned_memory")
class TestAgainstTheReference:
    def test_layouts(self, layout: Layout, statistics: str):
        compare(layout.input(), layout.axis, statistics == "per_channel", recompute=(True, True))

    def test_layouts_with_a_population(self, layout: Layout):
        x = layout.input()
        compare(x, layout.axis, False, chosen_population(x, layout.axis, False, "FTFT"))

    @pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[1], LAYOUTS[2]], ids=str)
    @pytest.mark.usefixtures("small_blocks")
    def test_layouts_in_small_blocks(self, layout: Layout, statistics: str):
        compare(layout.input(T=3), layout.axis, statistics == "per_channel")

    @pytest.mark.parametrize(
        ("mode", "feature"), list(zip(MODES, itertools.cycle(("slot", "pooled", "scalar")), strict=False))
    )
    def test_settings(self, statistics: str, mode: str, feature: str):
        per_channel = statistics == "per_channel"
        x = torch.randn(5, 7, 3)
        compare(x, 1, per_channel, chosen_population(x, 1, per_channel, mode, feature))

    @pytest.mark.parametrize("mode", ["TTFF", "FTTF"])
    @pytest.mark.usefixtures("small_blocks")
    def test_settings_in_small_blocks(self, statistics: str, mode: str):
        per_channel = statistics == "per_channel"
        x = torch.randn(5, 7, 3)
        compare(x, 1, per_channel, chosen_population(x, 1, per_channel, mode), recompute=(True, True))

    @pytest.mark.parametrize(
        "recompute", [(True, False), ("variance", False), (False, True)], ids=["batch", "batch variance", "feature"]
    )
    @pytest.mark.parametrize("mode", [TRAINING, "TFTF", "FTFT"])
    def test_a_pair_of_own_statistics_that_was_not_saved(self, mode: str, recompute: tuple[bool | str, bool]):
        x = torch.randn(5, 7, 3)
        compare(x, 1, False, chosen_population(x, 1, False, mode), recompute=recompute)

    @pytest.mark.parametrize("dtype", [torch.float64, *HALVES], ids=str)
    @pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3], LAYOUTS[4]], ids=str)
    def test_dtypes(self, layout: Layout, dtype: torch.dtype):
        compare(layout.input(dtype), layout.axis, False, recompute=(True, False))

    @pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
    @pytest.mark.parametrize("nominal", [None, 0, 8])
    def test_affine_and_nominal_batch_size(self, affine: bool, nominal: int | None):
        compare(torch.randn(4, 3, 5), 1, False, affine=affine, nominal=nominal)

    @pytest.mark.parametrize(
        "shape", [(1, 1), (1, 7), (50, 1), (63, 50), (1, 3, 5), (5, 1, 3), (5, 3, 1), (3, 50, 63), (2, 1, 1)], ids=str
    )
    def test_sizes(self, statistics: str, shape: tuple[int, ...]):
        compare(torch.randn(shape), 1, statistics == "per_channel", recompute=(True, True))

    @pytest.mark.parametrize("shape", [(0, 3, 2), (4, 3, 0), (0, 3)], ids=str)
    def test_empty(self, statistics: str, shape: tuple[int, ...]):
        compare(torch.randn(shape), 1, statistics == "per_channel")

    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.randn(4, 6, 5)[:, ::2, 1:],
            lambda: torch.randn(5, 3, 4).transpose(0, 2),
            lambda: torch.randn(5, 4, 3).transpose(0, 1),
            lambda: torch.randn(4, 3, 5, 2).transpose(2, 3),
            lambda: torch.randn(4, 3, 1).expand(4, 3, 5),
            lambda: torch.randn(1, 3, 5).expand(4, 3, 5),
            lambda: torch.randn(5, 4).T,
        ],
        ids=["sliced", "transposed", "sequence first", "positions", "expanded", "samples expanded", "dense transposed"],
    )
    @pytest.mark.parametrize("mode", [TRAINING, "TFFT"])
    def test_strides(self, make: Callable[[], Tensor], mode: str):
        x = make()
        compare(x, 1, False, chosen_population(x, 1, False, mode))
        if x.ndim == 3:
            compare(x, 2, False, chosen_population(x, 2, False, mode), recompute=(True, True))

    @pytest.mark.parametrize(
        "grad_y",
        [torch.ones(()).expand(4, 3, 5), torch.randn(5, 3, 4).transpose(0, 2), torch.randn(4, 3, 10)[..., ::2]],
        ids=["expanded", "transposed", "strided"],
    )
    def test_gradients_with_other_strides(self, grad_y: Tensor):
        compare(torch.randn(4, 3, 5), 1, False, grad_y=grad_y)

    def test_population_of_the_other_kind(self):
        """Per-position population statistics beside per-channel ones of the mini-batch, and the reverse."""
        x = torch.randn(5, 7, 3)
        compare(x, 1, True, Population(batch_var=torch.rand(7, 3) + 0.5))
        compare(x, 1, True, Population(batch_mean=torch.randn(7, 3)), recompute=(True, True))
        compare(x, 1, False, Population(batch_var=torch.rand(7) + 0.5, feature_mean=torch.randn(5, 3)))

    def test_offsets_of_64_bits(self, statistics: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(cuda, "LARGE", 0)
        compare(torch.randn(5, 7, 3), 1, statistics == "per_channel", recompute=(True, True))

    @pytest.mark.parametrize("blocks", [(16, 2, 4, 16, 1), (1, 8, 1, 3, 2), (4, 2, 4, 4, 1)], ids=str)
    def test_blocks(self, blocks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(cuda, "plan", lambda *_, **__: cuda.Plan(*blocks))
        compare(torch.randn(5, 7, 3), 1, False, recompute=(True, True))


@runs
@pytest.mark.parametrize(("samples", "statistics"), [(16, "per_position"), (63, "per_channel"), (1000, "per_position")])
def test_a_large_mean_survives_in_float32_as_in_batch_norm(samples: int, statistics: str):
    per_channel = statistics == "per_channel"
    x = (torch.randn(samples, 8, 5) + 1e4).to(DEVICE)
    weight = torch.full((8,), 8**0.5, device=DEVICE)
    rest = (None, None, None, None, None, None, 1, per_channel, 1e-3)
    ours = (cuda.forward(x, weight, *rest)[0].double() - cuda.forward(x.double(), weight, *rest)[0]).abs().max()
    flat = x if per_channel else x.flatten(1)

    def batch_norm(value: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(value, None, None, training=True, eps=1e-3)

    assert ours <= 2 * (batch_norm(flat).double() - batch_norm(flat.double())).abs().max()


@gpu
def test_repeated_runs_give_the_same_bits():
    x, grad_y = torch.randn(2, 500, 50, 63, device=DEVICE)
    rest = (None, None, None, None, None, 1, False, 1e-3)
    first, second = (cuda.forward(x, None, None, *rest) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    first, second = (cuda.backward(grad_y, x, None, *first[1:], *rest) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@runs
def test_a_plan_covers_the_input_and_fits():
    for N, C, P in ((1, 1, 1), (32, 2048, 49), (512, 64, 1024), (4096, 8192, 1), (2, 3, 50176), (128, 64, 12544)):
        for itemsize in (2, 4, 8):
            for inner in (True, False):
                cut = cuda.plan(N, C, P, itemsize, channels_inner=inner, waves=True, tensors=2)
                assert cut.block_n * cut.block_c * cut.block_p <= cuda.TILE
                assert cut.samples % cut.block_n == 0
                assert 1 <= cut.wave <= -(-P // cut.block_p)


class Driver:
    """Of a Hopper GPU that is not there."""

    def get_current_target(self) -> object:
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


class UnderstoodError(Exception):
    """Triton has translated and verified a kernel; its optimisers and the assembler would come next."""


def understood(*_: object) -> None:
    raise UnderstoodError


def warm_up(kernel: triton.runtime.JITFunction, grid: tuple[int]) -> Callable[..., None]:
    def call(*args: object, **kwargs: object) -> None:
        with contextlib.suppress(UnderstoodError):
            kernel.warmup(*args, grid=grid, **kwargs)

    return call


@compiles
class TestCompiling:
    """The interpreter takes what the compiler does not, such as a variable that changes its shape in a loop."""

    @pytest.fixture(autouse=True)
    def _nothing_is_launched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        triton.runtime.driver.set_active(Driver())
        monkeypatch.setattr(triton.runtime.JITFunction, "__getitem__", warm_up)

    @pytest.fixture
    def translate_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(triton.backends.nvidia.compiler.CUDABackend, "make_ttgir", staticmethod(understood))

    @staticmethod
    def compile(x: Tensor, per_channel: bool, mode: str) -> None:
        weight = torch.ones(x.shape[1])
        rest = (*chosen_population(x, 1, per_channel, mode), torch.tensor(3), 1, per_channel, 1e-3)
        _, *own = cuda.forward(x, weight, weight, *rest)
        cuda.backward(x, x, weight, *own, *rest)
        cuda.backward(x, x, None, *(stat.new_empty(0) for stat in own), *rest)

    def test_to_machine_code(self):
        self.compile(torch.randn(5, 7, 3).bfloat16(), False, TRAINING)

    @pytest.mark.parametrize("mode", [TRAINING, "FTFT", "TFTF", "TTFF", "FFTT", "TTTT"])
    @pytest.mark.usefixtures("translate_only")
    def test_settings(self, statistics: str, mode: str):
        self.compile(torch.randn(5, 7, 3), statistics == "per_channel", mode)

    @pytest.mark.parametrize("shape", [(50, 63), (1, 1), (5, 1, 3), (5, 7, 1), (1, 16, 16)], ids=str)
    @pytest.mark.usefixtures("translate_only")
    def test_sizes(self, shape: tuple[int, ...]):
        self.compile(torch.randn(shape), False, TRAINING)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
    @pytest.mark.usefixtures("translate_only")
    def test_dtypes_and_channels_last(self, dtype: torch.dtype):
        x = torch.randn(16, 16, 4, 4).to(dtype)
        self.compile(x.to(memory_format=torch.channels_last), False, TRAINING)

    @pytest.mark.usefixtures("translate_only")
    def test_offsets_of_64_bits(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(cuda, "LARGE", 0)
        self.compile(torch.randn(5, 7, 3), False, TRAINING)


@gpu
@pytest.mark.usefixtures("_poisoned_memory")
class TestTheOpOnAGPU:
    def test_it_is_this_kernel(self):
        x = torch.randn(50, 63, 7, device="cuda")
        rest = (None, None, None, None, None, None, None, 1, False, 1e-3)
        assert all(torch.equal(a, b) for a, b in zip(FORWARD(x, *rest), cuda.forward(x, *rest), strict=True))

    @pytest.mark.parametrize("mode", [TRAINING, "TTFF", "TFFT"])
    def test_gradients(self, statistics: str, mode: str):
        per_channel = statistics == "per_channel"
        x = torch.randn(4, 3, 2, dtype=torch.float64)
        population = chosen_population(x, 1, per_channel, mode)
        population = Population(*(None if stat is None else stat.cuda() for stat in population))
        weight, bias = torch.randn(2, 3, dtype=torch.float64, device="cuda")
        check_gradients(x.cuda(), weight, bias, population, None, 1, per_channel, fast=False)

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_opcheck(self, statistics: str, memory_format: torch.memory_format):
        x = torch.randn(4, 3, 2, 5, device="cuda").to(memory_format=memory_format).requires_grad_()
        weight = torch.randn(3, device="cuda", requires_grad=True)
        rest = (None, None, None, None, torch.tensor(4, device="cuda"), 1, statistics == "per_channel", 1e-3)
        torch.library.opcheck(FORWARD, (x, weight, weight, *rest))
        with torch.no_grad():
            _, *own = FORWARD(x, weight, weight, *rest)
        torch.library.opcheck(BACKWARD, (torch.randn_like(x), x, weight, *own, *rest))

    def test_compiled(self, statistics: str):
        x = torch.randn(8, 6, 5, 5, device="cuda", requires_grad=True)
        compiled = torch.compile(batch_layer_norm, fullgraph=True)
        outputs = [f(x, statistics=statistics) for f in (batch_layer_norm, compiled)]
        assert_close(*outputs)
        assert_close(*(torch.autograd.grad(y.sin().sum(), x)[0] for y in outputs))

    def test_captured_in_a_graph(self):
        x = torch.randn(50, 63, 7, device="cuda")
        batch_size = torch.tensor(4, device="cuda")
        rest = (None, None, None, None, None, None, batch_size, 1, False, 1e-3)
        cuda.forward(x, *rest)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = cuda.forward(x, *rest)[0]
        x.normal_()
        batch_size.fill_(9)
        graph.replay()
        assert torch.equal(y, cuda.forward(x, *rest)[0])

    @pytest.mark.parametrize("shape", [(512, 64, 32, 32), (32, 2048, 7, 7), (4096, 1024), (64, 3, 224, 224)], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_real_sizes(self, shape: tuple[int, ...], dtype: torch.dtype, statistics: str):
        x = torch.randn(shape, device="cuda").to(dtype)
        per_channel = statistics == "per_channel"
        compare(x, 1, per_channel)
        if len(shape) == 4:
            compare(x.to(memory_format=torch.channels_last), 1, per_channel, recompute=(True, True))
