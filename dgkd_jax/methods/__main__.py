"""`python -m dgkd_jax.methods`: the README's table of the methods, from their docstrings."""

import re

from dgkd_jax.methods import METHODS


def table() -> str:
    """Markdown: each method's name, and the first line of its docstring with links to arXiv."""
    lines = ["| `--config.method=` | loss and source |", "|---|---|"]
    for name, method in METHODS.items():
        first, *_ = (method.__doc__ or "").splitlines()
        linked = re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", first)
        lines.append(f"| `{name}` | {linked} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
