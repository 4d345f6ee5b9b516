"""Translation validation: is a staged network what its plan makes of a model?

The model is captured again. Every number that the masked form of docs/semantics.md computes is
written as a *term*: what operator made it from which numbers, down to inputs, constants and named
elements of the parameters. Every number that the stages of a network compute is written in the
same way. Both must agree. Terms are 64-bit hashes under a key drawn anew for every verification,
so that memory is proportional to the network's own; see ``terms``.

Nothing here builds stages, and nothing of what builds them (``passes``, ``staging``, the rules'
lowering) is used here. Shared with the compiler are the capture of the model, the analysis that
says which positions belong together, and for layers with computed weights the slice of their
expression.

- ``terms``: arithmetic on terms.
- ``layers``: what weighted layers and norms do to terms.
- ``operators``: what every other operator does to terms; ``arguments`` and ``subscripts``: what
  it is given, and the letters of contractions.
- ``specification``: the masked form in terms.
- ``network``: a staged network in terms.
- ``runs``: what runs is what the graphs say, for batches of any size, at the cost that is said.
- ``weights``: the numbers themselves, and what was trained since.
- ``verify``: all of it together.
"""

from s2d_compiler.verification.verify import Verification, verify

__all__ = ["Verification", "verify"]
