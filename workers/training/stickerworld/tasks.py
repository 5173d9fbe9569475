"""The registry of tasks: a new one is a builder here, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from workers.training.stickerworld.drafts import Builder
from workers.training.stickerworld.figures import identity_like, try_on_like
from workers.training.stickerworld.stylings import self_reconstruction, style_content, style_text
from workers.training.stickerworld.subjects import multi_subject, single_subject, text_to_image, two_column

TASKS: Mapping[str, Builder] = MappingProxyType(
    {
        "text_to_image": text_to_image,
        "single_subject": single_subject,
        "multi_subject": multi_subject,
        "two_column": two_column,
        "identity_like": identity_like,
        "try_on_like": try_on_like,
        "style_text": style_text,
        "style_content": style_content,
        "self_reconstruction": self_reconstruction,
    }
)
