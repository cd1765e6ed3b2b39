"""The state of another model is refused with the names that differ."""

import pytest
from torch import nn

from gtcompile.state.same_model import check_same_model, shapes_of


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (
            nn.Linear(3, 4),
            r"bias was \[4\] when saved and is \[2\] now; weight was \[4, 3\] when saved and is \[2, 2\] now",
        ),
        (nn.Linear(2, 2, bias=False), r"bias was absent when saved and is \[2\] now"),
        (
            nn.PReLU(),
            r"bias was absent when saved and is \[2\] now; weight was \[1\] when saved and is \[2, 2\] now",
        ),
    ],
)
def test_another_model_is_refused_with_the_tensors_that_differ(other, difference):
    saved, present = shapes_of(other.state_dict()), shapes_of(nn.Linear(2, 2).state_dict())
    with pytest.raises(ValueError, match=rf"x\.pt is a checkpoint of another model: {difference}"):
        check_same_model(saved, present, "x.pt is a checkpoint")


def test_a_value_that_is_no_tensor_is_compared_too():
    with pytest.raises(ValueError, match=r"a was no tensor when saved and is \[2\] now"):
        check_same_model({"a": None}, {"a": [2]}, "the state")
    check_same_model({"a": None, "b": (2,)}, {"a": None, "b": [2]}, "the state")
