"""Look into delta files, write them for other tools, merge, shrink and compare them, put them into bases and take them out.

vgm-delta inspect me.safetensors
vgm-delta merge me.safetensors:0.8 toon.safetensors:0.5 -o both.safetensors
vgm-delta export me.safetensors --for comfyui -o me-comfyui.safetensors
vgm-delta count --base-config sdxl --delta krona --set a1=4 --set a2=64
"""

import argparse

from vgm_peft.cli import Parser
from vgm_peft.cli.verbs import bake, convert, difference, export, extract, inspect, merge, resize, verify

TOOLS = (inspect, export, verify, convert, resize, merge, extract, bake, difference)


def add_flags(parser: Parser) -> None:
    """Declare the verbs."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for tool in TOOLS:
        tool.add_verb(verbs)
    about = "Count what a method trains on a published base, without loading it."
    count = verbs.add_parser("count", help="count what a method would train", description=about)
    count.add_argument("--base-config", metavar="B", default="sd15", help="sd15 (the default), sdxl or dit-xl-2")
    count.add_argument("--delta", metavar="NAME,..", default="all", help="one or more methods (default: all)")
    count.add_argument("--sites", metavar="S,..", default="", help="presets or patterns (default: the method's own)")
    count.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="an option of the method; repeatable")
    count.add_argument("--json", action="store_true", help="print it as JSON")


def run(args: argparse.Namespace) -> int:
    """Count, or hand on to the tool."""
    if args.verb == "count":
        from vgm_peft.cli.count import run

        return run(args)
    return args.run(args)
