"""`train`: one loop for all stages.

A step is a function of the settings, the data and its number alone, so a run that was killed and resumed from a
checkpoint is bitwise the run that was not.
"""

import json
import logging
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
from accelerate import Accelerator
from tqdm import tqdm

from ..engine import ops
from ..engine.fingerprint import fingerprint
from ..engine.run_folder import EARLIER, RUN_FILE, RunDescription
from . import checkpoint
from .mask_schedule import MaskSchedule
from .optimizer import Optimizer
from .passes import Passes
from .processes import Processes
from .settings import TrainingSettings
from .stages import Stage, make_stage
from .trainee import Trainee, load_trainee

logger = logging.getLogger(__name__)

LOG = "log.jsonl"
_BUDGETS = (4096, 8192, 16384, 32768)  # tokens of a pass to choose from


@dataclass
class TrainingSummary:
    """What a run did."""

    output: str
    steps: int
    skipped: int
    tokens: int
    seconds: float
    evaluation: dict[str, float]

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.evaluation.items())
        return (
            f"{self.steps:,} steps, {self.tokens:,} tokens in {self.seconds:,.1f} s "
            f"({self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s), {self.skipped} skipped"
            f"{': ' + figures if figures else ''}: {self.output}"
        )


def train(settings: TrainingSettings) -> TrainingSummary:
    """Run one stage into `settings.output`; under torchrun, one process of it.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: settings, data or a model that cannot work, naming the field,
            the file or the line.
        RuntimeError: `max_skipped_steps` steps in a row had no finite gradient.
        OSError: a checkpoint cannot be written; those before it are whole.
    """
    output = Path(settings.output)
    device = ops.choose_device(settings.device)
    accelerator = Accelerator(
        cpu=device.type == "cpu", log_with=settings.report_to or None, project_dir=str(output), mixed_precision="no"
    )
    _check_output(output, settings)
    saved = _find_checkpoint(output, settings)
    with torch.random.fork_rng(devices=[]):
        run = _Run(settings, accelerator, output, saved)
        accelerator.wait_for_everyone()  # all have looked at the output, and nothing is wrong with model and data
        run.open_output()
        try:
            with _terminated() as terminated:
                return run.train(terminated)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"out of memory at a token_budget of {run.passes.token_budget}: choose a smaller one, "
                "or gradient_checkpointing; the batch and the result stay the same to rounding"
            ) from error


class _Run:
    def __init__(
        self, settings: TrainingSettings, accelerator: Accelerator, output: Path, saved: checkpoint.Saved | None
    ):
        self.settings = settings
        self.accelerator = accelerator
        self.output = output
        self.processes = Processes(accelerator)
        self.trainee = load_trainee(settings, accelerator.device)
        self.passes = Passes(
            self.trainee,
            token_budget=_token_budget(settings, self.trainee, saved),
            attention_dropout=settings.attention_dropout,
            checkpoint_activations=settings.gradient_checkpointing,
            seed=settings.seed,
        )
        self.stage: Stage = make_stage(settings, self.passes, self.processes)
        self.model_files = {}
        if accelerator.is_main_process:  # the one that saves and compares
            with_weights = not getattr(settings, "random_weights", False)
            self.model_files = fingerprint(self.trainee.checkpoint, weights=with_weights)
        self.schedule = MaskSchedule(
            settings.mask_schedule,
            settings.mask_schedule_steps or max(1, settings.max_steps // 2),
            settings.max_length,
            self.trainee.config,
        )
        self.optimizer = Optimizer(self.trainee.parameters, settings)
        self.step = self.skipped = self.skipped_in_a_row = self.tokens = 0
        self.evaluation: dict[str, float] = {}
        if saved is not None:
            self._restore(saved)

    def open_output(self) -> None:
        main = self.accelerator.is_main_process
        if main:
            _clear_output(self.output, self.settings)
        self.log = _Log(self.output / LOG, main, self.step)

    def train(self, terminated: threading.Event) -> TrainingSummary:
        settings, main = self.settings, self.accelerator.is_main_process
        if settings.report_to:
            self.accelerator.init_trackers("bivec", config=_flat(settings.shaping_the_result()))
        began, first_tokens = time.perf_counter(), self.tokens
        if self.step == 0:
            self.log.write({"step": 0, "settings": settings.shaping_the_result(), "versions": _versions()})
            self._evaluate()
        bar = tqdm(total=settings.max_steps, initial=self.step, unit="step", disable=not (main and sys.stderr.isatty()))
        with bar:
            while self.step < settings.max_steps:
                losses, norm, rate = self._train_step()
                bar.update()
                last = self.step == settings.max_steps
                if self.step % settings.logging_steps == 0 or last or not math.isfinite(norm):
                    figures = self._record(losses, norm, rate)
                    bar.set_postfix(loss=f"{figures['loss']:.4f}")
                if self.step % settings.eval_steps == 0 or last:
                    self._evaluate()
                stop = bool(self.processes.sum(terminated.is_set())[0])  # every process must know of the end of one
                if self.step % settings.save_steps == 0 or last or stop:
                    self._save()
                if stop:
                    raise SystemExit(143)
        if main:
            self.trainee.save(self.output, self._description())
        if self.processes.group is not None:
            self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        seconds = time.perf_counter() - began
        return TrainingSummary(
            str(self.output), self.step, self.skipped, self.tokens - first_tokens, seconds, self.evaluation
        )

    def _train_step(self) -> tuple[dict[str, torch.Tensor], float, float]:
        """One update; returns this process's part of the losses, the gradient norm, and the learning rate it took."""
        rate = self.optimizer.learning_rate
        self.optimizer.zero_grad()
        figures = self.stage.objective.train(self.step, self.schedule(self.step))
        self.processes.sum_gradients(self.trainee.parameters.values())
        norm = self.optimizer.step()
        self.step += 1
        self.tokens += int(self.processes.sum(self.passes.take_count())[0])
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row == self.settings.max_skipped_steps:
                raise RuntimeError(
                    f"{self.skipped_in_a_row} steps in a row, the last of them {self.step}, had no finite gradient: "
                    "choose a smaller learning_rate, or dtype float32"
                )
        return figures, norm, rate

    def _record(self, losses: dict[str, torch.Tensor], norm: float, rate: float) -> dict[str, Any]:
        sums = self.processes.sum(*(loss.item() for loss in losses.values()))
        figures: dict[str, Any] = dict(zip(losses, sums, strict=True))
        figures |= {"grad_norm": norm, "learning_rate": rate, "skipped": self.skipped, "tokens": self.tokens}
        self.log.write({"step": self.step} | figures)
        if self.settings.report_to:
            self.accelerator.log(figures, step=self.step)
        return figures

    def _evaluate(self) -> None:
        """Held-out figures into the log, with the mask that the run trains for."""
        if self.stage.evaluation is None:
            return
        mask = self.schedule(self.schedule.num_steps)
        totals: dict[str, float] = {}
        for batch in range(self.stage.num_evaluation_batches):
            for name, value in self.stage.evaluation.evaluate(batch, mask).items():
                totals[name] = totals.get(name, 0.0) + value
        totals = dict(zip(totals, self.processes.sum(*totals.values()), strict=True))
        count = max(totals.pop("count"), 1)
        self.evaluation = {
            "eval_loss": totals["loss"] / count,
            "eval_accuracy": totals["correct"] / count,
        }
        self.log.write({"step": self.step} | self.evaluation)
        if self.settings.report_to:
            self.accelerator.log(self.evaluation, step=self.step)

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "tokens": self.tokens,
            "token_budget": self.passes.token_budget,
            "schedule": self.optimizer.schedule_state(),
            "settings": self.settings.shaping_the_result(),
            "data": self.stage.fingerprint,
            "model": self.model_files,
            "evaluation": self.evaluation,
            "versions": _versions(),
        }
        self.log.sync()
        checkpoint.save(self.output, self.step, self.optimizer.tensors(), state, self.settings.save_total_limit)

    def _restore(self, saved: checkpoint.Saved) -> None:
        state = saved.state
        if state["data"] != self.stage.fingerprint:
            raise ValueError(f"{saved.path} was trained on other data than {', '.join(self.settings.data)}")
        before = state.get("model", {})
        changed = [part for part, now in self.model_files.items() if before.get(part) != now]
        if changed:
            raise ValueError(
                f"{saved.path} was trained with other files of the model {self.settings.model}: "
                f"changed since: {', '.join(changed)}"
            )
        try:
            self.optimizer.restore(saved.tensors, state["schedule"])
        except ValueError as error:
            raise ValueError(f"{saved.path} does not fit: {error}") from error
        self.step, self.skipped, self.tokens = state["step"], state["skipped"], state["tokens"]
        self.skipped_in_a_row, self.evaluation = state["skipped_in_a_row"], state["evaluation"]
        if state["versions"] != _versions():
            logger.warning("%s was written with %s; bits may differ", saved.path, state["versions"])

    def _description(self) -> RunDescription:
        settings, trainee = self.settings, self.trainee
        return RunDescription(
            stage=settings.stage,
            base_model=None if trainee.adapter is None else trainee.base_name,
            earlier=tuple(f"{EARLIER}/{place}" for place in range(1, len(trainee.earlier) + 1)),
            window=self.schedule.final_window,
            pooling=getattr(settings, "pooling", "mean"),
            instruction=getattr(settings, "instruction", None) or "",
            symmetric_instruction=getattr(settings, "symmetric_instruction", False),
            readout_shift=int(settings.stage == "mntp"),
        )


class _Log:
    """`log.jsonl`: a line an entry. Lines beyond the step that a run resumes from are taken out: they come again."""

    def __init__(self, path: Path, active: bool, step: int):
        self._file = None
        if not active:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if step and path.is_file() else []
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines if _step_of(line) <= step)
        temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, entry: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()

    def sync(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())


def _step_of(line: str) -> float:
    """The step of a line of the log; a line that a crash has torn belongs to none."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _find_checkpoint(output: Path, settings: TrainingSettings) -> checkpoint.Saved | None:
    """The checkpoint to go on from, None to begin."""
    saved = checkpoint.newest(output) if settings.resume else None
    if saved is None:
        return None
    before, now = saved.state["settings"], json.loads(json.dumps(settings.shaping_the_result()))
    changed = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(f"{saved.path} is of another configuration: {'; '.join(changed)}")
    return saved


def _check_output(output: Path, settings: TrainingSettings) -> None:
    """Raise FileExistsError where the run's folder holds what is not to be continued or replaced."""
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    if not names or settings.resume:
        return
    if not settings.overwrite:
        raise FileExistsError(
            f"{output} is not empty: give --resume to go on with its run, or --overwrite to replace it"
        )
    if not names & {LOG, RUN_FILE, checkpoint.CHECKPOINTS}:
        raise FileExistsError(f"{output} holds no run of bivec, so nothing in it is overwritten")


def _clear_output(output: Path, settings: TrainingSettings) -> None:
    """Make the run's folder, empty unless a run is resumed."""
    output.mkdir(parents=True, exist_ok=True)
    for path in () if settings.resume else output.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _token_budget(settings: TrainingSettings, trainee: Trainee, saved: checkpoint.Saved | None) -> int:
    """Tokens of a pass: as asked, as in the run that is resumed, or what a third of the device's memory holds."""
    if settings.token_budget is not None:
        return settings.token_budget
    if saved is not None:
        return saved.state["token_budget"]
    if trainee.device.type == "cuda":
        memory = torch.cuda.get_device_properties(trainee.device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fitting = memory // 3 // trainee.activation_bytes_per_token()
    longest = max(settings.max_length, getattr(settings, "block_size", 0) or 0)
    return max([longest, *(budget for budget in _BUDGETS if budget <= fitting)])


@contextmanager
def _terminated() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, so that a step is finished and a checkpoint written first."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # signals are the main thread's
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, previous)


def _versions() -> dict[str, str]:
    """What the bits of a run depend on beside its settings and data."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
    }


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Settings as trackers take them."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in values.items()
    }
