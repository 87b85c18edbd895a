"""What `genco learn` shows on /metrics; the help texts define each number."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

trained = Counter("genco_train_examples_total", "Examples learned")
skipped = Counter("genco_train_examples_skipped_total", "Examples not learned", ["reason"])
quarantined = Counter("genco_train_quarantined_updates_total", "Updates left out because no model could follow them")
jittered = Counter("genco_train_jittered_total", "Factorizations that needed jitter or double precision")
step = Histogram("genco_train_step_duration_seconds", "One update, from examples to a publishable snapshot")
update_examples = Histogram(
    "genco_train_update_examples",
    "Examples in an update; more when the learner is behind, up to GENCO_UPDATE_MAX_EXAMPLES and one record",
    buckets=(1, 10, 100, 300, 1_000, 2_000, 5_000, 10_000, 30_000, 100_000),
)

backlog = Gauge("genco_train_backlog_examples", "Examples in memory that wait for an update")
to_repeat = Gauge("genco_train_updates_to_repeat", "Recorded updates that are to be repeated after a start")
paused = Gauge("genco_train_reading_paused", "1 while reading waits because the learner is behind")
delay = Gauge(
    "genco_train_delay_seconds", "Age of the newest update's newest impression beyond the label wait, when learned"
)
frozen = Gauge("genco_learning_frozen", "1 while learning waits for an operator or an alert to end")
lost = Counter("genco_events_lost_total", "Records that retention removed before they were learned", ["reason"])

# Progressive validation: each example is predicted before it is learned.
validated = {
    "ctr": Gauge("genco_click_rate_ratio", "Clicks over impressions of the newest examples"),
    "log_loss": Gauge("genco_log_loss", "Mean log loss of the newest examples, each predicted before it was learned"),
    "normalized_entropy": Gauge(
        "genco_normalized_entropy_ratio", "Log loss over that of the click rate; below 1 is knowledge"
    ),
    "calibration": Gauge("genco_calibration_ratio", "Expected over observed clicks of the newest examples"),
    "late_share": Gauge("genco_late_click_ratio", "Share of the clicks that come after the label wait"),
    "num_coefficients": Gauge("genco_model_coefficients", "Coefficients of the reward model's core"),
    "generator_entropy": Gauge("genco_generator_entropy_nats", "Entropy of the generator on recent impressions"),
    "generator_reward": Gauge("genco_generator_reward_logits", "Reward of the generator's samples, under the model"),
}

published = Counter("genco_publish_total", "Snapshots by what became of them", ["result"])
held = Gauge("genco_publication_held", "1 while an operator's pin or freeze keeps new snapshots from service", ["by"])
lease = Gauge("genco_lease_held", "1 while this process may publish")
checkpointed = Gauge("genco_checkpoint_last_success_timestamp_seconds", "When the last checkpoint was complete")
checkpoint_failures = Counter("genco_checkpoint_failures_total", "Checkpoints that the disk refused")
checkpoint_pause = Histogram("genco_checkpoint_pause_seconds", "How long learning stood still for a checkpoint")
