"""Staged networks against what else one could do, on CIFAR-10.

- ``rows``: which networks are trained, and how.
- ``training``: one row, resumable: trained, then recorded on the held-out images.
- ``choosing``: thresholds chosen on one half of the held-out images, measured on the other.
- ``exporting``: a trained row for the folder ``examples``.
- ``page``: the table, the plot and the page.
"""
