"""The packed Llama: hidden states `(T, E)` over concatenated sequences, module names as in transformers.

This is the differentiable pass that training uses and the place where weights and adapters are loaded;
`runner.py` fuses the same layers for embedding. Covers Llama, Mistral, Qwen2 and Qwen3.

Shapes: T packed tokens, S sequences, E hidden size, H query heads, G key/value heads, D head dimension, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..kernels.norm import add_rms_norm, rms_norm
from ..kernels.rotary import apply_rotary
from ..kernels.swiglu import swiglu
from .config import ModelConfig, Window
from .ops import attention, list_tiles
from .packing import PackedBatch

LAYER_SEED_STEP = 0x9E3779B97F4A7C15 - 2**64  # odd: it reaches every 64-bit number; as a signed one


def project(hidden_states: torch.Tensor, *linears: nn.Module, room: int = 0) -> tuple[torch.Tensor, ...]:
    """The outputs of linears that share their input; where LoRA layers are fused (`lora.py`), of one call for all.

    `room`: columns of memory behind the input's rows that are free, as `room_behind_input` asked for them.
    """
    for linear in linears:
        together = getattr(linear, "forward_together", None)
        if together is not None:
            return together(hidden_states, linears, room)
    return tuple(linear(hidden_states) for linear in linears)


def room_behind_input(*linears: nn.Module) -> int:
    """How many columns of memory `project` wants behind the rows of these linears' input."""
    for linear in linears:
        room = getattr(linear, "room_together", None)
        if room is not None:
            return room(linears)
    return 0


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, *, room: int = 0
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of `hidden_states`; with a residual the sum of the two and the norm of the sum."""
        if residual is None:
            return rms_norm(hidden_states, self.weight, self.eps, room=room)
        return add_rms_norm(hidden_states, residual, self.weight, self.eps, room=room)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        size, head_dim = config.hidden_size, config.head_dim
        self.head_dim = head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, size, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def room_behind_input(self) -> int:
        return room_behind_input(self.q_proj, self.k_proj, self.v_proj)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (T, E)
        cos: torch.Tensor,
        sin: torch.Tensor,
        batch: PackedBatch,
        window: Window,
        backend: str,
        dropout_p: float,
        future_p: float,
        seeds: torch.Tensor | None,  # int64 (S,), this layer's
        tile_list: torch.Tensor | None,
        room: int = 0,
    ) -> torch.Tensor:
        projections = project(hidden_states, self.q_proj, self.k_proj, self.v_proj, room=room)
        query, key, value = (heads.unflatten(-1, (-1, self.head_dim)) for heads in projections)
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = apply_rotary(query, key, cos, sin)
        attended = attention(
            query,
            key,
            value,
            batch,
            window,
            backend,
            dropout_p=dropout_p,
            future_p=future_p,
            seeds=seeds,
            tile_list=tile_list,
        )
        return self.o_proj(attended.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def room_behind_input(self) -> int:
        return room_behind_input(self.gate_proj, self.up_proj)

    def forward(self, hidden_states: torch.Tensor, room: int = 0) -> torch.Tensor:
        gate, up = project(hidden_states, self.gate_proj, self.up_proj, room=room)
        room = room_behind_input(self.down_proj)
        return project(swiglu(gate, up, room=room), self.down_proj, room=room)[0]


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, *attention_arguments) -> torch.Tensor:
        room = self.self_attn.room_behind_input()
        attended = self.self_attn(self.input_layernorm(hidden_states, room=room), *attention_arguments, room=room)
        room = self.mlp.room_behind_input()
        hidden_states, normed = self.post_attention_layernorm(attended, hidden_states, room=room)
        return hidden_states + self.mlp(normed, room)


class LlamaModel(nn.Module):
    """The decoder stack. Which tokens see which is an argument of the pass, never a property of the weights."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._frequencies: dict[torch.device, torch.Tensor] = {}  # on each device that has been asked

    def rotary_tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine, float32 `(T, D / 2)`, of each token's angles."""
        device = positions.device
        if device not in self._frequencies:
            self._frequencies[device] = self.config.rope.inverse_frequencies(self.config.head_dim).to(device)
        angles = positions[:, None].float() * self._frequencies[device]
        return angles.cos(), angles.sin()

    def forward(
        self,
        batch: PackedBatch,
        windows: Sequence[Window] | None = None,
        *,
        backend: str = "sdpa",
        dropout_p: float = 0.0,
        future_p: float = 1.0,
        seeds: torch.Tensor | None = None,
        checkpoint_activations: bool = False,
    ) -> torch.Tensor:
        """Last hidden states `(T, E)` before the final norm (`self.norm`), in the weights' dtype.

        Args:
            windows: one a layer, `(left, right)` with -1 for all; default: the configuration's, bidirectional.
            backend: what `ops.choose_backend` gave.
            dropout_p: the chance that an attention probability is dropped, in every layer.
            future_p: the chance that a token is shown a later one that its window holds, in every layer.
            seeds: int64 `(S,)`, one a sequence, needed by these two. Layer `l` draws its masks from
                `seeds + l * LAYER_SEED_STEP` modulo 2**64, so choose them at random, not in multiples of the step.
            checkpoint_activations: keep only the layers' inputs, and compute each layer again in the backward.
        """
        hidden_states = self.embed_tokens(batch.input_ids)
        cos, sin = self.rotary_tables(batch.positions)
        tile_list = list_tiles(batch, backend)
        for layer, window in zip(self.layers, windows or self.config.bidirectional_windows, strict=True):
            arguments = (hidden_states, cos, sin, batch, window, backend, dropout_p, future_p, seeds, tile_list)
            if checkpoint_activations:
                # the state of torch's generator with it: LoRA's dropout draws its seed from there
                hidden_states = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=True)
            else:
                hidden_states = layer(*arguments)
            if seeds is not None:
                seeds = seeds + LAYER_SEED_STEP
        return hidden_states


class LanguageModel(nn.Module):
    """The original causal language model: the base checkpoint with the causal window and its head."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, batch: PackedBatch, *, backend: str = "sdpa") -> torch.Tensor:
        """Logits `(T, V)` of the token that follows each token."""
        hidden_states = self.model(batch, self.config.causal_windows, backend=backend)
        return self.lm_head(self.model.norm(hidden_states))
