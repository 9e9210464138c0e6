"""The rules of vLLM, text-embeddings-inference and llama.cpp: servers, which pool what stands before a text with it."""

import json
import shlex

from .gguf_tokenizer import caveats_of
from .reader_files import ModelFiles
from .verdicts import Findings, Verdict, is_causal_missing, judge_loading, named_prompts, quoted

# vLLM: model_executor/models/registry.py; the last is what config/model.py makes of a name that ends with Model
_VLLM_CLASSES = (
    *("LlamaModel", "LlamaForCausalLM", "LLaMAForCausalLM", "LlamaBidirectionalModel", "MistralModel"),
    *("MistralForCausalLM", "Qwen2Model", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3Model"),
)
# vLLM: transformers_utils/config.py
_VLLM_POOLING_TYPES = (
    "sentence_transformers.models.Pooling",
    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
)
_VLLM_POOLING = {"mean": "MEAN", "last": "LAST", "first": "CLS"}

# TEI: candle/src/models/{llama,mistral,qwen2,qwen3}.rs, the fields that are no Option and have no default
_TEI_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
)
_TEI_MORE_FIELDS = {
    "qwen2": ("use_sliding_window",),
    "qwen3": ("use_sliding_window", "attention_bias", "eos_token_id"),
}
_TEI_POOLING = {"mean": "mean", "last": "last-token", "first": "cls"}
_TEI_BATCH_TOKENS = 16384

_LLAMA_CPP_POOLING = {"mean": "mean", "last": "last", "first": "cls"}


def judge_vllm(files: ModelFiles) -> Verdict:
    found, config = Findings(), files.config
    judge_loading(files, found)
    _judge_server_pooling(files, found, _VLLM_POOLING)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name not in _VLLM_CLASSES:
        found.refuse(f"architectures in config.json must name one that it serves, got {names!r:.80}", export_helps=True)
    own = any(kind in _VLLM_POOLING_TYPES for kind in files.modules or ())
    pooler: dict[str, str | bool] = {}
    if name == "LlamaBidirectionalModel":
        # LlamaBidirectionalConfig in models/config.py overrules every other word on mask and pooling
        expected = {"mean": "avg", "last": "last", "first": "cls"}.get(files.run.pooling)
        if config.get("pooling") != expected:
            found.refuse(
                f"pooling in config.json must be {expected!r}, got {config.get('pooling')!r:.80}", export_helps=True
            )
    else:
        if not own and str(name).endswith("ForCausalLM"):
            found.flags.append("--runner pooling --convert embed")
        if not own or files.said_pooling != files.run.pooling:
            pooler["pooling_type"] = _VLLM_POOLING.get(files.run.pooling, "")
        if is_causal_missing(files):
            # llama.py:280, qwen2.py:257, qwen3.py:197; Mistral's layers are Llama's
            found.flags.append(f"--hf-overrides {shlex.quote(json.dumps({'is_causal': False}))}")
    # without modules.json vectors are normalised, with it as it says
    if files.run.normalize != (files.has_normalize if own else True):
        pooler["use_activation"] = files.run.normalize
    if pooler:
        found.flags.append(f"--pooler-config {shlex.quote(json.dumps(pooler))}")
    if files.dtype == "float32":
        # config/model.py, _resolve_auto_dtype
        found.flags.append("--dtype float32")
        found.notes.append("without --dtype float32 it computes float32 weights in float16")
    length = (files.length_file or {}).get("max_seq_length", "")
    if length is None:
        found.refuse("max_seq_length in sentence_bert_config.json must be a number, got null", export_helps=True)
    elif length != files.max_length:
        found.flags.append(f"--max-model-len {files.max_length}")
    window = files.sliding_window
    if window is not None and window < files.max_length and files.bidirectional:
        # v1/attention/backends/flash_attn.py: one token less to either side
        found.refuse(f"its layers see {window - 1} tokens to either side there, not {window}")
    if len(set(files.shape.sliding_windows)) > 1:
        found.refuse("some of its layers slide a window and some do not, which it refuses")
    if files.shape.model_type == "qwen3" and files.shape.output_bias:
        found.refuse("its Qwen3 has no bias in o_proj")
    found.notes.append(
        f'texts longer than {files.max_length} tokens are refused unless requests say "truncate_prompt_tokens": -1'
    )
    if files.prompts and not files.prompts_left_out:
        found.notes.append(f"prompts ({named_prompts(files)}) are put before a text by hand")
    return found.verdict("vLLM", files, " ".join([f"vllm serve {quoted(files)}", *found.flags]))


def judge_tei(files: ModelFiles) -> Verdict:
    found, config = Findings(), files.config
    kind = config["model_type"]
    if files.transformer:
        found.refuse(f"config.json lies in {files.transformer}", export_helps=True)
    _judge_server_pooling(files, found, _TEI_POOLING)
    # qwen2.rs reads is_causal, the others read use_bidirectional_attention alone
    if kind == "qwen2":
        bidirectional = config.get("is_causal") is False
        key = "is_causal: false"
    else:
        bidirectional = config.get("use_bidirectional_attention") is True
        key = "use_bidirectional_attention: true"
    if bidirectional != files.bidirectional:
        wrong = "without" if files.bidirectional else "with"
        mask = "causal" if files.bidirectional else "bidirectional"
        found.refuse(f"{wrong} {key} in config.json it is {mask}, without a word", export_helps=True)
    _judge_tei_config(files, found)
    _judge_tei_shapes(files, found)
    said = _tei_pooling(files.pooling_config)
    if files.run.pooling in _TEI_POOLING and said != files.run.pooling:
        found.flags.append(f"--pooling {_TEI_POOLING[files.run.pooling]}")
    if files.max_length > _TEI_BATCH_TOKENS:
        found.flags.append(f"--max-batch-tokens {files.max_length}")
    if files.default_prompt is not None:
        found.flags.append(f"--default-prompt-name {shlex.quote(files.default_prompt)}")
    if files.length_file is None:
        found.notes.append(
            f"texts are cut to {files.shape.max_position_embeddings} tokens there, not to {files.max_length}"
        )
    # candle/src/lib.rs; Python images run transformers 4, or attention that is causal by itself
    computes = "CUDA images compute it in float16; the CPU's refuses it"
    if kind == "qwen3":
        computes = "CUDA images compute it in float16, the CPU's in float32"
    found.notes.append(computes + "; ROCm's, HPU's and Intel's are causal, without a word" * files.bidirectional)
    if files.prompts and not files.prompts_left_out:
        found.notes.append(f'requests name their prompt ("prompt_name", one of {named_prompts(files)})')
    if not files.run.normalize:
        found.notes.append(
            '/embed gives vectors of length 1 unless a request says "normalize": false, /v1/embeddings always'
        )
    command = " ".join([f"text-embeddings-router --model-id {quoted(files)}", *found.flags])
    return found.verdict("TEI", files, command)


def _judge_tei_config(files: ModelFiles, found: Findings) -> None:
    """What its configuration's types ask for: Rust that stops at what it does not expect."""
    config, kind = files.config, files.config["model_type"]
    fields = _TEI_FIELDS + _TEI_MORE_FIELDS.get(kind, ("initializer_range",))
    absent = [name for name in ("architectures", *fields) if config.get(name) is None]
    if absent:
        found.refuse(f"config.json must have {absent[0]}", export_helps=True)
    # router/src/lib.rs reads the padding's, llama.rs and qwen3.rs the others
    numbers = ["pad_token_id"]
    numbers += {"qwen3": ["eos_token_id"], "llama": ["bos_token_id", "eos_token_id"]}.get(kind.partition("_")[0], [])
    for name in numbers:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            found.refuse(f"{name} in config.json must be one number, got {value!r:.80}", export_helps=True)
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and not {"rope_theta", "rope_type"} <= parameters.keys():
        found.refuse("rope_parameters in config.json must have rope_theta and rope_type", export_helps=True)
    elif config.get("rope_theta") is None and not parameters:
        found.refuse("config.json must have rope_theta", export_helps=True)
    scaled, rope = bool(config.get("rope_scaling")), files.shape.rope.rope_type
    if rope != "default" and not (kind == "mistral" and scaled and rope == "llama3"):
        # lib.rs refuses a Llama's rope_scaling; flash_mistral.rs takes it for llama3's or NTK's; rope_parameters are
        # read for their theta alone (rotary.rs)
        does = "leaves the scaling out, without a word"
        if scaled and kind != "qwen2" and kind != "qwen3":
            does = "scales it otherwise, without a word" if kind == "mistral" else "refuses to start"
        found.refuse(f"its rope is of type {rope!r}: TEI {does}")
    if files.length_file is not None and not isinstance(files.length_file.get("max_seq_length"), int):
        found.refuse("sentence_bert_config.json must have max_seq_length", export_helps=True)


def _judge_tei_shapes(files: ModelFiles, found: Findings) -> None:
    """What its models compute: flash_mistral.rs (of Llama too), flash_qwen2.rs and flash_qwen3.rs."""
    config, kind = files.config, files.config["model_type"]
    shape = files.shape
    per_head = shape.hidden_size / shape.num_attention_heads
    explicit = kind == "qwen3" and config.get("head_dim") is not None
    if shape.head_dim != per_head and not explicit:
        found.refuse(f"head_dim must be hidden_size / num_attention_heads ({per_head:g}), got {shape.head_dim}")
    if shape.head_dim % 8 or shape.head_dim > 256:
        found.refuse(f"its flash attention takes heads of a multiple of 8 up to 256, got {shape.head_dim}")
    if shape.output_bias or shape.mlp_bias:
        biased = "attention_bias" if shape.output_bias else "mlp_bias"
        found.refuse(f"it has no biases: those of {biased} would be left out, without a word")
    if kind.startswith("qwen") and config.get("use_sliding_window"):
        found.refuse("it refuses use_sliding_window")
    # of a Llama transformers reads none
    window = config.get("sliding_window") if kind.startswith("llama") else files.sliding_window
    if not kind.startswith("qwen") and isinstance(window, int) and window < files.max_length:
        found.refuse(f"its sliding window ({window}) is another there than in transformers")
    if kind in ("llama", "llama_bidirec", "mistral") and any(name.startswith("model.") for name in files.tensors):
        found.refuse("it finds no weights that are named model.*", export_helps=True)


def judge_llama_cpp(files: ModelFiles) -> Verdict:
    found, shape = Findings(), files.shape
    _judge_server_pooling(files, found, _LLAMA_CPP_POOLING)
    if not files.bidirectional:
        found.refuse("bivec exports bidirectional models alone")
    if files.prompts_left_out and files.default_prompt is not None:
        found.refuse(f"the prompt {files.default_prompt!r} stands before every text, and would be pooled with it")
    # what `bivec export --format gguf` refuses, as llama.cpp's Qwen has none of these
    if shape.model_type in ("qwen2", "qwen3") and (shape.output_bias or shape.rope.rope_type == "llama3"):
        found.refuse("its Qwen has no rope of type 'llama3' and no bias in o_proj")
    if shape.model_type == "qwen2" and shape.head_dim * shape.num_attention_heads != shape.hidden_size:
        found.refuse(f"head_dim must be hidden_size / num_attention_heads, got {shape.head_dim}")
    # it slides no window over these models: as much is right as all of a window sees
    length = min(files.max_length, files.sliding_window or files.max_length)
    # tools/server/server-context.cpp: a text that is seen whole must lie in one physical batch
    flags = ["--embeddings", f"--pooling {_LLAMA_CPP_POOLING.get(files.run.pooling)}"]
    flags += [f"--batch-size {length}", f"--ubatch-size {length}"]
    if not files.run.normalize:
        flags.append("--embd-normalize -1")
    found.flags += flags
    found.notes.append(f"texts longer than {length} tokens are refused")
    _judge_gguf_tokenizer(files, found)
    if files.prompts and not files.prompts_left_out:
        found.notes.append(f"prompts ({named_prompts(files)}) are put before a text by hand")
    file = shlex.quote(f"{files.path}.gguf")
    export = f"bivec export --model {quoted(files)} --format gguf --output {file}"
    return found.verdict("llama.cpp", files, "\n".join([export, " ".join([f"llama-server --model {file}", *flags])]))


def _judge_gguf_tokenizer(files: ModelFiles, found: Findings) -> None:
    """Whether llama.cpp has the tokenizer."""
    path = files.path / files.transformer / "tokenizer.json"
    if not path.is_file():
        found.notes.append("the export refuses tokenizers that llama.cpp does not know")
        return
    try:
        caveats = caveats_of(path, files.shape.vocab_size)
    except ValueError as error:
        found.refuse(f"it has not this tokenizer: {error}")
    else:
        found.notes += [f"texts that {' or '.join(caveats)} have other tokens there"] if caveats else []


def _judge_server_pooling(files: ModelFiles, found: Findings, modes: dict[str, str]) -> None:
    """What servers pool: all tokens of a text and of what stands before it."""
    if files.run.pooling not in modes:
        found.refuse(f"it has no pooling {files.run.pooling!r}")
    if files.prompts_left_out:
        found.with_prompts.append(f"its prompts ({named_prompts(files)}) would be pooled with the text")


def _tei_pooling(pooling_config: dict | None) -> str | None:
    """The mode that router/src/lib.rs finds in `1_Pooling/config.json`, which must have two of the older keys."""
    values = pooling_config or {}
    if any(not isinstance(values.get(f"pooling_mode_{name}"), bool) for name in ("cls_token", "mean_tokens")):
        return None
    order = {"cls_token": "first", "mean_tokens": "mean", "lasttoken": "last"}
    return next((mode for name, mode in order.items() if values.get(f"pooling_mode_{name}")), None)
