"""Makes a FLUX-shaped model of any size with random weights, in the real formats: `python -m model.fabricate OUT`.

The directory has diffusers' layout (transformer, vae, both text encoders and tokenizers, scheduler) and, in `dreamo/`,
files named and keyed as the released DreamO ones. Tests load such models. Weights are random, so pictures are abstract:
what they prove is the path, not the quality.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from model.spec import SPEC_FILE


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a fabricated model; `vae_blocks` channels per level, so its factor is 2^(levels − 1)."""

    double_blocks: int = 2
    single_blocks: int = 4
    heads: int = 4
    axes: tuple[int, int, int] = (8, 12, 12)
    text_width: int = 64
    pooled_width: int = 64
    vae_blocks: tuple[int, ...] = (16, 32, 32)
    rank: int = 8

    @property
    def head_dim(self) -> int:
        return sum(self.axes)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


TINY = Shape()
TINY_SPEC = {
    "name": "dreamo-tiny",
    "about": "Random weights: the path is real, the pictures are abstract. Point DREAMSERVE_BASE_MODEL at FLUX.1-dev.",
    "width": {"minimum": 32, "maximum": 128, "step": 8, "default": 64},
    "height": {"minimum": 32, "maximum": 128, "step": 8, "default": 64},
    "num_inference_steps": {"minimum": 1, "maximum": 50, "step": 1, "default": 8},
    "reference_resolution": {"minimum": 16, "maximum": 64, "step": 8, "default": 32},
    "identity_resolution": 32,
    "text_tokens": 64,
}

WORDS = (
    "a an the and or of from with in on at to this that it is are its his her their one two three left right top "
    "bottom middle centre corner above below beside under over behind front background table street hall room garden "
    "beach forest kitchen window wooden red green blue yellow orange purple pink brown black white grey gold silver "
    "striped dotted checked plain circle square triangle star heart ring cross hexagon arrow moon sticker toy mug cup "
    "bottle shirt dress hat shoe bag book chair lamp cat dog bird horse man woman person girl boy face hair smile "
    "wearing holding sitting standing playing guitar picture photo image drawing painting style generate same column "
    "two-column"
)


def write_model(out: Path, shape: Shape, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the base model and, in `out/dreamo`, every file of both released stacks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _save(open_gates(make_transformer(shape)), out / "transformer", dtype)
        _save(_vae(shape), out / "vae", dtype)
        write_tokenizers(out)
        clip_size = len(json.loads((out / "tokenizer" / "vocab.json").read_text()))
        _save(make_clip(shape, clip_size), out / "text_encoder", dtype)
        t5_size = Tokenizer.from_file(str(out / "tokenizer_2" / "tokenizer.json")).get_vocab_size()
        _save(make_t5(shape, t5_size), out / "text_encoder_2", dtype)
        write_dreamo(out / "dreamo", shape, dtype)
    write_index(out)


def write_index(out: Path) -> None:
    """Write what diffusers needs beside the networks: the scheduler and the list of parts."""
    _write_json(out / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write_json(out / "model_index.json", _INDEX)


def _save(network: Any, folder: Path, dtype: torch.dtype) -> None:
    network.to(dtype).save_pretrained(folder)


def write_dreamo(out: Path, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> None:
    """The released adapter files with random content: DreamO's own naming, and diffusers' for SFT, DPO, Turbo."""
    embeddings = {
        "dreamo_task_embedding.weight": 0.4 * torch.randn(2, shape.width),
        "dreamo_idx_embedding.weight": 0.4 * torch.randn(10, shape.width),
        "dreamo_t5_embedding.weight": torch.randn(10, shape.text_width),
    }
    named = {
        "dreamo.safetensors": dict(_xlabs_pairs(shape)) | embeddings,
        "dreamo_cfg_distill.safetensors": dict(_xlabs_pairs(shape)),
        "dreamo_quality_lora_pos.safetensors": dict(_xlabs_pairs(shape)),
        "dreamo_quality_lora_neg.safetensors": dict(_xlabs_pairs(shape)),
        "v1.1/dreamo_sft_lora.safetensors": dict(_peft_pairs(shape)),
        "v1.1/dreamo_dpo_lora.safetensors": dict(_peft_pairs(shape)),
        "diffusion_pytorch_model.safetensors": dict(_peft_pairs(shape)),
    }
    for name, tensors in named.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}, out / name)


def _pair(shape: Shape, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors whose product changes a unit input by about a tenth."""
    down = torch.randn(shape.rank, inputs) / inputs**0.5
    return down, 0.1 * torch.randn(outputs, shape.rank) / shape.rank**0.5


def _xlabs_pairs(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    width = shape.width
    layers = [
        (f"double_blocks_{i}_processor.{part}{stream}", width, outputs)
        for i in range(shape.double_blocks)
        for stream in (1, 2)
        for part, outputs in (("qkv_lora", 3 * width), ("proj_lora", width))
    ] + [
        (f"single_blocks_{i}_processor.{part}", inputs, outputs)
        for i in range(shape.single_blocks)
        for part, inputs, outputs in (("qkv_lora", width, 3 * width), ("proj_lora", 5 * width, width))
    ]
    for name, inputs, outputs in layers:
        down, up = _pair(shape, inputs, outputs)
        yield f"{name}.down.weight", down
        yield f"{name}.up.weight", up


def _peft_pairs(shape: Shape) -> Iterator[tuple[str, torch.Tensor]]:
    streams = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    modules = [
        f"{kind}.{i}.attn.{name}"
        for kind, number, names in (
            ("transformer_blocks", shape.double_blocks, streams),
            ("single_transformer_blocks", shape.single_blocks, streams[:3]),
        )
        for i in range(number)
        for name in names
    ]
    for module in modules:
        down, up = _pair(shape, shape.width, shape.width)
        yield f"transformer.{module}.lora_A.weight", down
        yield f"transformer.{module}.lora_B.weight", up


def make_transformer(shape: Shape) -> FluxTransformer2DModel:
    """A transformer of random weights."""
    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=shape.double_blocks,
        num_single_layers=shape.single_blocks,
        attention_head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.text_width,
        pooled_projection_dim=shape.pooled_width,
        guidance_embeds=True,
        axes_dims_rope=shape.axes,
    )


@torch.no_grad()
def open_gates(model: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """The model with its gates open, so that text and references show in pictures though it has learned nothing."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".attn." in name:
            parameter.mul_(3)
        elif ".norm" in name and name.endswith("linear.bias"):
            parameter.add_(1)
    model.proj_out.weight *= 2
    return model


@torch.no_grad()
def _vae(shape: Shape) -> AutoencoderKL:
    """A random VAE, scaled so that latents have unit variance and a small posterior, and pictures some contrast."""
    levels = len(shape.vae_blocks)
    sizes: dict[str, Any] = {
        "block_out_channels": shape.vae_blocks,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
    }
    vae: Any = AutoencoderKL(
        **sizes,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    vae.encoder.conv_out.weight[16:] = 0
    vae.encoder.conv_out.bias[16:] = -8
    means = vae.encode(torch.rand(4, 3, 64, 64) * 2 - 1).latent_dist.mean
    vae.encoder.conv_out.weight[:16] *= 2.5 / means.std()
    pictures = vae.decode(torch.randn(4, 16, 16, 16) * 2.5).sample
    vae.decoder.conv_out.weight *= 0.5 / pictures.std()
    return vae


def make_clip(shape: Shape, vocabulary: int) -> CLIPTextModel:
    """A text encoder of random weights; `vocabulary` tokens, the last two start and end."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=shape.pooled_width,
            intermediate_size=2 * shape.pooled_width,
            projection_dim=shape.pooled_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
            pad_token_id=vocabulary - 1,
        )
    )


def make_t5(shape: Shape, vocabulary: int) -> T5EncoderModel:
    """A text encoder of random weights for `vocabulary` tokens, with spare rows after them."""
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary + 28,  # spare rows, as the released T5 has
            d_model=shape.text_width,
            d_kv=shape.text_width // 4,
            d_ff=2 * shape.text_width,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def write_tokenizers(out: Path, more: Iterable[str] = ()) -> None:
    """A unigram tokenizer in T5's form and a byte-level BPE in CLIP's, both made from a short word list and `more`."""
    letters = [chr(code) for code in range(33, 127)]
    words = sorted({*WORDS.split(), *(word for word in more if word.isalpha() or "-" in word)})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    vocabulary += [(f"▁{word}", -6.0) for word in words]
    vocabulary += [(letter, -9.0) for letter in letters]
    t5 = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    t5.normalizer = normalizers.NFKC()
    t5.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    t5.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    t5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5.add_special_tokens(["<pad>", "</s>", "<unk>"])
    (out / "tokenizer_2").mkdir(parents=True, exist_ok=True)
    t5.save(str(out / "tokenizer_2" / "tokenizer.json"))
    _write_json(
        out / "tokenizer_2" / "tokenizer_config.json",
        {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
        | {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    )
    _write_clip_tokenizer(out / "tokenizer", words)


def _write_clip_tokenizer(out: Path, words: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(
        [" ".join(words)],
        trainers.BpeTrainer(vocab_size=900, end_of_word_suffix="</w>", initial_alphabet=alphabet),
    )
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [f"{letter}</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    _write_json(out / "vocab.json", {token: number for number, token in enumerate(tokens)})
    (out / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    end = "<|endoftext|>"
    _write_json(
        out / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>"}
        | {"eos_token": end, "pad_token": end, "unk_token": end},
    )


_SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m model.fabricate", description=__doc__)
    parser.add_argument("out", type=Path, help="directory to write, e.g. model/tiny")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_model(args.out, TINY, seed=args.seed)
    _write_json(
        args.out / SPEC_FILE,
        {"made_by": "python -m model.fabricate", "seed": args.seed} | {"shape": asdict(TINY), "spec": TINY_SPEC},
    )


if __name__ == "__main__":
    main()
