"""`train`: one loop for all stages.

A step is a function of the settings, the data and its number alone, so a run that was killed and resumed from a
checkpoint is bitwise the run that was not.
"""

import logging
import math
import operator
import platform
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import peft
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list
from tqdm import tqdm

from ..engine import ops
from ..engine.adapter_export import base_reference
from ..engine.checkpoints import Checkpoint, resolve
from ..engine.dtypes import DTYPES
from ..engine.fingerprint import fingerprint
from ..engine.outputs import naming, refuse_inputs
from ..engine.overlap import ahead
from ..engine.run_folder import EARLIER, RunDescription
from ..engine.slabs import OnHost
from . import checkpoint
from .divergence import find_divergence, not_finite
from .mask_schedule import MaskSchedule
from .optimizer import Optimizer, check_schedule
from .output import TRACKERS, Log, check_output, clear, find_checkpoint, hold
from .passes import Passes, choose_token_budget
from .preparation import Prepared, prepare
from .processes import Processes
from .settings import TrainingSettings
from .stages import Stage, look_at_data, make_stage, read_data
from .trainee import load_trainee

logger = logging.getLogger(__name__)


@dataclass
class TrainingSummary:
    """What a run did since it was begun or, after `first_step` steps, resumed.

    Attributes:
        steps: `skipped` ones among them.
        cut: share of the texts trained on that had more tokens than `max_length`.
    """

    output: str
    first_step: int
    steps: int
    skipped: int
    tokens: int
    cut: float
    seconds: float
    evaluation: dict[str, float]

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in self.evaluation.items())
        resumed = f" since it was resumed ({self.first_step + self.steps:,} in all)" if self.first_step else ""
        cut = f", {self.cut:.1%} of the texts cut at max_length" if self.cut else ""
        return (
            f"{self.steps:,} steps{resumed}, {self.tokens:,} tokens in {self.seconds:,.1f} s "
            f"({self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s), {self.skipped} skipped{cut}"
            f"{': ' + figures if figures else ''}: {self.output}"
        )


def train(settings: TrainingSettings) -> TrainingSummary:
    """Run one stage into `settings.output`; under torchrun, one process of it.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: settings, data, a model or an output that cannot work, naming
            the field, the file or the line; another run is writing the output.
        RuntimeError: training has diverged, `max_skipped_steps` steps in a row had no finite gradient, or memory is
            too small.
        OSError: the output cannot be written; checkpoints already there are whole.
    """
    output = Path(settings.output)
    device = ops.choose_device(settings.device)
    accelerator = _accelerator(settings, device)
    check_schedule(settings)
    if settings.batch_size % accelerator.num_processes:
        raise ValueError(
            f"batch_size must be a multiple of the {accelerator.num_processes} processes, got {settings.batch_size}"
        )
    check_output(output, settings)
    model = resolve(settings.model)
    refuse_inputs(output, _inputs(settings, model))
    prepared = prepare(settings, device, model)
    settings = prepared.settings
    look_at_data(settings)
    if accelerator.is_main_process:
        for note in prepared.notes:
            logger.warning(note)
    # the lock is one process's; the others look at the folder once it is held
    with naming(output), hold(output) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        check_output(output, settings)
        saved = find_checkpoint(output, settings)
        prepared = replace(prepared, dtype=_common_dtype(prepared, saved))
        with torch.random.fork_rng(devices=[]):
            run = _Run(prepared, accelerator, output, saved)
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


class _Launched(NamedTuple):
    """A step whose figures the device may still be computing: the gradient norm, then the losses of these names."""

    step: int
    learning_rate: float
    tokens: int
    names: tuple[str, ...]
    figures: OnHost


class _Run:
    def __init__(
        self,
        prepared: Prepared,
        accelerator: Accelerator,
        output: Path,
        saved: checkpoint.Saved | None,
    ):
        settings = self.settings = prepared.settings
        self.accelerator = accelerator
        self.output = output
        self.processes = Processes(accelerator)
        self.model_files = {}
        if accelerator.is_main_process:  # the one that saves and compares
            random_weights = getattr(settings, "random_weights", False)
            self.model_files = fingerprint(prepared.checkpoint, weights=not random_weights)
            if saved is not None:
                self._check_model(saved)
        data = read_data(settings, prepared.tokenizer)
        self.trainee = load_trainee(prepared)
        self.passes = Passes(
            self.trainee,
            token_budget=saved.state["token_budget"]
            if saved is not None
            else choose_token_budget(settings, self.trainee),
            attention_dropout=settings.attention_dropout,
            checkpoint_activations=settings.gradient_checkpointing,
            seed=settings.seed,
        )
        self.stage: Stage = make_stage(settings, data, self.passes, self.processes)
        self.schedule = MaskSchedule(
            settings.mask_schedule,
            settings.mask_schedule_steps or max(1, settings.max_steps // 2),
            self.trainee.tokenizer.max_length,
            self.trainee.config,
        )
        self.optimizer = Optimizer(self.trainee.parameters, settings)
        self.step = self.skipped = self.skipped_in_a_row = self.tokens = 0
        self.sequences = self.cut = 0  # since the run was begun or resumed
        self.launched: deque[_Launched] = deque()
        # steps to launch before one's figures are read, so that the device always has something to do
        self.behind = int(accelerator.device.type == "cuda")
        self.evaluation: dict[str, float] = {}
        if saved is not None:
            self._restore(saved)

    def open_output(self) -> None:
        main = self.accelerator.is_main_process
        if main and not self.settings.resume:
            clear(self.output)
        first = {"step": 0, "settings": self.settings.shaping_the_result(), "versions": _versions()}
        self.log = Log(self.output, main, first, self.step)

    def train(self, terminated: threading.Event) -> TrainingSummary:
        settings, main = self.settings, self.accelerator.is_main_process
        if settings.report_to:
            self.accelerator.init_trackers("bivec", config=_flat(settings.shaping_the_result()))
        began, before = time.perf_counter(), (self.step, self.skipped, self.tokens)
        if self.step == 0:
            self._evaluate()
        bar = tqdm(total=settings.max_steps, initial=self.step, unit="step", disable=not (main and sys.stderr.isatty()))
        with bar, closing(self._prepared()) as batches:
            for batch in batches:
                self._launch_step(batch)
                bar.update()
                last = self.step == settings.max_steps
                evaluates = last or self.step % settings.eval_steps == 0
                figures = self._settle(0 if evaluates else self.behind)
                if figures is not None:
                    bar.set_postfix(loss=f"{figures['loss']:.4f}")
                if evaluates:
                    self._evaluate()
                stop = bool(self.processes.sum(terminated.is_set())[0])  # every process must know of the end of one
                if last or stop or self.step % settings.save_steps == 0:
                    self._settle(0)
                    self._save()
                if stop:
                    raise SystemExit(143)
        if main:
            self.trainee.save(self.output, self._description())
        if self.processes.group is not None:
            self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        seconds = time.perf_counter() - began
        steps, skipped, tokens = map(operator.sub, (self.step, self.skipped, self.tokens), before)
        cut = self.cut / max(self.sequences, 1)
        return TrainingSummary(str(self.output), before[0], steps, skipped, tokens, cut, seconds, self.evaluation)

    def _prepared(self) -> Generator[Any, None, None]:
        """The batches of the steps to come, made by a thread while a step is computed."""
        device = self.accelerator.device
        # its copies are queued where ours and the passes are: before the passes that read them
        stream = torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else nullcontext()
        steps = range(self.step, self.settings.max_steps)

        def prepare() -> Generator[Any, None, None]:
            with stream:
                yield from map(self.stage.objective.prepare, steps)

        return ahead(prepare())

    def _launch_step(self, batch: Any) -> None:
        """One update, whose figures are read later."""
        rate = self.optimizer.learning_rate
        self.optimizer.zero_grad()
        losses = self.stage.objective.train(batch, self.schedule(self.step))
        self.processes.sum_gradients(self.trainee.parameters.values())
        norm = self.optimizer.step()
        self.step += 1
        tokens, sequences, cut = map(int, self.processes.sum(*self.passes.take_counts()))
        self.tokens += tokens
        self.sequences += sequences
        self.cut += cut
        figures = OnHost(torch.stack([norm, *losses.values()]))
        self.launched.append(_Launched(self.step, rate, self.tokens, tuple(losses), figures))

    def _settle(self, behind: int) -> dict[str, Any] | None:
        """Read the figures of all steps but the last `behind`, in order; returns those that were logged last."""
        settings, logged = self.settings, None
        while len(self.launched) > behind:
            launched = self.launched.popleft()
            norm, *losses = map(float, launched.figures.numpy())
            if math.isfinite(norm):
                self.skipped_in_a_row = 0
            else:
                self._count_skipped(launched.step)
            due = launched.step % settings.logging_steps == 0 or launched.step == settings.max_steps
            if due or not math.isfinite(norm):
                logged = self._record(launched, norm, losses)
        return logged

    def _count_skipped(self, step: int) -> None:
        self._stop_if(not_finite(self.trainee), step)
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row == min(self.settings.max_skipped_steps, self.settings.max_steps):
            raise RuntimeError(
                f"{self.skipped_in_a_row} steps in a row, the last of them {step}, had no finite gradient: "
                "choose a smaller learning_rate, or dtype float32"
            )

    def _stop_if(self, divergence: str | None, step: int) -> None:
        if divergence is not None:
            raise RuntimeError(
                f"training has diverged by step {step}: {divergence}; checkpoints before it are as they were, but "
                "--resume would go the same way: choose a smaller learning_rate and begin anew with --overwrite"
            )

    def _record(self, launched: _Launched, norm: float, losses: list[float]) -> dict[str, Any]:
        sums = self.processes.sum(*losses)
        figures: dict[str, Any] = dict(zip(launched.names, sums, strict=True))
        if math.isfinite(norm) and not math.isfinite(sum(sums)):
            self._stop_if(f"the loss is {figures['loss']}", launched.step)
        figures |= {"grad_norm": norm, "learning_rate": launched.learning_rate}
        figures |= {"skipped": self.skipped, "tokens": launched.tokens}
        self.log.write({"step": launched.step} | figures)
        if self.settings.report_to:
            self.accelerator.log(figures, step=launched.step)
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
        self._stop_if(find_divergence(self.passes, self.schedule.final_window), self.step)
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "tokens": self.tokens,
            "token_budget": self.passes.token_budget,
            "schedule": self.optimizer.schedule_state(),
            "settings": self.settings.shaping_the_result(),
            "dtype": str(self.trainee.dtype).removeprefix("torch."),
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
        try:
            self.optimizer.restore(saved.tensors, state["schedule"])
        except ValueError as error:
            raise ValueError(f"{saved.path} does not fit: {error}") from error
        self.step, self.skipped, self.tokens = state["step"], state["skipped"], state["tokens"]
        self.skipped_in_a_row, self.evaluation = state["skipped_in_a_row"], state["evaluation"]
        if state["versions"] != _versions():
            logger.warning("%s was written with %s; bits may differ", saved.path, state["versions"])

    def _check_model(self, saved: checkpoint.Saved) -> None:
        before = saved.state.get("model", {})
        changed = [part for part, now in self.model_files.items() if before.get(part) != now]
        if changed:
            raise ValueError(
                f"{saved.path} was trained with other files of the model {self.settings.model}: "
                f"changed since: {', '.join(changed)}"
            )

    def _description(self) -> RunDescription:
        settings, trainee = self.settings, self.trainee
        return RunDescription(
            stage=settings.stage,
            base_model=None if trainee.adapter is None else base_reference(trainee.checkpoint),
            earlier=tuple(f"{EARLIER}/{place}" for place in range(1, len(trainee.earlier) + 1)),
            window=self.schedule.final_window,
            pooling=getattr(settings, "pooling", "mean"),
            instruction=getattr(settings, "instruction", None) or "",
            symmetric_instruction=getattr(settings, "symmetric_instruction", False),
            readout_shift=int(settings.stage == "mntp"),
        )


def _accelerator(settings: TrainingSettings, device: torch.device) -> Accelerator:
    """Of the processes and trackers that are asked for; raises ValueError where there is no such tracker."""
    output = Path(settings.output)
    folders = ProjectConfiguration(project_dir=str(output), logging_dir=str(output / TRACKERS))
    wanted = settings.report_to
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`log_with=")  # of what is not installed: refused below
            made = Accelerator(
                cpu=device.type == "cpu", log_with=wanted or None, project_config=folders, mixed_precision="no"
            )
    except ValueError as error:
        raise ValueError(f"report_to must name trackers of accelerate, got {', '.join(wanted)}: {error}") from error
    absent = {*wanted} - {"all", *map(str, made.log_with)}
    if absent:
        raise ValueError(f"report_to: {', '.join(sorted(absent))} is not installed")
    return made


def _common_dtype(prepared: Prepared, saved: checkpoint.Saved | None) -> torch.dtype:
    """What the run was begun in, or else what the first process found to be faster, for all processes."""
    before = None if saved is None else saved.state.get("dtype")
    return broadcast_object_list([prepared.dtype if before is None else DTYPES[before]])[0]


def _inputs(settings: TrainingSettings, model: Checkpoint) -> list[Path]:
    """The files and folders that a run reads."""
    found = [model.base, model.tokenizer, *model.adapters]
    return [*found, *map(Path, settings.data), *map(Path, settings.eval_data)]


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
