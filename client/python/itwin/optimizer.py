"""torch.optim.Optimizer -> name and options, as the spec writes them."""

from itwin.errors import OptimizerError, first_of

# Ours: (theirs -> how it is written). What is not here must have its neutral value.
_SUPPORTED = {
    "SGD": ("sgd", ("lr", "momentum", "weight_decay", "nesterov", "dampening")),
    "Adam": ("adam", ("lr", "betas", "eps", "weight_decay")),
    "AdamW": ("adamw", ("lr", "betas", "eps", "weight_decay")),
    "RMSprop": ("rmsprop", ("lr", "alpha", "eps", "weight_decay", "momentum")),
    "Adagrad": ("adagrad", ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")),
    "LBFGS": ("lbfgs", ("lr", "max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn")),
}
_RENAMED = {"initial_accumulator_value": "initial_accumulator", "history_size": "history"}
_OF_GROUPS = ("lr", "weight_decay")  # what may differ between groups
_NEUTRAL = {"amsgrad": False, "maximize": False, "centered": False, "differentiable": False}
_EITHER = ("params", "foreach", "capturable", "fused", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum")  # how it
# computes, or what a scheduler has noted


def document(optimizer, module=None):
    """{"adam": {"lr": …}} for a torch optimizer, a dict or a name. `module`: the nn.Module that it should belong to."""
    if isinstance(optimizer, str):
        return {optimizer.strip().lower(): {}}
    if isinstance(optimizer, dict):
        return optimizer
    if not hasattr(optimizer, "param_groups"):
        raise OptimizerError(f"optimizer={type(optimizer).__name__} is none: pass a torch.optim.Optimizer, a name such as "
                             "'adam', or {'adam': {'lr': 1e-3}}.")
    kind = type(optimizer)
    if kind.__name__ not in _SUPPORTED or not kind.__module__.startswith("torch.optim"):
        raise OptimizerError(f"the optimizer {kind.__name__} cannot run at the site. Known: "
                             f"{', '.join('torch.optim.' + name for name in _SUPPORTED)}.")
    name, options = _SUPPORTED[kind.__name__]
    groups = [{k: v for k, v in group.items() if k not in _EITHER} for group in optimizer.param_groups]
    for number, group in enumerate(groups[1:], 1):
        different = [k for k in group if group[k] != groups[0].get(k) and k not in _OF_GROUPS]
        if different:
            raise OptimizerError(
                f"parameter group {number} of {kind.__name__} has another {different[0]} ({group[different[0]]!r}) than group 0 "
                f"({groups[0].get(different[0])!r}). Only {' and '.join(_OF_GROUPS)} may differ between groups.")
    group = groups[0]
    for key, neutral in _NEUTRAL.items():
        if group.get(key, neutral) not in (neutral, None):
            raise OptimizerError(f"{kind.__name__}({key}={group[key]!r}) is not supported at the site; leave {key} out.")
    if module is not None:
        _check_parameters(optimizer, kind.__name__, module)
    values = {}
    for option in options:
        if option == "betas":
            values["beta1"], values["beta2"] = (float(beta) for beta in group["betas"])
        elif option == "line_search_fn":
            values["strong_wolfe"] = group[option] == "strong_wolfe"
        else:
            value = group[option]
            values[_RENAMED.get(option, option)] = value if isinstance(value, (bool, int)) else float(value)
    return {name: values}


def groups(optimizer, module, rates=None):
    """The spec's `parameter_groups` of a torch optimizer with several: by name, with what differs from group 0. Frozen parameters
    are in none. `rates`: the groups' rates where a scheduler has changed those in the optimizer."""
    if module is None or not hasattr(optimizer, "param_groups") or len(optimizer.param_groups) < 2:
        return []
    names = {id(parameter): name for name, parameter in module.named_parameters() if parameter.requires_grad}  # what the job trains
    first, result = optimizer.param_groups[0], []
    for number, group in enumerate(optimizer.param_groups[1:], 1):
        values = {}
        for key in _OF_GROUPS:
            value, base = (group.get(key), first.get(key))
            if key == "lr" and rates:
                value, base = rates[number], rates[0]
            if value != base:
                values[key] = float(value)
        match = [names[id(p)] for p in group["params"] if id(p) in names]
        if values and match:
            result.append({"match": match, **values})
    return result


# What PyTorch keeps per parameter, and whether it counts steps there.
_STATE = {
    "SGD": (lambda group: ["momentum_buffer"] if group["momentum"] else [], False),
    "Adam": (lambda group: ["exp_avg", "exp_avg_sq"], True),
    "AdamW": (lambda group: ["exp_avg", "exp_avg_sq"], True),
    "RMSprop": (lambda group: ["square_avg"] + ["momentum_buffer"] * bool(group["momentum"]), True),
    "Adagrad": (lambda group: ["sum"], True),
}


def trained_state(optimizer, module, tensors, phase=None):
    """What optimizer.load_state_dict() takes, of `tensors` by "<state>/<parameter>" and "step" ("step/<phase>" of a job with several
    optimizers), as a job leaves them. Rates and the like stay the optimizer's own. Raises OptimizerError that lists what does not
    fit; changes nothing."""
    kind = type(optimizer).__name__
    if kind not in _STATE:
        raise OptimizerError(f"the state of {kind} cannot be put into a torch optimizer. Possible: {', '.join(_STATE)}.")
    names_of, counts_steps = _STATE[kind]
    step = "step" if phase is None else f"step/{phase}"
    if step not in tensors:
        phases = ", ".join(sorted(name[len("step/"):] for name in tensors if name.startswith("step/")))
        raise OptimizerError(f"the job has several optimizers: pass optimizer={{name: optimizer}} with names of {phases}." if phases
                             else f"the job has one optimizer and none named {phase!r}: pass the optimizer itself.")
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    packed = optimizer.state_dict()
    state, problems = {}, []
    for group, numbers in zip(optimizer.param_groups, (group["params"] for group in packed["param_groups"])):
        for parameter, number in zip(group["params"], numbers):
            if id(parameter) not in names:
                problems.append(f"a parameter of shape {tuple(parameter.shape)} is not the module's")
                continue
            if not parameter.requires_grad:
                continue
            values = {"step": int(tensors[step])} if counts_steps else {}
            for name in names_of(group):
                of_parameter = f"{name}/{names[id(parameter)]}"
                if of_parameter not in tensors:
                    problems.append(f"{of_parameter} is missing in the result")
                elif tensors[of_parameter].shape != parameter.shape:
                    problems.append(f"{of_parameter} is {tuple(tensors[of_parameter].shape)} in the result, "
                                    f"{tuple(parameter.shape)} in the module")
                else:
                    values[name] = tensors[of_parameter].clone()
            if values:
                state[number] = values
    if problems:
        raise OptimizerError(f"the state does not fit {kind}: {first_of(problems)}. Nothing was changed.")
    return {"state": state, "param_groups": packed["param_groups"]}


def _check_parameters(optimizer, kind, module):
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    left_out = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in owned]
    if len(left_out) == len(trainable):
        raise OptimizerError(f"{kind} holds none of the module's parameters: it was made for another module (or a copy). Make "
                             f"it again with torch.optim.{kind}(module.parameters(), …).")
    if left_out:
        raise OptimizerError(
            f"{kind} leaves out {len(left_out)} trainable parameters of the module (first: {left_out[0]}), but the job would "
            "train all. Give it module.parameters(), or freeze the others with requires_grad_(False).")
