"""What the commands do, a module each.

- ``options``: options that several commands share, and what a command returns.
- ``compiling``, ``inspecting``, ``showing``, ``verifying``, ``evaluating``: the commands.
- ``data_options``, ``policy_options``: options about labelled images, and when to leave.
- ``progress``: a bar while work is long.
- ``running``: runs one: prints what it found, and turns errors into sentences and exit statuses.
"""
