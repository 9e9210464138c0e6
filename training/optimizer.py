"""AdamW, its learning-rate schedule, and a step that a bad gradient cannot spoil; its state as named tensors."""

import math
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from .settings import TrainingSettings

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def check_schedule(settings: TrainingSettings) -> None:
    """That there is a learning-rate schedule as the settings ask, before anything is loaded; raises ValueError."""
    Optimizer({"": nn.Parameter(torch.zeros(1))}, settings)


class Optimizer:
    """Updates parameters by name, in the order given."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: TrainingSettings):
        self.parameters = parameters
        self.max_grad_norm = settings.max_grad_norm
        # fused, it is told by the device to leave everything as it is
        self._fused = _on_cuda(parameters)
        self._adamw = torch.optim.AdamW(
            parameters.values(),
            fused=self._fused,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
        )
        try:
            self._schedule = transformers.get_scheduler(
                settings.lr_scheduler_type,
                self._adamw,
                num_warmup_steps=settings.warmup_steps,
                num_training_steps=settings.lr_scheduler_steps or settings.max_steps,
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"lr_scheduler_type {settings.lr_scheduler_type!r} cannot be used: {error}") from error
        if not isinstance(self._schedule, LambdaLR):
            raise ValueError(
                "lr_scheduler_type must be a schedule of the step's number alone, which a resumed run repeats, "
                f"got {settings.lr_scheduler_type!r}"
            )

    @property
    def learning_rate(self) -> float:
        return self._adamw.param_groups[0]["lr"]

    def zero_grad(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def step(self) -> torch.Tensor:
        """Clip, update and go on in the schedule; returns the gradient norm before clipping, a float32 scalar.

        Where it is not finite nothing is updated. On CUDA the device decides that, and nothing waits for it.
        """
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        first = next(iter(self.parameters.values()))
        norm = torch.nn.utils.get_total_norm(gradients) if gradients else first.new_zeros(())
        if self._fused:
            # as torch.amp.GradScaler tells it: neither weights nor moments nor its step change
            self._adamw.found_inf = torch.isfinite(norm).logical_not_().float()  # type: ignore[attr-defined]
        if self._fused or math.isfinite(norm.item()):
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.max_grad_norm, norm)
            self._adamw.step()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # a skipped first step
            self._schedule.step()
        return norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and moments, on the host."""
        found = {}
        for name, parameter in self.parameters.items():
            found[f"parameter.{name}"] = parameter.detach().cpu()
            state = self._adamw.state.get(parameter, {})
            found |= {f"{moment}.{name}": state[moment].cpu() for moment in _MOMENTS if moment in state}
        return found

    def schedule_state(self) -> dict[str, Any]:
        return {key: value for key, value in self._schedule.state_dict().items() if key != "lr_lambdas"}

    def restore(self, tensors: dict[str, torch.Tensor], schedule_state: dict[str, Any]) -> None:
        """Take the state that `tensors` and `schedule_state` gave.

        Raises:
            ValueError: the tensors are those of other parameters.
        """
        for name, parameter in self.parameters.items():
            saved = tensors.get(f"parameter.{name}")
            if saved is None or saved.shape != parameter.shape:
                raise ValueError(f"the checkpoint has no parameter {name} of shape {tuple(parameter.shape)}")
            with torch.no_grad():  # a write that torch counts: LoRA linears on a GPU look for it
                parameter.copy_(saved)
            moments = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS if f"{moment}.{name}" in tensors}
            if moments:
                # unless it is fused, adamw keeps its step on the host
                self._adamw.state[parameter] = {
                    key: value.clone() if key == "step" and not self._fused else value.to(parameter.device)
                    for key, value in moments.items()
                }
        self._schedule.load_state_dict(self._schedule.state_dict() | schedule_state)
        for group, rate in zip(self._adamw.param_groups, self._schedule.get_last_lr(), strict=True):
            group["lr"] = rate


def _on_cuda(parameters: dict[str, nn.Parameter]) -> bool:
    return next(iter(parameters.values())).is_cuda
