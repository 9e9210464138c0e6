"""Which readers give the vectors that bivec gives, of one folder as it is: yes, with flags, or no and why.

Each reader is judged by its own rules, as they were read in transformers 5.24, sentence-transformers 6.2, vLLM 0.33.0,
text-embeddings-inference 1.9.3 (0d124dc) and llama.cpp (0c1e570), applied to the files that it would read.
"""

import shlex
from pathlib import Path

from .checkpoints import UNDESCRIBED, HubOptions, resolve
from .config import BIDIRECTIONAL, CAUSAL
from .json_files import read_object
from .reader_files import ModelFiles
from .reader_servers import judge_llama_cpp, judge_tei, judge_vllm
from .run_folder import RunDescription
from .verdicts import Findings, Verdict, export_command, is_causal_missing, judge_loading, named_prompts

__all__ = ["READERS", "Verdict", "readers"]

READERS = ("transformers", "sentence-transformers", "vLLM", "TEI", "llama.cpp")


def readers(folder: str | Path) -> list[Verdict]:
    """A verdict for each of `READERS`, in their order.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no model.
        ValueError: a file in it is not what it must be, or it is no model that bivec computes.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder here, and what can read it is judged by its files; "
            f"write one first: bivec export --model {shlex.quote(str(folder))} --output DIR"
        )
    adapter = _adapter_of(path)
    if adapter is not None:
        return _adapter_verdicts(path, adapter)
    files = ModelFiles.read(path)
    only_bivec = _only_bivec(files.run)
    if only_bivec:
        return [Verdict(reader, "no", (only_bivec,)) for reader in READERS]
    judges = (judge_transformers, judge_sentence_transformers, judge_vllm, judge_tei, judge_llama_cpp)
    return [judge(files) for judge in judges]


def _adapter_of(path: Path) -> str | None:
    """The base of an adapter's folder, None where it is none."""
    file = path / "adapter_config.json"
    if not file.is_file():
        return None
    base = read_object(file).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{file}: base_model_name_or_path must be a folder or a hub id, got {base!r:.80}")
    return base


def _adapter_verdicts(path: Path, base: str) -> list[Verdict]:
    """That nobody reads an adapter as a model, and what helps: an export, where one can be made."""
    try:
        run = resolve(path, hub=HubOptions(local_files_only=True)).description
    except FileNotFoundError:  # its base is not here, nor what it says of the mask
        run = UNDESCRIBED
    reason = f"it is an adapter on {base}"
    obstacle = _only_bivec(run) or ("it is causal, which is not exported" if run.window != BIDIRECTIONAL else None)
    if obstacle:
        return [Verdict(reader, "no", (reason, obstacle)) for reader in READERS]
    command = export_command(path.absolute())
    return [Verdict(reader, "no", (f"{reason}: export it first",), command=command) for reader in READERS]


def _only_bivec(run: RunDescription) -> str | None:
    """What no other reader can be told."""
    if not run.pools_special_tokens and run.pooling != "last":
        return "it never pools BOS, which every other reader does"
    if any(run.template):
        return "it puts texts into a chat template and pools a part of that, which no other reader does"
    if run.window not in (BIDIRECTIONAL, CAUSAL):
        return f"it sees the window {run.window}, which no other reader has"
    return None


def judge_transformers(files: ModelFiles) -> Verdict:
    found = Findings()
    judge_loading(files, found)
    tell = is_causal_missing(files)
    weights = {
        "mean": "mask",
        "weighted_mean": "(mask * mask.cumsum(1))",
        "first": "(mask * (mask.cumsum(1) == 1))",
        "last": "(mask * (mask.cumsum(1) == mask.sum(1, keepdim=True)))",
    }
    lines = ["from transformers import AutoModel, AutoTokenizer", f"folder = {str(files.path)!r}"]
    lines.append("tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)")
    if tell:
        found.flags.append("config.is_causal")
        found.notes.append("config.json does not say is_causal: false, so the model must be told")
        lines[0] = "from transformers import AutoConfig, AutoModel, AutoTokenizer"
        lines[2:] = [
            "tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)",
            "config.is_causal = False",
            "model = AutoModel.from_pretrained(folder, config=config)",
        ]
    padding = _padding(files)
    if padding:
        found.flags.append("pad_token")
        lines.append(f"tokenizer.pad_token = tokenizer.{padding}")
    lines += [
        f'batch = tokenizer(["a text", "another"], padding=True, truncation=True, max_length={files.max_length}, '
        'return_tensors="pt")',
        'states, mask = model(**batch).last_hidden_state.float(), batch["attention_mask"]',
        f"weights = {weights[files.run.pooling]}[:, :, None]",
        "vectors = (states * weights).sum(1) / weights.sum(1)",
    ]
    if files.run.normalize:
        lines.append("vectors = vectors / vectors.norm(dim=1, keepdim=True)")
    found.notes.append(
        "it gives states, and pooling is up to you" + (", as is normalisation" if files.run.normalize else "")
    )
    if files.bidirectional:
        found.notes.append("transformers 5.2 or newer: older ones are causal without a word")
    if files.prompts:
        left_out = "; their weights, and that of BOS, must be 0" if files.prompts_left_out else ""
        found.notes.append(f"prompts ({named_prompts(files)}) are put before a text by hand{left_out}")
    return found.verdict("transformers", files, "\n".join(lines))


def judge_sentence_transformers(files: ModelFiles) -> Verdict:
    found = Findings()
    judge_loading(files, found, modules=True)
    if is_causal_missing(files):
        # AutoConfig drops what a configuration does not have, so config_kwargs cannot add it
        found.refuse("config.json does not say is_causal: false: it is causal, without a word", export_helps=True)
    lines = ["from sentence_transformers import SentenceTransformer"]
    lines.append(f"encoder = SentenceTransformer({str(files.path)!r})")
    if files.modules is None:
        # without modules.json: the mean, of bidirectional models (sentence_transformer/model.py)
        if files.run.pooling != "mean":
            found.refuse(f"there is no modules.json that says that pooling is {files.run.pooling!r}", export_helps=True)
        if files.run.normalize:
            found.refuse("there is no modules.json with a Normalize module", export_helps=True)
    else:
        said = files.said_pooling
        if said != files.run.pooling:
            found.refuse(
                f"modules.json leads to pooling {said!r}, bivec.json to {files.run.pooling!r}", export_helps=True
            )
        if files.has_normalize != files.run.normalize:
            found.refuse(f"modules.json and bivec.json differ in normalize ({files.run.normalize})", export_helps=True)
    if files.length_file is None:
        found.flags.append("max_seq_length")
        lines.append(f"encoder.max_seq_length = {files.max_length}")
    padding = _padding(files)
    if padding:
        found.flags.append("pad_token")
        lines.append(f"encoder.tokenizer.pad_token = encoder.tokenizer.{padding}")
    left_out = files.prompts_left_out
    included = (files.pooling_config or {}).get("include_prompt") is not False
    if left_out and included:
        found.refuse(f"its prompts ({named_prompts(files)}) would be pooled with the text", export_helps=True)
    elif left_out and files.run.pooling == "weighted_mean":
        found.refuse(
            f"its weights begin with a prompt's tokens ({named_prompts(files)}), those of bivec with the text's"
        )
    elif files.prompts and not included and files.run.pools_prompt:
        found.refuse("1_Pooling/config.json leaves prompts out of pooling, bivec.json does not", export_helps=True)
    lines += ['queries = encoder.encode_query(["a question"])', 'documents = encoder.encode_document(["a text"])']
    if files.bidirectional:
        found.notes.append("transformers 5.2 or newer: older ones are causal without a word")
    if files.prompts:
        found.notes.append(f"prompts ({named_prompts(files)}) are put before texts by encode_query and encode_document")
    return found.verdict("sentence-transformers", files, "\n".join(lines))


def _padding(files: ModelFiles) -> str | None:
    """What a tokenizer without a padding token can pad with."""
    if files.tokenizer.get("pad_token") is not None:
        return None
    return next((name for name in ("eos_token", "bos_token") if files.tokenizer.get(name) is not None), None)
