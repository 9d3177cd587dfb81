"""A network as a page that runs in the browser: `repjax export --format web`.

runtime.py   ONNX Runtime Web: from the user's cache, a file or folder, or the registry of npm
files.py     the files of a folder that any web server can show
page/        the page itself, without a framework:
  index.html   the page
  page.css     its colours, light and dark
  page.js      takes pictures, runs the forms of the network, and shows the results
  pixels.js    resizes as Pillow does, so that the network sees the pixels of its evaluation
"""

# ruff: noqa: F401  (everything imported here is offered to other packages)

from repjax.web.files import folder_files, page_files
from repjax.web.runtime import runtime_files
