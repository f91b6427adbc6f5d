"""Building of wheels: what is written in C is compiled, where there is a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "peftsurgery/checkpoint/rounding.c"
LIBRARY = "librounding.so"  # not as a module is called: Python would import it
FLAGS = ("-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-trapping-math", "-fPIC", "-shared")


class CustomBuildHook(BuildHookInterface):
    """Puts a library beside the source in C; without a compiler there is none, and all works."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name the wheel after the machine that it is for."""
        source = Path(self.root, SOURCE)
        library = source.with_name(LIBRARY)
        library.unlink(missing_ok=True)
        command = [os.environ.get("CC", "cc"), *FLAGS, "-o", str(library), str(source)]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{SOURCE} is not compiled, folds will be slower: {error}", file=sys.stderr)
            return
        build_data["artifacts"].append(library.relative_to(self.root).as_posix())
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False
