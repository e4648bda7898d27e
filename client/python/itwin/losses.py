"""The named losses, as the worker computes them: to try a model before it is handed over and to record the loss it must give."""

import math

from itwin.errors import DataError, SpecError

NAMES = ("mse", "l1", "huber", "cross_entropy", "bce_logits", "nll", "smooth_l1", "quantile", "gaussian_nll", "crps",
         "crps_ensemble", "kl_div", "focal", "dice")
CLASSES = ("cross_entropy", "nll", "focal", "dice")  # the target holds class numbers


def compute(torch, loss, prediction, target, options=None):
    """The mean loss as a scalar. Raises DataError that names the shapes when they do not fit."""
    options = options or {}
    f = torch.nn.functional
    shapes = f"the model's output has shape {tuple(prediction.shape)} and the target {tuple(target.shape)}"
    try:
        if loss in CLASSES and not (loss == "dice" and target.is_floating_point()):
            return _of_classes(torch, f, loss, prediction, target, options, shapes)
        target = target if target.is_floating_point() else target.float()
        if loss in ("quantile", "gaussian_nll", "crps", "crps_ensemble"):
            return _of_parts(torch, loss, prediction, target, options, shapes)
        if target.shape != prediction.shape and target.numel() == prediction.numel() and 1 in (target.dim(), prediction.dim()):
            target = target.reshape(prediction.shape)  # [samples] and [samples, 1] are the same thing
        if target.shape != prediction.shape:
            raise DataError(f"loss '{loss}' needs equal shapes; {shapes}.")
        if loss == "mse":
            return f.mse_loss(prediction, target)
        if loss == "l1":
            return f.l1_loss(prediction, target)
        if loss == "huber":
            return f.huber_loss(prediction, target, delta=options.get("delta", 1.0))
        if loss == "smooth_l1":
            return f.smooth_l1_loss(prediction, target, beta=options.get("beta", 1.0))
        if loss == "bce_logits":
            return f.binary_cross_entropy_with_logits(prediction, target)
        if loss == "kl_div":
            return f.kl_div(prediction, target, reduction="sum") / (target.numel() // target.shape[1])
        if loss == "dice":
            return _dice(prediction.sigmoid().flatten(1), target.flatten(1), options)
    except (RuntimeError, ValueError, IndexError) as error:
        raise DataError(f"loss '{loss}' fails ({str(error).strip().splitlines()[-1].rstrip('.')}); {shapes}.") from None
    raise SpecError(f"loss={loss!r} is not known. Known: {', '.join(NAMES)}.")


def _dice(p, t, options):
    smooth = options.get("smooth", 1.0)
    return (1 - (2 * (p * t).sum(-1) + smooth) / (p.sum(-1) + t.sum(-1) + smooth)).mean()


def _of_classes(torch, f, loss, prediction, target, options, shapes):
    if target.is_floating_point():
        raise DataError(f"loss '{loss}' needs class numbers (integers) as target, but the target is {target.dtype}.")
    if target.dim() == prediction.dim() and target.shape[1] == 1:
        target = target.squeeze(1)
    if prediction.dim() < 2 or target.shape != prediction.shape[:1] + prediction.shape[2:]:
        raise DataError(f"loss '{loss}' compares scores [samples, classes, …] with class numbers [samples, …]; {shapes}.")
    classes, low, high = prediction.shape[1], int(target.min()), int(target.max())
    if low < 0 or high >= classes:
        raise DataError(f"the target holds class {low if low < 0 else high}, but the model has {classes} outputs (0..{classes - 1}).")
    weights = options.get("class_weights")
    weights = torch.tensor(weights, dtype=prediction.dtype) if weights else None
    count = target.numel()
    if loss == "nll":
        return f.nll_loss(prediction, target, weight=weights, reduction="sum") / count
    if loss == "cross_entropy":
        return f.cross_entropy(prediction, target, weight=weights, reduction="sum",
                               label_smoothing=options.get("label_smoothing", 0.0)) / count
    if loss == "focal":
        chosen = f.log_softmax(prediction, 1).gather(1, target.unsqueeze(1)).squeeze(1)
        each = -((1 - chosen.exp()).clamp_min(0) ** options.get("gamma", 2.0)) * chosen
        return (each if weights is None else each * weights[target]).mean()
    samples = len(prediction)
    p = f.softmax(prediction, 1).reshape(samples, classes, -1)
    return _dice(p, f.one_hot(target.reshape(samples, -1), classes).transpose(1, 2).to(p.dtype), options)


def _of_parts(torch, loss, prediction, target, options, shapes):
    target = target.unsqueeze(1) if target.dim() == 1 else target
    channels = target.shape[1]
    parts = {"quantile": len(options.get("quantiles") or ()), "crps_ensemble": options.get("members", 0)}.get(loss, 2)
    fits = (prediction.dim() == target.dim() and prediction.shape[2:] == target.shape[2:]
            and prediction.shape[1] % channels == 0
            and (prediction.shape[1] >= 2 * channels if parts == 0 else prediction.shape[1] == parts * channels))
    if not fits:
        raise DataError(f"loss '{loss}' needs {parts or '2 or more'} numbers for each number of the target, in the dimension after "
                        f"the sample; {shapes}.")
    split = prediction.reshape(target.shape[0], -1, *target.shape[1:])
    if loss == "quantile":
        errors = [target - split[:, i] for i in range(parts)]
        return sum(torch.maximum(q * e, (q - 1) * e).mean() for q, e in zip(options["quantiles"], errors)) / parts
    if loss == "crps_ensemble":
        members = split.shape[1]
        pairs = (split.unsqueeze(1) - split.unsqueeze(2)).abs().sum((1, 2)) / (members * (members - 1))
        return (split - target.unsqueeze(1)).abs().mean() - pairs.mean() / 2
    mean, log_variance = split[:, 0], split[:, 1].clamp_min(-13.8)
    if loss == "gaussian_nll":
        return (((target - mean) ** 2 * (-log_variance).exp() + log_variance) / 2).mean()
    deviation = (log_variance / 2).exp()
    z = (target - mean) / deviation
    density = (-z ** 2 / 2).exp() / math.sqrt(2 * math.pi)
    return (deviation * (z * torch.erf(z / math.sqrt(2)) + 2 * density - 1 / math.sqrt(math.pi))).mean()
