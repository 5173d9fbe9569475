"""What is optimised: the packed forward with its adapter and embeddings, and the losses of one batch.

One module, so that accelerate can spread it over processes: its forward is prompts and latents in, losses out.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from model.losses import Losses, LossTerm, flow_loss, holder_loss, noised, route_loss
from model.packing import Condition, lay_out, pack
from model.roles import ADDED_TOKENS
from model.routing import Capture, ResponseMaps, placeholder_ids, placeholder_positions
from model.text import PromptEmbeds, PromptEncoder
from model.transformer import EmbeddingTables, Network, forward, forward_with_maps
from model.weights.checkpoints import LoadedModel
from workers.training.adapting import Embeddings
from workers.training.batches import Batch, Example
from workers.training.encodings import Encodings
from workers.training.recipes import LossPart

_LOG = logging.getLogger(__name__)
_REMEMBERED_BYTES = 2**28
"""64 prompts of FLUX's, thousands of a small model's."""


class Objective(nn.Module):
    """The trained network and its losses.

    Args:
        checkpointing: compute blocks again in the backward pass instead of keeping their insides.
        encodings: encodes prompts without placeholders; None has them encoded together, step by step.
    """

    def __init__(
        self,
        model: LoadedModel,
        embeddings: Embeddings,
        *,
        checkpointing: bool,
        encodings: Encodings | None = None,
    ) -> None:
        super().__init__()
        self.transformer = model.transformer
        self.embeddings = embeddings
        self.checkpointing = checkpointing
        self._prompts = _Prompts(model.text, encodings)  # frozen, and no part of this module's state

    def forward(self, batch: Batch, losses: LossPart) -> tuple[Losses, ResponseMaps]:
        """Losses of a batch; those of weight 0 are not computed."""
        embeds = self._prompts.features([example.prompt for example in batch.examples], self.embeddings)
        conditions = [
            Condition(embed.text, embed.pooled, example.grid, example.references)
            for embed, example in zip(embeds, batch.examples, strict=True)
        ]
        layout = lay_out(conditions)
        times = batch.times.to(batch.examples[0].latents)
        latents = [
            noised(example.latents, example.noise, time) for example, time in zip(batch.examples, times, strict=True)
        ]
        packed = pack(layout, conditions, latents, list(times), batch.guidances.tolist())
        tables = EmbeddingTables(self.embeddings.type_rows, self.embeddings.index_rows)
        wants_route, wants_holder = losses.route > 0 and bool(batch.masks), losses.holder > 0
        maps, network = ResponseMaps((), ()), Network(self.transformer)
        if wants_route or wants_holder:
            capture = Capture(route=wants_route, holder=wants_holder)
            positions = self._prompts.positions(batch.examples) if wants_holder else None
            velocity, maps = forward_with_maps(
                network, tables, packed, capture, positions, checkpoint=self.checkpointing
            )
        else:
            velocity = forward(network, tables, packed, checkpoint=self.checkpointing)
        none = LossTerm(velocity.new_zeros((), dtype=torch.float32), 0)
        flow = flow_loss(velocity, [e.latents for e in batch.examples], [e.noise for e in batch.examples], layout)
        route = route_loss(maps, batch.masks) if wants_route else none
        return Losses(flow, route, holder_loss(maps) if wants_holder else none), maps


class _Prompts:
    """Prompt features: remembered where nothing trained is in them, computed in the graph where placeholders are."""

    def __init__(self, encoder: PromptEncoder, encodings: Encodings | None) -> None:
        self._encoder = encoder
        self._encodings = encodings
        self._slots = placeholder_ids(encoder.t5_tokenizer)
        self._trained = {encoder.t5_tokenizer.token_to_id(token) for token in ADDED_TOKENS}
        self._remembered: OrderedDict[str, PromptEmbeds] = OrderedDict()
        self._taken = 0
        self._warned: set[str] = set()

    def features(self, prompts: list[str], embeddings: Embeddings) -> list[PromptEmbeds]:
        distinct = list(dict.fromkeys(prompts))
        bound = [prompt for prompt in distinct if not self._trained.isdisjoint(self._whole(prompt))]
        found = {prompt: self._remembered[prompt] for prompt in distinct if prompt in self._remembered}
        fresh = [prompt for prompt in distinct if prompt not in found and prompt not in bound]
        if fresh:
            with torch.no_grad():
                found |= dict(zip(fresh, self._plain(fresh), strict=True))
            self._remember({prompt: found[prompt] for prompt in fresh})
        if bound:
            rows = embeddings.placeholder_rows
            found |= dict(zip(bound, self._encoder.features(bound, rows), strict=True))
        return [found[prompt] for prompt in prompts]

    def positions(self, examples: Sequence[Example]) -> list[dict[int, tuple[int, ...]]]:
        """Where each prompt's placeholders stand, for the placeholder loss; says where truncation takes one from it."""
        return [self._places(example) for example in examples]

    def _places(self, example: Example) -> dict[int, tuple[int, ...]]:
        tokens = self._encoder.tokenize(example.prompt).t5
        places = placeholder_positions(tokens, self._slots)
        named = [reference.slot for reference in example.references]
        if len(named) < 2 or len(tokens) < self._encoder.max_tokens or example.key in self._warned:
            return places
        whole = placeholder_positions(self._whole(example.prompt), self._slots)
        if cut := [f"[ref#{slot}]" for slot in named if slot in whole and slot not in places]:
            self._warned.add(example.key)
            _LOG.warning(
                "record %s: its prompt is longer than the %d text tokens of this model, and %s lies beyond: the "
                "placeholder loss leaves the record out; shorten the prompt",
                example.key,
                self._encoder.max_tokens,
                ", ".join(cut),
            )
        return places

    def _whole(self, prompt: str) -> list[int]:
        """T5's ids before truncation."""
        return self._encoder.t5_tokenizer.encode(prompt).ids

    def _plain(self, prompts: list[str]) -> list[PromptEmbeds]:
        if self._encodings is None:
            return self._encoder.features(prompts)
        return [self._encodings.prompt(prompt) for prompt in prompts]

    def _remember(self, embeds: dict[str, PromptEmbeds]) -> None:
        self._remembered |= embeds
        self._taken += sum(_size(embed) for embed in embeds.values())
        while self._taken > _REMEMBERED_BYTES:
            self._taken -= _size(self._remembered.popitem(last=False)[1])


def _size(embed: PromptEmbeds) -> int:
    return embed.text.nbytes + embed.pooled.nbytes
