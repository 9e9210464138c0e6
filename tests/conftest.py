"""Small checkpoints made on the spot, real data where it lies beside the repository, and which tests run.

Without a GPU the Triton kernels are interpreted.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

# a fork of a process whose OpenMP threads have run would hang where it needs them; and tests share their cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# triton reads it when it is imported, which whatever is imported next may do
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import peft
import pytest
import tokenizers
import transformers

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"

TRAINING_TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "a packed batch holds many sequences side by side",
    "bidirectional attention lets every token see every other token",
    "München, naïve café, 北京, emoji 😀 and punctuation!?",
] * 4

WORDS = ["quick", "brown", "fox", "lazy", "dog", "packed", "batch", "holds", "many", "sequences", "side", "token"]

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# what each architecture adds; every text in the tests is longer than its window and its original context
ARCHITECTURES = {
    "llama": {"model_type": "llama", "rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    "llama-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "mistral": {"model_type": "mistral", "sliding_window": 7, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
}


def save_tokenizer(folder: Path, bos: bool = True) -> int:
    """Train a byte-level BPE of a few hundred tokens into `folder`; returns its size."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def save_checkpoint(folder: Path, architecture: str = "llama", seed: int = 0, bos: bool = True, **changes) -> Path:
    """A random checkpoint of one architecture as transformers writes it, norms and biases random too."""
    vocab_size = save_tokenizer(folder, bos)
    arguments = TINY | ARCHITECTURES[architecture] | {"vocab_size": vocab_size} | changes
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**arguments)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint_folders(tmp_path_factory) -> dict[str, Path]:
    return {name: save_checkpoint(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tiny_llama_folder(checkpoint_folders) -> Path:
    return checkpoint_folders["llama"]


@pytest.fixture(scope="session")
def make_checkpoint():
    """`save_checkpoint`, for tests that need a checkpoint of their own."""
    return save_checkpoint


def save_adapter(base: Path, folder: Path, causal: bool = False, seed: int = 1, **form) -> Path:
    """A LoRA adapter as PEFT writes it, no part of which is what it began as.

    `causal` says whether PEFT sees a causal language model or its stack, `form` are fields of `LoraConfig`.
    """
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets} | form)
        model = peft.get_peft_model(kind.from_pretrained(base, dtype=torch.float32), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_magnitude" in name:
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
                elif "lora_" in name:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def make_adapter():
    """`save_adapter`, for tests that need an adapter of their own."""
    return save_adapter


def start_in_child(action) -> int:
    """Run `action` in a fork of this process, whose id is returned.

    It has one thread, as OpenMP's others do not survive a fork.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            action()
            status = 0
        except SystemExit as error:
            status = error.code
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(status)
    return child


def run_in_child(action) -> int:
    """Wait for `start_in_child(action)`; returns its exit status, negative for a signal."""
    child = start_in_child(action)
    try:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException:  # the test's time is over
        os.kill(child, signal.SIGKILL)
        raise


@pytest.fixture(scope="session")
def fork():
    """`start_in_child`, for tests of processes beside each other."""
    return start_in_child


@pytest.fixture(scope="session")
def exit_code():
    """`run_in_child`, for tests that kill what they run."""
    return run_in_child


@pytest.fixture
def python():
    """Runs a program in a process of its own, which may have OpenMP threads; returns what it prints, read as JSON."""

    def run(program: str, *arguments: object, **variables: str) -> object:
        path = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-c", program, *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": path} | variables
        return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)

    return run


@pytest.fixture
def cores(monkeypatch):
    """cores(number): so many that torch says it has, in each thread; none of them computes."""
    numbers, all_cores = threading.local(), [1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: getattr(numbers, "own", all_cores[0]))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: setattr(numbers, "own", number))
    return lambda number: (all_cores.__setitem__(0, number), setattr(numbers, "own", number))


@pytest.fixture
def sentence():
    """Draws sentences of 4 to 12 words, ever the same ones."""
    chance = random.Random(0)
    return lambda: " ".join(chance.choices(WORDS, k=chance.randint(4, 12)))


@pytest.fixture
def fresh_llama_folder(tmp_path) -> Path:
    """A checkpoint of one's own, to break."""
    return save_checkpoint(tmp_path / "model")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data is not beside the repository ({SHARED_DATA.name})")
    return SHARED_DATA


def pytest_collection_modifyitems(config, items):
    """Leave slow tests out unless a marker expression or a test's own name asks for them."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
