"""Settings of Sphinx for the documentation site; `make docs` runs docs/build.py, which uses them."""
from configparser import ConfigParser
from pathlib import Path

_settings = ConfigParser(delimiters=["="])
_settings.read(Path(__file__).resolve().parent.parent / "settings.ini", encoding="utf-8")
_project = _settings["DEFAULT"]

project = _project["lib_name"]
author = _project["author"]
copyright = _project["copyright"]
release = _project["version"]

extensions = ["myst_nb"]
nb_execution_mode = "off"  # the saved outputs are shown
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath", "deflist"]
myst_heading_anchors = 4
myst_links_external_new_tab = True
suppress_warnings = ["mystnb.unknown_mime_type"]  # of saved widgets, which have an image as well

html_theme = "furo"  # search, a light and a dark mode
html_title = f"{project} {release}"
html_theme_options = {
    "source_repository": _project["git_url"],
    "source_branch": _project["branch"],
    "source_directory": "nbs/",
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
