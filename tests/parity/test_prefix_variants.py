"""Prefixes on cores of every kind, as an MLP and with a head, and what peft's files cannot say.

Where peft runs a model it is the oracle, else the model's own eager code with more keys.
"""

from __future__ import annotations

import json
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftsurgery as ps
from peftsurgery.surgery.model.operated import OperatedModel
from tests.models.captured import captured as zoo
from tests.models.zoo import ZOO
from tests.parity.models import randomise
from tests.parity.tasks import declare_past, graph, logits, plain, texts
from tests.parity.test_prefix import LENGTH
from tests.parity.training import both_train, train

INNER = 16
BERT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")


def peft_model(model: nn.Module, task: str = "CAUSAL_LM", **settings: Any) -> Any:
    model.config.use_cache = True
    config = PrefixTuningConfig(task_type=task, num_virtual_tokens=LENGTH, **settings)
    made = get_peft_model(model, config).eval()
    randomise(made, lambda name: "prompt_encoder" in name, 0.5)
    return made


def carry_mlp(theirs: Any, ours: OperatedModel) -> list[tuple[Tensor, Tensor]]:
    """Give our perceptron peft's values; pairs of ours and the part of peft's that it is."""
    encoder = theirs.prompt_encoder["default"]
    weight, bias = encoder.transform[2].weight, encoder.transform[2].bias
    pairs = [
        (ours.get_parameter("prefix_tuning_mlp.E"), encoder.embedding.weight),
        (ours.get_parameter("prefix_tuning_mlp.W"), encoder.transform[0].weight),
        (ours.get_parameter("prefix_tuning_mlp.b"), encoder.transform[0].bias),
    ]
    cuts = [cut for cut in ours.cuts if cut.rule.params]
    for layer, cut in enumerate(cuts):
        for place, letter in enumerate("KV"):
            number = 2 * layer + place
            for name, whole in (("W", weight), ("b", bias)):
                mine = ours.get_parameter(cut.parameters[name + letter])
                pairs.append((mine, whole.unflatten(0, (2 * len(cuts), -1))[number]))
    with torch.no_grad():
        for mine, value in pairs:
            mine.copy_(value)
    return pairs


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_perceptron_is_pefts(name: str, tmp_path: Path) -> None:
    theirs = peft_model(plain(name), prefix_projection=True, encoder_hidden_size=INNER)
    settings = {"length": LENGTH, "bottleneck": INNER, "shift": True}
    ours = ps.apply(graph(name), "prefix_tuning_mlp", **settings).eval()
    carry_mlp(theirs, ours)
    same = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(logits(ours, texts(name)), logits(theirs, texts(name)), **same)
    for model in (theirs, ours):
        model(**texts(name)).loss.backward()
    encoder = theirs.prompt_encoder["default"]
    for letter, tensor in (("E", encoder.embedding.weight), ("W", encoder.transform[0].weight)):
        mine = ours.get_parameter(f"prefix_tuning_mlp.{letter}").grad
        torch.testing.assert_close(mine, tensor.grad, rtol=0, atol=1e-5)
    losses = both_train(theirs, ours, draw=partial(texts, name), rate=3e-2)
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    ps.to_peft(ours, tmp_path)
    again = PeftModel.from_pretrained(plain(name), tmp_path).eval()
    torch.testing.assert_close(logits(again, texts(name)), logits(ours, texts(name)), **same)


def given(ours: OperatedModel, theirs: Any) -> OperatedModel:
    """Our prefix with the values of peft's."""
    whole = theirs.prompt_encoder["default"].embedding.weight.detach()
    cuts = [cut for cut in ours.cuts if cut.rule.params]
    shape = (cuts[0].sizes["kv_heads"], cuts[0].sizes["head_dim"])
    parts = whole.view(LENGTH, 2 * len(cuts), *shape)
    with torch.no_grad():
        for number, (cut, letter) in enumerate((cut, x) for cut in cuts for x in "KV"):
            ours.get_parameter(cut.parameters[letter]).copy_(parts[:, number])
    return ours.eval()


def wide() -> nn.Module:
    """Gemma-2 with capped scores, and windows that the text and its prefix fit into.

    In peft a prefix slides out of a window; here every query sees it.
    """
    model = ZOO["gemma2"].build()
    settings = {**model.config.to_dict(), "sliding_window": 32}
    made = type(model)(type(model.config)(**settings)).eval()
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("name", ["gemma2", "bloom", "gpt_neox", "opt", "gpt_neo"])
def test_cores_of_other_kinds_give_what_peft_gives(name: str) -> None:
    """Capped scores, distances in them, angles of a part of each head, tables, hidden scores."""
    inputs = ZOO[name].inputs(3, 9)
    model = wide() if name == "gemma2" else ZOO[name].build()
    base = ps.capture(model, inputs=ZOO[name].inputs(2, 7)) if name == "gemma2" else zoo(name)
    theirs = peft_model(deepcopy(model))
    ours = given(ps.apply(base, "prefix_tuning", length=LENGTH, shift=True), theirs)
    result = logits(ours, inputs)
    torch.testing.assert_close(result, logits(theirs, inputs), rtol=0, atol=1e-6)
    assert (result - logits(base, inputs)).abs().max() > 1e-3


def test_scores_that_are_hidden_by_a_product_see_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenAI's first GPT hides scores by w * b - 10000 * (1 - b); peft needs a cache it has not.

    The oracle is the original with its attention written out, the prefix in front.
    """
    name = "openai_gpt"
    ours = ps.apply(zoo(name), "prefix_tuning", length=LENGTH).eval()
    randomise(ours, lambda parameter: "prefix_tuning" in parameter, 0.5)
    model, inputs = ZOO[name].build(), ZOO[name].inputs(3, 9)
    for cut in ours.cuts:
        K, V = (ours.get_parameter(cut.parameters[x]).detach().transpose(0, 1) for x in "KV")

        def attend(
            q: Tensor, k: Tensor, v: Tensor, *_: Any, K: Tensor = K, V: Tensor = V
        ) -> list[Tensor]:
            keys, values = (
                torch.cat((new.expand(len(q), -1, -1, -1), old), 2)
                for new, old in ((K, k.transpose(-1, -2)), (V, v))
            )
            scores = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
            later = torch.ones(scores.shape[-2:]).triu(LENGTH + 1).bool()
            return [scores.masked_fill(later, -torch.inf).softmax(-1) @ values]

        monkeypatch.setattr(model.get_submodule(cut.placed.module), "_attn", attend)
    result = logits(ours, inputs)
    torch.testing.assert_close(result, logits(model, inputs), rtol=0, atol=1e-5)
    assert (result - logits(zoo(name), inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["t5"])
def test_cross_attention_sees_a_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle: the original, with more keys handed to torch's attention within the modules."""
    ours = ps.apply(zoo(name), "prefix_tuning", length=LENGTH, attention=["cross"]).eval()
    model, inputs = ZOO[name].build(), ZOO[name].inputs(3, 9)
    now: list[dict[str, str]] = []
    for cut in ours.cuts:
        module, names = model.get_submodule(cut.placed.module), cut.parameters
        module.register_forward_pre_hook(lambda *_, names=names: now.append(names))
        module.register_forward_hook(lambda *_: now.clear())
    plain_attention = torch.nn.functional.scaled_dot_product_attention

    def longer(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **rest: Any) -> Tensor:
        if now:
            K, V = (ours.get_parameter(now[0][x]).detach().transpose(0, 1) for x in "KV")
            k, v = (torch.cat((p.expand(len(q), -1, -1, -1), x), 2) for p, x in ((K, k), (V, v)))
            seen = 1 if attn_mask is not None and attn_mask.dtype == torch.bool else 0
            pad = torch.nn.functional.pad
            attn_mask = None if attn_mask is None else pad(attn_mask, (LENGTH, 0), value=seen)
        return plain_attention(q, k, v, attn_mask=attn_mask, **rest)

    result = logits(ours, inputs)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", longer)
    torch.testing.assert_close(result, logits(model, inputs), rtol=0, atol=1e-5)
    monkeypatch.undo()
    assert (result - logits(zoo(name), inputs)).abs().max() > 1e-3


@pytest.mark.slow
def test_a_prefix_generates_what_peft_generates(tmp_path: Path) -> None:
    model = plain("gpt2")
    theirs = peft_model(deepcopy(model))
    theirs.save_pretrained(tmp_path)
    ours = ps.from_peft(ps.capture(model, cache=True), tmp_path).eval()
    ids = texts("gpt2")["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    tokens = [m.generate(input_ids=ids, attention_mask=mask, **settings) for m in (ours, theirs)]
    assert torch.equal(*tokens)


def test_without_a_head_there_is_the_prefix_alone() -> None:
    ours = ps.apply(graph("llama"), "p_tuning_v2", length=LENGTH)
    assert {name.rpartition(".")[2] for name in ours.learnt()} == {"K", "V"}


def test_the_head_is_trained_with_the_prefix_and_goes_to_peft(tmp_path: Path) -> None:
    ours = ps.apply(graph("bert-classifier"), "p_tuning_v2", length=LENGTH)
    trained = {name for name in ours.learnt() if not name.endswith((".K", ".V"))}
    assert trained == {"classifier.weight", "classifier.bias"}
    before = graph("bert-classifier").get_parameter("classifier.weight").clone()
    losses = train(ours.train(), partial(texts, "bert-classifier"), 3e-2)
    assert losses[-2] < losses[0]
    assert not torch.equal(ours.get_parameter("classifier.weight"), before)
    ours.eval()
    ps.to_peft(ours, tmp_path)
    theirs = PeftModel.from_pretrained(plain("bert-classifier"), tmp_path).eval()
    inputs = texts("bert-classifier")
    torch.testing.assert_close(logits(theirs, inputs), logits(ours, inputs), rtol=0, atol=1e-6)
    again = ps.from_peft(graph("bert-classifier"), tmp_path).eval()
    torch.testing.assert_close(logits(again, inputs), logits(ours, inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"shift": False}),
        ("t5", {"shift": True}),
        ("t5", {"shift": True, "causal": True}),
        ("t5", {"shift": False, "attention": ["cross"]}),
    ],
)
def test_a_prefix_that_peft_has_not_is_refused(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    ours = ps.apply(graph(name), "prefix_tuning", length=LENGTH, **settings)
    with pytest.raises(ps.SurgeryError) as caught:
        ps.to_peft(ours, tmp_path / "adapter")
    assert caught.value.code == "PSG510"


def test_adapterhub_has_no_prefix_that_moves_positions(tmp_path: Path) -> None:
    ours = ps.apply(graph("bert-classifier"), "prefix_tuning", length=LENGTH, shift=True)
    with pytest.raises(
        ps.SurgeryError, match="has shift = True, and AdapterHub knows only False"
    ) as caught:
        ps.to_adapterhub(ours, tmp_path / "adapter")
    assert caught.value.code == "PSG512"


@pytest.mark.parametrize(
    ("code", "key", "value"),
    [
        ("PSG507", "num_virtual_tokens", LENGTH + 1),
        ("PSG508", "num_layers", 7),
        ("PSG508", "num_attention_heads", 8),
        ("PSG508", "num_transformer_submodules", 2),
        ("PSG503", "num_virtual_tokens", -1),
        ("PSG504", "inject_everywhere", True),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    code: str, key: str, value: Any, tmp_path: Path
) -> None:
    refused(tmp_path, code, lambda config, tensors: config.update({key: value}))


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    whole = "prompt_embeddings"
    refused(tmp_path, "PSG506", lambda c, t: t.update({f"base_model.{whole}": t.pop(whole)}))
    refused(tmp_path, "PSG507", lambda c, t: t.update({whole: t[whole][:, :-1].contiguous()}))


def refused(folder: Path, code: str, damage: Any) -> None:
    ps.to_peft(ps.apply(graph("llama"), "prefix_tuning", length=LENGTH, shift=True), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    damage(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ps.SurgeryError) as caught:
        ps.from_peft(graph("llama"), folder)
    assert caught.value.code == code


@pytest.mark.parametrize("types", [2, 16])
def test_a_prefix_is_pefts_whatever_the_sizes_of_example_and_type_table(
    types: int, tmp_path: Path
) -> None:
    small = {**BERT, "type_vocab_size": types}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**small)).eval()
    with torch.no_grad():
        model.bert.embeddings.token_type_embeddings.weight.normal_()
    wrapped = deepcopy(model)
    declare_past(wrapped.bert)
    theirs = peft_model(wrapped, "SEQ_CLS")
    theirs.save_pretrained(tmp_path)
    captured = ps.capture(model, {"input_ids": torch.ones(2, 2).long()})
    ours = ps.from_peft(captured, tmp_path).eval()
    text = {"input_ids": torch.randint(1, 50, (2, 7))}
    with torch.no_grad():
        wanted = theirs(**text, attention_mask=torch.ones(2, 7).long()).logits
        torch.testing.assert_close(ours(**text).logits, wanted, rtol=0, atol=1e-6)
