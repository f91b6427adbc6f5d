"""Coded errors: every way an operation can be refused, and what to do about it.

A :class:`SurgeryError` names the thing that is wrong and, where there is one, the nearest right
one. Its code (``PSG101``) is stable; ``peftsurgery explain PSG101`` prints the entry of
:data:`CODES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NO_MATCH, USAGE, BAD_INPUT, UNVERIFIED = 1, 2, 3, 4


@dataclass(frozen=True)
class CodeInfo:
    """What a code means: a title, an explanation for the reader, and the exit code of a command."""

    title: str
    explanation: str
    exit_code: int = BAD_INPUT


class SurgeryError(Exception):
    """A refusal with a stable code, the name of what is wrong and, if there is one, a hint."""

    def __init__(
        self, code: str, message: str, hint: str | None = None, where: str | None = None
    ) -> None:
        if code not in CODES:
            raise KeyError(f"{code} is not in the catalogue of error codes")
        self.code, self.message, self.hint, self.where = code, message, hint, where
        super().__init__(code, message, hint, where)

    @property
    def exit_code(self) -> int:
        """The exit code a command ends with when this error reaches it."""
        return CODES[self.code].exit_code

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        hint = f"\n  {self.hint}" if self.hint else ""
        return f"{self.code}: {place}{self.message}{hint}"

    def to_dict(self) -> dict[str, Any]:
        """The error as ``--json`` prints it."""
        return {
            "error": {
                "code": self.code,
                "title": CODES[self.code].title,
                "message": self.message,
                "hint": self.hint,
                "where": self.where,
            }
        }


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like ``name``, or None if none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint that names the nearest known word, or all of them when none is near."""
    known = sorted(known)
    near = closest(name, known)
    return f"did you mean '{near}'?" if near else f"known here: {', '.join(known)}"


CODES: dict[str, CodeInfo] = {
    "PSG101": CodeInfo(
        "A rule file is not readable YAML",
        "The text breaks YAML's syntax at the place named. Indent with spaces, close every bracket "
        "and quote texts that hold ': ' or '#'.",
    ),
    "PSG102": CodeInfo(
        "A rule file is too large, too deep, empty or not text",
        "A rule file is one UTF-8 mapping of at most 256 KiB, nested at most 50 levels deep.",
    ),
    "PSG103": CodeInfo(
        "A key appears twice",
        "YAML loaders keep the last of two equal keys and drop the first without a word. "
        "Here it is an error: remove one of them.",
    ),
    "PSG104": CodeInfo(
        "YAML tags, anchors and aliases are not used in rule files",
        "Tags can construct objects and aliases can blow up a small file. Write the value out.",
    ),
    "PSG105": CodeInfo(
        "A rule file has an unknown key",
        "Every key is checked against the schema (`peftsurgery rules schema` prints it).",
    ),
    "PSG106": CodeInfo(
        "A value in a rule file is not what its key takes",
        "The value has another type or form than the schema says "
        "(`peftsurgery rules schema` prints it), or contradicts another key of the same rule.",
    ),
    "PSG107": CodeInfo(
        "There is no such rule file",
        "A rule is named by a shipped name (`peftsurgery rules ls`) or by the path of a YAML file.",
    ),
    "PSG110": CodeInfo(
        "An expression cannot be parsed",
        "Expressions are written in Python's notation: numbers, names, + - * / @ **, comparisons, "
        "`a if n > 0 else b`, and calls of the operators.",
    ),
    "PSG111": CodeInfo(
        "An expression uses something that is not in the language",
        "Attribute access, lambdas, comprehensions, strings and every name that begins with '__' "
        "are left out on purpose: a rule is data and can do nothing but arithmetic on tensors.",
    ),
    "PSG112": CodeInfo(
        "An expression is too large",
        "At most 2,000 characters, 200 nodes, 50 levels, exponents up to 64 and numbers below "
        "2^63. Name intermediate values with `let:`.",
    ),
    "PSG113": CodeInfo(
        "An expression uses an unknown name",
        "The names are what the match binds, its sizes, the settings, the parameters and `let` "
        "names. `fold` and `init` see the weights but not the activations; a shape sees only "
        "numbers.",
    ),
    "PSG114": CodeInfo(
        "An expression calls an unknown operator",
        "Calls are to the operators of the table only; Python code can add to it with "
        "`@ps.operator`.",
    ),
    "PSG115": CodeInfo(
        "An operator was called with the wrong arguments",
        "The operator's signature is printed with the error.",
    ),
    "PSG116": CodeInfo(
        "An expression cannot be computed on these values",
        "Most often two shapes do not fit. The part of the expression and the shapes are printed.",
    ),
    "PSG120": CodeInfo(
        "There is no such setting",
        "The settings of a rule file are the keys of its `with:`.",
    ),
    "PSG121": CodeInfo(
        "A setting has a value of the wrong type",
        "A setting keeps the type of its default: a number, a text, true/false or a list.",
    ),
    "PSG122": CodeInfo(
        "A parameter's shape is not a list of positive whole numbers",
        "Each entry of `shape` is an expression over sizes and settings; use // to divide.",
    ),
    "PSG123": CodeInfo(
        "A parameter's initial value does not fit",
        "`init` must give a number, or a tensor of exactly the declared shape.",
    ),
    "PSG133": CodeInfo(
        "A penalty is not a number",
        "What a rule adds to the loss is one number for each site: reduce it, by `norm`, `sum` or "
        "`mean` over all dimensions.",
    ),
    "PSG124": CodeInfo(
        "unknown activation",
        "`activation(name, x)` takes the name of an activation: relu, silu (or swish), gelu, "
        "gelu_new, tanh and others that configurations use.",
    ),
    "PSG126": CodeInfo(
        "A text cannot be turned into tokens",
        "A setting that holds tokens can be given as a text if the model was captured from a "
        "directory with a tokenizer. Otherwise give the numbers of the tokens.",
    ),
    "PSG130": CodeInfo(
        "A rule's fold does not agree with its rewrite",
        "On random tensors in double precision, the operation with the folded weights must equal "
        "the rewritten operation. They differ, so folding would change the model.",
    ),
    "PSG131": CodeInfo(
        "A rewrite changes the shape of what it replaces",
        "The new value must have the shape of the old, or the rest of the model cannot take it.",
    ),
    "PSG132": CodeInfo(
        "An expression cannot be read as graph operations",
        "An operator's function must be plain torch code: no test of a tensor's value, no loop "
        "over its size.",
    ),
    "PSG140": CodeInfo(
        "A regular expression took too long",
        "The `path` expression backtracks without end on a module's name. Remove nested "
        "repetitions such as (a+)+.",
    ),
    "PSG141": CodeInfo(
        "A regular expression is not valid",
        "`path` is a regular expression that must match the whole module path.",
    ),
    "PSG142": CodeInfo(
        "There is no such role",
        "Roles are what `peftsurgery inspect` prints, what a rule file defines under `roles:` and "
        "what Python code registers with `@ps.role`.",
    ),
    "PSG143": CodeInfo(
        "A name is defined twice",
        "Operators and roles have one meaning; choose another name for your own.",
    ),
    "PSG144": CodeInfo(
        "A pattern is not usable",
        "A pattern is an expression of operators that stand for graph operations, with free names "
        "for the values to bind, small enough to search for.",
    ),
    "PSG145": CodeInfo(
        "a rule refers to one that was not applied before it",
        "`matched:` names an adapter or a rule file whose cuts are already made: apply that first, "
        "or in the same call before this one. It is still needed when the other is ejected.",
    ),
    "PSG146": CodeInfo(
        "there is no such way to store a weight",
        "`store:` is nf4(block, double, compute) or fp4(...): blocks of 32 to 4096 numbers share a "
        "scale, `double` quantises the scales too, and `compute` is a dtype or null.",
    ),
    "PSG201": CodeInfo(
        "the model cannot be captured",
        "torch.export could not turn the model into a graph for any input of this kind. "
        "Usually its "
        "forward takes decisions that depend on values (routing by index, loops over .tolist()). "
        "Capture the part of it that does not, or pass inputs that avoid that path.",
    ),
    "PSG202": CodeInfo(
        "example inputs are needed",
        "Inputs are made only for transformers models whose main input is a known kind (token ids, "
        "pixels, audio). Pass inputs=(x, ...) or inputs={'name': x} with a batch of at least two.",
    ),
    "PSG203": CodeInfo(
        "the arguments do not fit the model's forward",
        "A captured model takes what the original's forward takes, by position or by name.",
    ),
    "PSG204": CodeInfo(
        "a part of a captured model was called",
        "In a captured model the code is in the model and in its blocks (the elements of repeated "
        "lists). Other modules keep their names and tensors but are not called.",
    ),
    "PSG205": CodeInfo(
        "there is no such model",
        "MODEL is a directory with a config.json, a hub id (owner/name), "
        "package.module:factory, or "
        "a saved surgery.",
    ),
    "PSG206": CodeInfo(
        "the config names no known model",
        "config.json has a model_type or architecture that the installed transformers does "
        "not have.",
    ),
    "PSG207": CodeInfo(
        "the model has no weights",
        "Applying rules needs no weights, but running, training and folding do. The directory "
        "holds "
        "none that can be read, or a live model is on the meta device.",
    ),
    "PSG208": CodeInfo(
        "the model needs code that comes with it",
        "The config points at Python files in the model's directory. They are never run unasked.",
    ),
    "PSG209": CodeInfo(
        "a module's name is taken",
        "A captured model keeps the original's module names, and this one is also the name of "
        "something every captured model or block has.",
    ),
    "PSG210": CodeInfo(
        "the cache cannot be left to its owner",
        "A captured model calls the cache it is given, and knows no more of it than how long it "
        "is. That works for caches of keys and values; it does not for models that keep other "
        "states, or that read the cache's tensors themselves. A cache of fixed length works in "
        "generate, which makes the masks for it. Generate with use_cache=False, or fold the model "
        "and generate with the plain one.",
    ),
    "PSG211": CodeInfo(
        "the model cannot be captured in train mode",
        "In training its code decides by random values what to run (LayerDrop, router jitter). Set "
        "that to zero in its config, or call eval() on the captured model and train it as it is, "
        "without dropout.",
    ),
    "PSG212": CodeInfo(
        "the model does not generate",
        "generate() is for causal language models of transformers. The encoder and the decoder of "
        "an encoder-decoder model are captured as one graph, and generating calls the decoder "
        "alone: fold such a model and generate with the plain one.",
    ),
    "PSG214": CodeInfo(
        "Gradient checkpointing is asked for something it does not do",
        "Blocks are recomputed without re-entering, on the device they are on. Leave "
        "`use_reentrant` and `offload` out, or false.",
    ),
    "PSG215": CodeInfo(
        "the model is quantised already",
        "Graphs are captured of models with ordinary weights. Capture the model that was quantised "
        "and apply `nf4` or `qlora`: the base is then kept in four bits by the operated model.",
    ),
    "PSG301": CodeInfo(
        "A rule matched nothing",
        "No site of the model survived the rule's clauses. The count after each clause and the "
        "nearest miss are printed; `peftsurgery why MODEL RULE PATH` explains one module.",
        NO_MATCH,
    ),
    "PSG302": CodeInfo(
        "A rule matched another number of sites than it expects",
        "`expect` says how many sites a rule must match. The count after each clause and the "
        "nearest miss are printed.",
        NO_MATCH,
    ),
    "PSG303": CodeInfo(
        "A module path that a rule names is not in the model",
        "Every entry of `paths` must be the path of a site of the rule's kind.",
        NO_MATCH,
    ),
    "PSG304": CodeInfo(
        "a name is taken",
        "Every adapter's parameters are named beneath the module they were added to. Two adapters"
        " of one rule at one place need different names; a name is a word without dots.",
    ),
    "PSG305": CodeInfo(
        "a rewrite is no value of the graph",
        "The expression gives a number, not a tensor that could take the place of the old value, "
        "or the site has no value of the name that is rewritten.",
    ),
    "PSG306": CodeInfo(
        "a rewrite does not fit",
        "The new value has another shape than the one it replaces, so what follows could not use "
        "it.",
    ),
    "PSG307": CodeInfo(
        "new inputs reach places the rules were not applied to",
        "The model was captured with inputs that left these places out. Capture it with inputs "
        "that reach them, then apply.",
    ),
    "PSG308": CodeInfo(
        "a parameter has the wrong shape",
        "The file was made for another model, or with other settings (rank).",
    ),
    "PSG309": CodeInfo(
        "rules are applied to captured models",
        "Capture the model first.",
        USAGE,
    ),
    "PSG310": CodeInfo(
        "there is no such adapter",
        "The name is none of the adapters that were applied.",
    ),
    "PSG311": CodeInfo(
        "the adapter does not fit the base",
        "Its tensors and the places that its rules match in this model are not the same. It was "
        "made for another base, or the base has changed.",
    ),
    "PSG312": CodeInfo(
        "two active adapters train one parameter",
        "Each has its own copy of a parameter of the model, and a program can read only one of "
        "them. Deactivate one; the rows of a batch may use both.",
    ),
    "PSG313": CodeInfo(
        "an adapter changes what all rows of a batch share",
        "Rows of one batch use different adapters by choosing, for each row, between the new value "
        "and the old one. That needs a value with the batch as an axis: the tables of positions "
        "that blocks share, or a prompt that makes the input longer, are not the rows' own.",
    ),
    "PSG314": CodeInfo(
        "the rows of the batch are not those that adapters are named for",
        "One adapter is named for each row of the batch, or None for the base. While generating, "
        "a row may be repeated for beams.",
        USAGE,
    ),
    "PSG315": CodeInfo(
        "adapters cannot be combined with each other",
        "A combination is a new adapter of the same method. That needs adapters that do the same, "
        "at the same places or at some of them, with settings that differ by a factor or, for "
        "'cat' and 'svd', in rank.",
    ),
    "PSG316": CodeInfo(
        "a method cannot be combined in this way",
        "'cat' is for methods whose change is a sum over a size that is a setting (a rank), 'svd' "
        "for those that add a product of two parameters to a weight. It is tried, not assumed: a "
        "rule for which it does not come out is refused. 'linear' and its kin merge parameters "
        "one by one.",
    ),
    "PSG317": CodeInfo(
        "a combination's settings make no sense",
        "Weights are finite numbers for adapters that are there; ties, dare and magnitude_prune "
        "need a density, svd may have a rank and a clamp.",
        USAGE,
    ),
    "PSG320": CodeInfo(
        "an attention core cannot be run again with more keys",
        "A rule that calls attention(...) runs the model's own core with the values it gives. This "
        "core takes its heads or keys apart on the way, so it is not known what more keys would "
        "mean. Leave it out with `where:`.",
    ),
    "PSG321": CodeInfo(
        "there are no ranks to take away",
        "A rule whose ranks a budget can be shared among says so under `ranks:`.",
    ),
    "PSG322": CodeInfo(
        "a schedule of ranks does not fit the training",
        "It needs the number of steps, and some of them between those at the start, in which "
        "nothing is taken away, and those at the end, in which the choice is final.",
    ),
    "PSG323": CodeInfo(
        "the state of a rank allocator is missing or another model's",
        "Which ranks are important is learnt over many steps. Training that goes on in the middle "
        "needs what was saved with it: RankAllocator.save and load, or the checkpoint's directory.",
    ),
    "PSG324": CodeInfo(
        "no parameter has that name",
        "Parameters are chosen by the names that the rules give them, such as A and B.",
    ),
    "PSG325": CodeInfo(
        "a weight cannot be stored in four bits",
        "Only a whole matrix of finite numbers in float32, float16 or bfloat16 that no rule trains "
        "has a four-bit form. Leave other weights out with `where:`.",
    ),
    "PSG326": CodeInfo(
        "bitsandbytes is missing",
        "Four-bit weights are packed and unpacked by bitsandbytes, which is an optional "
        "dependency: pip install 'peftsurgery[quantise]'.",
    ),
    "PSG330": CodeInfo(
        "a method cannot be flattened",
        "The rules that its file names under `flat:` must match the very places that the method "
        "was applied to, and have parameters of the shapes that it computes.",
    ),
    "PSG340": CodeInfo(
        "a fusion is over an adapter that is not there",
        "A rule `over` adapters combines the values of adapters that were applied before it. Apply "
        "them first, and give their names to the setting that the rule takes them from.",
    ),
    "PSG341": CodeInfo(
        "adapters cannot be combined",
        "A fusion binds what each of its adapters makes of the same value. They must rewrite the "
        "result of the same sites, and the fusion must cover all of them.",
    ),
    "PSG342": CodeInfo(
        "an adapter is in use",
        "A fusion combines its values. Take the fusion out first: eject(model, fusion).",
    ),
    "PSG351": CodeInfo(
        "the model's inputs cannot be changed",
        "A rule that matches `inputs` changes what the model is given after its tokens are "
        "embedded, so the model must take embeddings (inputs_embeds) in place of tokens.",
    ),
    "PSG352": CodeInfo(
        "the inputs do not fit together once they are changed",
        "A rule that makes the text longer must do the same to all that has a value for each token "
        "(mask, labels, positions, types). What is given in another form than (batch, tokens), a "
        "mask for each pair of tokens say, cannot be made longer. The longer text may also be more "
        "than the model takes.",
    ),
    "PSG353": CodeInfo(
        "a method that changes the outputs cannot generate",
        "Generation works with what the model says of every next token, and the method combines "
        "that of several texts.",
    ),
    "PSG354": CodeInfo(
        "a cache brings what rules would put before the text again",
        "Virtual tokens go before a text once, and are in the cache from then on. generate() does "
        "so; a call of one's own that goes on from such a cache would have them twice.",
    ),
    "PSG331": CodeInfo(
        "positions of keys without keys",
        "Where attention is biased by the distance of each key, a rule that adds positions must "
        "add as many keys at every core that the bias is for.",
    ),
    "PSG401": CodeInfo(
        "the method cannot be folded",
        "Only what amounts to a change of weights can become part of them. The rule says so by "
        "its `fold:`.",
    ),
    "PSG402": CodeInfo(
        "a weight would overflow",
        "The folded weight is finite in fp32 and too large for the dtype the model is stored in. "
        "Fold a model that was loaded in a wider dtype.",
    ),
    "PSG403": CodeInfo(
        "a value is not finite",
        "An adapter or a folded weight holds NaN or infinity: training diverged, or the file is "
        "damaged.",
    ),
    "PSG404": CodeInfo(
        "a tie cannot be broken",
        "Two names of the model are one weight and only one of them was adapted. The architecture"
        " ties them again at every load, so the fold would be lost or would leak to the other "
        "side.",
    ),
    "PSG405": CodeInfo(
        "there is no bias to fold into",
        "The fold changes a bias that the model does not have.",
    ),
    "PSG406": CodeInfo(
        "a weight has no four-bit layer to go into",
        "With requantise, folded weights go into bitsandbytes' linear layers. A weight of another "
        "kind of module can only be written in full precision.",
    ),
    "PSG410": CodeInfo(
        "the folded model is not the operated one",
        "What was written was read back by from_pretrained (a plain module: from its tensors) and "
        "run at two shapes, and its outputs differ from the operated model's by more than rounding "
        "explains. Nothing is left at the output.",
        UNVERIFIED,
    ),
    "PSG411": CodeInfo(
        "the ONNX model differs from the folded one",
        "onnxruntime ran the file at two shapes that its export had not seen, and the outputs "
        "differ by more than 1e-5 (of their size, if they are larger than 1), or the file "
        "could not "
        "be run. The file is removed.",
        UNVERIFIED,
    ),
    "PSG412": CodeInfo(
        "the model cannot be written as ONNX",
        "torch.onnx has no translation for something the model does. The reason it gave is "
        "printed; "
        "the folded model itself is not affected.",
        UNVERIFIED,
    ),
    "PSG413": CodeInfo(
        "adapters cannot be inputs of an ONNX model yet",
        "export_onnx(..., adapters='fold') writes a model with the adapters in its weights.",
        USAGE,
    ),
    "PSG414": CodeInfo(
        "no inputs can be made to check the model with",
        "A check needs inputs at two shapes other than the captured one. They can be made for "
        "models "
        "whose arguments are tensors, given by name, with a batch that may vary.",
    ),
    "PSG501": CodeInfo(
        "an adapter's config cannot be read",
        "adapter_config.json is missing, is no JSON object, or holds a key twice, NaN or infinity.",
    ),
    "PSG502": CodeInfo(
        "an adapter is of an unknown method",
        "Its peft_type, or AdapterHub's architecture, is none of the methods for which a shipped "
        "rule lists the library's names (under `checkpoint: peft` or `checkpoint: adapterhub`).",
    ),
    "PSG503": CodeInfo(
        "a value in an adapter's config cannot be used",
        "A rank is a positive whole number, alpha a finite number, a dropout less than 1, and a "
        "list of modules a list of texts.",
    ),
    "PSG504": CodeInfo(
        "an adapter's config asks for something that is not honoured",
        "The key named changes what the adapter computes, and no rule does that. Nothing is "
        "skipped: an adapter is read as its library means it or not at all.",
    ),
    "PSG505": CodeInfo(
        "an adapter's tensors cannot be read",
        "The safetensors file is missing or damaged, or holds NaN or infinity. peft's pickle files "
        "(.bin) are never loaded, since that can run code. AdapterHub's are, if they hold nothing "
        "but tensors: its library cannot write a prefix in any other way.",
    ),
    "PSG506": CodeInfo(
        "a tensor of an adapter has no place in the model",
        "No module of that name is reached in the captured model. Most often the adapter was made "
        "for another base, or for another class around it.",
    ),
    "PSG507": CodeInfo(
        "the tensors of an adapter do not fit",
        "A module needs all the tensors of its method (lora_A and lora_B), in the shapes that its "
        "weight and the config's rank give.",
    ),
    "PSG508": CodeInfo(
        "an adapter's config and its tensors contradict each other",
        "target_modules, modules_to_save, rank_pattern or alpha_pattern name modules that have no "
        "tensors, or leave out some that have. peft ignores such names; one of them may be a typo.",
    ),
    "PSG510": CodeInfo(
        "peft has no form for what was applied",
        "peft wraps modules by name, knows some methods, and has one set of values for an adapter. "
        "Save the surgery itself, or fold it.",
    ),
    "PSG511": CodeInfo(
        "it is not clear which adapter is meant",
        "A directory of peft's or AdapterHub's holds one adapter: give the name of one that the "
        "model has.",
    ),
    "PSG512": CodeInfo(
        "AdapterHub's library has no form for what was applied",
        "Its adapter is one method with one config, which says by kind of place and by layer where "
        "it is. Save the surgery itself, or fold it.",
    ),
    "PSG513": CodeInfo(
        "AdapterHub's names for the places of a model are not known",
        "The library names them for each architecture in its own way; those that are known here "
        "are in peftsurgery/formats/adapterhub.yaml.",
    ),
    "PSG514": CodeInfo(
        "the head that was saved with an adapter has no place in the model",
        "A head is taken over if the captured model has parameters of its names and shapes. Those "
        "of AdapterHub's own model classes (`heads.<name>...`) are not.",
    ),
    "PSG601": CodeInfo(
        "The output exists already",
        "Nothing is overwritten unless `--force` is given, and then only a file or a model's "
        "directory.",
    ),
    "PSG602": CodeInfo(
        "The output is, holds or lies in an input",
        "Inputs are never touched, so the output must be somewhere else.",
    ),
    "PSG603": CodeInfo(
        "A file cannot be read or written",
        "The system refused: the message names the file and gives the reason.",
    ),
    "PSG604": CodeInfo(
        "the place is taken",
        "A surgery is written into a new or empty directory, or over an older surgery.",
    ),
    "PSG605": CodeInfo(
        "the surgery's manifest is damaged",
        "surgery.json is missing, is no JSON object of a known format, or names files outside the"
        " directory.",
    ),
    "PSG606": CodeInfo(
        "the surgery's tensors are damaged",
        "adapter.safetensors is missing or truncated, or holds values that are not finite.",
    ),
    "PSG607": CodeInfo(
        "there is nothing to fold",
        "A saved surgery has a surgery.json, a peft adapter an adapter_config.json.",
    ),
    "PSG901": CodeInfo(
        "The command line is not understood",
        "`peftsurgery --help` lists the commands, `peftsurgery COMMAND --help` the arguments "
        "of one.",
        USAGE,
    ),
    "PSG902": CodeInfo(
        "An optional package is not installed",
        "The command needs a package that comes with an extra; the hint has the line to "
        "install it.",
    ),
    "PSG903": CodeInfo(
        "There is no such error code",
        "`peftsurgery explain` without a code lists all of them.",
        USAGE,
    ),
}
