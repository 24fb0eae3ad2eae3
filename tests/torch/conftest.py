"""Live comparisons with PyTorch (`make test-torch`): torchvision made importable beside a CPU-only torch."""

import torch

# torchvision's published build lacks its compiled operators here and does not import unless these two are declared.
LIBRARY = torch.library.Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    LIBRARY.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
torch.set_num_threads(2)
