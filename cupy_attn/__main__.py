"""``python -m cupy_attn``: the command line."""

from .cli import main

main(prog_name="cupy-attn")
