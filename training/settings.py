"""What a training run is told: a dataclass a stage, read from a recipe (YAML) and the command line, which wins.

Fields are named as in transformers' TrainingArguments and PEFT's LoraConfig where those have them.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from ..engine.lengths import within_positions
from ..engine.outputs import refuse_inputs

MaskSchedule = Literal["bidirectional", "causal", "window", "annealed", "layers"]

# what may differ between a run and its resumption: nothing that the result depends on
OUTSIDE_THE_RESULT = frozenset(
    {"output", "resume", "overwrite", "device", "logging_steps", "save_steps", "save_total_limit", "report_to"}
)

_WITH_BLOCKS = {"max_length": 512, "block_size": 512}
_BLOCK_SIZE_HELP = (
    "Texts are joined and cut in blocks of so many tokens; 0: a text is a row. "
    "Default: 512, or the model's positions where it has fewer."
)
# float16's range is too small for gradients, and eight-bit products have none
_DTYPES = ("auto", "float32", "bfloat16")
_KINDS = {int: "whole number", float: "number", bool: "boolean", str: "string"}


def _help(text: str, default: Any = dataclasses.MISSING, *, factory: Any = dataclasses.MISSING) -> Any:
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class TrainingSettings:
    """What every stage has; `stage` names it."""

    model: str = _help("Hub id or folder of a base Llama, an adapter, or a run, whose stages stay beneath this one.")
    data: list[str] = _help("Files, folders or patterns: .txt, .jsonl, .csv (all also .gz) or .parquet.")
    output: str = _help("Folder of the run: adapter, bivec.json, log.jsonl and checkpoints.")
    eval_data: list[str] = _help("Held-out files, evaluated every eval_steps.", factory=list)
    text_column: str = _help("Column or key of the text.", "text")
    max_length: int | None = _help(
        "Tokens a text is cut to. Default: 512, or the model's positions where it has fewer.", None
    )

    full_finetuning: bool = _help("Train every weight instead of a LoRA adapter; the run is a checkpoint.", False)
    continue_adapter: bool = _help("Go on training the model's last adapter instead of a fresh one.", False)
    lora_r: int = _help("Rank of the adapter.", 16)
    lora_alpha: int = _help("The adapter is scaled by lora_alpha / lora_r.", 32)
    lora_dropout: float = _help("Chance of an input element to be hidden from the adapter.", 0.05)
    target_modules: list[str] = _help(
        "Linears that get an adapter.",
        factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    )
    attention_dropout: float = _help("Chance of an attention probability to be dropped.", 0.0)

    mask_schedule: MaskSchedule = _help(
        "How the causal mask goes: bidirectional (at once), window (a look-ahead that grows), annealed (future tokens "
        "seen with a growing chance), layers (from the last layer down), or causal (never).",
        "bidirectional",
    )
    mask_schedule_steps: int | None = _help("Steps until the mask is bidirectional. Default: half of max_steps.", None)
    keep_generation: float = _help("Weight of a causal language-model loss of the same texts in every step.", 0.0)

    batch_size: int = _help("Rows of one step, over all processes.", 32)
    token_budget: int | None = _help(
        "Tokens of one pass, which memory must hold; a batch takes as many passes as it needs. "
        "Default: by the memory of the device, at most 32768.",
        None,
    )
    max_steps: int = _help("Steps to train.", 1000)
    learning_rate: float = _help("Peak learning rate of AdamW.", 5e-5)
    lr_scheduler_type: str = _help("As in transformers: linear, cosine, constant, constant_with_warmup, ...", "linear")
    lr_scheduler_steps: int | None = _help("Steps that the schedule is laid out for. Default: max_steps.", None)
    warmup_steps: int = _help("Steps of linear warm-up.", 0)
    weight_decay: float = _help("Of AdamW.", 0.0)
    adam_beta1: float = _help("Of AdamW.", 0.9)
    adam_beta2: float = _help("Of AdamW.", 0.999)
    adam_epsilon: float = _help("Of AdamW.", 1e-8)
    max_grad_norm: float = _help("Gradients are clipped to this norm.", 1.0)
    max_skipped_steps: int = _help("Steps without a finite gradient are skipped; so many in a row end training.", 5)
    gradient_checkpointing: bool = _help("Recompute each layer in the backward: less memory, a third more time.", False)
    seed: int = _help("Of everything random: data order, masks, dropout, the fresh adapter.", 42)

    device: str = _help("auto, cpu, cuda or cuda:N; under torchrun each process takes its own.", "auto")
    dtype: str = _help("Of the computation: auto, float32 or bfloat16. What is trained is kept in float32.", "auto")
    attention: str = _help("Attention backend: auto, triton or sdpa.", "auto")

    logging_steps: int = _help("Steps between two lines of the log.", 10)
    eval_steps: int = _help("Steps between two evaluations.", 100)
    save_steps: int = _help("Steps between two checkpoints.", 200)
    save_total_limit: int = _help("Checkpoints to keep, the newest.", 2)
    report_to: list[str] = _help("Trackers of accelerate: tensorboard, wandb, ...", factory=list)
    resume: bool = _help("Go on with the unfinished run in output; begin where there is none.", False)
    overwrite: bool = _help("Replace the run in output: its files are removed, and training begins anew.", False)

    stage: ClassVar[str] = ""
    usual_lengths: ClassVar[dict[str, int]] = {"max_length": 512}

    def __post_init__(self) -> None:
        self._cast_numbers()
        self._check()

    def _cast_numbers(self) -> None:
        """YAML reads 5e-5 as a string and 1 as an integer; refuse what is no value of a field's type."""
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is ClassVar:
                continue
            value = getattr(self, name)
            if isinstance(kind, UnionType):
                if value is None:
                    continue
                kind = next(part for part in get_args(kind) if part is not NoneType)
            if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
                with suppress(ValueError):
                    value = float(value)
                setattr(self, name, value)
            if get_origin(kind) is Literal:
                _require(value in get_args(kind), name, f"one of {', '.join(get_args(kind))}", value)
            elif get_origin(kind) is list:
                (item,) = get_args(kind)
                fits = isinstance(value, list) and all(type(part) is item for part in value)
                _require(fits, name, f"a list of {_KINDS[item]}s", value)
            else:
                _require(type(value) is kind, name, f"a {_KINDS[kind]}", value)
                _require(kind is not float or math.isfinite(value), name, "a finite number", value)

    def _check(self) -> None:
        for name in ("batch_size", "max_steps", "lora_r", "lora_alpha", "max_skipped_steps"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("logging_steps", "eval_steps", "save_steps", "save_total_limit"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("lora_dropout", "attention_dropout", "adam_beta1", "adam_beta2"):
            _require(0.0 <= getattr(self, name) < 1.0, name, "in [0, 1)", getattr(self, name))
        for name in ("learning_rate", "weight_decay", "warmup_steps", "keep_generation"):
            _require(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        for name in ("max_grad_norm", "adam_epsilon"):
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("max_length", "mask_schedule_steps", "lr_scheduler_steps"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, "at least 1", value)
        _require(self.dtype in _DTYPES, "dtype", f"one of {', '.join(_DTYPES)}", self.dtype)
        _require(bool(self.output), "output", "a folder", self.output)
        _require(bool(self.data), "data", "one file or more", self.data)
        _require(0 <= self.seed < 2**63, "seed", "in [0, 2 ** 63)", self.seed)
        budget, longest = self.token_budget, self.max_length
        _require(budget is None or budget >= (longest or 0), "token_budget", f"at least max_length ({longest})", budget)
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite must not both be given")
        if self.full_finetuning and self.continue_adapter:
            raise ValueError("full_finetuning and continue_adapter must not both be given")

    @property
    def predicts_tokens(self) -> bool:
        """Whether a loss needs the language-model head."""
        return self.keep_generation > 0

    def within(self, positions: int) -> tuple[Self, list[str]]:
        """The settings for a model of so many positions, and a line for every length that is less than usual.

        Raises:
            ValueError: a length that was asked for is more, or a token_budget less than a length.
        """
        found = {
            name: within_positions(getattr(self, name), usual, positions, name)
            for name, usual in self.usual_lengths.items()
        }
        if found.get("block_size", (0, None))[0]:  # no text is cut then, so nobody needs to hear of it
            found["max_length"] = found["max_length"][0], None
        notes = [note for _, note in found.values() if note is not None]
        lengths: dict[str, Any] = {name: length for name, (length, _) in found.items()}
        return dataclasses.replace(self, **lengths), notes

    def shaping_the_result(self) -> dict[str, Any]:
        """The fields that a resumed run must share with the run it resumes."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in OUTSIDE_THE_RESULT}


@dataclass(kw_only=True)
class PretrainSettings(TrainingSettings):
    """Causal language model: the next token of every token."""

    full_finetuning: bool = _help("Train every weight instead of a LoRA adapter; the run is a checkpoint.", True)
    mask_schedule: MaskSchedule = _help("The mask; a language model's is causal.", "causal")
    random_weights: bool = _help("Begin with random weights; model gives configuration and tokenizer.", False)
    block_size: int | None = _help(_BLOCK_SIZE_HELP, None)
    learning_rate: float = _help("Peak learning rate of AdamW.", 3e-4)

    stage = "pretrain"
    usual_lengths: ClassVar[dict[str, int]] = _WITH_BLOCKS
    predicts_tokens = True

    def _check(self) -> None:
        super()._check()
        _check_block_size(self)
        if self.random_weights and not self.full_finetuning:
            raise ValueError("random_weights needs full_finetuning: an adapter on random weights learns nothing")


@dataclass(kw_only=True)
class MntpSettings(TrainingSettings):
    """Masked next-token prediction: a masked token is predicted from the state of the token before it."""

    mask_probability: float = _help("Share of the tokens that is predicted.", 0.2)
    mask_style: Literal["bert", "all_mask"] = _help(
        "bert: 80 %% become the mask token, 10 %% a random one, 10 %% stay; all_mask: all become the mask token.",
        "bert",
    )
    mask_token: str = _help("An ordinary token of the vocabulary that stands for a masked one.", "_")
    train_head: bool = _help("Train the language-model head too; it is not kept.", False)
    block_size: int | None = _help(_BLOCK_SIZE_HELP, None)

    stage = "mntp"
    usual_lengths: ClassVar[dict[str, int]] = _WITH_BLOCKS
    predicts_tokens = True

    def _check(self) -> None:
        super()._check()
        _check_block_size(self)
        _require(0.0 < self.mask_probability <= 1.0, "mask_probability", "in (0, 1]", self.mask_probability)


@dataclass(kw_only=True)
class ContrastiveSettings(TrainingSettings):
    pooling: Literal["mean", "weighted_mean", "last", "first"] = _help("How states become one vector.", "mean")
    temperature: float = _help("Of the contrastive loss.", 0.05)
    symmetric: bool = _help("Average with the loss of finding each positive's query.", False)
    dims: list[int] = _help("Matryoshka sizes: the mean of the losses of these leading dimensions.", factory=list)

    def _check(self) -> None:
        super()._check()
        _require(self.temperature > 0, "temperature", "above 0", self.temperature)
        _require(self.batch_size > 1, "batch_size", "at least 2, so that there are negatives", self.batch_size)
        _require(all(size >= 1 for size in self.dims), "dims", "sizes of at least 1", self.dims)


@dataclass(kw_only=True)
class SimcseSettings(ContrastiveSettings):
    """SimCSE: a text and itself under another dropout mask are a pair, the batch's other texts its negatives."""

    attention_dropout: float = _help("Chance of an attention probability to be dropped.", 0.3)
    max_length: int | None = _help(
        "Tokens a text is cut to. Default: 128, or the model's positions where it has fewer.", None
    )
    batch_size: int = _help("Rows of one step, over all processes.", 128)
    learning_rate: float = _help("Peak learning rate of AdamW.", 3e-5)

    stage = "simcse"
    usual_lengths: ClassVar[dict[str, int]] = {"max_length": 128}

    def _check(self) -> None:
        super()._check()
        if not (self.attention_dropout or self.lora_dropout):
            raise ValueError("attention_dropout or lora_dropout must be above 0, or both views are the same vector")


@dataclass(kw_only=True)
class SupervisedSettings(ContrastiveSettings):
    """Queries with their positives and hard negatives; every batch comes from one file."""

    instruction: str | None = _help("Put before every query that brings none; attended to, not pooled.", None)
    symmetric_instruction: bool = _help("Put the query's instruction before its positive and negatives too.", False)
    temperature: float = _help("Of the contrastive loss.", 0.02)
    batch_size: int = _help("Rows of one step, over all processes.", 512)
    learning_rate: float = _help("Peak learning rate of AdamW.", 2e-4)
    warmup_steps: int = _help("Steps of linear warm-up.", 300)

    stage = "supervised"


STAGES: dict[str, type[TrainingSettings]] = {
    settings.stage: settings for settings in (PretrainSettings, MntpSettings, SimcseSettings, SupervisedSettings)
}


def read_settings(stage: str, arguments: Sequence[str]) -> TrainingSettings:
    """The settings of a stage from command-line arguments, `--recipe FILE.yaml` among them, whose fields they override.

    Raises:
        ValueError: an unknown stage, an unknown or wrongly typed field, naming it (and the recipe).
        SystemExit: argparse's own, for a malformed command line and for --help.
    """
    if stage not in STAGES:
        raise ValueError(f"the stage must be one of {', '.join(STAGES)}, got {stage!r}")
    from transformers.hf_argparser import HfArgumentParser  # takes two seconds to import

    kind = STAGES[stage]
    parser = HfArgumentParser(
        kind,
        prog=f"bivec train {stage}",
        usage="%(prog)s --model MODEL --data FILE... --output RUN [--recipe FILE.yaml] [--FIELD VALUE]...",
        description=kind.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", help="YAML file of fields; what the command line gives wins.")
    for action in parser._actions:  # both spellings are taken, and one is shown
        action.option_strings = [option for option in action.option_strings if "_" not in option]
    known = {entry.name for entry in dataclasses.fields(kind)}
    recipe = _recipe_argument(arguments)
    values = {} if recipe is None else read_recipe(recipe, stage, known)
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    # argparse leaves alone what its namespace already holds, so the recipe's fields stand where the line has none
    given = vars(parser.parse_args(list(arguments), argparse.Namespace(**values)))
    given.pop("recipe")
    settings = kind(**given)
    if recipe is not None:
        refuse_inputs(Path(settings.output), [recipe])
    return settings


def _recipe_argument(arguments: Sequence[str]) -> Path | None:
    for place, argument in enumerate(arguments):
        if argument == "--recipe" and place + 1 < len(arguments):
            return Path(arguments[place + 1])
        if argument.startswith("--recipe="):
            return Path(argument.removeprefix("--recipe="))
    return None


def read_recipe(path: Path, stage: str, known: set[str]) -> dict[str, Any]:
    """The fields of a recipe: a YAML mapping with `stage` and fields of that stage.

    Raises:
        FileNotFoundError, ValueError: naming the file and the field.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such recipe")
    try:
        text = path.read_text(encoding="utf-8")
        expanding = _expansion(text)
        values = None if expanding else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # the latter for a date or a number that is none
        raise ValueError(f"{path} must be YAML: {' '.join(str(error).split())}") from error
    if expanding:
        raise ValueError(f"{path} must be a mapping of fields to values and lists of values, got {expanding}")
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of fields, got {type(values).__name__}")
    found = values.pop("stage", stage)
    if found != stage:
        raise ValueError(f"{path} is a recipe of stage {found!r}, not of {stage!r}")
    unknown = sorted(str(name) for name in values if name not in known)
    if unknown:
        raise ValueError(f"{path}: no field {unknown[0]!r} in stage {stage}; see bivec train {stage} --help")
    return values


def _expansion(text: str) -> str | None:
    """What in a few lines of YAML stands for any number of values, None where nothing does."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            return f"the alias *{event.anchor}"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 2:
            return "deeper nesting"
    return None


def _require(holds: bool, name: str, requirement: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {requirement}, got {got!r}")


def _check_block_size(settings: PretrainSettings | MntpSettings) -> None:
    size = settings.block_size
    _require(size is None or size == 0 or size >= 2, "block_size", "0 or at least 2", size)
    budget = settings.token_budget
    _require(not size or budget is None or budget >= size, "token_budget", f"at least block_size ({size})", budget)
