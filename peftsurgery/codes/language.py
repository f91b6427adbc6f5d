"""PSG1xx: what rule files and expressions are refused for."""

from peftsurgery.codes.entry import USAGE, CodeInfo

CODES = {
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
    "PSG108": CodeInfo(
        "A rule file stands on itself",
        "`base:` names a rule file that in the end stands on this one, or more files than anybody "
        "reads (16).",
    ),
    "PSG109": CodeInfo(
        "A rule file changes a rule that its base does not have",
        "`change:` has one entry for each rule of the base that it changes, in order; what is "
        "added besides goes under `rules:`.",
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
    "PSG117": CodeInfo(
        "Nothing reads a setting of the base any more",
        "A rule file stands on another (`base:`), and an expression of its own took the place of "
        "the one that read the setting. A name in it may be misspelt; if not, `without:` says that "
        "the setting is none of the file's.",
    ),
    "PSG118": CodeInfo(
        "Two bases of a rule file mean different things by one name",
        "A rule file stands on several (`base: [a, b]`), whose settings, numbers and roles of one "
        "name are one thing. Where they differ, the file says under `with:`, `let:` or `roles:` "
        "which it is.",
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
    "PSG133": CodeInfo(
        "A penalty is not a number",
        "What a rule adds to the loss is one number for each site: reduce it, by `norm`, `sum` or "
        "`mean` over all dimensions.",
    ),
    "PSG134": CodeInfo(
        "No site has such a size",
        "`rules check --size in=64` (in Python, check_rules(rules, sizes={'in': 64})) says how "
        "large the sites are that rules are tried on: whole numbers for sizes that a kind of site "
        "has, as `peftsurgery rules words` lists them.",
        USAGE,
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
}
