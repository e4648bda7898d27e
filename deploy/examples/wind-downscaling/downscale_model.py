"""How to bring your own model: write it in PyTorch, put the loss into training_step, script it, save it.

    python3 downscale_model.py        writes downscale.pt, which job-torchscript.yaml names

The same architecture is built in as `downscale`.
"""
from typing import Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Downscale(nn.Module):
    """Corrects the bilinear interpolation of a coarse field, knowing where on the map each cell is."""

    def __init__(self, channels: int = 2, rows: int = 72, columns: int = 144, factor: int = 4):
        super().__init__()
        self.rows, self.columns, self.factor = rows, columns, factor
        self.position = nn.Parameter(0.1 * torch.randn(1, 8, rows, columns))  # learned: relief, coasts, storm tracks
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels + 8, 16, 5, padding=2), nn.ReLU(),
            nn.Conv2d(16, 16, 5, padding=2), nn.ReLU(),
            nn.Conv2d(16, channels, 3, padding=1))

    def forward(self, coarse: Tensor) -> Tensor:
        size = [self.rows, self.columns]
        smooth = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        position = self.position.expand(coarse.size(0), -1, -1, -1)
        fine = smooth + self.convolutions(torch.cat([smooth, position], dim=1))
        # The mean over each coarse cell is known: it is the input.
        return fine + F.interpolate(coarse - F.avg_pool2d(fine, self.factor), size=size, mode="nearest")

    @torch.jit.export
    def training_step(self, batch: Dict[str, Tensor]) -> Tuple[Tensor, Dict[str, Tensor]]:
        """The loss, and metrics by name: each a mean over the samples of the batch. "mse" is shown as "rmse", too."""
        loss = F.mse_loss(self.forward(batch["input"]), batch["target"])
        return loss, {"mse": loss}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.jit.script(Downscale()).save("downscale.pt")
    print("wrote downscale.pt")
