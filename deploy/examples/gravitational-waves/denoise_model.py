"""A U-Net in one dimension that finds the signal in whitened strain.

    python3 denoise_model.py        writes denoise.pt, which job.yaml names
"""
from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(inputs, outputs, 9, padding=4), nn.GroupNorm(4, outputs), nn.ReLU(),
                         nn.Conv1d(outputs, outputs, 9, padding=4), nn.ReLU())


class Denoise(nn.Module):
    def __init__(self, width: int = 12):
        super().__init__()
        self.first, self.second, self.third = block(1, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.back_second, self.back_first = block(6 * width, 2 * width), block(3 * width, width)
        self.head = nn.Conv1d(width, 1, 1)

    def forward(self, strain: Tensor) -> Tensor:
        first = self.first(strain)
        second = self.second(F.avg_pool1d(first, 4))
        third = self.third(F.avg_pool1d(second, 4))
        up = F.interpolate(third, scale_factor=4.0, mode="nearest")
        up = F.interpolate(self.back_second(torch.cat([up, second], dim=1)), scale_factor=4.0, mode="nearest")
        return self.head(self.back_first(torch.cat([up, first], dim=1)))

    @torch.jit.export
    def training_step(self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        """Beside the error, the power of the signal: the error of a model that finds nothing."""
        loss = F.mse_loss(self.forward(batch["input"]), batch["target"])
        return loss, {"mse": loss, "signal_mse": batch["target"].square().mean()}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.jit.script(Denoise()).save("denoise.pt")
    print("wrote denoise.pt")
