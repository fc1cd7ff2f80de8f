"""The docs as a site that needs no network: `sphinx-build -W docs site`, then open site/index.html."""

from titan import __version__

project, author = "titan", "the titan developers"
release = __version__
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "titan"
html_theme_options = {"navigation_with_keys": True}
html_show_copyright = html_show_sphinx = False
highlight_language = "none"
nitpicky = True
