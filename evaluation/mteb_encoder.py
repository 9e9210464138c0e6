"""An encoder for the Massive Text Embedding Benchmark: `mteb.evaluate(MtebEncoder(encoder), tasks)`.

Queries, and both sides of a symmetric task, get the task's instruction, which attends and is not pooled; documents get
one only where the task gives it for documents, as in LLM2Vec and E5 (Wang et al., arXiv 2401.00368).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..engine.encoder import Encoder
from ..engine.prompts import as_prompt
from .extras import needed
from .report import fingerprint
from .sts import cosines


class MtebEncoder:
    """Implements mteb 2's `EncoderProtocol`.

    Args:
        encoder: any bivec encoder.
        instructions: of tasks by name, in place of mteb's own: a string, or `{"query": ..., "document": ...}`; an empty
            string is none.
    Raises:
        ValueError: mteb is absent.
    """

    def __init__(self, encoder: Encoder, instructions: Mapping[str, str | Mapping[str, str]] | None = None):
        self.encoder = encoder
        self.instructions = dict(instructions or {})
        model_meta = needed("mteb.models.model_meta", "mteb", "MtebEncoder")
        name = str(encoder.checkpoint.name).rstrip("/").rpartition("/")[2]
        self.mteb_model_meta = model_meta.ModelMeta.create_empty(
            {
                "name": f"bivec/{name}",
                "revision": self._revision(),
                "n_parameters": sum(parameter.numel() for parameter in encoder.model.parameters()),
                "max_tokens": encoder.max_length,
                "embed_dim": encoder.get_embedding_dimension(),
                "similarity_fn_name": model_meta.ScoringFunction.COSINE,
                "use_instructions": True,
            }
        )

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **arguments: Any,
    ) -> np.ndarray:
        """Vectors float32 `(N, E)` of the batches' `text`s."""
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = self.instruction(task_metadata, prompt_type)
        return self.encoder.encode(texts, prompt=as_prompt(instruction), show_progress_bar=False)

    def instruction(self, task_metadata: Any, prompt_type: Any = None) -> str:
        """What stands before the texts of a task; `prompt_type` is query, document or None, as mteb gives it."""
        side = None if prompt_type is None else prompt_type.value
        given = self.instructions.get(task_metadata.name, task_metadata.prompt)
        if isinstance(given, Mapping):
            return given.get(side or "query") or ""
        if side == "document":
            return ""
        if given is None:
            given = needed("mteb.abstasks.abstask", "mteb", "MtebEncoder").get_abstask_prompt(task_metadata.name)
        return given

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines, float32 `(N, M)`."""
        return self.encoder.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> np.ndarray:
        """Cosines, float64 `(N,)`, of rows with the same place."""
        return cosines(np.atleast_2d(embeddings1), np.atleast_2d(embeddings2))

    def _revision(self) -> str:
        """Of what vectors depend on: mteb keeps results by name and revision, and would take another's for ours."""
        encoder = self.encoder
        checkpoint = encoder.checkpoint
        files = [path for folder in (checkpoint.base, *checkpoint.adapters) for path in folder.glob("*.safetensors")]
        state = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
        settings = (encoder.pooling, encoder.max_length, encoder.windows, str(encoder.dtype), self.instructions)
        return fingerprint(map(repr, state), map(repr, settings))[:16]
