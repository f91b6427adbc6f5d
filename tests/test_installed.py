"""Versions of what is installed, against Python's own library."""

from importlib import metadata

from peftsurgery.installed import version_beside, version_of


def test_versions_beside_packages_are_those_that_python_tells() -> None:
    names = {each.metadata["Name"] for each in metadata.distributions()}
    assert len(names) > 10
    for name in names:
        assert version_beside(name) == metadata.version(name), name
        assert version_beside(name.upper().replace("_", "-")) == metadata.version(name), name


def test_what_is_not_installed_has_no_version() -> None:
    assert version_beside("there-is-no-such-package") is None
    assert version_of("there-is-no-such-package") is None
