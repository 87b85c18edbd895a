"""`genco bench learn`: how fast the learner learns, in its parts, and Vowpal Wabbit's slates beside it.

Everything runs on one core, in processes of their own, from records of `examples` that are in memory already: Kafka and
Redis are left out.
"""
