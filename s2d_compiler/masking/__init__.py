"""The masked form: the whole network once, its weights masked, for training every plan.

``s2d_compiler.masking.model`` holds ``masked`` and ``MaskedModel``; the rest is what the pass
``mask-channels`` builds with.
"""
