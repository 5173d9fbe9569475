"""Prompts: DreamO's added tokens and what happens around them."""

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from model.errors import WeightsError
from model.roles import ADDED_TOKENS
from model.text import PromptEncoder
from model.weights.checkpoints import ModelSource, load_text, resolve_base

# Made with transformers 4.45.2's T5TokenizerFast plus the ten added tokens, on the recordings' tokenizer.
TRANSFORMERS_4_45 = {
    "jungle, [ref#1]": [3, 28, 18, 38, 44, 16, 3, 102, 1],
    "[ref#1] [ref#2][ref#3]": [102, 3, 103, 104, 1],
    " a  [ref#1]b  c ": [3, 5, 3, 3, 102, 25, 3, 3, 51, 3, 1],
    "x[res]y": [3, 52, 111, 3, 12, 1],
    "": [1],
}


@pytest.fixture(scope="module")
def encoder(recorded: ModelSource) -> PromptEncoder:
    text = load_text(resolve_base(recorded.base_model), torch.float32, 512)
    text.add_placeholders(torch.randn(10, 32))
    return text


@pytest.mark.parametrize("prompt", TRANSFORMERS_4_45)
def test_tokenises_as_the_weights_were_trained(encoder: PromptEncoder, prompt: str) -> None:
    """transformers 5 drops the lone metaspace before a placeholder; we must not."""
    assert list(encoder.tokenize(prompt).t5) == TRANSFORMERS_4_45[prompt]


def test_a_placeholder_changes_the_features(encoder: PromptEncoder) -> None:
    """The added rows reach the encoder's output, at the placeholder and around it."""
    one, two = encoder.encode("a toy [ref#1]").text, encoder.encode("a toy [ref#2]").text
    assert one.shape == (512, 32)
    assert (one - two).abs().max() > 1e-2


def test_a_batch_equals_one_by_one(encoder: PromptEncoder) -> None:
    """Prompts of different lengths share a call without touching each other."""
    prompts = ["a toy [ref#1]", "", "a person playing guitar in the street"]
    with torch.no_grad():
        together = encoder.features(prompts)
    for prompt, embeds in zip(prompts, together, strict=True):
        alone = encoder.encode(prompt)
        assert torch.allclose(embeds.text, alone.text, atol=2e-6)
        assert torch.allclose(embeds.pooled, alone.pooled, atol=2e-6)


def test_rows_stand_in_for_the_added_tokens(encoder: PromptEncoder) -> None:
    """The table's own rows give the same features; other rows get a gradient, and only where a placeholder stands."""
    own = encoder.t5.get_input_embeddings().weight[-10:].detach().clone().requires_grad_()
    features = encoder.features(["a toy [ref#2]"], own)[0].text
    assert torch.allclose(features, encoder.encode("a toy [ref#2]").text, atol=1e-4)
    features.square().sum().backward()
    assert own.grad is not None
    assert [row for row in range(10) if own.grad[row].abs().sum() > 0] == [1]


def test_padding_and_truncation_of_the_file_do_not_count(recorded: ModelSource, tmp_path: Path) -> None:
    """A tokenizer.json saved with padding and truncation switched on gives the same ids."""
    base = Path(shutil.copytree(recorded.base_model, tmp_path / "base"))
    file = base / "tokenizer_2" / "tokenizer.json"
    file.chmod(0o644)
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    tokenizer.save(str(file))
    text = load_text(base, torch.float32, 512)
    text.add_placeholders(torch.randn(10, 32))
    assert list(text.tokenize("jungle, [ref#1]").t5) == TRANSFORMERS_4_45["jungle, [ref#1]"]


def test_long_prompts_end_with_the_end_token(encoder: PromptEncoder) -> None:
    """Truncation keeps `</s>` last and both encoders within their length."""
    tokens = encoder.tokenize("a person " * 400)
    assert len(tokens.t5) == 512
    assert tokens.t5[-1] == 1
    assert len(tokens.clip) == 77
    assert encoder.encode("a person " * 400).text.shape == (512, 32)


@pytest.mark.parametrize("shape", [(9, 32), (10, 31), (10,)])
def test_rows_of_another_shape_are_refused(recorded: ModelSource, shape: tuple[int, ...]) -> None:
    """DreamO files made for another T5 are named as such."""
    text = load_text(resolve_base(recorded.base_model), torch.float32, 512)
    with pytest.raises(WeightsError) as caught:
        text.add_placeholders(torch.zeros(shape))
    assert caught.value.code == "weights_shape"
    assert len(ADDED_TOKENS) == 10
