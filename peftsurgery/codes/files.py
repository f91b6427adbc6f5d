"""PSG6xx: what files and places are refused for."""

from peftsurgery.codes.entry import CodeInfo

CODES = {
    "PSG601": CodeInfo(
        "The output exists already",
        "Nothing is overwritten unless `--force` is given, and then only a file or a model's "
        "directory.",
    ),
    "PSG602": CodeInfo(
        "The output is, holds or lies in an input",
        "What is read is never written, whatever `--force` says: the base (also if only the "
        "surgery or the adapter names it, or if it is in the hub's cache), the surgery, the "
        "adapter and the rule files, by whatever path or link. Write somewhere else.",
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
        "surgery.json is missing, is no regular file or no JSON object of a known format, holds a "
        "key twice, lists what no surgery has, or names files outside the directory.",
    ),
    "PSG606": CodeInfo(
        "the surgery's tensors are damaged",
        "adapter.safetensors is missing, truncated or no regular file, or holds values that are "
        "not finite or of a dtype that parameters do not have.",
    ),
    "PSG609": CodeInfo(
        "what was folded into a model cannot be read",
        "peftsurgery.json, beside the weights of a folded model, is no JSON object or lists "
        "nothing. It is what tells a base from one that an adapter is in already.",
    ),
    "PSG607": CodeInfo(
        "there is nothing to fold",
        "A saved surgery has a surgery.json, a peft adapter an adapter_config.json.",
    ),
    "PSG610": CodeInfo(
        "An unfinished output is in the way",
        "OUT.part holds what an earlier run got done, or another process is writing it. `--resume` "
        "goes on with it, if base, adapter and dtype are the same; else remove it. What was begun "
        "in parts goes on with `--part K/N`, each K with the same N, until `--finish` finds all.",
    ),
    "PSG611": CodeInfo(
        "A place elsewhere does not answer",
        "A URL (`s3://`, `hf://`...) was refused, nothing is there, or a request failed as "
        "often as it was made; the message has what its library said. What is done of an output "
        "stays there, with a journal: `--resume` goes on with it, on this machine or another.",
    ),
}
