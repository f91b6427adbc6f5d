"""The catalogue of error codes: what each means and what to do, a file for each hundred."""

from collections.abc import Mapping

from peftsurgery.codes import capture, commands, files, folding, formats, language, surgery
from peftsurgery.codes.entry import NO_MATCH, UNVERIFIED, USAGE, CodeInfo

__all__ = ["CODES", "NO_MATCH", "UNVERIFIED", "USAGE", "CodeInfo"]

CODES: Mapping[str, CodeInfo] = {
    code: info
    for room in (language, capture, surgery, folding, formats, files, commands)
    for code, info in room.CODES.items()
}
