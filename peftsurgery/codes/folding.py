"""PSG4xx: what folding and checking a result are refused for."""

from peftsurgery.codes.entry import UNVERIFIED, CodeInfo

CODES = {
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
        "Two names of the model are one weight and only one of them was adapted. The architecture "
        "ties them again at every load, so the fold would be lost or would leak to the other side.",
    ),
    "PSG405": CodeInfo(
        "there is no bias to fold into",
        "The fold changes a bias that the model does not have.",
    ),
    "PSG406": CodeInfo(
        "a weight has no four-bit layer to go into",
        "With requantise, folded weights go into bitsandbytes' linear layers. A weight of another "
        "kind of module can only be written in full precision, and so can one that transformers "
        "keeps in full precision whenever it loads the architecture.",
    ),
    "PSG407": CodeInfo(
        "nothing is to be quantised again",
        "requantise packs the weights again that the operated model keeps in four bits, and this "
        "one keeps none: no rule of it has `store:`.",
    ),
    "PSG408": CodeInfo(
        "a weight has readers that the rule leaves as they are",
        "The rule changes what one place computes with a weight, and another place reads the same "
        "weight unchanged. A fold changes the weight for both, so the folded model would compute "
        "something else. Let the rule match all of them, or keep the adapter.",
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
        "differ by more than 1e-5 (of their size, if they are larger than 1), or the file could "
        "not be run. The file is removed.",
        UNVERIFIED,
    ),
    "PSG412": CodeInfo(
        "the model cannot be written as ONNX",
        "torch.onnx has no translation for something the model does. The reason it gave is "
        "printed; the folded model itself is not affected.",
        UNVERIFIED,
    ),
    "PSG413": CodeInfo(
        "the adapter cannot be put in and left out of an ONNX graph",
        "With adapters='inputs' the tensors of the active adapters are inputs that may be left "
        "out, which leaves the model as it was. That needs an adapter that is active, and for "
        "which some tensors (empty ones, or what it starts with) change nothing. A prefix that "
        "moves positions has a fixed length; an adapter that lengthens the text cannot do so "
        "for every token of a model with a cache. Write a model with the adapters in its "
        "weights: adapters='fold'.",
    ),
    "PSG414": CodeInfo(
        "no inputs can be made to check the model with",
        "A check needs inputs at two shapes other than the captured one. They can be made for "
        "models whose arguments are tensors, given by name, with a batch that may vary.",
    ),
    "PSG415": CodeInfo(
        "The fold changes nothing",
        "Every weight would be written as it was: the adapter is untrained, or its changes are too "
        "small for the dtype of the weights. Train it, or write another dtype.",
    ),
    "PSG416": CodeInfo(
        "The fold cannot be made on files",
        "A weight is not in the base's files as the model has it, or kept in a form that cannot be "
        "added to, or that is not what its quantiser's config says; a tie that would be broken is "
        "one that no config can break, or new tokens have rows in no file; or adapter and fold do "
        "not have the same tensors; or residuals are asked for where more changes than values. "
        "`fold_to_directory` builds the model and folds in memory.",
    ),
    "PSG417": CodeInfo(
        "The output is not what was written",
        "A tensor, a header or a file differs from what the certificate, peftsurgery.json, says of "
        "it. Fold again, or fetch it again.",
        exit_code=4,
    ),
    "PSG418": CodeInfo(
        "There is nothing to unfold from",
        "What a fold changed is restored from the base, or from the residuals that a fold writes "
        "if it is told to be reversible. Neither is there.",
    ),
    "PSG419": CodeInfo(
        "A change cannot be said by a LoRA",
        "A LoRA adds a product of two matrices to the weight of a linear, an embedding or a plain "
        "convolution. The adapter changes something else: a bias, a norm, stacked experts. Fold "
        "it, or leave that part out.",
    ),
    "PSG420": CodeInfo(
        "Two checkpoints are not of one model",
        "An adapter is extracted from two checkpoints with the same tensors. One of them has a "
        "tensor that the other lacks, or has in another shape (a vocabulary of another size).",
    ),
    "PSG421": CodeInfo(
        "The plan of a fold could not be made",
        "What the names of an adapter's tensors leave open is told by the base's graph, which a "
        "process of its own captures without weights. It ended before it was done: it may have "
        "been killed, or found no memory. Try again, or fold in Python after `import torch`.",
    ),
    "PSG422": CodeInfo(
        "the model cannot be written as a program of torch.export",
        "torch.export cannot trace the model as it is, or has no form for a part of it; the reason "
        "it gave is printed. The folded model (`--adapters fold`) has no parts but the original's.",
        UNVERIFIED,
    ),
    "PSG423": CodeInfo(
        "the program of torch.export is not the model",
        "The file was read back and called at two shapes that its export had not seen, and its "
        "outputs differ by more than rounding explains, or it could not be called. The file is "
        "removed.",
        UNVERIFIED,
    ),
    "PSG424": CodeInfo(
        "a computed weight cannot be what the fold makes it",
        "The model computes the weight of its parameters (normalises or standardises it, masks it, "
        "multiplies two factors). A fold undoes that, and refuses where it cannot be undone, or "
        "where no values of the parameters make the new weight. The adapter works all the same.",
    ),
}
