"""Our Transformer language model as a Llama of transformers: the same mathematics, so that what runs those runs ours.

Everything has its place there: RMSNorm before each layer, rotary positions whose halves pair, SwiGLU, grouped queries,
no biases, tied embeddings or a head. Dropout is left out, for it acts in training alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mmhub_text.transformer_lm import TransformerLM


def as_llama(model: TransformerLM) -> LlamaForCausalLM:
    """Return a Llama that computes the logits of `model`, in evaluation mode, on the CPU."""
    with torch.device("meta"):
        llama: Any = LlamaForCausalLM(_config(model))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(model)}
    llama.load_state_dict(tensors, strict=False, assign=True)
    llama.tie_weights()
    left = [name for name, parameter in llama.named_parameters() if parameter.is_meta]
    assert not left, left
    found: LlamaForCausalLM = llama.eval()
    return found


def _config(model: TransformerLM) -> LlamaConfig:
    config, processor = model.config, model.processor
    block: Any = model.blocks[0]
    pad = processor.names.get("pad_token")
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=block.mlp.out.in_features,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        max_position_embeddings=config.max_length,
        rms_norm_eps=model.norm.eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.theta},
        tie_word_embeddings=config.tied,
        bos_token_id=processor.begin_id,
        eos_token_id=list(processor.stop_ids) or None,
        pad_token_id=None if pad is None or processor.tokenizer is None else processor.tokenizer.token_to_id(pad),
        dtype=model.embedding.weight.dtype,
    )


def _tensors(model: TransformerLM) -> Iterator[tuple[str, Tensor]]:
    """Our tensors by their names there; theirs are separate where ours stand behind each other."""
    yield "model.embed_tokens.weight", model.embedding.weight
    yield "model.norm.weight", model.norm.weight
    if model.head is not None:
        yield "lm_head.weight", model.head.weight
    width = model.config.dim // model.config.heads
    blocks: Any = model.blocks
    for number, block in enumerate(blocks):
        layer, attention = f"model.layers.{number}", block.attention
        sizes = [attention.heads * width, *[attention.kv_heads * width] * 2]
        for name, part in zip("qkv", attention.qkv.weight.split(sizes), strict=True):
            yield f"{layer}.self_attn.{name}_proj.weight", part
        yield f"{layer}.self_attn.o_proj.weight", attention.out.weight
        for name, part in zip(("gate", "up"), block.mlp.both.weight.chunk(2), strict=True):
            yield f"{layer}.mlp.{name}_proj.weight", part
        yield f"{layer}.mlp.down_proj.weight", block.mlp.out.weight
        yield f"{layer}.input_layernorm.weight", block.norm1.weight
        yield f"{layer}.post_attention_layernorm.weight", block.norm2.weight
