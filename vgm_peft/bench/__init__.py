"""Comparing methods by what they learn: the same subject, every method, several seeds, one table and one picture.

`plan` says which runs there are and how each is configured; `judge` measures a delta with Toybox's oracles; `methods` trains,
judges and keeps one JSON per run; `sheet` draws and tells what is kept. What a step costs is measured in `benchmarks/`.
"""
