"""sentence-transformers in every setting that is tried, its model made bidirectional and shown to be."""

import numpy as np
import torch

from .contender import Contender, Encode, centred_cosines
from .timing import error_text

PEER = "sentence-transformers"
DEFAULT = f"{PEER} float32, batch 32"


def sentence_transformers(folder: str, device: torch.device, max_length: int) -> list[Contender]:
    """One contender a dtype, attention and batch size, the defaults among them."""
    kinds = [("float32", "sdpa"), ("bfloat16", "sdpa")]
    if device.type == "cuda":
        # float32 is too slow to be timed; with flash attention, sentence-transformers leaves padding out
        kinds = [("bfloat16", "sdpa"), ("bfloat16", "flash_attention_2")]
    batch_sizes = (32, 128, 512) if device.type == "cuda" else (4, 8, 16, 32)
    models = {kind: load_sentence_transformer(folder, *kind, device, max_length) for kind in kinds}
    return [
        Contender(
            f"{PEER} {dtype}, batch {size}" + ("" if attention == "sdpa" else f", {attention}"),
            dtype,
            _encode(model, size),
        )
        for (dtype, attention), model in models.items()
        for size in batch_sizes
    ]


def _encode(model, batch_size: int) -> Encode | str:
    if isinstance(model, str):
        return model
    return lambda texts: model.encode(texts, batch_size=batch_size, show_progress_bar=False)


def load_sentence_transformer(folder: str, dtype: str, attention: str, device: torch.device, max_length: int):
    """The checkpoint as a bidirectional SentenceTransformer with mean pooling, or the reason why there is none."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        transformer = Transformer(
            folder,
            max_seq_length=max_length,
            model_kwargs={"dtype": getattr(torch, dtype), "attn_implementation": attention},
        )
        pooling = Pooling(transformer.get_embedding_dimension(), "mean")
        model = SentenceTransformer(modules=[transformer, pooling], device=str(device))
        # given through config_kwargs it is dropped without a word (6.2), so it is set where the layers read it
        model[0].auto_model.config.is_causal = False
        if not sees_future(model):
            return "the model stayed causal with is_causal=False"
    except Exception as error:
        return error_text(error)
    return model


@torch.inference_mode()
def sees_future(model) -> bool:
    """Whether the first token's state changes with the last token."""
    llama = model[0].auto_model
    ids = torch.arange(3, 11, device=llama.device)[None]
    changed = ids.clone()
    changed[0, -1] = 11
    masks = torch.ones_like(ids)
    first, second = (llama(input_ids=x, attention_mask=masks).last_hidden_state[0, 0].float() for x in (ids, changed))
    return bool((first - second).abs().max() > 1e-4 * first.abs().max())


def causal_control(model, texts: list[str], reference: np.ndarray | None, count: int = 32) -> float | None:
    """The median cosine of the same model's causal vectors: what a wrong mask gives, well below LEAST_COSINE."""
    if reference is None or isinstance(model, str):
        return None
    config = model[0].auto_model.config
    config.is_causal = True
    try:
        causal = model.encode(texts[:count], show_progress_bar=False)
    finally:
        config.is_causal = False
    return float(np.median(centred_cosines(causal, reference[:count], reference.mean(0))))
