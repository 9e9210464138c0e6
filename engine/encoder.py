"""`Encoder`: text in, vectors out. The public face of the engine."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from tqdm import tqdm

from .. import DEFAULT_MODEL
from ..kernels.pooling import POOLING_MODES, pool
from . import checkpoints, ops
from .adapters import load_merged, load_merged_by_layer, merge_adapters
from .config import BIDIRECTIONAL, Window, load_config
from .description import describe, identity
from .dtypes import ComputeDtype, choose_dtype
from .fastest import fastest_backend
from .lengths import text_length
from .model import DecoderLayer, LanguageModel, LlamaModel
from .overlap import ahead
from .packing import PackedBatch
from .prompts import document_prompt, model_prompts, texts_and_prompts
from .runner import Runner
from .selftest import check_mask
from .slabs import OnHost, Slabs
from .tokens import Rejected, TextTokenizer, Tokenized, load_tokenizer
from .weights import load_model

Precision = Literal["float32", "float16", "int8"]
PRECISIONS = {"float32": np.float32, "float16": np.float16, "int8": np.int8}

# texts that are tokenised and packed together: the first window's tokens are all that the device waits for
_WINDOW = 2048


class Encoder:
    """A bidirectional Llama that embeds text; a drop-in for `SentenceTransformer.encode`.

    A text's vector is bitwise the same alone, in any batch, at any place, in any order.
    Make one with `Encoder.from_pretrained`.
    """

    def __init__(
        self,
        model: LlamaModel,
        tokenizer: TextTokenizer,
        checkpoint: checkpoints.Checkpoint,
        *,
        pooling: str,
        backend: str,
        window: Window = BIDIRECTIONAL,
        compute_dtype: ComputeDtype,
        backend_reason: str = "",
        normalize: bool = False,
        layers: Iterable[DecoderLayer] | None = None,
    ):
        self.model = model
        self.config = model.config
        self.pooling = pooling
        self.normalize = normalize
        self.checkpoint = checkpoint
        self.prompts, self.default_prompt_name = model_prompts(checkpoint)
        self._tokenizer = tokenizer
        self.backend, self.backend_reason = backend, backend_reason
        self.compute_dtype = compute_dtype
        self.windows = self.config.windows(window)
        self.runner = Runner(model, backend, self.windows, products=compute_dtype.products, layers=layers)
        self.self_test = check_mask(self.runner, self.config, self.windows)
        self.slabs = Slabs(
            self.device,
            longest=self.max_length,
            at_once=self.runner.passes_at_once,
            cores_each=self.runner.cores_each,
            tile=self.runner.tiles[-1],
            release=self.runner.forget_graphs,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        adapters: str | Path | Sequence[str | Path] = (),
        pooling: str | None = None,
        max_length: int | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        attention: str = "auto",
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | None = None,
        local_files_only: bool = False,
        window: Window | None = None,
    ) -> "Encoder":
        """Load a model from the hub or a folder, make it bidirectional, merge its adapters, and test its mask.

        A folder in sentence-transformers' layout says itself which mask and pooling it has, and keeps them.

        Args:
            model: hub id or folder of a Llama, Mistral, Qwen2 or Qwen3 with safetensors, of a PEFT or LLM2Vec adapter
                of one, or of a run of `bivec train`; default the small demonstration encoder that comes with bivec.
                A later stage of LLM2Vec brings the MNTP adapter that it stands on, of the folder of that name beside it
                or of the hub, and is refused without it; texts are put into LLM2Vec's template.
            adapters: further LoRA adapters or runs, merged in this order; a run or a stage of LLM2Vec brings those that
                it stands on.
            pooling: `mean`, `weighted_mean`, `last` or `first`, over the text's tokens; default the model's own, else
                `mean`.
            max_length: tokens a text is cut to, special tokens included, at most as many as the model has positions;
                default LLM2Vec's `max_length`, or the `max_seq_length` of a folder in sentence-transformers' layout, or
                its tokenizer's `model_max_length`, else 512, and all positions where the model has fewer.
            device: `auto`, `cpu` or `cuda[:N]`.
            dtype: `auto`, `float32`, `bfloat16` or `float16`, or with weights and states of eight bits in the products
                `int8` (CPU) or `float8` (CUDA, capability 8.9). `auto` is bfloat16, but float32 on a CPU that is
                measured to multiply that clearly faster, and float16 on a GPU without bfloat16. `int8+float32` and the
                like also say what stands between the products, which else is as `auto` chooses.
            attention: `auto`, `triton` (bivec's kernel), `varlen` (torch's FlashAttention), `flash` (the flash-attn
                package's) or `sdpa` (torch's over texts of one length). `auto` is on CUDA what was measured to be
                fastest on such a GPU, bivec's kernel where nothing was, and on the CPU `sdpa`.
            revision, token, cache_dir, local_files_only: as in huggingface_hub; `revision` is `model`'s.
            window: which tokens see which, `(left, right)` with -1 for all; default the model's own, else `(-1, -1)`,
                bidirectional. `(-1, 0)` is causal.
        Raises:
            ValueError, FileNotFoundError: naming the file or argument and what was expected.
        """
        chosen_device = ops.choose_device(device)
        if pooling is not None and pooling not in POOLING_MODES:
            raise ValueError(f"pooling must be one of {', '.join(POOLING_MODES)}, got {pooling!r}")
        hub = checkpoints.HubOptions(revision, token, cache_dir, local_files_only)
        checkpoint = checkpoints.resolve(DEFAULT_MODEL if model is None else model, adapters, hub)
        config = load_config(checkpoint.base)
        compute_dtype = choose_dtype(dtype, chosen_device, config)
        if attention == "auto":
            backend, backend_reason = fastest_backend(config, chosen_device, compute_dtype.floats)
        else:
            backend = ops.choose_backend(attention, chosen_device, compute_dtype.floats, config.head_dim)
            backend_reason = "asked for"
        max_length = text_length(checkpoint, config, max_length)
        run = checkpoint.description
        tokenizer = TextTokenizer.described(load_tokenizer(checkpoint.tokenizer, config.vocab_size), max_length, run)
        # the caller's autocast is for the caller's own: weights are merged on the CPU, and checks are of what will run
        with torch.autocast("cpu", enabled=False), torch.autocast(chosen_device.type, enabled=False):
            layers = None
            if compute_dtype.is_quantized:
                llama, layers = load_merged_by_layer(checkpoint, config, compute_dtype.floats, chosen_device)
            else:
                llama = load_merged(checkpoint, config, compute_dtype.floats).to(chosen_device)
            return cls(
                llama.eval(),
                tokenizer,
                checkpoint,
                pooling=pooling or run.pooling,
                backend=backend,
                window=window or run.window,
                compute_dtype=compute_dtype,
                backend_reason=backend_reason,
                normalize=run.normalize,
                layers=layers,
            )

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Encoder cannot be pickled or copied: call Encoder.from_pretrained in each process")

    @property
    def device(self) -> torch.device:
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.runner.dtype

    @property
    def max_length(self) -> int:
        return self._tokenizer.max_length

    @property
    def pooled(self) -> str:
        """Which of a text's tokens its vector is made of."""
        if self._tokenizer.pools_prompt:
            return "all, a prompt's too"
        if self._tokenizer.counts_prompt_alone:
            return "all, or those after as many as the prompt has alone"
        return "all, or those after the prompt" if self._tokenizer.pools_special_tokens else "the text's"

    @property
    def template(self) -> tuple[str, str]:
        """What stands before each prompt and after each text, as strings."""
        return self._tokenizer.template

    @property
    def tokenizer(self):
        """The transformers tokenizer, unchanged."""
        return self._tokenizer.hugging_face

    def get_embedding_dimension(self) -> int:
        """Elements of a vector when nothing is truncated."""
        return self.config.hidden_size

    def encode(
        self,
        sentences: str | Sequence[str] | Sequence[Sequence[str]],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        output_value: Literal["sentence_embedding", "token_embeddings"] = "sentence_embedding",
        precision: Precision = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
    ) -> Any:
        """Embed texts; arguments as in sentence-transformers.

        An empty text that leaves no token to pool (it stands under a prompt, or the tokenizer adds no BOS) has the zero
        vector; so has white space that the tokenizer drops, and what a sentence-transformers folder that leaves prompts
        out of pooling counts as its prompt's. `encode_rows` and `bivec embed` report it instead.

        Args:
            sentences: texts, in a list, an array or another iterable; one `str` gives one vector;
                `[[instruction, text], ...]` as in LLM2Vec, where a space joins the two unless the instruction ends with
                white space.
            prompt: put before each text as given; its tokens attend and are not pooled. A space that ends it counts as
                the text's. Default: the prompt that `self.default_prompt_name` names, if any.
            prompt_name: a key of `self.prompts`, instead of `prompt`.
            batch_size: a hint that changes nothing: texts are packed by tokens.
            show_progress_bar: default: on a terminal, when there is more than one pass to run.
            output_value: `token_embeddings` gives one `(tokens, dim)` array of final hidden states a text.
            precision: `float16` rounds; `int8` scales each vector by 127 / its largest magnitude, which keeps cosines
                and depends on no other text.
            convert_to_tensor: a torch tensor on the encoder's device instead of numpy.
            device: None or the encoder's own; it does not move.
            normalize_embeddings: scale each vector to length 1; a model whose files say so (sentence-transformers'
                `Normalize`) always does.
            truncate_dim: keep the leading dimensions, before normalisation.
        Returns:
            `(N, dim)`, or `(dim,)` for one `str`.
        Raises:
            ValueError: a text that cannot be embedded, with its place and the reason; a wrong argument.
            RuntimeError: in a fork of a process that computes with several cores.
        """
        single = isinstance(sentences, str)
        texts, prompts = texts_and_prompts([sentences] if single else sentences, self._prompt(prompt_name, prompt))
        self._check_device(device)
        if output_value == "token_embeddings":
            embeddings = self._token_embeddings(texts, prompts, convert_to_numpy and not convert_to_tensor)
            return embeddings[0] if single else embeddings
        if output_value != "sentence_embedding":
            raise ValueError(f"output_value must be sentence_embedding or token_embeddings, got {output_value!r}")
        with tqdm(total=len(texts), unit="text", disable=not self._shows_progress(show_progress_bar, texts)) as bar:
            vectors, reasons, _ = self._encode_windows(
                lambda window: list(map(_without_tokens, self._tokenizer(texts[window], prompts[window]))),
                len(texts),
                normalize_embeddings=normalize_embeddings,
                truncate_dim=truncate_dim,
                precision=precision,
                progress=lambda num_texts, _: bar.update(num_texts),
            )
        _raise_first(reasons)
        if convert_to_tensor:
            output: Any = torch.from_numpy(vectors).to(self.device)
        else:
            output = vectors if convert_to_numpy else list(torch.from_numpy(vectors))
        return output[0] if single else output

    def encode_query(self, sentences, prompt_name: str | None = None, prompt: str | None = None, **arguments) -> Any:
        """`encode` with the prompt named `query`, or without one where the model has none and none is given."""
        if prompt is None and prompt_name is None:
            prompt = self.prompts.get("query", "")
        return self.encode(sentences, prompt_name, prompt, **arguments)

    def encode_document(self, sentences, prompt_name: str | None = None, prompt: str | None = None, **arguments) -> Any:
        """As `encode_query`, with the prompt named `document`, `passage` or `corpus`."""
        if prompt is None and prompt_name is None:
            prompt = document_prompt(self.prompts)
        return self.encode(sentences, prompt_name, prompt, **arguments)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine similarities, float32 `(N, M)`, of two sets of vectors, whatever `similarity_fn_name` a model has."""
        first, second = (
            torch.nn.functional.normalize(torch.atleast_2d(torch.as_tensor(embeddings)).float(), dim=-1)
            for embeddings in (embeddings1, embeddings2)
        )
        return first @ second.T

    def encode_rows(
        self,
        texts: Sequence[str],
        *,
        prompt: str | Sequence[str] = "",
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        precision: Precision = "float32",
        progress: Callable[[int, int], object] | None = None,
    ) -> tuple[np.ndarray, list[str | None], int]:
        """Embed what can be embedded and say of the rest why not; `encode` and embedding jobs stand on it.

        Args:
            prompt: one for all, or one a text.
            progress: called as `progress(texts, tokens)` after each pass.
        Returns:
            vectors `(N, dim)` with zeros where there is a reason; a reason or None for each text; tokens run.
        """
        prompts = [prompt] * len(texts) if isinstance(prompt, str) else prompt
        return self._encode_windows(
            lambda window: self._tokenizer(texts[window], prompts[window]),
            len(texts),
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            precision=precision,
            progress=progress,
        )

    def tokenize_rows(self, texts: Sequence[str], *, prompt: str = "") -> list[Tokenized | Rejected]:
        """The first half of `encode_rows`, on the host alone: it may run while another thread computes."""
        return self._tokenizer(texts, [prompt] * len(texts))

    def encode_tokenized(
        self,
        tokenized: Sequence[Tokenized | Rejected],
        *,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        precision: Precision = "float32",
        progress: Callable[[int, int], object] | None = None,
    ) -> tuple[np.ndarray, list[str | None], int]:
        """The second half of `encode_rows`: pack the texts, run them, pool; it returns what `encode_rows` does.

        A text without tokens has the zero vector.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        dim = self.get_embedding_dimension()
        if truncate_dim is not None and not 1 <= truncate_dim <= dim:
            raise ValueError(f"truncate_dim must be from 1 to {dim}, got {truncate_dim}")
        vectors = np.zeros((len(tokenized), truncate_dim or dim), dtype=PRECISIONS[precision])
        reasons = [text.reason if isinstance(text, Rejected) else None for text in tokenized]
        rows = [row for row, text in enumerate(tokenized) if isinstance(text, Tokenized) and text.ids]
        texts = [text for text in tokenized if isinstance(text, Tokenized) and text.ids]

        def embed(slab: list[int], batch: PackedBatch) -> tuple[list[int], OnHost, OnHost, int]:
            pooled = pool(
                self.runner(batch, self.windows),
                batch.cu_seqlens,
                pool_starts=batch.pool_starts,
                mode=self.pooling,  # type: ignore[arg-type]  # checked when the encoder was made
                norm_weight=self.model.norm.weight.detach(),
                norm_eps=self.config.rms_norm_eps,
                truncate_dim=truncate_dim,
                normalize=normalize_embeddings or self.normalize,
            )
            quantized = _quantize(pooled, precision)
            finite = (pooled.isfinite() & quantized.isfinite()).all(dim=-1)  # float16 can overflow
            return slab, OnHost(quantized.where(finite[:, None], 0)), OnHost(finite), batch.num_tokens

        total = 0
        for slab, found, finite, num_tokens in self.slabs.map(embed, texts):
            places = [rows[index] for index in slab]
            vectors[places] = found.numpy()
            for index in np.flatnonzero(~finite.numpy()):
                reasons[places[index]] = "the model gives a vector that is not finite"
            total += num_tokens
            if progress is not None:
                progress(len(slab), num_tokens)
        return vectors, reasons, total

    def _encode_windows(
        self, tokenize: Callable[[slice], list[Tokenized | Rejected]], num_texts: int, **options: Any
    ) -> tuple[np.ndarray, list[str | None], int]:
        """`encode_tokenized` of window after window of `num_texts`, the next one tokenised meanwhile."""
        windows = [slice(start, start + _WINDOW) for start in range(0, num_texts, _WINDOW) or [0]]
        tokenized = (tokenize(window) for window in windows)
        with contextlib.closing(ahead(tokenized) if len(windows) > 1 else tokenized) as found:
            parts = [self.encode_tokenized(window, **options) for window in found]
        vectors, reasons, num_tokens = zip(*parts, strict=True)
        return np.concatenate(vectors), [reason for part in reasons for reason in part], sum(num_tokens)

    def forward_packed(self, batch: PackedBatch) -> torch.Tensor:
        """The differentiable pass: final hidden states `(T, E)`, after the last norm, of a packed batch.

        Raises:
            ValueError: the encoder computes in eight bits, and keeps no float weights.
        """
        if self.compute_dtype.is_quantized:
            raise ValueError(
                f"forward_packed needs a float dtype; this encoder computes in {self.compute_dtype.name}: load it with "
                f"dtype={str(self.compute_dtype.floats).removeprefix('torch.')!r}"
            )
        return self.model.norm(self.model(batch, self.windows, backend=self.backend))

    def language_model(self, adapters: bool = False) -> LanguageModel:
        """The original causal language model, read again from the base checkpoint: no adapter touches it.

        With `adapters` the encoder's own are merged into it: what generation is like after training.
        """
        model = load_model(LanguageModel, self.checkpoint.base, self.compute_dtype.floats, self.config)
        if adapters:
            merge_adapters(model.model, self.checkpoint.adapters)
        return model.to(self.device).eval()

    def warm_up(self) -> None:
        """Run a pass of every size once, so that no request waits for kernels to be compiled and graphs captured.

        On the CPU there is nothing to wait for, and nothing is run.
        """
        if self.device.type != "cuda":
            return
        # the largest first: the others' graphs share its memory
        for size in reversed(self.runner.pass_sizes(self.slabs.tokens)):
            whole, rest = divmod(min(size, self.slabs.tokens), self.max_length)
            lengths = [self.max_length] * whole + [rest] * (rest > 0)
            self.encode_tokenized([Tokenized([0] * length, 0) for length in lengths])

    def describe(self) -> dict[str, Any]:
        """What was loaded, which choices were made and why, and the self-test's result; texts, numbers and lists."""
        return describe(self)

    def identity(self) -> dict[str, Any]:
        """All that a vector's bits depend on but its text and the arguments of `encode`; every file is read once."""
        return identity(self)

    def _prompt(self, prompt_name: str | None, prompt: str | None) -> str:
        if prompt is not None and prompt_name is not None:
            raise ValueError("prompt and prompt_name must not both be given")
        if prompt_name is not None and prompt_name not in self.prompts:
            raise ValueError(f"prompt_name must be one of {sorted(self.prompts)}, got {prompt_name!r}")
        if prompt is None:
            name = prompt_name if prompt_name is not None else self.default_prompt_name
            prompt = "" if name is None else self.prompts[name]
        return prompt

    def _check_device(self, device: str | torch.device | None) -> None:
        if device is None:
            return
        asked = ops.choose_device(device) if isinstance(device, str | torch.device) else None
        if asked is None or asked.type != self.device.type or asked.index not in (None, self.device.index or 0):
            raise ValueError(
                f"device must be None or the encoder's own, {self.device}, got {device!r}: load another one"
            )

    def _token_embeddings(self, texts: Sequence[str], prompts: Sequence[str], as_numpy: bool) -> list:
        """Final hidden states `(tokens, dim)` of each text, prompt and special tokens included, float32."""
        tokenized = self._tokenizer(texts, prompts)
        _raise_first([text.reason if isinstance(text, Rejected) and text.ids is None else None for text in tokenized])
        found = [Tokenized(text.ids, 0) for text in tokenized if text.ids]
        rows = [row for row, text in enumerate(tokenized) if text.ids]
        none = torch.zeros(0, self.get_embedding_dimension(), device=self.device)
        embeddings: list = [none.cpu().numpy() if as_numpy else none] * len(tokenized)

        def embed(slab: list[int], batch: PackedBatch) -> None:
            hidden_states = self.model.norm(self.runner(batch, self.windows)).detach().float()
            for index, states in zip(slab, hidden_states.split(batch.seqlens), strict=True):
                embeddings[rows[index]] = states.cpu().numpy() if as_numpy else states.clone()

        for _ in self.slabs.map(embed, found):
            pass
        return embeddings

    def _shows_progress(self, show_progress_bar: bool | None, texts: Sequence[str]) -> bool:
        if show_progress_bar is None:
            return sys.stderr.isatty() and sum(map(len, texts)) > self.slabs.tokens
        return show_progress_bar


def _quantize(vectors: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Float32 vectors `(S, dim)` in the precision asked for."""
    if precision == "int8":
        largest = vectors.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return (vectors * (127.0 / largest)).round().to(torch.int8)
    return vectors.half() if precision == "float16" else vectors


def _without_tokens(text: Tokenized | Rejected) -> Tokenized | Rejected:
    """A text that leaves none of its tokens to pool as one that is run with no tokens, whose vector is zero."""
    return Tokenized([], 0) if isinstance(text, Rejected) and text.ids is not None else text


def _raise_first(reasons: Sequence[str | None]) -> None:
    for place, reason in enumerate(reasons):
        if reason is not None:
            raise ValueError(f"sentences[{place}] cannot be embedded: {reason}")
