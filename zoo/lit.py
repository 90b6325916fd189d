"""Train and test the zoo's models with Lightning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import Accuracy

from lightning_bln import start_epoch
from lightning_bln.optim import matched_gain_groups
from lightning_bln.surgery import bln_layers
from zoo._registry import create_model
from zoo._weights import full_name, get_weights
from zoo.data.loader import generator_for
from zoo.distillation import Teachers, distillation_loss
from zoo.twins import load_twin_

Batch = tuple[Tensor, ...]


class LitClassifier(pl.LightningModule):
    """A model of the zoo, trained on batches of (inputs..., labels) and tested by its accuracy.

    SGD with Nesterov's momentum, or Adam with decoupled decay (AdamW); the rate rises linearly to ``lr`` and falls
    linearly to zero (or stays, with ``schedule="constant"``). Biases and the weights of norms are not decayed.
    Cross-entropy, or binary cross-entropy where the model has one output. Random numbers of each training step depend
    on the seed of the process (``seed_everything``), the epoch and the batch only, so that a run that was resumed
    equals one that was not. Each epoch begins population statistics afresh; on several devices give the Trainer a
    `BLNSwap` too, which merges them.

    Logs train_loss, and of validation and test the loss and the accuracy (0 to 1).

    Args:
        model: One of ``zoo.list_models()``.
        weights: What to start from: a tag of the model's own weights, such as "cifar10", or ``arch.tag`` of the same
            network with other norms, whose parameters are taken over and whose statistics are not, so that the model
            must be trained before it is of use; see `zoo.twins.load_twin_`. Default None: a fresh start.
        num_classes: Default None: that of the weights, else 10.
        optimizer: "sgd" (default) or "adam".
        lr: The highest learning rate. Default 0.1.
        momentum: Of SGD. Default 0.9.
        weight_decay: Default 0: none.
        matched_gains: The gains of BLN layers, weight / sqrt(C), learn as fast as BatchNorm's, see
            `lightning_bln.optim.matched_gain_groups`; with one rate for all they would be C times slower with SGD,
            sqrt(C) times with Adam. Default False.
        schedule: "triangle" (default) or "constant".
        warmup: The share of steps in which the rate rises. Default 0.2.
        bf16: Train under bfloat16 autocast: True, False or "auto" (default), on GPUs and CPUs that compute in it.
            Validation and test are always in float32.
        channels_last: Keep image models in this memory format. Default True.
        teachers: Names of weights, such as ["resnet20_bn.cifar10"], whose averaged probabilities on each training batch
            are learned beside the labels, see `zoo.distillation.distillation_loss`. Default None: labels only.
            Inputs must be standardised as in their trainings; with the zoo's data modules that is checked.
        mirror_teachers: Average the teachers' probabilities over each image and its mirror image. Default False.
        distillation: The share of the teachers in the loss. Default 0.9.
        temperature: Of the teachers' probabilities. Default 2.
        model_kwargs: More arguments of the model.

    Raises:
        ValueError: If an argument is none of these; when training begins, if the teachers do not fit the model or the
            data.

    Example:
        >>> module = LitClassifier("resnet20_bln", lr=0.2)
    """

    def __init__(
        self,
        model: str,
        weights: str | None = None,
        num_classes: int | None = None,
        optimizer: str = "sgd",
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        matched_gains: bool = False,
        schedule: str = "triangle",
        warmup: float = 0.2,
        bf16: bool | str = "auto",
        channels_last: bool = True,
        teachers: list[str] | None = None,
        mirror_teachers: bool = False,
        distillation: float = 0.9,
        temperature: float = 2.0,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"optimizer must be 'sgd' or 'adam', got {optimizer!r}.")
        if schedule not in ("triangle", "constant"):
            raise ValueError(f"schedule must be 'triangle' or 'constant', got {schedule!r}.")
        if not 0 <= distillation <= 1 or not temperature > 0:
            raise ValueError(
                f"distillation must be from 0 to 1 and temperature above 0, got {distillation!r} and {temperature!r}."
            )
        if mirror_teachers and teachers is None:
            raise ValueError(
                'mirror_teachers must come with teachers, got none; pass teachers=["resnet20_bn.cifar10"].'
            )
        # Of the model itself or of its twin.
        start = None if weights is None else get_weights(full_name(model, weights))
        if num_classes is None:
            num_classes = 10 if start is None else int(start.metadata["arguments"]["num_classes"])
        self.save_hyperparameters(ignore="weights")
        self.hparams["num_classes"] = num_classes
        self._teachers: Teachers | None = None
        self._start = weights
        self.seed = torch.initial_seed()
        self._random_state = torch.get_rng_state()
        own = None if start is None or start.arch != model else start
        self.model = create_model(model, weights=own, num_classes=num_classes, **(model_kwargs or {}))
        if start is not None and own is None:
            load_twin_(self.model, start.name)
        if channels_last and any(isinstance(module, nn.Conv2d) for module in self.model.modules()):
            self.model.to(memory_format=torch.channels_last)
        task: Any = "binary" if num_classes == 1 else "multiclass"
        self.metrics = nn.ModuleDict({stage: Accuracy(task, num_classes=num_classes) for stage in ("val", "test")})

    def forward(self, *inputs: Tensor) -> Tensor:
        """The model's outputs."""
        return self.model(*self._as_the_model_takes(inputs))

    def _as_the_model_takes(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        if self.hparams["channels_last"] and inputs[0].ndim == 4:
            return inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]
        return inputs

    def on_fit_start(self) -> None:
        """Teachers are needed in training only."""
        if self.hparams["teachers"] is not None:
            self._teachers = Teachers(self.hparams["teachers"], self.hparams["mirror_teachers"])
            self._teachers.check(self.hparams["num_classes"], getattr(self.trainer, "datamodule", None))
            self._teachers.load_(self.device)

    def on_fit_end(self) -> None:
        """Their memory is free again."""
        self._teachers = None

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Dropout of this step: neither what came before nor a break between two steps may change it."""
        if bln_layers(self.model):
            start_epoch(self.model, self.current_epoch)  # does nothing within an epoch
        numbers = (self.current_epoch, batch_idx, self.global_rank)
        self._random_state = torch.get_rng_state()
        torch.manual_seed(generator_for(self.seed, *numbers).initial_seed())

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """The process's generator goes on where it was."""
        torch.set_rng_state(self._random_state)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The seed, for a run that goes on in another process, and the weights that it began with."""
        checkpoint["zoo_seed"] = self.seed
        checkpoint["zoo_start"] = self._start

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As it was saved."""
        self.seed = checkpoint.get("zoo_seed", self.seed)
        self._start = checkpoint.get("zoo_start", self._start)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        *inputs, labels = batch
        bf16 = self.hparams["bf16"]
        enabled = computes_in_bf16(self.device) if bf16 == "auto" else bool(bf16)
        taken = self._as_the_model_takes(inputs)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            outputs = self(*taken)
            teachers, temperature = self._teachers, self.hparams["temperature"]
            targets = None if teachers is None else teachers.probabilities(taken, temperature)
        outputs = outputs.float()
        if targets is None:
            loss = self.loss(outputs, labels)
        else:
            loss = distillation_loss(outputs, labels, targets, self.hparams["distillation"], temperature)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and accuracy."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The outputs of (inputs..., labels)."""
        *inputs, _ = batch
        return self(*inputs)

    def _evaluate(self, batch: Batch, stage: str) -> None:
        *inputs, labels = batch
        outputs = self(*inputs)
        accuracy: Any = self.metrics[stage]
        # torchmetrics takes logits that all lie in [0, 1] for probabilities.
        accuracy((outputs.squeeze(1) > 0).long() if outputs.shape[1] == 1 else outputs, labels)
        self.log(f"{stage}_loss", self.loss(outputs, labels), batch_size=len(labels), prog_bar=True, sync_dist=True)
        self.log(f"{stage}_accuracy", accuracy, batch_size=len(labels), prog_bar=True)

    @staticmethod
    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, averaged over the samples."""
        if outputs.shape[1] == 1:
            return F.binary_cross_entropy_with_logits(outputs.squeeze(1), labels.to(outputs.dtype))
        return F.cross_entropy(outputs, labels)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Weights of layers decay, the rest does not; the gains of BLN layers may have rates of their own."""
        hparams = self.hparams
        lr = hparams["lr"]
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": hparams["weight_decay"]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        gains = [layer.weight for layer in bln_layers(self.model).values() if layer.weight is not None]
        if hparams["matched_gains"] and any(gain.requires_grad for gain in gains):
            groups = matched_gain_groups(self.model, groups, lr=lr, adaptive=hparams["optimizer"] == "adam")
        optimizer: torch.optim.Optimizer
        if hparams["optimizer"] == "sgd":
            momentum = hparams["momentum"]
            optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
        else:
            # Without a default of its own for groups that are added later, as in fine-tuning.
            optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.0)
        if hparams["schedule"] == "constant":
            return optimizer
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=hparams["warmup"],
            anneal_strategy="linear",
            cycle_momentum=False,
            div_factor=10,
            final_div_factor=1e4,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there; on older CPUs it is emulated, and slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return False
