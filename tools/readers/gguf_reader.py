"""What the gguf package reads of an adapter, as JSON: ``gguf_reader.py ADAPTER.gguf``."""

import json
import sys

import gguf

reader = gguf.GGUFReader(sys.argv[1])
keys = {name: field.contents() for name, field in reader.fields.items() if "." in name}
tensors = {tensor.name: tensor.data.shape for tensor in reader.tensors}
print(json.dumps({"keys": keys, "tensors": tensors}))
