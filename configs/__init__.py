"""Experiments: each file is a function `get_config(preset)` whose docstring has the command and what to expect."""
