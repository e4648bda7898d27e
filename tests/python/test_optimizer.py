import pytest
import torch
from torch.optim import lr_scheduler

import modules
from itwin import optimizer, schedule, spec
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
    (lambda p: torch.optim.LBFGS(p, 0.5, history_size=7, line_search_fn="strong_wolfe"),
     {"lbfgs": {"lr": 0.5, "max_iter": 20, "max_eval": 25, "tolerance_grad": 1e-7, "tolerance_change": 1e-9, "history": 7,
                "strong_wolfe": True}}),
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


def test_groups_travel_by_name():
    module = net()
    groups = [{"params": module.first.parameters()}, {"params": [*module.norm.parameters(), *module.last.parameters()]}]
    sgd = torch.optim.SGD(groups, 0.1)
    assert optimizer.document(sgd, module)["sgd"]["lr"] == 0.1 and optimizer.groups(sgd, module) == []
    sgd.param_groups[1]["lr"] = 0.5
    assert optimizer.groups(sgd, module) == [
        {"match": ["norm.weight", "norm.bias", "last.weight", "last.bias"], "lr": 0.5}]
    sgd.param_groups[1]["momentum"] = 0.5
    with pytest.raises(OptimizerError, match=r"group 1 of SGD has another momentum \(0.5\) than group 0.*Only lr and weight_decay"):
        optimizer.document(sgd, module)


@pytest.mark.parametrize("make, kind, values, unit", [
    (lambda o: lr_scheduler.StepLR(o, 3, 0.5), "step", {"every": 3, "gamma": 0.5}, "epoch"),
    (lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5), "multi_step", {"milestones": [2, 4], "gamma": 0.5}, "epoch"),
    (lambda o: lr_scheduler.ExponentialLR(o, 0.9), "exponential", {"gamma": 0.9}, "epoch"),
    (lambda o: lr_scheduler.LinearLR(o, 0.5, 1.0, 4), "linear", {"start": 0.5, "end": 1.0, "length": 4}, "epoch"),
    (lambda o: lr_scheduler.ReduceLROnPlateau(o, "max", patience=3), "plateau",
     {"factor": 0.1, "patience": 3, "threshold": 1e-4, "cooldown": 0, "min_factor": 0.0, "direction": "max"}, None),
])
def test_schedulers(make, kind, values, unit):
    document = schedule.document(make(torch.optim.SGD(net().parameters(), 0.1)))
    assert document[kind] == pytest.approx(values) if kind not in ("multi_step", "plateau") else document[kind] == values
    assert document.get("unit") == unit


def test_one_cycle_counts_steps_from_its_peak():
    scheduler = lr_scheduler.OneCycleLR(torch.optim.SGD(net().parameters(), 0.1), 0.4, total_steps=50, pct_start=0.4, div_factor=10,
                                        cycle_momentum=False)
    document = schedule.document(scheduler)
    assert document["unit"] == "step" and schedule.rates(scheduler) == [0.4]
    assert document["one_cycle"] == pytest.approx(
        {"length": 50, "rise": 0.4, "initial_divisor": 10, "final_divisor": 1e4, "linear": False})
    with pytest.raises(OptimizerError, match="CyclicLR cannot run at the site"):
        schedule.document(lr_scheduler.CyclicLR(torch.optim.SGD(net().parameters(), 0.1), 0.1, 0.4))


def two_groups(kind=torch.optim.SGD, **options):
    module = net()
    rest = [*module.norm.parameters(), *module.last.parameters()]
    return module, kind([{"params": module.first.parameters(), "lr": 0.1}, {"params": rest, "lr": 0.2}], **options)


def test_each_group_has_the_peak_of_its_own(tmp_path):
    module, sgd = two_groups(momentum=0.9)
    scheduler = lr_scheduler.OneCycleLR(sgd, [0.4, 0.5], total_steps=50, cycle_momentum=False)
    train = spec.train(str(tmp_path), module, "mse", optimizer=sgd, scheduler=scheduler)
    assert train["optimizer"]["sgd"] == {"lr": 0.4, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False, "dampening": 0.0}
    assert [group["lr"] for group in train["parameter_groups"]] == [0.5]
    module, sgd = two_groups()
    train = spec.train(str(tmp_path), module, "mse", optimizer=sgd, scheduler=lr_scheduler.LinearLR(sgd, 0.1, total_iters=4))
    assert train["optimizer"]["sgd"]["lr"] == 0.1 and [group["lr"] for group in train["parameter_groups"]] == [0.2]


def stepped(scheduler):
    scheduler.optimizer.step()
    scheduler.step()
    return scheduler


@pytest.mark.parametrize("make, message", [
    (lambda o: lr_scheduler.OneCycleLR(o, 0.4, total_steps=50), r"cycle_momentum=True.*pass cycle_momentum=False"),
    (lambda o: stepped(lr_scheduler.StepLR(o, 3)), "has taken 1 steps.*make the scheduler afresh"),
    (lambda o: lr_scheduler.CosineAnnealingLR(o, 40, 0.01), "eta_min.*share of each group's rate.*eta_min=0"),
    (lambda o: lr_scheduler.ReduceLROnPlateau(o, min_lr=0.01), "min_lr.*share of each group's rate"),
])
def test_schedules_that_the_job_would_not_follow(make, message):
    with pytest.raises(OptimizerError, match=message):
        schedule.document(make(two_groups(momentum=0.9)[1]))


def test_a_scheduler_of_another_optimizer(tmp_path):
    module, sgd = two_groups()
    with pytest.raises(OptimizerError, match="scheduler belongs to another optimizer"):
        spec.train(str(tmp_path), module, "mse", optimizer=sgd, scheduler=lr_scheduler.StepLR(two_groups()[1], 3))


def test_frozen_parameters_are_in_no_group():
    module, sgd = two_groups()
    module.norm.requires_grad_(False)
    assert optimizer.groups(sgd, module) == [{"match": ["last.weight", "last.bias"], "lr": 0.2}]
    module.last.requires_grad_(False)
    assert optimizer.groups(sgd, module) == []


@pytest.mark.parametrize("make, message", [
    (lambda p: torch.optim.Adam(p, amsgrad=True), r"amsgrad=True\) is not supported"),
    (lambda p: torch.optim.RMSprop(p, centered=True), "centered=True"),
    (lambda p: torch.optim.SGD(p, 0.1, maximize=True), "maximize=True"),
    (lambda p: torch.optim.Rprop(p), "Rprop cannot run at the site. Known: torch.optim.SGD"),
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
    assert spec.loss_options(torch.nn.CrossEntropyLoss(label_smoothing=0.1)) == {"label_smoothing": 0.1}
    assert spec.loss_options(torch.nn.HuberLoss(), {"delta": 2}) == {"delta": 2}
    with pytest.raises(SpecError, match="ignore_index=3.*training_step"):
        spec.loss_name(torch.nn.CrossEntropyLoss(ignore_index=3))
    with pytest.raises(SpecError, match="weight=.*class_weights"):
        spec.loss_name(torch.nn.CrossEntropyLoss(weight=torch.ones(2)))
    with pytest.raises(SpecError, match="CTCLoss is not known"):
        spec.loss_name(torch.nn.CTCLoss())
