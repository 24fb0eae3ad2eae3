"""Fixtures of the tests that open data sets."""

import socket

import pytest

from configs import default


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"something asked the network: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def section(tmp_path):
    """A `data` section whose TFDS directory is empty and has a space in its path."""

    def make(name, **values):
        data = default.get_config().data
        data.update(name=name, dir=str(tmp_path / "data sets"), **values)
        return data

    return make
