"""The sentence at the end of a fit."""

from mats_lightning.cost import Cost


def test_batches_are_counted_by_whether_they_are_captured() -> None:
    cost = Cost()
    for captured in (False, True, True):
        cost.start(captured)
        cost.end()
    cost.start(True)  # the module ends the epoch: no end of the batch
    assert cost.batches == {False: 1, True: 2}
    assert all(seconds >= 0 for seconds in cost.seconds.values())


def test_the_sentence() -> None:
    cost = Cost(2000, {False: 75, True: 25}, {False: 30.0, True: 20.0})
    assert str(cost) == (
        "2,000 examples captured, in 25 of 100 batches; these took 2.00x the others' time (0.8 s a"
        " batch and 0.4 s, wall clock), which adds 25% to the time of all batches"
    )


def test_without_batches_to_compare_with() -> None:
    assert str(Cost(8, {False: 0, True: 2}, {False: 0.0, True: 1.0})) == (
        "8 examples captured, in 2 of 2 batches; what it took cannot be told, as none was without"
    )
    assert str(Cost(0, {False: 3, True: 0})) == "0 examples captured, in 0 of 3 batches"
    assert str(Cost()) == "0 examples captured, in 0 of 0 batches"
