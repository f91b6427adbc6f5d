"""Files that were right, changed at one place or several: what readers must refuse or read.

A change is one of JSON (another value, a key more or less, something in another's place) or one of
bytes. A folder is copied before it is changed, so each example begins with what is right.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from peftsurgery.errors import SurgeryError

WHOLE = st.sampled_from([0, -1, 1, 2, 7, 2**31, 2**53, 2**63, 2**64, -(2**70)])
ATOMS = (
    st.none()
    | st.booleans()
    | WHOLE
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.sampled_from(
        ["", "\0", "../x", "/etc/passwd", "a/b", "\x1b[2J", "F32", "blake3", "é" * 40]
    )
    | st.text(max_size=6)
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three changes somewhere in it."""
    result = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        place, parent, key = result, None, None
        while isinstance(place, dict | list) and place and draw(st.integers(0, 5)):
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            parent, key = place, draw(st.sampled_from(keys))
            place = parent[key]
        how = draw(st.sampled_from(["value", "value", "delete", "more", "double"]))
        if parent is None or key is None:
            result = result if how != "value" else draw(VALUES)
        elif how == "value":
            parent[key] = draw(VALUES)
        elif how == "delete":
            del parent[key]
        elif how == "more" and isinstance(parent, dict):
            parent[draw(st.text(max_size=5))] = draw(VALUES)
        elif how == "double" and isinstance(parent, dict):
            parent[key] = copy.deepcopy(draw(st.sampled_from(list(parent.values()))))
    return result


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of which a few are others, or some are missing or too many."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(result) - 1, 0)))
        how = draw(st.sampled_from(["set", "cut", "insert", "end"]))
        if how == "set" and result:
            result[place] = draw(st.integers(0, 255))
        elif how == "cut":
            del result[place : place + draw(st.integers(1, 40))]
        elif how == "insert":
            result[place:place] = draw(st.binary(min_size=1, max_size=9))
        else:
            del result[place:]
    return bytes(result)


@st.composite
def changed_header(draw: st.DrawFn, content: bytes) -> bytes:
    """A safetensors file whose header says something else, or that is changed anywhere."""
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(content))
    end = 8 + int.from_bytes(content[:8], "little")
    header = draw(changed_json(json.loads(content[8:end])))
    text = json.dumps(header).encode()
    length = draw(st.sampled_from([len(text)] * 8 + [0, len(text) + 1, 2**40, 2**64 - 1]))
    return length.to_bytes(8, "little") + text + content[end:]


@st.composite
def changed_file(draw: st.DrawFn, file: Path) -> tuple[Path, bytes]:
    """A file, and what it holds instead."""
    content = file.read_bytes()
    if file.suffix == ".safetensors":
        return file, draw(changed_header(content))
    if draw(st.integers(0, 3)) == 0:
        return file, draw(changed_bytes(content))
    return file, json.dumps(draw(changed_json(json.loads(content)))).encode()


@contextmanager
def with_change(folder: Path, file: Path, content: bytes) -> Iterator[Path]:
    """A copy of a folder in which a file holds something else."""
    with tempfile.TemporaryDirectory() as room:
        again = Path(shutil.copytree(folder, Path(room, "folder")))
        (again / file.relative_to(folder)).write_bytes(content)
        yield again


def ended(run: Callable[[], object]) -> str:
    """The code that a run is refused by, or "" if it ends well; anything else is raised."""
    try:
        run()
    except SurgeryError as refused:
        str(refused)
        return refused.code
    return ""
