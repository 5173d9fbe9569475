"""Low precision: layers within what their number formats allow, the network near bfloat16, the memory given back."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from model.errors import WeightsError
from model.network import fused, ready
from model.precision import Absorbed, Fp8Linear, Int8Linear, Precision, check_device, held_bytes, quantized
from model.transformer import EmbeddingTables, Network, forward, num_blocks
from model.weights.checkpoints import LoadedModel, ModelSource, load_model
from tests.model.requests import packed, sample

Layer = Fp8Linear | Int8Linear
Bound = Callable[[Tensor, nn.Linear], Tensor]
PRECISIONS: tuple[Precision, ...] = ("fp8", "int8")


def e4m3_error(values: Tensor) -> Tensor:
    """Most that rounding by rows can be off: 2⁻⁴ of a value, half a subnormal step (2⁻⁹ of the scale) near zero."""
    scale = values.abs().amax(1, keepdim=True) / 448
    return torch.maximum(values.abs() / 16, scale / 1024)


def fp8_bound(x: Tensor, linear: nn.Linear) -> Tensor:
    """[N, out]: both factors rounded to e4m3, the result to bfloat16."""
    weight, x = linear.weight.double(), x.double()
    of_weight, of_x = e4m3_error(weight), e4m3_error(x)
    size = x.abs() @ weight.abs().T
    rounding = x.abs() @ of_weight.T + of_x @ weight.abs().T + of_x @ of_weight.T
    return rounding + (size + linear.bias.double().abs()) * 2**-7


def int8_bound(x: Tensor, linear: nn.Linear) -> Tensor:
    """[N, out]: half a step for each weight, and its and the result's rounding to the dtype."""
    weight, x = linear.weight.double(), x.double()
    unit = torch.finfo(linear.weight.dtype).eps
    half = weight.abs().amax(1) / 254 * (1 + unit)
    size = x.abs() @ weight.abs().T + linear.bias.double().abs()
    return x.abs().sum(1, keepdim=True) * half + 2 * unit * size + 1e-5 * size


KINDS = pytest.mark.parametrize(("kind", "bound"), [(Fp8Linear, fp8_bound), (Int8Linear, int8_bound)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def draw(rows: int, dtype: torch.dtype, width: int = 64) -> tuple[nn.Linear, Tensor]:
    """A square layer whose rows differ by orders of magnitude, one of them zero, one with an outlier; and its input."""
    torch.manual_seed(rows)
    linear = nn.Linear(width, width).requires_grad_(False)
    linear.weight *= torch.logspace(-3, 2, width)[:, None]
    linear.weight[5] = 0
    linear.weight[7, 9] = 1000
    x = torch.randn(rows, width) * torch.logspace(-2, 2, rows)[:, None]
    x[-1, 3] = 5000
    return linear.to(dtype), x.to(dtype)


def excess(layer: nn.Module, linear: nn.Linear, x: Tensor, bound: Bound) -> float:
    """By how many times the layer's worst value misses the float64 product's bound; at most 1 is right."""
    wanted = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    return float(((layer(x).double() - wanted).abs() / bound(x, linear)).max())


@KINDS
@DTYPES
@pytest.mark.parametrize("rows", [1, 7, 16, 33])
def test_a_layer_keeps_to_its_format(kind: type[Layer], bound: Bound, dtype: torch.dtype, rows: int) -> None:
    """Any number of tokens, weight rows of any size, zero rows and outliers: within the format's own error."""
    linear, x = draw(rows, dtype)
    layer = kind(linear)
    assert layer(x).dtype == dtype
    assert layer(x).shape == (rows, 64)
    assert excess(layer, linear, x, bound) <= 1
    bias = linear.bias.bfloat16() if kind is Fp8Linear else linear.bias
    assert torch.equal(layer(torch.zeros_like(x)), bias.to(dtype).expand(rows, -1)), "a token of zeros"


@pytest.mark.gpu
@KINDS
@pytest.mark.parametrize("rows", [1, 7, 33, 4609])
def test_a_layer_keeps_to_its_format_on_a_gpu(kind: type[Layer], bound: Bound, rows: int) -> None:
    """FLUX's width and any number of tokens, by the GPU's own product and its fast accumulator."""
    linear, x = draw(rows, torch.bfloat16, width=3072)
    linear, x = linear.cuda(), x.cuda()
    try:
        layer = kind(linear)
    except WeightsError as error:
        pytest.skip(error.message)
    assert excess(layer, linear, x, bound) <= 1


@KINDS
def test_the_bounds_see_a_scale_of_the_wrong_axis(kind: type[Layer], bound: Bound) -> None:
    """Control: scales by column in place of scales by row are far outside."""
    linear, x = draw(7, torch.float32)
    wrong = kind(linear)
    columns = linear.weight.abs().amax(0)
    wrong.scale.copy_((columns / (448 if kind is Fp8Linear else 127)).reshape(wrong.scale.shape))
    assert excess(wrong, linear, x, bound) > 3


@DTYPES
def test_int8_weights_are_half_a_step_off_at_most(dtype: torch.dtype) -> None:
    """Whatever a row's size, and exactly where the steps can hold the weights."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 40).requires_grad_(False)
    linear.weight *= torch.logspace(-30, 30, 40)[:, None]
    layer = Int8Linear(linear.to(dtype))
    kept = layer.weight.double() * layer.scale.double()
    assert ((kept - linear.weight.double()).abs() <= layer.scale.double() / 2 * (1 + 1e-6)).all()
    linear.weight.copy_(torch.randint(-127, 128, (40, 96)))
    linear.weight[:, 0] = 127
    assert torch.equal(Int8Linear(linear).weight.to(dtype), linear.weight)


def test_tokens_do_not_see_one_another() -> None:
    """A request's bits must not hang on an outlier in the request that it is packed with."""
    linear, x = draw(33, torch.bfloat16)
    layer = Fp8Linear(linear)
    louder = torch.cat([x[:-1], x[-1:] * 1e4])
    assert torch.equal(layer(louder)[:-1], layer(x)[:-1])


@pytest.mark.parametrize("kind", [Fp8Linear, Int8Linear])
def test_one_graph_serves_any_number_of_tokens(kind: type[Layer]) -> None:
    """A layer compiles whole, once, and computes what it does uncompiled."""
    layer, counter = kind(draw(1, torch.bfloat16)[0]), CompileCounterWithBackend("aot_eager")
    fast = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for rows in (33, 7, 16):
        x = torch.randn(rows, 64, dtype=torch.bfloat16)
        assert torch.equal(fast(x), layer(x))
    assert counter.frame_count == 1


def lowered(tiny: LoadedModel) -> LoadedModel:
    """A copy of the shipped model in bfloat16, as a GPU runs it."""
    tables = EmbeddingTables(tiny.tables.type.bfloat16(), tiny.tables.index.bfloat16())
    return replace(tiny, transformer=copy.deepcopy(tiny.transformer).bfloat16(), tables=tables)


@pytest.mark.parametrize(("precision", "least"), [("fp8", 0.99), ("int8", 0.999)])
@torch.inference_mode()
def test_the_network_stays_close(tiny: LoadedModel, precision: Precision, least: float) -> None:
    """The shipped model's velocities for two requests in one forward: near those in bfloat16, and not the same."""
    model = lowered(tiny)
    samples = [
        sample(model, 1, (6, 6), {1: (3, 4), 2: (2, 2)}, timestep=0.7),
        sample(model, 2, (4, 4), {}, timestep=0.3),
    ]
    wanted = forward(Network(model.transformer), model.tables, packed(samples))
    got = forward(quantized(Network(model.transformer), precision), model.tables, packed(samples))
    cosines = F.cosine_similarity(got.float(), wanted.float())
    assert cosines.min() > least
    assert not torch.equal(got, wanted)


def narrow() -> FluxTransformer2DModel:
    """FLUX's proportions, 24 times narrower."""
    model = FluxTransformer2DModel(
        num_layers=4,
        num_single_layers=8,
        num_attention_heads=4,
        attention_head_dim=32,
        axes_dims_rope=(8, 12, 12),
        joint_attention_dim=176,
        pooled_projection_dim=32,
        guidance_embeds=True,
    )
    return model.bfloat16().requires_grad_(False)


@pytest.mark.parametrize(("precision", "most"), [("fp8", 0.7), ("int8", 0.55)])
def test_the_memory_is_given_back(precision: Precision, most: float) -> None:
    """Neither the old weights nor those that a fused projection was made of are held; and nothing is counted twice."""
    network = fused(narrow())
    before, numbers = held_bytes(network), sum(p.numel() for p in network.model.parameters())
    assert before == 2 * numbers
    old = [weakref.ref(layer.weight) for layers in network.projections for layer in layers]
    old += [weakref.ref(block.attn.to_k.weight) for block in network.model.transformer_blocks]
    old += [weakref.ref(block.proj_mlp.weight) for block in network.model.single_transformer_blocks]
    network = quantized(network, precision)
    gc.collect()
    assert not [reference for reference in old if reference() is not None]
    assert held_bytes(network) <= most * before
    assert sum(p.numel() for p in network.model.parameters()) == numbers, "the model still holds all of its weights"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_replaced(precision: Precision) -> None:
    """All linear layers of the blocks, the modulation's only in int8; outside of the blocks none."""
    model = quantized(Network(narrow()), precision).model
    plain = {name for name, layer in model.named_modules() if type(layer) is nn.Linear}
    inside = {name for name in plain if "transformer_blocks" in name}
    assert {name.split(".", 2)[2] for name in inside} == (
        {"norm1.linear", "norm1_context.linear", "norm.linear"} if precision == "fp8" else set()
    )
    assert {"x_embedder", "context_embedder", "norm_out.linear", "proj_out"} < plain
    absorbed = model.transformer_blocks[0].attn.to_q
    assert isinstance(absorbed, Absorbed)
    with pytest.raises(RuntimeError, match="run the network that"):
        absorbed(torch.zeros(1, 128))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", ["to_q", "proj_mlp"])
def test_an_adapter_is_not_lost(precision: Precision, target: str) -> None:
    """A model that still carries one is refused before anything is changed; so is one that is quantized already."""
    model = narrow()
    model.add_adapter(LoraConfig(r=2, target_modules=[target]))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(WeightsError, match=target) as caught:
        quantized(Network(model), precision)
    assert caught.value.code == "adapter_attached"
    assert [name for name, _ in model.named_modules()] == names
    network = quantized(Network(narrow()), precision)
    with pytest.raises(WeightsError):
        quantized(network, precision)


def test_what_cannot_run_fp8_says_so() -> None:
    """Older GPUs, and layers that the product's tiles do not fit, at the start and not in the first request."""
    check_device("fp8", torch.device("cuda"), (8, 9))
    check_device("fp8", torch.device("cuda"), (12, 0))
    check_device("int8", torch.device("cuda"), (6, 1))
    for device, capability in (("cuda", (8, 6)), ("mps", None)):
        with pytest.raises(WeightsError, match="choose int8") as caught:
            check_device("fp8", torch.device(device), capability)
        assert caught.value.code == "precision_unavailable"
    with pytest.raises(WeightsError, match="multiples of 16") as caught:
        Fp8Linear(nn.Linear(24, 32))
    assert caught.value.code == "precision_unavailable"


def test_a_model_is_loaded_in_low_precision() -> None:
    """`DREAMSERVE_PRECISION` reaches the weights: what is loaded holds int8 layers, and serving runs those."""
    model = load_model(ModelSource(precision="int8"))
    network = ready(model.transformer)
    layers = [layer for projections in network.projections for layer in projections]
    assert len(network.projections) == num_blocks(model.transformer)
    assert layers and all(isinstance(layer, Int8Linear) for layer in layers)
    sequence = packed([sample(model, 1, (6, 6), {1: (3, 4)}, timestep=0.7)])
    whole = load_model(ModelSource())
    wanted = forward(ready(whole.transformer), whole.tables, sequence)
    velocity = forward(network, model.tables, sequence)
    assert not torch.equal(velocity, wanted)
    assert F.cosine_similarity(velocity.flatten(), wanted.flatten(), dim=0) > 0.999
