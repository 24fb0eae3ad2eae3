"""Python objects that take the place of names in a config."""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from dgkd_jax import methods
from dgkd_jax.data.source import Description, Source
from dgkd_jax.methods import Method
from dgkd_jax.models import network
from dgkd_jax.models.architecture import Architecture
from dgkd_jax.models.host_network import HostNetwork


class FlaxTeacher(NamedTuple):
    """A teacher in JAX: its architecture and variables."""

    architecture: Architecture
    variables: dict[str, Any]


class Given(NamedTuple):
    """Python objects; None: the config's name counts."""

    student: Architecture | None = None
    teacher: FlaxTeacher | HostNetwork | None = None
    method: Method | None = None
    source: Source | None = None

    def method_of(self, config: ConfigDict) -> Method:
        return self.method or methods.from_config(config)

    def student_of(self, config: ConfigDict, source: Description) -> Architecture:
        """The object, or the network that `config.student` names.

        Raises:
            BadInput: the student cannot take the data set's images.
        """
        groups = config.batch_norm_groups
        return self.student or network.of_section(config.student, source, role="student", batch_norm_groups=groups)


NOTHING = Given()
