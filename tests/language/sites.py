"""Sites made by hand, so that selection is tested without any model."""

from dataclasses import dataclass, field


@dataclass(eq=False)
class Part:
    label: str | None = None
    whole: object = None


@dataclass(eq=False)
class Site:
    kind: str
    module: str
    role: str | None = None
    layer: int | None = None
    block: str = ""
    attentions: tuple = ()
    type: str = "Linear"
    parameter: str | None = None
    facts: dict = field(default_factory=dict)
    feeds: tuple = ()
    fed_by: tuple = ()
    site: Part = field(default_factory=Part)
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        self.role = self.extra.get("role", self.role)


def decoder(layers=4):
    """The sites of a decoder: per layer a core, q k v o of (8, 8) and up, down; then a head."""
    sites = []
    for i in range(layers):
        block = f"model.layers.{i}"
        core = Site("attention", f"{block}.attn", layer=i, block=block, attentions=(f"core{i}",))
        sites.append(core)
        for role in "qkvo":
            site = Site(
                "linear", f"{block}.attn.{role}_proj", f"attn.{role}", i, block, (f"core{i}",)
            )
            site.facts = {"in": 8, "out": 8, "op": "linear", "dtype": "torch.float32"}
            site.feeds = (core,) if role != "o" else ()
            site.fed_by = (core,) if role == "o" else ()
            sites.append(site)
        for role, shape in (("up", (32, 8)), ("down", (8, 32))):
            site = Site("linear", f"{block}.mlp.{role}_proj", f"ffn.{role}", i, block)
            site.facts = {
                "out": shape[0],
                "in": shape[1],
                "op": "linear",
                "dtype": "torch.bfloat16",
            }
            sites.append(site)
        bias = Site("parameter", f"{block}.mlp.up_proj", None, i, block)
        bias.parameter, bias.facts = f"{block}.mlp.up_proj.bias", {"kind": "bias", "shape": (32,)}
        sites.append(bias)
    sites.append(Site("linear", "lm_head", "lm_head", facts={"in": 8, "out": 100}))
    return sites


def fused(layers=2):
    """The sites of a model whose q, k and v are one weight: the whole, and its three parts."""
    sites = []
    for i in range(layers):
        block = f"h.{i}"
        whole = Site("linear", f"{block}.c_attn", "attn.qkv", i, block, (f"core{i}",))
        sites.append(whole)
        for role in "qkv":
            part = Part(role, whole.site)
            site = Site("linear", f"{block}.c_attn", f"attn.{role}", i, block, (f"core{i}",))
            site.site = part
            sites.append(site)
    return sites
