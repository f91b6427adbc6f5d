"""PSG5xx: what other libraries' adapters are refused for."""

from peftsurgery.codes.entry import CodeInfo

CODES = {
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
        "The safetensors file is missing or damaged, or holds NaN, infinity or a dtype that "
        "parameters do not have. peft's pickle files (.bin) are never loaded, since that can run "
        "code. AdapterHub's are, if they hold nothing but tensors: its library cannot write a "
        "prefix in any other way.",
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
        "AdapterHub's names for the parts of a model's layers are not known",
        "The library names them for each architecture in its own way. Those in "
        "peftsurgery/formats/adapterhub/library.yaml are known; of others, an adapter that is read "
        "tells them by its tensors' names (the path of a linear, a module that ends a sublayer, or "
        "words such as attention and output), and what is added to queries, keys and values needs "
        "none to be written.",
    ),
    "PSG514": CodeInfo(
        "the head that was saved with an adapter has no place in the model",
        "A head is taken over if the captured model has parameters of its names and shapes. Those "
        "of AdapterHub's own model classes (`heads.<name>...`) are not.",
    ),
    "PSG515": CodeInfo(
        "a base that is read as another class lacks values",
        "An adapter for a classifier on a language model's directory brings the head along, which "
        "the directory does not have. This one does not: what it was trained with is lost, or the "
        "class is another one.",
    ),
    "PSG520": CodeInfo(
        "an adapter is no plain LoRA",
        "What is to be done can only be done with adapters that add a product of two matrices to "
        "weights, and nothing else. The key or tensor named makes this one more than that. "
        "`peftsurgery export --as-lora RANK` and `as_lora` turn any foldable change into one.",
    ),
    "PSG521": CodeInfo(
        "a program cannot be given an adapter",
        "The program would refuse, ignore or misread the part named, so nothing is written. A "
        "merge (`fold`) says everything; `as_lora` makes smaller ranks.",
    ),
    "PSG522": CodeInfo(
        "a program's names for an architecture are not known",
        "Programs name the modules of each architecture in their own way, and some order the rows "
        "of their weights otherwise. What is known is in the YAML table of each folder of "
        "peftsurgery/formats.",
    ),
    "PSG523": CodeInfo(
        "a file's tensors are spelled like those of no LoRA that is known",
        "`peftsurgery import` reads the LoRA of kohya's trainer (`...lora_down.weight`), diffusers "
        "(`...lora_A.weight`, `...lora.down.weight`) and mlx-lm (`...lora_a`), LoHa and LoKr "
        "of LyCORIS (`...hada_w1_a`, `...lokr_w1`). Adapters of peft and AdapterHub need no "
        "import.",
    ),
}
