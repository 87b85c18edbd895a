"""`genco bench search`: what a search of creatives gains for its evaluations, with and without the generator.

`scene` makes a world with large cards and a learner that has learned from its traffic, `methods` are the searches,
`curve` measures them, `plot` draws what was measured.
"""
