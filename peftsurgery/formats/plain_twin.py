"""A directory with the names and shapes of a quantised base as a plain one, and few of its values.

A model's graph is captured without weights, so this is nearly all that a plan needs of the base.
Values are those of which the adapter may hold a copy, by its shape, which is held to the base's.
"""

from __future__ import annotations

import json
from pathlib import Path

from peftsurgery.checkpoint.codecs.coded import BESIDE, CONFIG, PlainView
from peftsurgery.checkpoint.tensor_bytes import chunks
from peftsurgery.model_files import INDEX, other_files
from peftsurgery.tensor_file import header_of, laid_out, read_header


def plain_twin(view: PlainView, folder: Path, adapter: Path) -> Path:
    """Write such a directory at ``folder``: its files have holes where values would be.

    Plain tensors that have the shape of one in the directory ``adapter`` are copied. PSG505 if that
    holds files that are damaged.
    """
    files = (read_header(path, "PSG505") for path in sorted(adapter.glob("*.safetensors")))
    shapes = {tensor.shape for file in files for tensor in file.tensors.values()}
    folder.mkdir()
    for name, path in other_files(view.folder).items():
        if name not in {CONFIG, *BESIDE}:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path.absolute())
    (folder / CONFIG).write_bytes(view.config())
    where = dict[str, str]()
    for file in view.files.files:
        tensors = laid_out((each.name, each.dtype, each.shape) for each in view.of(file))
        header, size = header_of(tensors, file.metadata), sum(each.size for each in tensors)
        with (folder / file.path.name).open("wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + size)
            for tensor in tensors:
                if tensor.shape in shapes and tensor.name not in view.coded:
                    stream.seek(len(header) + tensor.start)
                    stream.writelines(chunks(*view.held[tensor.name]))
        where |= {each.name: file.path.name for each in tensors}
    if view.files.index is not None:
        (folder / INDEX).write_text(json.dumps({**view.files.index, "weight_map": where}))
    return folder
