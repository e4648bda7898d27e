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
    name, options = _KINDS[kind]
    values = {ours: getattr(scheduler, theirs) for ours, theirs in options.items()}
    base = scheduler.optimizer.param_groups[0].get("initial_lr", scheduler.optimizer.param_groups[0]["lr"])
    if kind == "MultiStepLR":
        values["milestones"] = sorted(scheduler.milestones.elements())
    elif kind == "CosineAnnealingLR":
        values["min_factor"] = scheduler.eta_min / base
    elif kind == "OneCycleLR":
        group = scheduler.optimizer.param_groups[0]
        phases = scheduler._schedule_phases
        if len(phases) != 2:
            raise OptimizerError("OneCycleLR(three_phase=True) is not supported at the site; leave three_phase out.")
        values["rise"] = (phases[0]["end_step"] + 1) / scheduler.total_steps
        values["initial_divisor"] = group["max_lr"] / group["initial_lr"]
        values["final_divisor"] = group["initial_lr"] / group["min_lr"]
        anneal = getattr(scheduler, "_anneal_func_type", None) or scheduler.anneal_func.__name__
        values["linear"] = "linear" in anneal
    elif kind == "ReduceLROnPlateau":
        if scheduler.threshold_mode != "rel":
            raise OptimizerError("ReduceLROnPlateau(threshold_mode='abs') is not supported at the site; use a relative threshold.")
        values["min_factor"] = min(scheduler.min_lrs) / base
        values["direction"] = scheduler.mode
    result = {name: values}
    if kind != "ReduceLROnPlateau":
        result["unit"] = unit or ("step" if kind == "OneCycleLR" else "epoch")
    return result


def peak_rate(scheduler):
    """The optimizer's rate that the schedule's factors are of; a scheduler changes the one in the optimizer."""
    group = scheduler.optimizer.param_groups[0]
    return group["max_lr"] if type(scheduler).__name__ == "OneCycleLR" else group.get("initial_lr", group["lr"])
