"""What the commands do, a module each.

- ``options``: options that several commands share, and what a command returns.
- ``compiling``, ``inspecting``, ``showing``, ``verifying``: the commands.
- ``data_options``: options about labelled images. ``progress``: a bar while work is long.
- ``running``: runs one: prints what it found, and turns errors into sentences and exit statuses.
"""
