"""Prompts → what FLUX reads: T5's token features and CLIP's pooled vector, with DreamO's ten added T5 tokens.

Shapes: L T5 tokens, padding included and not masked (FLUX: 512 × 4096); pooled 768.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from tokenizers import AddedToken, Tokenizer
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel

from model.errors import WeightsError
from model.roles import ADDED_TOKENS


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """text [L, Ct] and pooled [Cp]."""

    text: torch.Tensor
    pooled: torch.Tensor


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Token ids without padding: T5's end with `</s>`, CLIP's are framed by its start and end tokens."""

    t5: tuple[int, ...]
    clip: tuple[int, ...]


class PromptEncoder:
    """Both text encoders. Placeholders are known to T5 once `add_placeholders` has run; CLIP reads them as text."""

    def __init__(
        self,
        clip_tokenizer: CLIPTokenizer,
        clip: CLIPTextModel,
        t5_tokenizer: Tokenizer,
        t5: T5EncoderModel,
        max_tokens: int,
    ) -> None:
        self.clip_tokenizer = clip_tokenizer
        self.clip = clip
        self.t5_tokenizer = t5_tokenizer
        self.t5 = t5
        self.max_tokens = max_tokens
        self._pad: int = t5.config.pad_token_id or 0
        self._clip_pad = cast("int", clip_tokenizer.pad_token_id)

    def add_placeholders(self, rows: torch.Tensor) -> None:
        """Append DreamO's added tokens to T5 with their trained embedding rows.

        The embedding table is first cut to the tokenizer's size (T5's has spare rows), then grown by ten.

        Args:
            rows: [n ≥ 10, Ct]; the last ten are used, in the order of `roles.ADDED_TOKENS`.

        Raises:
            WeightsError: `weights_shape` when the rows do not fit this T5.
        """
        rows = check_rows(rows, self.t5.get_input_embeddings().weight.shape[1])
        # tokenizers applies tokenizer.json as it is written. transformers 5 rebuilds T5's pre-tokenizer and
        # drops the lone metaspace before an added token, which the released weights were trained with.
        self.t5.resize_token_embeddings(self.t5_tokenizer.get_vocab_size(), mean_resizing=False)
        self.t5_tokenizer.add_tokens([AddedToken(token, normalized=True) for token in ADDED_TOKENS])
        self.t5.resize_token_embeddings(self.t5_tokenizer.get_vocab_size(), mean_resizing=False)
        table = self.t5.get_input_embeddings().weight
        with torch.no_grad():
            table[-len(ADDED_TOKENS) :] = rows.to(table.device, table.dtype)

    @property
    def placeholders(self) -> torch.Tensor:
        """The added tokens' embedding rows: [10, Ct]."""
        return self.t5.get_input_embeddings().weight.detach()[-len(ADDED_TOKENS) :]

    def tokenize(self, prompt: str) -> PromptTokens:
        """Token ids of both encoders, truncated to what each can hold."""
        t5 = self.t5_tokenizer.encode(prompt).ids
        if len(t5) > self.max_tokens:
            t5 = [*t5[: self.max_tokens - 1], t5[-1]]
        clip = self.clip_tokenizer(prompt, truncation=True, max_length=self.clip.config.max_position_embeddings)
        return PromptTokens(tuple(t5), tuple(clip["input_ids"]))

    @torch.inference_mode()
    def encode(self, prompt: str, rows: torch.Tensor | None = None) -> PromptEmbeds:
        """Features of one prompt, in the encoders' dtype, on their device.

        Args:
            rows: as in `features`.
        """
        return self.features([prompt], rows)[0]

    def features(self, prompts: Sequence[str], rows: torch.Tensor | None = None) -> list[PromptEmbeds]:
        """Features of several prompts in one batch; gradients flow if they are enabled.

        Args:
            rows: [10, Ct] stand in for the added tokens' embedding rows. Training them needs the graph through T5.
        """
        tokens = [self.tokenize(prompt) for prompt in prompts]
        device = self.t5.device
        t5_ids = _padded([t.t5 for t in tokens], self.max_tokens, self._pad).to(device)
        clip_length = self.clip.config.max_position_embeddings
        clip_ids = _padded([t.clip for t in tokens], clip_length, self._clip_pad).to(device)
        if rows is None:
            text = self.t5(t5_ids).last_hidden_state
        else:
            table = self.t5.get_input_embeddings().weight
            first = table.shape[0] - len(ADDED_TOKENS)
            whole = torch.cat([table[:first], rows.to(table.dtype)])
            text = self.t5(inputs_embeds=torch.nn.functional.embedding(t5_ids, whole)).last_hidden_state
        pooled = self.clip(clip_ids).pooler_output
        return [PromptEmbeds(*pair) for pair in zip(text, pooled, strict=True)]


def check_rows(rows: torch.Tensor, width: int) -> torch.Tensor:
    """The last ten of the rows, in the order of `roles.ADDED_TOKENS`.

    Raises:
        WeightsError: `weights_shape` when they do not fit a T5 of this width.
    """
    if rows.ndim != 2 or rows.shape[0] < len(ADDED_TOKENS) or rows.shape[1] != width:
        raise WeightsError(
            "weights_shape",
            f"dreamo_t5_embedding is {tuple(rows.shape)}, but this T5 needs at least {len(ADDED_TOKENS)} "
            f"rows of {width}: use the DreamO files made for this base model",
        )
    return rows[-len(ADDED_TOKENS) :]


def _padded(ids: Sequence[Sequence[int]], length: int, pad: int) -> torch.Tensor:
    """[n, length] int64."""
    return torch.tensor([[*row, *([pad] * (length - len(row)))] for row in ids])
