"""Export a model, for a mini-batch of any size, as plain PyTorch operations or as ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightning_bln.ops import reference

__all__ = ["export_onnx", "export_program"]


def export_program(model: nn.Module, example_inputs: Sequence[Tensor]) -> ExportedProgram:
    """`torch.export.export` with a dynamic batch size, each `BatchLayerNorm` as the plain operations that define it.

    The program needs no package but torch. (`torch.export.export` by itself keeps each layer as one operation, which
    runs this package's kernels.) B in the weights of a layer that was trained is its training batch size, a constant;
    statistics that the flags take from the mini-batch are those of the batch that the program is run on.

    Args:
        model: In eval mode, on the CPU or a GPU. Inference flags and population statistics are exported as they are.
        example_inputs: The model's positional arguments, all with the same number of samples along axis 0, at least 2.
            Other sizes than the batch size hold for all inputs.

    Returns:
        The program; ``program.module()`` can be called.

    Raises:
        ValueError: If the model is in train mode, or there are too few samples; for a GRU classifier also if it takes
            batch statistics from the mini-batch, which padding would enter, or has BatchNorm inside its gates.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).eval()
        >>> program = export_program(model, [torch.randn(2, 4)])
        >>> program.module()(torch.randn(5, 4)).shape
        torch.Size([5, 8])
    """
    if any(module.training for module in model.modules()):
        raise ValueError("A model must be in eval mode to be exported, got one in train mode; call model.eval() first.")
    samples = {x.shape[0] for x in example_inputs}
    if len(samples) != 1 or min(samples) < 2:
        raise ValueError(
            f"Example inputs must have one number of samples along axis 0, at least 2 so that it can be told from a "
            f"constant, got {sorted(samples)}; pass [torch.randn(2, 3, 32, 32)], say."
        )
    shapes = tuple({0: Dim.DYNAMIC} for _ in example_inputs)
    with warnings.catch_warnings():
        # torch's own recurrent layers assign a list of their parameters; the program takes the parameters.
        warnings.filterwarnings(
            "ignore", r"The tensor attributes? .*_flat_weights.* assigned during export", UserWarning
        )
        program = torch.export.export(model, tuple(example_inputs), dynamic_shapes=shapes)
    return program.run_decompositions({torch.ops.lightning_bln.batch_layer_norm.default: _definition})


def export_onnx(model: nn.Module, example_inputs: Sequence[Tensor], path: str | Path) -> None:
    """Write a model as one ONNX file with a dynamic batch size, for onnxruntime and the like.

    Inputs have the names of the arguments of ``model.forward``, the output is called "output", their first axis
    "batch". See `export_program`. Needs ``pip install onnx onnxscript``.

    Args:
        model: In eval mode.
        example_inputs: As in `export_program`.
        path: Of the file, such as "model.onnx".

    Raises:
        ValueError: As in `export_program`.

    Example:
        >>> model = zoo.create_model("resnet20_bln", weights="cifar10").eval()  # doctest: +SKIP
        >>> export_onnx(model, [torch.randn(2, 3, 32, 32)], "resnet20_bln.onnx")  # doctest: +SKIP
    """
    program = export_program(model, example_inputs)
    with warnings.catch_warnings():
        # All inputs have one name for that axis, on purpose.
        warnings.filterwarnings("ignore", "# The axis name: batch will not be used", UserWarning)
        torch.onnx.export(
            program,
            f=path,
            dynamo=True,
            output_names=["output"],
            # The program's own name for that size, such as s77, says nothing.
            dynamic_shapes=tuple({0: "batch"} for _ in example_inputs),
            external_data=False,
            verbose=False,
        )


def _definition(x: Tensor, weight: Tensor | None, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The operation's schema in terms of the reference."""
    *population, batch_size, feature_dim, per_channel, eps = rest
    y, own = reference.normalize(
        x, weight, bias, reference.Population(*population), batch_size, feature_dim, per_channel, eps
    )
    return y, *own
