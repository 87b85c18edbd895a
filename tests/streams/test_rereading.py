"""A new owner knows how much of the last window it still has to read again."""

from streams.rereading import Progress, Rereading


def test_rereading_of_nothing_is_complete() -> None:
    assert Rereading(5.0).progress(7.5) == Progress(0, 0, 2.5, 0.0)
    assert Rereading(5.0).progress(7.5).is_complete


def test_rereading_counts_the_records_of_all_partitions() -> None:
    rereading = Rereading(100.0)
    rereading.begin("a", 10, 30)
    rereading.begin("b", 0, 20)
    assert rereading.progress(101.0) == Progress(0, 40, 1.0, None)
    rereading.read("a", 20)
    assert rereading.progress(102.0) == Progress(10, 40, 2.0, 6.0)
    rereading.read("b", 20)
    assert not rereading.progress(103.0).is_complete
    rereading.read("a", 30)
    assert rereading.progress(104.0) == Progress(40, 40, 4.0, 0.0)
    assert rereading.progress(104.0).is_complete


def test_records_that_came_after_the_start_are_not_waited_for() -> None:
    rereading = Rereading(0.0)
    rereading.begin("a", 10, 12)
    rereading.read("a", 500)
    assert rereading.progress(1.0) == Progress(2, 2, 1.0, 0.0)


def test_second_beginning_of_a_partition_changes_nothing() -> None:
    rereading = Rereading(0.0)
    rereading.begin("a", 10, 20)
    rereading.read("a", 15)
    rereading.begin("a", 15, 900)
    assert rereading.progress(1.0).num_read == 5
    assert rereading.progress(1.0).num_records == 10


def test_partition_that_ends_before_its_beginning_has_nothing_to_read() -> None:
    rereading = Rereading(0.0)
    rereading.begin("a", 10, 5)
    assert rereading.progress(1.0).is_complete


def test_reading_of_a_partition_that_was_not_begun_is_ignored() -> None:
    rereading = Rereading(0.0)
    rereading.read("a", 7)
    assert rereading.progress(1.0).num_records == 0
