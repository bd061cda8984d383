"""Packaging: every setting is read from settings.ini, edit it there."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

licenses = {"apache2": "Apache-2.0"}
statuses = {
    "3": "Development Status :: 3 - Alpha",
    "4": "Development Status :: 4 - Beta",
    "5": "Development Status :: 5 - Production/Stable",
}
python_versions = ("3.11", "3.12", "3.13", "3.14")
supported = python_versions[python_versions.index(settings["min_python"]):]


def requirements(*names):
    "The packages that settings.ini lists under these names."
    return [package for name in names for package in settings[name].split()]


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    keywords=settings["keywords"],
    license=licenses[settings["license"]],
    classifiers=[
        statuses[settings["status"]],
        "Intended Audience :: " + settings["audience"].title(),
        "Natural Language :: " + settings["language"].title(),
        *("Programming Language :: Python :: " + version for version in supported),
    ],
    # The sources of the kernels become a folder of the library: they are compiled on the user's machine.
    packages=[*find_packages(include=["mamba2d", "mamba2d.*"]), "mamba2d.csrc"],
    package_dir={"mamba2d.csrc": "csrc"},
    package_data={"mamba2d": ["examples/*.safetensors"], "mamba2d.csrc": ["**/*"]},
    python_requires=">=" + settings["min_python"],
    install_requires=requirements("requirements"),
    extras_require={
        "explore": requirements("explore_requirements"),
        "log": requirements("log_requirements"),
        "browser": requirements("browser_requirements"),
        "docs": requirements("docs_requirements"),
        "integrations": requirements("integrations_requirements"),
        "dense": requirements("dense_requirements"),
        "large": requirements("large_requirements"),
        "dev": requirements("dev_requirements", "explore_requirements", "log_requirements"),
    },
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
