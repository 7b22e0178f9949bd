from __future__ import annotations

import numpy as np
import pytest

from hstu.data import leave_one_out


def test_last_event_tests_and_last_but_one_validates() -> None:
    lengths = np.array([3, 10, 4])
    splits = leave_one_out(lengths)
    assert list(splits) == ["train", "valid", "test"]
    np.testing.assert_array_equal(splits["train"].stop, [1, 8, 2])
    np.testing.assert_array_equal(splits["valid"].stop, [2, 9, 3])
    np.testing.assert_array_equal(splits["test"].stop, lengths)
    for name, split in splits.items():
        assert split.name == name and len(split) == 3
        np.testing.assert_array_equal(split.users, [0, 1, 2])


def test_users_with_too_few_events_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 of 3 users .* fewer than 3 .*row 1 has 2.*--min_user_events 3"):
        leave_one_out(np.array([3, 2, 1]))
