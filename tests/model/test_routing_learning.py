"""The routing loss does what it is for: a few steps on a random model, and maps point at the subjects."""

from __future__ import annotations

from collections.abc import Generator, Mapping

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from model.fabricate import Shape, make_transformer, open_gates
from model.losses import route_loss
from model.packing import Condition, PackedSequence, ReferenceTokens, lay_out, pack
from model.roles import Role
from model.routing import Capture, ResponseMaps
from model.transformer import EmbeddingTables, Network, forward_with_maps

SIDE = 6


@pytest.fixture(autouse=True)
def one_thread() -> Generator[None]:
    """Small tensors on several threads crawl when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Toy:
    """Scenes whose subjects share their tokens' pattern with their reference; a random FLUX of two narrow blocks."""

    def __init__(self) -> None:
        shape = Shape(double_blocks=1, single_blocks=1, heads=2)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model: FluxTransformer2DModel = open_gates(make_transformer(shape))
            self.tables = EmbeddingTables(0.4 * torch.randn(2, shape.width), 0.4 * torch.randn(10, shape.width))
        self.model.requires_grad_(False)
        self.weights = [
            parameter.requires_grad_()
            for name, parameter in self.model.named_parameters()
            if any(part in name for part in ("to_q", "to_k", "add_q_proj", "add_k_proj"))
        ]

    def scenes(self, num: int, generator: torch.Generator) -> tuple[PackedSequence, dict[tuple[int, int], Tensor]]:
        """Two references each, 2×2 tokens, somewhere in the left and somewhere in the right half of a 6×6 target."""
        conditions: list[Condition] = []
        latents: list[Tensor] = []
        masks: dict[tuple[int, int], Tensor] = {}
        for number in range(num):
            target = torch.randn(SIDE, SIDE, 64, generator=generator)
            patterns = 2 * torch.randn(2, 64, generator=generator)
            for slot, pattern in enumerate(patterns, start=1):
                row, column = (int(torch.randint(0, n, (1,), generator=generator)) for n in (SIDE - 1, SIDE // 2 - 1))
                column += (slot - 1) * SIDE // 2
                mask = torch.zeros(SIDE, SIDE)
                mask[row : row + 2, column : column + 2] = 1
                target[mask == 1] = pattern
                masks[number, slot] = mask.flatten()
            references = tuple(
                ReferenceTokens(slot, Role.SUBJECT, pattern.expand(4, 64), (2, 2))
                for slot, pattern in enumerate(patterns, start=1)
            )
            text, pooled = torch.randn(4, 64, generator=generator), torch.zeros(64)
            conditions.append(Condition(text, pooled, (SIDE, SIDE), references))
            latents.append(target.flatten(0, 1))
        times = [torch.tensor(0.5)] * num
        return pack(lay_out(conditions), conditions, latents, times, [1.0] * num), masks

    def maps(self, scenes: PackedSequence) -> ResponseMaps:
        return forward_with_maps(Network(self.model), self.tables, scenes, Capture(holder=False))[1]

    @torch.no_grad()
    def pointing(self, scenes: PackedSequence, masks: Mapping[tuple[int, int], Tensor]) -> tuple[float, float]:
        """Routing loss, and how often the layers' mean map peaks inside its subject."""
        maps = self.maps(scenes)
        hits = [mask[maps.route(*key).mean(0).argmax()].item() for key, mask in masks.items()]
        return route_loss(maps, masks).value.item(), sum(hits) / len(hits)


def test_training_on_the_routing_loss_teaches_where_references_go() -> None:
    """A few steps on query and key weights: unseen scenes' maps peak in their subjects, below the loss of silent maps.

    Swapped masks teach no such thing, so it is the pairing that is learnt.
    """
    held_out = Toy().scenes(24, torch.Generator().manual_seed(0))
    silent = 4 / SIDE**2

    def train(steps: int, *, swapped: bool = False) -> tuple[float, float]:
        toy = Toy()
        draws = torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(toy.weights, lr=3e-3)
        for _ in range(steps):
            scenes, masks = toy.scenes(12, draws)
            given = {(r, 3 - slot if swapped else slot): mask for (r, slot), mask in masks.items()}
            optimizer.zero_grad()
            route_loss(toy.maps(scenes), given).value.backward()
            optimizer.step()
        return toy.pointing(*held_out)

    untrained_loss, untrained_hits = train(0)
    loss, hits = train(80)
    swapped_loss, swapped_hits = train(80, swapped=True)
    assert loss < 0.85 * silent < untrained_loss
    assert untrained_hits < 0.25
    assert hits > 0.75
    assert swapped_loss > silent
    assert swapped_hits < 0.1
