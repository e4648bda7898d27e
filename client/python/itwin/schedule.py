"""torch.optim.lr_scheduler -> the spec's `schedule`."""

from itwin.errors import OptimizerError

# Ours: theirs -> (kind, {our option: (their attribute, or None)}).
_KINDS = {
    "ConstantLR": None, "StepLR": ("step", {"every": "step_size", "gamma": "gamma"}),
    "MultiStepLR": ("multi_step", {"gamma": "gamma"}), "ExponentialLR": ("exponential", {"gamma": "gamma"}),
    "CosineAnnealingLR": ("cosine", {"length": "T_max"}),
    "LinearLR": ("linear", {"start": "start_factor", "end": "end_factor", "length": "total_iters"}),
    "PolynomialLR": ("polynomial", {"length": "total_iters", "power": "power"}),
    "OneCycleLR": ("one_cycle", {"length": "total_steps"}),
    "ReduceLROnPlateau": ("plateau", {"factor": "factor", "patience": "patience", "threshold": "threshold", "cooldown": "cooldown"}),
}


def document(scheduler, unit=None):
    """{"cosine": {"length": 40}, "unit": "epoch"} for a torch scheduler; a dict or a name as it is. `unit`: what the scheduler's
    numbers count; default: epochs, as most notebooks call step() once per epoch, and steps for OneCycleLR."""
    if isinstance(scheduler, str):
        return {scheduler.strip().lower(): {}}
    if isinstance(scheduler, dict):
        return scheduler
    kind = type(scheduler).__name__
    if not type(scheduler).__module__.startswith("torch.optim") or not _KINDS.get(kind):
        known = ", ".join(name for name, value in _KINDS.items() if value)
        raise OptimizerError(f"the scheduler {kind} cannot run at the site. Known: {known}; the spec's own are in docs/training.md.")
    if scheduler.last_epoch > 0:
        raise OptimizerError(f"the scheduler {kind} has taken {scheduler.last_epoch} steps already, but a job follows its schedule from "
                             "the start: make the scheduler afresh, with last_epoch=-1, for what is left.")
    name, options = _KINDS[kind]
    values = {ours: getattr(scheduler, theirs) for ours, theirs in options.items()}
    bases = rates(scheduler)
    if kind == "MultiStepLR":
        values["milestones"] = sorted(scheduler.milestones.elements())
    elif kind == "CosineAnnealingLR":
        values["min_factor"] = _share("eta_min", [scheduler.eta_min] * len(bases), bases)
    elif kind == "OneCycleLR":
        group = scheduler.optimizer.param_groups[0]
        phases = scheduler._schedule_phases
        if len(phases) != 2:
            raise OptimizerError("OneCycleLR(three_phase=True) is not supported at the site; leave three_phase out.")
        if scheduler.cycle_momentum:
            raise OptimizerError("OneCycleLR(cycle_momentum=True), the default, is not supported at the site, where the momentum (or "
                                 "beta1) stays as it is: pass cycle_momentum=False, and make the optimizer afresh, as the scheduler has "
                                 "changed the momentum in it.")
        values["rise"] = (phases[0]["end_step"] + 1) / scheduler.total_steps
        values["initial_divisor"] = group["max_lr"] / group["initial_lr"]
        values["final_divisor"] = group["initial_lr"] / group["min_lr"]
        anneal = getattr(scheduler, "_anneal_func_type", None) or scheduler.anneal_func.__name__
        values["linear"] = "linear" in anneal
    elif kind == "ReduceLROnPlateau":
        if scheduler.threshold_mode != "rel":
            raise OptimizerError("ReduceLROnPlateau(threshold_mode='abs') is not supported at the site; use a relative threshold.")
        values["min_factor"] = _share("min_lr", scheduler.min_lrs, bases)
        values["direction"] = scheduler.mode
    result = {name: values}
    if kind != "ReduceLROnPlateau":
        result["unit"] = unit or ("step" if kind == "OneCycleLR" else "epoch")
    return result


def rates(scheduler):
    """The rate of each group that the schedule's factors are of; a scheduler changes the one in the optimizer."""
    peak = "max_lr" if type(scheduler).__name__ == "OneCycleLR" else "initial_lr"
    return [float(group.get(peak, group["lr"])) for group in scheduler.optimizer.param_groups]


def _share(what, lowest, bases):
    """The lowest rates as one factor of the groups' rates."""
    factors = [low / base for low, base in zip(lowest, bases)]
    if max(factors) - min(factors) > 1e-9:
        raise OptimizerError(f"{what} is the same rate for groups of different rates, but at the site it is one share of each group's "
                             f"rate ({', '.join(f'{factor:g}' for factor in factors)}): use {what}=0, or groups of one rate.")
    return factors[0]
