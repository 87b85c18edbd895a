"""`genco bench decide`: how long a decision takes, in process and over HTTP, and what swaps and outages cost.

`scene` teaches a learner and keeps its snapshots, `in_process` measures the policy alone and `peers` Vowpal Wabbit on
the same requests, `load` is the load generator, and `served` measures a server with its services under that load.
"""
