import pytest
import torch

import modules
from itwin import optimizer, spec
from itwin.errors import OptimizerError, SpecError


def net():
    return modules.Net()


@pytest.mark.parametrize("make, expected", [
    (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
     {"sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "nesterov": True, "dampening": 0.0}}),
    (lambda p: torch.optim.Adam(p, 2e-3, betas=(0.8, 0.99)),
     {"adam": {"lr": 2e-3, "beta1": 0.8, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}}),
    (lambda p: torch.optim.AdamW(p), {"adamw": {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}}),
    (lambda p: torch.optim.RMSprop(p, 1e-2),
     {"rmsprop": {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0}}),
])
def test_options_become_data(make, expected):
    module = net()
    assert optimizer.document(make(module.parameters()), module) == expected


def test_names_and_dicts_pass():
    assert optimizer.document("Adam") == {"adam": {}}
    assert optimizer.document({"sgd": {"lr": 1}}) == {"sgd": {"lr": 1}}


def test_the_learning_rate_of_now_counts():
    adam = torch.optim.Adam(net().parameters(), 1e-3)
    adam.param_groups[0]["lr"] = 5e-4
    assert optimizer.document(adam)["adam"]["lr"] == 5e-4


def test_equal_groups_pass_and_different_ones_are_refused():
    module = net()
    groups = [{"params": module.first.parameters()}, {"params": [*module.norm.parameters(), *module.last.parameters()]}]
    assert optimizer.document(torch.optim.SGD(groups, 0.1), module)["sgd"]["lr"] == 0.1
    groups = [{"params": module.first.parameters()}, {"params": module.last.parameters(), "lr": 0.5}]
    with pytest.raises(OptimizerError, match=r"group 1 of SGD has another lr \(0.5\) than group 0 \(0.1\).*not supported yet"):
        optimizer.document(torch.optim.SGD(groups, 0.1), module)


@pytest.mark.parametrize("make, message", [
    (lambda p: torch.optim.Adam(p, amsgrad=True), r"amsgrad=True\) is not supported"),
    (lambda p: torch.optim.RMSprop(p, centered=True), "centered=True"),
    (lambda p: torch.optim.SGD(p, 0.1, maximize=True), "maximize=True"),
    (lambda p: torch.optim.Adagrad(p), "Adagrad cannot run at the site. Known: torch.optim.SGD"),
    (lambda p: type("Mine", (torch.optim.Adam,), {})(p), "Mine cannot run"),
    (lambda p: 3, "optimizer=int is none"),
])
def test_what_the_site_does_not_have(make, message):
    with pytest.raises(OptimizerError, match=message):
        optimizer.document(make(net().parameters()))


def test_an_optimizer_of_another_module():
    with pytest.raises(OptimizerError, match="made for another module"):
        optimizer.document(torch.optim.Adam(net().parameters()), net())
    module = net()
    with pytest.raises(OptimizerError, match="leaves out 4 trainable parameters.*first.weight"):
        optimizer.document(torch.optim.Adam(module.last.parameters()), module)


def test_loss_names():
    assert spec.loss_name("mse") == "mse" and spec.loss_name(None) == ""
    assert spec.loss_name(torch.nn.CrossEntropyLoss()) == "cross_entropy"
    assert spec.loss_name(torch.nn.functional.l1_loss) == "l1" and spec.loss_name(torch.nn.HuberLoss) == "huber"
    with pytest.raises(SpecError, match="label_smoothing=0.1.*training_step"):
        spec.loss_name(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
    with pytest.raises(SpecError, match="weight="):
        spec.loss_name(torch.nn.CrossEntropyLoss(weight=torch.ones(2)))
    with pytest.raises(SpecError, match="CTCLoss is not known"):
        spec.loss_name(torch.nn.CTCLoss())
