"""PSG3xx: what applying, switching and combining are refused for."""

from peftsurgery.codes.entry import NO_MATCH, USAGE, CodeInfo

CODES = {
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
        "Capture the model first. To combine adapters, apply rules first.",
        USAGE,
    ),
    "PSG310": CodeInfo(
        "there is no such adapter",
        "The name is none of the adapters that were applied, or none is named.",
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
        "'linear', 'cat' and 'svd', in rank.",
    ),
    "PSG316": CodeInfo(
        "a method cannot be combined in this way",
        "'linear' is the exact sum of the changes, for methods whose change is a sum over a size "
        "that is a setting (a rank), or linear in its parameters; 'cat' is the first of these, and "
        "'svd' is for methods that add a product of two parameters to a weight. It is tried, not "
        "assumed: a rule for which it does not come out is refused. 'peft_linear' and its kin "
        "merge parameters one by one, which is no sum of changes.",
    ),
    "PSG317": CodeInfo(
        "a combination's settings make no sense",
        "Weights are finite numbers for adapters that are there; ties, dare and magnitude_prune "
        "need a density, svd may have a rank and a clamp.",
        USAGE,
    ),
    "PSG318": CodeInfo(
        "a place that a rule was applied to means something else with new inputs",
        "The model uses the weight or the module that was cut, and with these inputs the rule does "
        "not choose it: its role was seen otherwise. What was trained there would be left out. "
        "Capture the model with these inputs, then apply, or choose the sites by path.",
    ),
    "PSG319": CodeInfo(
        "the base is another than the one the adapter was made for",
        "A saved surgery has a fingerprint of its base's weights, and those of this base are "
        "others; or something was folded into this base already, and the adapter does not name it "
        "as its base. The result would be another model than the one that was trained. "
        "--allow-other-base takes the base all the same, and what is written says so.",
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
        "Parameters are chosen by the names that the rules give them, such as A and B, or, where "
        "none are given, by their shapes: those with an axis of the outputs and one of ranks.",
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
    "PSG327": CodeInfo(
        "which tokens are one sequence's is not known",
        "A rule that takes a mean over the tokens needs to know which of them belong together. "
        "Here sequences and tokens share an axis, and no attention tells them apart.",
    ),
    "PSG330": CodeInfo(
        "a method cannot be flattened",
        "The rules that its file names under `flat:` must match the very places that the method "
        "was applied to, and have parameters of the shapes that it computes.",
    ),
    "PSG331": CodeInfo(
        "positions of keys without keys",
        "Where attention is biased by the distance of each key, a rule that adds positions must "
        "add as many keys at every core that the bias is for.",
    ),
    "PSG332": CodeInfo(
        "a narrowing leaves out the positions",
        "Rules put keys before those of the text, and move the text's positions behind theirs. "
        "Narrowed, they would do the one and not the other: positions are made once for the model, "
        "and are in no layer.",
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
    "PSG355": CodeInfo(
        "merged weights are not to be had, or are gone",
        "Within merged(), calls run on weights with the active adapters in them. That is for "
        "evaluation, and needs whole weights: not those that are shared out among processes. A "
        "call that began there cannot end after the adapters were taken out again.",
        USAGE,
    ),
}
