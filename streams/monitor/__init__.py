"""The monitor: what went wrong, the world or us, told from matured examples and the registry.

`reading` makes numbers of examples, `maturing` holds them until their labels are final, `evidence`, `detectors` and
`distributions` test them, `pulse` keeps all of that, `diagnosis` names one cause and `episodes` makes alerts of it.
All of it is pure: the time is an argument, and predictions come from models that are handed in. `agent` is the process.
"""
