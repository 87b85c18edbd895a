"""`genco bench regret`: how well policies learn, over simulated worlds with paired seeds.

`worlds` says what the worlds are, `traffic` draws what happens whatever the policy does, `labels` tells clicks as the
joiner would, `run` plays one policy, `pool` many over the cores, `report` and `plot` sum up. `policies` holds ours and
the peers.
"""
