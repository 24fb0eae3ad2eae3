"""The pictures of the loss: what is drawn, where its minimum is, and the command's mistakes in one line."""

import numpy as np
import pytest
from scipy import special

from dgkd_jax import landscape
from dgkd_jax.landscape import Settings

POINTS = np.random.default_rng(0).uniform(0.05, 0.95, (4, 30))  # p, s, q, t


@pytest.fixture
def coarse(monkeypatch):
    monkeypatch.setattr(landscape, "_CELLS", 21)


def by_hand(p, s, q, t, temperature):
    """TCKD, NCKD and G of three classes, from probabilities alone."""
    p, s, q, t = np.broadcast_arrays(p, s, q, t)

    def divergence(a, b):
        return special.rel_entr(a, b) + special.rel_entr(1 - a, 1 - b)

    delta = p - q
    rest = ((1 + delta) * s - t) ** 2 + ((1 + delta) * (1 - s) - (1 - t)) ** 2
    return temperature**2 * np.array([divergence(q, p), divergence(t, s), delta**2 + rest])


@pytest.mark.parametrize(
    ("convention", "of_g"),
    [
        ("per_sample", lambda g: g),
        ("literal", lambda g: g / (16**2 * 3)),
        ("normalized", lambda g: np.log(1 + g / (16**2 * 3 * 1e-8))),
        ("self_normalized", lambda g: np.log(1 + g / 0.3)),
    ],
)
def test_parts_are_the_formulas(convention, of_g):
    settings = Settings(temperature=3.0, alpha=0.5, beta=2.0, epsilon=0.7, convention=convention, kappa=0.3, batch=16)
    found = landscape.evaluate(*POINTS, settings)
    tckd, nckd, g = by_hand(*POINTS, 3.0)
    np.testing.assert_allclose(found.tckd, 0.5 * tckd, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.nckd, 2.0 * nckd, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.coupling, -0.7 * of_g(g), rtol=1e-9)
    np.testing.assert_allclose(found.total, 0.5 * tckd + 2.0 * nckd - 0.7 * of_g(g), rtol=1e-9)


def test_opposition_is_the_cosine_of_the_two_gradients():
    settings = Settings(temperature=2.0)
    p, s, q, t = POINTS
    found = landscape.evaluate(p, s, q, t, settings)

    # By central differences of the formulas over the logits.
    z = 2.0 * np.log(np.stack([p, (1 - p) * s, (1 - p) * (1 - s)]))
    step, columns = 1e-5, []
    for shift in step * np.eye(3)[:, :, None]:
        ends = []
        for logits in (z + shift, z - shift):
            share = special.softmax(logits / 2.0, axis=0)
            tckd, nckd, g = by_hand(share[0], share[1] / (1 - share[0]), q, t, 2.0)
            ends.append([tckd + 8.0 * nckd, g])
        columns.append((np.array(ends[0]) - ends[1]) / (2 * step))
    of_dkd, of_g = np.moveaxis(columns, 0, 1)
    cosine = (of_dkd * of_g).sum(0) / np.linalg.norm(of_dkd, axis=0) / np.linalg.norm(of_g, axis=0)
    np.testing.assert_allclose(found.opposition, cosine, atol=1e-7)


def marked(figure, label):
    """(x, y) of what is drawn under a label that starts so, in the last map."""
    lines = [line for axes in figure.axes for line in axes.get_lines() if line.get_label().startswith(label)]
    return np.array(lines[-1].get_xydata())


@pytest.mark.slow
def test_the_minimum_is_at_the_teacher_by_default_and_away_from_it_at_the_repositorys_epsilon(coarse):
    q, t = 0.8, 0.7
    (lowest,) = marked(landscape.over_students(Settings(teacher_target=q, teacher_share=t)), "lowest")
    np.testing.assert_allclose(lowest, (q, t), atol=0.5 / 20)  # half a cell
    (lowest,) = marked(landscape.over_students(Settings(convention="normalized", epsilon=6.0)), "lowest")
    axis = landscape._grid()
    tckd, nckd, g = by_hand(axis[:, None], axis, q, t, 4.0)
    total = tckd + 8 * nckd - 6 * np.log(g + 64**2 * 3 * 1e-8)
    row, column = np.unravel_index(np.argmin(total), total.shape)
    np.testing.assert_allclose(lowest, (axis[row], axis[column]), rtol=1e-12)
    assert lowest[0] < 0.5


def test_the_minimum_is_marked_for_each_q(coarse):
    lowest = marked(landscape.over_target(Settings(student_share=0.7)), "lowest")
    np.testing.assert_allclose(lowest[:, 0], lowest[:, 1], atol=1e-12)
    assert len(lowest) == 21


@pytest.mark.slow
def test_the_command_writes_the_figures_and_says_where(coarse, tmp_path, capsys):
    assert landscape.main([f"--output={tmp_path}/new/folder", "--convention=literal", "--epsilon=-1"]) == 0
    printed = capsys.readouterr().out.split()
    assert [path.rsplit("/", 1)[1] for path in printed] == [f"{name}.png" for name in landscape.FIGURES]
    for path in printed:
        with open(path, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"


@pytest.mark.wrong_input
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--temperature=0", "--temperature"),
        ("--temperature=nan", "--temperature"),
        ("--alpha=-1", "--alpha"),
        ("--epsilon=inf", "--epsilon"),
        ("--epsilon=small", "small"),
        ("--convention=normalised", "self_normalized"),
        ("--kappa=0", "--kappa"),
        ("--batch=0", "--batch"),
        ("--teacher_target=1", "--teacher_target"),
        ("--colour=red", "--colour"),
        ("--output=/dev/null/folder", "--output"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(argument, said, coarse, capsys):
    assert landscape.main([argument]) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
