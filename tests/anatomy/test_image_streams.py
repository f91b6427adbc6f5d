"""Attention as networks for images write it: over places of an image, gated, over two streams.

The tables are written by hand from the modules below; outputs are compared with the modules' own,
hooked where a rule puts something.
"""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.anatomy import survey

WIDTH = 8


class ImageAttention(nn.Module):
    """A latent diffusion model's attention: values come first in the second product."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH)
        self.one, self.two, self.three, self.last = (nn.Conv2d(WIDTH, WIDTH, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2) for part in (self.one, self.two, self.three))
        weights = torch.softmax(torch.bmm(q.permute(0, 2, 1), k) * WIDTH**-0.5, dim=2)
        mixed = torch.bmm(v, weights.permute(0, 2, 1)).reshape(x.shape)
        result: Tensor = x + self.last(mixed)
        return result


class Gated(nn.Module):
    """A block whose norms and sums are scaled by what a text, or a time, says (DiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.said = nn.Linear(5, 4 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, first, shift, second = self.said(time)[:, None].chunk(4, -1)
        h = F.layer_norm(x, (WIDTH,)) * (1 + scale)
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        mixed = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + first * self.out(mixed)
        h = F.layer_norm(x, (WIDTH,)) + shift
        return x + second * self.down(F.gelu(self.up(h)))


class Joint(nn.Module):
    """Tokens of an image and of a text attend to all of them, each by their own projections."""

    def __init__(self) -> None:
        super().__init__()
        self.of_image, self.of_text = (nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.to_image, self.to_text = (nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.of_text(text), self.of_image(image)], dim=1)
        q, k, v = both.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        ours, theirs = mixed.split([text.shape[1], image.shape[1]], dim=1)
        return image + self.to_image(theirs), text + self.to_text(ours)


def made(kind: type[nn.Module], **inputs: Tensor) -> tuple[nn.Module, ps.GraphModel]:
    torch.manual_seed(0)
    module = kind().eval()
    return module, ps.capture(module, inputs)


def roles(graph: ps.GraphModel) -> dict[tuple[str, str | None], str | None]:
    sites = survey(graph.base_capture)
    return {(s.module, s.site.label): s.role for s in sites if s.kind == "linear" and s.role}


def after(graph: ps.GraphModel) -> list[str]:
    return [s.facts["after"] for s in survey(graph.base_capture) if s.kind == "residual"]


def test_values_may_come_first_in_a_product() -> None:
    module, graph = made(ImageAttention, x=torch.randn(2, WIDTH, 4, 5))
    names = {"one": "attn.q", "two": "attn.k", "three": "attn.v", "last": "attn.o"}
    assert roles(graph) == {(name, None): role for name, role in names.items()}
    rule = {"match": "attention", "rewrite": "attention(q, k, v + attention(q, k, v))"}
    operated = ps.apply(graph, ps.parse_rules(json.dumps({"name": "twice", "rules": [rule]})))
    x = torch.randn(3, WIDTH, 6, 3)
    h = module.norm(x)
    q, k, v = (part(h).flatten(2).mT for part in (module.one, module.two, module.three))
    v = v + F.scaled_dot_product_attention(q, k, v)
    mixed = F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
    torch.testing.assert_close(operated(x), x + module.last(mixed))


def test_a_stream_of_images_is_adapted_along_its_channels() -> None:
    module, graph = made(ImageAttention, x=torch.randn(2, WIDTH, 4, 5))
    operated = ps.apply(graph, "houlsby", reduction_factor=2)
    given = {name.rsplit(".", 1)[1]: operated.get_parameter(name) for name in operated.report.added}
    assert {name: tuple(p.shape) for name, p in given.items()} == {
        "D": (4, WIDTH),
        "bd": (4,),
        "U": (WIDTH, 4),
        "bu": (WIDTH,),
    }
    with torch.no_grad():
        for parameter in given.values():
            parameter.copy_(torch.randn_like(parameter))

    def adapter(part: nn.Module, args: object, h: Tensor) -> Tensor:
        inner = F.silu(torch.einsum("bchw,ic->bihw", h, given["D"]) + given["bd"][:, None, None])
        return h + torch.einsum("bihw,ci->bchw", inner, given["U"]) + given["bu"][:, None, None]

    x = torch.randn(3, WIDTH, 6, 3)
    module.last.register_forward_hook(adapter)
    torch.testing.assert_close(operated(x), module(x))


def test_what_is_the_same_for_all_tokens_is_no_second_signal() -> None:
    _, graph = made(Gated, x=torch.randn(2, 6, WIDTH), time=torch.randn(2, 5))
    assert roles(graph) == {
        ("qkv", None): "attn.qkv",
        **{("qkv", part): f"attn.{part}" for part in "qkv"},
        ("out", None): "attn.o",
        ("up", None): "ffn.up",
        ("down", None): "ffn.down",
    }
    assert after(graph) == ["attention", "ffn"]


def test_each_of_two_streams_has_its_own_projection_of_the_result() -> None:
    inputs = {"image": torch.randn(2, 6, WIDTH), "text": torch.randn(2, 4, WIDTH)}
    _, graph = made(Joint, **inputs)
    found = roles(graph)
    assert found["to_image", None] == found["to_text", None] == "attn.o"
    assert [found[name, part] for name in ("of_image", "of_text") for part in "qv"] == [
        "attn.q",
        "attn.v",
    ] * 2
    assert after(graph) == ["attention"] * 2
    assert len(ps.apply(graph, "lora_qv").report.matches) == 4
