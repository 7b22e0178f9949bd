"""The shipped configs stand in configs/ of the repository and are data of the package hstu.configs in a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hstu", "hstu.*"]), "hstu.configs"],
    package_dir={"hstu.configs": "configs"},
    package_data={"hstu": ["**/README.md", "py.typed"], "hstu.configs": ["*.gin"]},
)
