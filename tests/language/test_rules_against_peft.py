"""The shipped rules against peft's own layers: output, every gradient, and the merged weight."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peftsurgery.language.evaluation import Context
from peftsurgery.language.loading import load_rules
from peftsurgery.language.readings import fold, initial_values, rewrite
from peftsurgery.language.settings import resolve_settings


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def conv():
    return nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0))


CASES = {
    "lora_qv": (lambda: nn.Linear(8, 6), {}),
    "lora_attention": (lambda: nn.Linear(8, 6, bias=False), {}),
    "lora_all_linear": (lambda: nn.Linear(8, 6), {}),
    "rslora": (lambda: nn.Linear(8, 6), {"use_rslora": True}),
    "dora": (lambda: nn.Linear(8, 6), {"use_dora": True}),
    "lora_embedding": (lambda: nn.Embedding(11, 6), {}),
    "lora_conv": (conv, {}),
    "dora_conv": (conv, {"use_dora": True}),
}
SIZES = {
    nn.Linear: {"in": 8, "out": 6},
    nn.Embedding: {"in": 11, "out": 6},
    nn.Conv2d: {
        "in": 4,
        "out": 6,
        "kernel": (3, 2),
        "stride": (2, 1),
        "padding": (1, 0),
        "dilation": (1, 1),
        "groups": 1,
    },
}


def example(layer):
    torch.manual_seed(1)
    if isinstance(layer, nn.Embedding):
        return torch.randint(11, (2, 5))
    return torch.randn(2, 4, 9, 8) if isinstance(layer, nn.Conv2d) else torch.randn(2, 3, 8)


def side_by_side(name, dropout=0.0):
    """peft's model of one layer, and our rule's bindings with the same parameters in them."""
    make, flags = CASES[name]
    torch.manual_seed(0)
    base = make()
    W = base.weight.detach().clone()
    b = base.bias.detach().clone() if getattr(base, "bias", None) is not None else 0.0
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["layer"], **flags)
    model = get_peft_model(One(base), config)
    file, overrides = load_rules(name), {"rank": 4, "alpha": 6}
    if "dropout" in file.with_:
        overrides["dropout"] = dropout
    env = {**resolve_settings(file, overrides), **SIZES[type(base)], "W": W, "b": b}
    return model, base, file.rules[0], env


def share(model, rule, env):
    """Random values for peft's parameters, and ours as copies, by the rule's checkpoint names."""
    theirs = dict(model.named_parameters())
    for param, suffix in rule.checkpoint["peft"].items():
        stem, _, leaf = suffix.partition(".")
        names = [n for n in theirs if f".{stem}.default" in n]
        assert len(names) == 1, (suffix, leaf)
        with torch.no_grad():
            theirs[names[0]].normal_()
        env[param] = theirs[names[0]].detach().clone().requires_grad_()
        yield env[param], theirs[names[0]]


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_pefts(name):
    model, base, rule, env = side_by_side(name)
    pairs = list(share(model, rule, env))
    x = example(base)
    env |= {"x": x, "y": model.get_base_model().layer.base_layer(x).detach()}
    ours, theirs = rewrite(rule, env)["y"], model(x)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-6)
    weight = torch.randn_like(theirs)
    (ours * weight).sum().backward()
    (theirs * weight).sum().backward()
    for mine, original in pairs:
        torch.testing.assert_close(mine.grad, original.grad, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_folded_weight_is_pefts_merged_weight(name):
    model, _, rule, env = side_by_side(name)
    list(share(model, rule, env))
    merged = model.merge_and_unload().layer.weight
    torch.testing.assert_close(fold(rule, env)["W"].detach(), merged, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["lora_qv", "dora", "lora_conv", "dora_conv"])
def test_dropout_while_training_is_pefts_under_the_same_seed(name):
    model, base, rule, env = side_by_side(name, dropout=0.4)
    list(share(model, rule, env))
    x = example(base)
    env |= {"x": x, "y": model.get_base_model().layer.base_layer(x).detach()}
    torch.manual_seed(9)
    theirs = model.train()(x)
    torch.manual_seed(9)
    ours = rewrite(rule, env, Context(training=True))["y"]
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_fresh_parameters_start_with_pefts_values(name):
    """Zero where peft's are zero, peft's norm for the magnitudes, peft's bound for the random."""
    model, _, rule, env = side_by_side(name)
    theirs = dict(model.named_parameters())
    for param, suffix in rule.checkpoint["peft"].items():
        stem = suffix.partition(".")[0]
        original = next(p for n, p in theirs.items() if f".{stem}.default" in n).detach()
        value = initial_values(rule, env, {})[param]
        assert value.shape == original.shape
        assert value.dtype == original.dtype
        assert (value == 0).all() == (original == 0).all()
        torch.testing.assert_close(value.std(), original.std(), atol=0.2, rtol=0.4)


@pytest.mark.parametrize("name", CASES)
def test_an_operated_layer_starts_as_the_layer_was(name):
    _, base, rule, env = side_by_side(name)
    x = example(base)
    layer = base if not hasattr(base, "base_layer") else base.base_layer
    with torch.no_grad():
        env |= {"x": x, "y": layer(x)}
        env |= initial_values(rule, env, {})
        torch.testing.assert_close(rewrite(rule, env)["y"], env["y"])
        torch.testing.assert_close(fold(rule, env)["W"], env["W"])


@pytest.mark.parametrize("name", CASES)
def test_the_config_keys_of_a_rule_are_pefts(name):
    file = load_rules(name)
    known = LoraConfig().to_dict()
    assert set(file.carried("peft")) | set(file.identifying("peft")) <= set(known)
    _, flags = CASES[name]
    config = LoraConfig(**flags).to_dict()
    for key, value in file.identifying("peft").items():
        assert value == (config[key].value if key == "peft_type" else config[key])
