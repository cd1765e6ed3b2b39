"""What an optimizer saves is whole, what it has is not; what was made up is gone after loading."""

import copy

import pytest
import torch

from gtcompile import train_only
from gtcompile.state.optimizer_state import complete_when_saved, forget_state_of_others, parameters_with_state
from tests.support.models import Regression, make_batch, step

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}
TRAINED = ["layers.1.*", "layers.3.bias"]


def partly_trained(kind):
    torch.manual_seed(0)
    model = Regression()
    optimizer = OPTIMIZERS[kind](model.parameters())
    train_only(model, TRAINED)
    step(model, make_batch())
    optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_saved_state_is_whole_and_the_optimizers_own_stays_partial(kind):
    model, optimizer = partly_trained(kind)
    own = parameters_with_state(model, optimizer)
    assert set(own) == train_only(model, TRAINED)
    partial = copy.deepcopy(optimizer.state_dict()["state"])
    handle = complete_when_saved(optimizer)
    saved = optimizer.state_dict()["state"]
    assert len(saved) == len(list(model.parameters()))
    assert {frozenset(state) for state in saved.values()} == {frozenset(s) for s in partial.values()}
    torch.testing.assert_close({index: saved[index] for index in partial}, partial, rtol=0, atol=0)
    assert parameters_with_state(model, optimizer) == own
    handle.remove()
    assert optimizer.state_dict()["state"].keys() == partial.keys()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_was_made_up_is_forgotten(kind):
    model, optimizer = partly_trained(kind)
    complete_when_saved(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    again = Regression()
    again.load_state_dict(model.state_dict())
    resumed = OPTIMIZERS[kind](again.parameters())
    resumed.load_state_dict(saved)
    forget_state_of_others(again, resumed, parameters_with_state(model, optimizer))
    for trained, of in ((model, optimizer), (again, resumed)):
        train_only(trained, None)
        trained.zero_grad()
        step(trained, make_batch(1))
        of.step()
    torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_what_the_user_froze_gets_no_state():
    model = Regression()
    model.layers[3].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, make_batch())
    optimizer.step()
    complete_when_saved(optimizer)
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters())) - 1
