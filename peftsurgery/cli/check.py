"""``peftsurgery check``: what a program would refuse, ignore or misread of an adapter."""

from __future__ import annotations

import click

from peftsurgery.cli.kit import json_option, print_result


@click.command()
@click.argument("adapter", metavar="ADAPTER")
@click.option("--for", "program", metavar="PROGRAM", required=True, help="peft, vllm or llama.cpp.")
@click.option("--base", metavar="DIR", help="The base, which is asked for the adapter's modules.")
@json_option
def check(adapter: str, program: str, base: str | None, as_json: bool) -> int:
    """Tell what PROGRAM would refuse, ignore or misread of ADAPTER, a directory of peft's.

    Exit code 1 if there is anything. `export --to` writes what the program reads right.
    """
    from peftsurgery.checkpoint.program_check import check_for

    found = check_for(adapter, program, base)
    print_result({"schema": "peftsurgery.check/1", **found.to_dict()}, found, as_json)
    return 1 if found.findings else 0
