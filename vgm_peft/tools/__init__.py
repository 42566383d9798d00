"""The room of tools on delta files: to look into, check, combine, shrink, compare, and put into or out of checkpoints.

One file a tool. Each works on one module after another: of a low-rank change the two factors are all that is ever multiplied,
and of a base only the tensor in hand is read (`checkpoint`), never a whole network. What is written goes through
`formats.write` or the same care: aside, checked, then renamed.
"""
