"""One page about a staged network, for whoever decides whether to deploy it.

- ``page``: ``write_report``: the page, from a network and samples.
- ``samples``: what it is shown: data, or tensors, with or without labels.
- ``observations``: what every exit said of every sample, and where each one left.
- ``findings``: what is worth a second look.
- ``tables``: classes, mistakes, thresholds.
- ``reliability``: how far confidences can be believed.
- ``diagram``: the stages as a drawing; ``figures``: plots; ``gallery``: images.
- ``templates``: the page and its style.
"""

from s2d_compiler.reporting.page import write_report

__all__ = ["write_report"]
