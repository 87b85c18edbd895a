"""What the processes agree on: events, examples, catalog, snapshots, topics, settings.

A leaf: it imports nothing of the project, does no I/O and holds no torch, faust, kafka or redis. Import the
submodule that you need, so that a server does not load pyarrow for the sake of a topic name:

    events        Impression, Click
    catalog       Element, Product
    codec         batches of events <-> NDJSON bytes of one Kafka record
    decision_ids  route, time-ordered id and MAC
    examples      labeled impressions <-> one Arrow record batch
    features      how a context becomes numbers: the frozen vocabulary of a model
    growing       the vocabulary of a learner: growth, expiry, limits
    encoders      how the content of an element becomes numbers
    snapshot      published weights: safetensors and a signed manifest
    registry      key names of the snapshot registry in Redis
    topics        the topic table
    settings      every setting of every process, prefix GENCO_
"""
