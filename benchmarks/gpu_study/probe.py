"""Does this process reach the GPU? Where there is none it has nothing to do."""

import torch

if torch.cuda.is_available():
    torch.zeros(1, device="cuda").item()
