"""A denoise step as others make it: the released pipeline, stock diffusers, and a mixed batch padded to one length.

Shapes: B requests side by side, T text, I image tokens (target and references) and S = T + I of each, D model width,
H heads, d head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.modulation import gate_residual, modulate
from model.blocks import (
    Last,
    Projections,
    Responses,
    Site,
    after_attention,
    norms_of,
    project,
    queries_and_keys,
    to_stream_order,
)
from model.packing import Condition, lay_out
from model.sampling import Denoising, Sampler
from model.transformer import EmbeddingTables, Network
from tests.benchmarks.step_cases import begin, with_references


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the released pipeline keeps between steps and gives its transformer in each of them.

    Attributes:
        latents: [B, n, 64], the noisy targets. references: [B, I − n, 64], clean. text: [B, T, Ct]. pooled: [B, Cp].
        added: [B, I, D], type and index vectors of each token.
        text_ids: [T, 3]. image_ids: [I, 3]. timestep, guidance: [B].
        mask: [B, 1, 1, S], true where there is a token and not padding; None without padding.
    """

    latents: Tensor
    references: Tensor
    text: Tensor
    pooled: Tensor
    added: Tensor
    text_ids: Tensor
    image_ids: Tensor
    timestep: Tensor
    guidance: Tensor
    mask: Tensor | None = None


def inputs_of(
    tables: EmbeddingTables,
    conditions: Sequence[Condition],
    latents: Sequence[Tensor],
    timesteps: Sequence[Tensor],
    guidances: Sequence[float],
    mask: Tensor | None = None,
) -> Inputs:
    """What `model.packing.pack` takes, as one batch. Several requests are of one shape: padded."""
    layouts = [lay_out([condition]) for condition in conditions]
    ids, num_text = layouts[0].ids, layouts[0].num_text
    targets = torch.stack(list(latents))
    tokens = [[reference.tokens for reference in condition.references] for condition in conditions]
    return Inputs(
        latents=targets,
        references=torch.stack([torch.cat(own) for own in tokens]) if tokens[0] else targets[:, :0],
        text=torch.stack([condition.text for condition in conditions]),
        pooled=torch.stack([condition.pooled for condition in conditions]),
        added=torch.stack([tables.rows(layout) for layout in layouts]),
        text_ids=ids[:num_text],
        image_ids=ids[num_text:],
        timestep=torch.stack(list(timesteps)).to(targets),
        guidance=torch.tensor(guidances).to(targets),
        mask=mask,
    )


def inputs_at(tables: EmbeddingTables, runs: Sequence[Denoising], mask: Tensor | None = None) -> Inputs:
    """The inputs of runs at their current steps."""
    return inputs_of(
        tables,
        [run.condition for run in runs],
        [run.latents for run in runs],
        [run.timestep for run in runs],
        [run.guidance.at(run.step) for run in runs],
        mask,
    )


@torch.inference_mode()
def released(model: FluxTransformer2DModel, inputs: Inputs) -> Tensor:
    """Velocity of the targets [B, n, 64] as the released pipeline computes it in every step, with nothing kept.

    Target and references go through the input layer together and get their vectors added; one time embedding serves
    all tokens; the blocks are diffusers' own, called as they are; after the output layer the targets are cut out.
    """
    network: Any = model  # diffusers annotates its layers loosely
    image = network.x_embedder(torch.cat([inputs.latents, inputs.references], dim=1)) + inputs.added
    time = network.time_text_embed(inputs.timestep * 1000, inputs.guidance * 1000, inputs.pooled)
    text = network.context_embedder(inputs.text)
    rotary = network.pos_embed(torch.cat([inputs.text_ids, inputs.image_ids]))
    options = None if inputs.mask is None else {"attention_mask": inputs.mask}
    for block in (*network.transformer_blocks, *network.single_transformer_blocks):
        text, image = block(
            hidden_states=image,
            encoder_hidden_states=text,
            temb=time,
            image_rotary_emb=rotary,
            joint_attention_kwargs=options,
        )
    return network.proj_out(network.norm_out(image, time))[:, : inputs.latents.shape[1]]


@torch.inference_mode()
def stock(forward: Callable[..., tuple[Tensor]], inputs: Inputs) -> Tensor:
    """diffusers' own forward, which knows no type and index vectors: [B, I, 64].

    Args:
        forward: the model, or what was compiled of it.
    """
    return forward(
        hidden_states=torch.cat([inputs.latents, inputs.references], dim=1),
        encoder_hidden_states=inputs.text,
        pooled_projections=inputs.pooled,
        timestep=inputs.timestep,
        guidance=inputs.guidance,
        txt_ids=inputs.text_ids,
        img_ids=inputs.image_ids,
        return_dict=False,
    )[0]


def pad(sampler: Sampler, runs: Sequence[Denoising]) -> tuple[list[Denoising], Tensor]:
    """Runs padded to the longest, and the mask [B, 1, 1, S] of what is not padding.

    Padding is what the longest run has beyond the others, references of random tokens: what is masked must not matter.
    All runs have one kind of text and target; their references are prefixes of one list of square grids.
    """
    longest = max((run.condition for run in runs), key=_length)
    even = [replace(begin(sampler, _padded(run.condition, longest), run.latents), step=run.step) for run in runs]
    places = torch.arange(_length(longest))
    real = torch.stack([places < _length(run.condition) for run in runs])
    return even, real[:, None, None].to(runs[0].latents.device)


def _padded(condition: Condition, longest: Condition) -> Condition:
    missing = longest.references[len(condition.references) :]
    return with_references(condition, [torch.randn_like(reference.tokens) for reference in missing])


def _length(condition: Condition) -> int:
    rows, columns = condition.target_grid
    return len(condition.text) + rows * columns + sum(len(reference.tokens) for reference in condition.references)


def padded(network: Network, mask: Tensor, *, cudnn: bool = False) -> Network:
    """The network for a padded batch: the same code, but for attention over equal lengths with a mask."""
    attend = partial(_masked_attention, mask=mask, cudnn=cudnn)
    return replace(network, double=partial(_padded_double, attend), single=partial(_padded_single, attend))


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor, cudnn: bool) -> Tensor:
    """[B·S, H, d] → [B·S, H·d], by torch's own order of backends or cuDNN's first."""
    batch = [tokens.unflatten(0, (len(mask), -1)).transpose(1, 2) for tokens in (query, key, value)]
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    context: AbstractContextManager[Any] = sdpa_kernel(order, set_priority=True) if cudnn else nullcontext()
    with context:
        return F.scaled_dot_product_attention(*batch, attn_mask=mask).transpose(1, 2).flatten(0, 1).flatten(1)


def _padded_double(
    attend: Attention,
    block: FluxTransformerBlock,
    text: Tensor,
    image: Tensor,
    image_vectors: Tensor,
    text_vectors: Tensor,
    site: Site,
    fused: Projections = (),
    *_: object,
) -> tuple[Tensor, Tensor, Responses]:
    """`model.blocks.double_block` with another attention."""
    attn = block.attn
    image_mod, text_mod = image_vectors.chunk(6, dim=1), text_vectors.chunk(6, dim=1)
    normed_text = modulate(text, text_mod[0], text_mod[1], site.text_rows)
    normed_image = modulate(image, image_mod[0], image_mod[1], site.image_rows)
    own = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.to_q, attn.to_k, attn.to_v)
    text_qkv = project(attn, own[0], fused[0] if fused else None, normed_text)
    image_qkv = project(attn, own[1], fused[1] if fused else None, normed_image)
    norms = norms_of(attn.norm_added_q, attn.norm_added_k, attn.norm_q, attn.norm_k)
    query, key, value, _seen = queries_and_keys(text_qkv, image_qkv, norms, site, None)
    attended = to_stream_order(attend(query, key, value), site)
    attended_text, attended_image = attended.split([text.shape[0], image.shape[0]])
    image = after_attention(image, attn.to_out[0](attended_image), block.ff, image_mod, site.image_rows)
    text = after_attention(text, attn.to_add_out(attended_text), block.ff_context, text_mod, site.text_rows)
    return text, image, ()


def _padded_single(
    attend: Attention,
    block: FluxSingleTransformerBlock,
    joint: Tensor,
    vectors: Tensor,
    site: Site,
    fused: Projections = (),
    _probe: object = None,
    last: Last | None = None,
) -> tuple[Tensor, Responses]:
    """`model.blocks.single_block` with another attention."""
    shift, scale, gate = vectors.chunk(3, dim=1)
    attn, rows = block.attn, site.joint_rows
    normed = modulate(joint, shift, scale, rows)
    qkv = project(attn, (attn.to_q, attn.to_k, attn.to_v), fused[0] if fused else None, normed)
    norms = norms_of(attn.norm_q, attn.norm_k, attn.norm_q, attn.norm_k)
    attended = attend(*queries_and_keys(None, qkv, norms, site, None)[:3])
    if last is not None:
        rows = last.rows
        attended, joint, normed = (tokens.index_select(0, last.tokens) for tokens in (attended, joint, normed))
    mlp = block.act_mlp(block.proj_mlp(normed))
    return gate_residual(joint, block.proj_out(torch.cat([attended, mlp], dim=1)), gate, rows), ()
