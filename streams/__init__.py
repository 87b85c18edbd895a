"""Kafka and Faust: contracts, the join of impressions and clicks, replay. No torch."""
