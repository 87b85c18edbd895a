"""Random events that are valid and difficult."""

from hypothesis import strategies as st

from streams.contracts.events import Click, Impression

text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)
# What makes counting colons and keys difficult.
awkward = st.sampled_from(['":', "a:b", '\\":', "\\", '"', "\n", "\x00", "é", "😀", " ", '{"a":1}', "\u2028", "\ufeff"])
identifiers = st.one_of(text, awkward, st.builds(str.__add__, awkward, text))
context_values = st.one_of(
    st.text(st.characters(exclude_categories=("Cs",)), max_size=20),
    awkward,
    st.integers(-(2**53), 2**53),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
)
timestamps = st.integers(0, 4_102_444_799_999)
counters = st.integers(0, 2**53 - 1)
probabilities = st.floats(0.0, 1.0, exclude_min=True)


@st.composite
def impressions(draw: st.DrawFn) -> Impression:
    slots = draw(st.lists(identifiers, min_size=1, max_size=4, unique=True))
    candidates = {slot: draw(st.lists(identifiers, min_size=1, max_size=4)) for slot in slots}
    slot_propensities = {slot: draw(st.floats(1e-6, 1.0)) for slot in slots}
    propensity = 1.0
    for value in slot_propensities.values():
        propensity *= value
    return Impression(
        schema_version=1,
        decision_id=draw(identifiers),
        occurred_at_ms=draw(timestamps),
        product_id=draw(identifiers),
        context=draw(st.dictionaries(identifiers, context_values, max_size=4)),
        candidates=candidates,
        creative={slot: draw(st.sampled_from(elements)) for slot, elements in candidates.items()},
        slot_propensities=slot_propensities,
        propensity=propensity,
        model_id=draw(identifiers),
        epoch=draw(counters),
        policy_version=draw(counters),
        source=draw(st.sampled_from(["policy", "last_good", "uniform"])),
        holdout=draw(st.booleans()),
        seed=draw(st.integers(0, 2**63 - 1)),
        survival_probability=draw(probabilities),
    )


clicks = st.builds(
    Click,
    schema_version=st.just(1),
    decision_id=identifiers,
    occurred_at_ms=timestamps,
    reward=st.floats(0.0, 1e9),
)
