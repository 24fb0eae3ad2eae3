"""PyTorch's side of the comparisons, written from the formulas: the only file here that imports torch.

DKD is in the form that is usual in PyTorch: log of a softmax, and −1000 at the target to leave it out. That form is
exact in float64 at moderate logits; where it breaks is one of the things that `losses` shows.
"""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

VERSION = f"torch {torch.__version__}"

_LEFT_OUT = 1000.0  # what the usual form subtracts from the target's logit
_NORMALIZED_GUARD = 1e-8
_KAPPA = 1e-8


LOSSES = ("ce", "kd", "tckd", "nckd", "logit_mse")


def loss_terms(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    *,
    names: Iterable[str] = LOSSES,
) -> dict[str, torch.Tensor]:
    """Batch means of the losses that have no weights, or those named: logits [batch, classes] -> scalars."""
    forms = {
        "ce": lambda: F.cross_entropy(student, labels),
        "kd": lambda: _kd(student, teacher, temperature),
        "tckd": lambda: _tckd(student, teacher, labels, temperature),
        "nckd": lambda: _nckd(student, teacher, labels, temperature),
        "logit_mse": lambda: F.mse_loss(student, teacher),
    }
    return {name: forms[name]() for name in names}


def coupling(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, temperature: float, convention: str
) -> torch.Tensor:
    """G by autograd: the gradients of both batch means with their own graph, so that G can be differentiated again."""
    of_means = [
        torch.autograd.grad(term(student, teacher, labels, temperature), student, create_graph=True)[0]
        for term in (_tckd, _nckd)
    ]
    if convention in ("literal", "normalized"):
        value = F.mse_loss(*of_means)
        return value / (value.detach() + _NORMALIZED_GUARD) if convention == "normalized" else value
    # A mean's gradient holds each sample's own over the batch size.
    own = len(student) * (of_means[0] - of_means[1])
    value = own.square().sum(1).mean()
    return value / (value.detach() + _KAPPA) if convention == "self_normalized" else value


def evaluate(
    student: np.ndarray,
    teacher: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: float,
    alpha: float,
    beta: float,
    epsilon: float,
    conventions: tuple[str, ...],
    dtype: str = "float64",
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Every loss and coupling at these logits: name -> (value, gradient with respect to the student's logits)."""
    z = torch.tensor(student, dtype=getattr(torch, dtype), requires_grad=True)
    v, y = torch.tensor(teacher, dtype=z.dtype), torch.tensor(labels, dtype=torch.int64)
    values = loss_terms(z, v, y, temperature)
    values["dkd"] = alpha * values["tckd"] + beta * values["nckd"]
    for convention in conventions:
        values[f"coupling {convention}"] = coupling(z, v, y, temperature, convention)
        values[f"dgkd {convention}"] = values["dkd"] - epsilon * values[f"coupling {convention}"]
    return {
        name: (value.detach().numpy(), torch.autograd.grad(value, z, retain_graph=True)[0].numpy())
        for name, value in values.items()
    }


def peers(
    student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, settings: dict[str, dict[str, float]]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The peers that `settings` names, with their settings, in float64: name -> (value, gradient), as `evaluate`."""
    v, y = torch.tensor(teacher), torch.tensor(labels, dtype=torch.int64)
    found = {}
    for name, own in settings.items():
        z = torch.tensor(student, requires_grad=True)
        value = PEERS[name](z, v, y, **own)
        found[name] = (value.detach().numpy(), torch.autograd.grad(value, z)[0].numpy())
    return found


def _kd(student, teacher, temperature):
    log_student, share = F.log_softmax(student / temperature, 1), F.softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(log_student, share, reduction="batchmean")


def _tckd(student, teacher, labels, temperature):
    pairs = []
    for logits in (student, teacher):
        share = F.softmax(logits / temperature, 1)
        at_target = F.one_hot(labels, share.shape[1]).to(share.dtype)
        pairs.append(torch.stack([(share * at_target).sum(1), (share * (1 - at_target)).sum(1)], 1))
    return temperature**2 * F.kl_div(pairs[0].log(), pairs[1], reduction="batchmean")


def _nckd(student, teacher, labels, temperature):
    left_out = _LEFT_OUT * F.one_hot(labels, student.shape[1]).to(student.dtype)
    log_student = F.log_softmax(student / temperature - left_out, 1)
    share = F.softmax(teacher / temperature - left_out, 1)
    return temperature**2 * F.kl_div(log_student, share, reduction="batchmean")


def _standardized(logits):
    return (logits - logits.mean(1, keepdim=True)) / (1e-7 + logits.std(1, keepdim=True))


def _dkd_standardized(student, teacher, labels, *, alpha, beta, temperature):
    both = _standardized(student), _standardized(teacher)
    return alpha * _tckd(*both, labels, temperature) + beta * _nckd(*both, labels, temperature)


def _nkd(student, teacher, labels, *, gamma, temperature):
    at = labels[:, None]
    of_target = F.softmax(teacher, 1).gather(1, at) * F.log_softmax(student, 1).gather(1, at)
    rest = ~F.one_hot(labels, student.shape[1]).bool()
    z, v = (logits[rest].view(len(labels), -1) / temperature for logits in (student, teacher))
    return -of_target.mean() - gamma * temperature**2 * (F.softmax(v, 1) * F.log_softmax(z, 1)).sum(1).mean()


def _dist(student, teacher, labels, *, beta, gamma, temperature):
    p, q = (F.softmax(logits / temperature, 1) for logits in (student, teacher))

    def correlation(a, b):
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)

    of_rows, of_columns = 1 - correlation(p, q).mean(), 1 - correlation(p.T, q.T).mean()
    return temperature**2 * (beta * of_rows + gamma * of_columns)


def _wttm(student, teacher, labels, *, gamma):
    powers = F.softmax(teacher, 1) ** gamma
    weight = powers.sum(1)
    each = F.kl_div(F.log_softmax(student, 1), powers / weight[:, None], reduction="none").sum(1)
    return (weight * each).mean()


def _kl_within(student, teacher, inside):
    """KL of the softmaxes over the selected classes, per sample; 0 where there are none."""
    any_class = inside.any(1, keepdim=True)
    absent = ~inside & any_class
    log_s, log_t = (F.log_softmax(logits.masked_fill(absent, -torch.inf), 1) for logits in (student, teacher))
    return torch.where(inside, log_t.exp() * (log_t - log_s), 0.0).sum(1)


def _kl_of_masses(student_masses, teacher_masses):
    """KL of two numbers each, [batch] twice a side."""
    s, t = (torch.stack(masses, 1) for masses in (student_masses, teacher_masses))
    return F.kl_div(s.log(), t, reduction="none").sum(1)


def _rld(student, teacher, labels, *, alpha, beta, temperature, alpha_temperature):
    at = labels[:, None]
    p, q = (F.softmax(logits / alpha_temperature, 1) for logits in (student, teacher))
    of_target, highest = p.gather(1, at)[:, 0], q.max(1).values
    confidence = _kl_of_masses((of_target, 1 - of_target), (highest, 1 - highest))
    below = _kl_within(student / temperature, teacher / temperature, teacher < teacher.gather(1, at))
    return (alpha * alpha_temperature**2 * confidence + beta * temperature**2 * below).mean()


def _gdkd(student, teacher, labels, *, w0, w1, w2, temperature):
    # Not topk, which takes any of equal logits, and bfloat16 has many: of these the lower class comes first.
    top = teacher.argsort(dim=1, descending=True, stable=True)[:, : min(5, teacher.shape[1] - 1)]
    inside = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, top, True)
    z, v = student / temperature, teacher / temperature
    shares = F.softmax(z, 1), F.softmax(v, 1)
    masses = _kl_of_masses(*([(share * which).sum(1) for which in (inside, ~inside)] for share in shares))
    each = w0 * masses + w1 * _kl_within(z, v, inside) + w2 * _kl_within(z, v, ~inside)
    return temperature**2 * each.mean()


# (student's logits, teacher's, labels, settings) -> batch mean.
PEERS = {
    "kd standardized": lambda z, v, y, **own: _kd(_standardized(z), _standardized(v), **own),
    "dkd standardized": _dkd_standardized,
    "nkd": _nkd,
    "dist": _dist,
    "wttm": _wttm,
    "rld": _rld,
    "gdkd": _gdkd,
}


class ThinResNet(torch.nn.Module):
    """A thin CIFAR ResNet with the structure of ours: `dgkd_jax.models.resnet.ResNet` of `BasicBlock`s."""

    def __init__(self, *, stage_sizes: tuple, widths: tuple, stem_width: int, num_classes: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, stem_width, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(stem_width)
        width = stem_width
        for stage, (size, out) in enumerate(zip(stage_sizes, widths, strict=True)):
            blocks = []
            for index in range(size):
                blocks.append(_Block(width, out, stride=2 if stage and index == 0 else 1))
                width = out
            setattr(self, f"layer{stage + 1}", torch.nn.Sequential(*blocks))
        self.fc = torch.nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


class _Block(torch.nn.Module):
    def __init__(self, width: int, out: int, *, stride: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(out)
        self.conv2 = torch.nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(out)
        if stride != 1 or width != out:
            shortcut = torch.nn.Conv2d(width, out, 1, stride, bias=False)
            self.downsample = torch.nn.Sequential(shortcut, torch.nn.BatchNorm2d(out))
        else:
            self.downsample = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.downsample(x) + y)


def fill(network: torch.nn.Module, entries: dict[str, np.ndarray], dtype: str) -> torch.nn.Module:
    """The network in `dtype` with exactly these `state_dict` entries."""
    network.to(getattr(torch, dtype))
    network.load_state_dict({name: torch.tensor(array) for name, array in entries.items()}, strict=True)
    return network


def train(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    batches: Iterable[tuple[np.ndarray, np.ndarray, float]],
    *,
    terms: dict[str, float],
    convention: str | None,
    epsilon: float,
    temperature: float,
    learning_rate: float,
    momentum: float,
    weight_decay: float,
) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
    """Train the student with SGD; yields (loss, its entries after the step) for each batch.

    Args:
        batches: (images [batch, 3, height, width], labels, ramp on TCKD, NCKD and the coupling).
        terms: weights of the losses of `loss_terms`.
        convention: of the coupling; None for none.
    """
    student.train()
    teacher.eval()
    parameters = list(student.parameters())
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay)
    for images, labels, ramp in batches:
        x, y = torch.tensor(images, dtype=parameters[0].dtype), torch.tensor(labels, dtype=torch.int64)
        with torch.no_grad():
            v = teacher(x)
        z = student(x)
        values = loss_terms(z, v, y, temperature)
        ramps = {name: ramp if name in ("tckd", "nckd") else 1.0 for name in terms}
        loss = sum(ramps[name] * weight * values[name] for name, weight in terms.items())
        if convention is not None:
            loss = loss - ramp * epsilon * coupling(z, v, y, temperature, convention)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item(), {name: entry.numpy(force=True).copy() for name, entry in student.state_dict().items()}
