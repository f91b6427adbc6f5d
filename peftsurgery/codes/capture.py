"""PSG2xx: what models and inputs are refused for."""

from peftsurgery.codes.entry import CodeInfo

CODES = {
    "PSG201": CodeInfo(
        "the model cannot be captured",
        "torch.export could not turn the model into a graph for any input of this kind; the "
        "message ends in its reason and the line of the model's code. Capture the part of it that "
        "does not need that, or pass inputs that avoid that path.",
    ),
    "PSG202": CodeInfo(
        "example inputs are needed",
        "Inputs are made only for transformers models whose main input, and whatever else the "
        "forward has no default for, is of a known kind (token ids, pixels, audio). Pass "
        "inputs=(x, ...) or inputs={'name': x} with a batch of at least two.",
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
        "MODEL is a directory with a config.json, a hub id (owner/name), package.module:factory, "
        "or a saved surgery. A factory is called without arguments and returns a module, or "
        "(module, inputs) with a tuple or a dict of example inputs.",
    ),
    "PSG206": CodeInfo(
        "the config names no known model",
        "config.json has a model_type or architecture that the installed transformers does "
        "not have.",
    ),
    "PSG207": CodeInfo(
        "the model has no weights",
        "Applying rules needs no weights, but running, training and folding do. The directory "
        "holds none that can be read, or a live model is on the meta device.",
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
    "PSG216": CodeInfo(
        "a captured model has no such method",
        "A captured model is an instance of the original's class and answers what it is asked as "
        "the original does. What would change the model (new sizes, another attention, an adapter "
        "of another library) or write it as if it were the original is refused. Change the "
        "original and capture it again; save() writes what was learnt, fold() makes a model of "
        "the original's class.",
    ),
    "PSG217": CodeInfo(
        "the model changes itself in its forward",
        "A captured model shares the weights of its original and computes the same at every call. "
        "A forward that writes to a weight, to a tensor kept as a plain attribute, or that counts "
        "its calls in one, cannot be captured so. State in buffers can: a captured model has its "
        "own. If the model changes itself at its first call only, call it once in the mode that "
        "is wanted (under no_grad) and capture it then.",
    ),
    "PSG218": CodeInfo(
        "there is no such class for the base",
        "`--class`, or what was trained on the base, names a class that transformers does not "
        "have, or that is not made of the base's config. Name one of the base's own architecture, "
        "such as LlamaForSequenceClassification.",
    ),
    "PSG219": CodeInfo(
        "the vocabulary cannot be made another size",
        "What was trained on the base needs a table of tokens with more rows, or fewer, and the "
        "model's class has no resize_token_embeddings that does it, or its input and output have "
        "vocabularies of their own, or the rows are of another base. Load the model, resize it, "
        "and capture that.",
    ),
    "PSG220": CodeInfo(
        "a part cannot be called or changed by itself",
        "Hooks, and modules put in a part's place, make the part a call of its own. That takes a "
        "stretch of the graph that is all the part's, tensors for its arguments and its result, "
        "and the original's calls: modules cannot be added to lists or taken out of them, and the "
        "settings that a capture has as constants cannot be changed. Change the original, and "
        "capture it again.",
    ),
    "PSG221": CodeInfo(
        "a hook changed what the model cannot take on",
        "What a hook returns, and what a module put in a part's place returns, has the structure "
        "of the original's result; so have arguments that a hook before it returns. A value that "
        "the part only passes on cannot be another one.",
    ),
    "PSG222": CodeInfo(
        "an ONNX file cannot be read",
        "The message says why: the file is none, is damaged, or has no graph. `diff` reads ONNX "
        "files with the package onnx, which comes with the extra of that name.",
    ),
    "PSG223": CodeInfo(
        "torch.compile does not take these options",
        "compile() hands its options to torch.compile, which knows them by name: backend (one of "
        "torch.compiler.list_backends(), or a function), mode or options, dynamic, fullgraph and "
        "disable. torch's reference of torch.compile says what each may be.",
    ),
    "PSG224": CodeInfo(
        "the model cannot be compiled",
        "The backend of compile() failed in a call. Inductor, which is taken unless another is "
        "named, needs a C++ compiler and Python's headers for the CPU (on Debian the packages g++ "
        "and python3-dev; the variable CXX names another compiler), and Triton for a GPU. With "
        "compile(backend='aot_eager') it is seen whether that is all that is missing; "
        "compile(disable=True) lets the model run uncompiled.",
    ),
    "PSG225": CodeInfo(
        "the model is sharded over several processes",
        "FSDP2 and tensor parallelism leave a part of every parameter with each process. Such a "
        "model is called, trained and saved; save() is called by all processes, puts the parts "
        "together, and the first process writes them. Folds, exports and further operations need "
        "whole parameters: load the saved surgery in one process.",
    ),
    "PSG226": CodeInfo(
        "a captured model is split by a plan of tensor parallelism",
        "Such a plan lets a part give its share of the features to the code behind it, which takes "
        "the sizes of what it is given. A graph has the sizes of whole tensors there. Shard the "
        "model with FSDP2 (fully_shard), or fold it: the folded model is of the original's class, "
        "for which the plan is.",
    ),
    "PSG227": CodeInfo(
        "a program of torch.export is no model to open",
        "A .pt2 file is what `export --to pt2` writes for torch to run. Reading one unpickles, "
        "which can run any code that is in it, and what it holds is a flat graph without the "
        "modules that rules speak of. No command opens one: name the model or the surgery that it "
        "was made of. torch.export.load reads files that you trust.",
    ),
    "PSG228": CodeInfo(
        "the model's code goes by values",
        "A graph computes the same steps for all values. Where a forward asks for a value that is "
        "made of its inputs alone (whether a mask masks anything), the call's answer is taken, and "
        "other answers are captured when they come. The message names the line that asks for "
        "one that the weights have a say in: which experts were chosen, how long a list of found "
        "things is. Many models of experts have another implementation, which runs all of them "
        "(`experts_implementation` in transformers); otherwise capture the modules around that "
        "code, and leave it to call them.",
    ),
    "PSG229": CodeInfo(
        "a file would be right for some values only",
        "The model's code goes by values of its inputs, so a capture is made for each answer and "
        "the one that fits a call is taken. A file has one graph and takes all values. Write the "
        "folded model, whose own code decides, as a model directory.",
    ),
}
