"""Plans of folds made by a process of its own, so that the one that folds imports no torch.

    python -c "from peftsurgery.formats.plan_process import main; main()" ADAPTER BASE ALLOW ROOM

writes ``plan.json`` and the adapter's tensors to the directory ROOM, or ``error.json``. An empty
BASE is the one that the adapter names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from peftsurgery.checkpoint.plan import Planned
from peftsurgery.checkpoint.plan_file import plan_as_json, plan_from_json
from peftsurgery.errors import SurgeryError
from peftsurgery.tensor_file import read_header

PLAN, ERROR, WHERE = "plan.json", "error.json", "where.json"


def planned_apart(adapter: Path, base: str | None, allow_other_base: bool, room: Path) -> Planned:
    """Have a short process capture the base and plan the fold; its files are put into ``room``.

    Raises what :func:`captured_plan` raises, and PSG421 if the process does not end.
    """
    command = [sys.executable, "-c", "from peftsurgery.formats.plan_process import main; main()"]
    asked = [str(adapter), base or "", "yes" if allow_other_base else "", str(room)]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([*command, *asked], capture_output=True, text=True, check=False, env=here)
    if (room / ERROR).is_file():
        raise SurgeryError(**json.loads((room / ERROR).read_bytes()))
    if done.returncode or not (room / WHERE).is_file():
        said = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        raise SurgeryError("PSG421", f"the plan of the fold could not be made: {said[0]}")
    where = json.loads((room / WHERE).read_bytes())
    plan = plan_from_json((room / PLAN).read_bytes())
    return Planned(plan, Path(where["base"]), read_header(Path(where["adapter"])))


def main() -> None:
    """Plan a fold as the arguments say."""
    from peftsurgery.formats.captured_plan import captured_plan

    adapter, base, allow_other_base, folder = sys.argv[1:]
    room = Path(folder)
    try:
        planned = captured_plan(Path(adapter), base or None, bool(allow_other_base), room)
    except SurgeryError as error:
        said = {name: getattr(error, name) for name in ("code", "message", "hint", "where")}
        (room / ERROR).write_text(json.dumps(said), encoding="utf-8")
        return
    (room / PLAN).write_bytes(plan_as_json(planned.plan))
    where = {"base": str(planned.base), "adapter": str(planned.adapter.path)}
    (room / WHERE).write_text(json.dumps(where), encoding="utf-8")
