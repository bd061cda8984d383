"""Packaging: every setting is read from settings.ini, edit it there."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

licenses = {"apache2": ("Apache-2.0", "License :: OSI Approved :: Apache Software License")}
statuses = {"3": "Development Status :: 3 - Alpha", "4": "Development Status :: 4 - Beta", "5": "Development Status :: 5 - Production/Stable"}
python_versions = ("3.11", "3.12", "3.13", "3.14")
supported = python_versions[python_versions.index(settings["min_python"]):]

sources = sorted(str(path.relative_to(here)) for path in (here / "csrc").glob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))

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
    license=licenses[settings["license"]][0],
    classifiers=[statuses[settings["status"]], "Intended Audience :: " + settings["audience"].title(),
                 "Natural Language :: " + settings["language"].title(),
                 *("Programming Language :: Python :: " + version for version in supported)],
    packages=["mamba2d", "mamba2d.csrc"] if sources else ["mamba2d"],
    package_dir={"mamba2d.csrc": "csrc"} if sources else {},  # the kernels' sources travel inside the wheel
    package_data={"mamba2d.csrc": ["*"]} if sources else {},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={"dev": [name for extra in ("dev", "explore", "log") for name in settings[f"{extra}_requirements"].split()],
                    **{extra: settings[f"{extra}_requirements"].split() for extra in ("explore", "log", "browser")}},
    entry_points={
        "console_scripts": [line for line in settings["console_scripts"].split()],
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
