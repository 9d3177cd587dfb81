"""Files and folders on disk, written completely or not at all, and checked when they are read.

flush.py     durability, and errors of the disk as one paragraph
locks.py     locks on open files, and what happens where there are none
private.py   hidden folders in which a process writes, and how dead processes' folders are removed
folders.py   `replacing` and `replacing_file`, which give a finished folder or file its name
manifest.py  checksums of the files of a folder, and `read_whole`, which reads one writer's files
values.py    JSON files
trees.py     trees of arrays; imported by its own name, since only this file needs JAX
"""

# ruff: noqa: F401  (everything imported here is offered to other packages)

from repjax.disk.flush import sync, sync_entries, writing
from repjax.disk.folders import (
  check_new,
  check_place,
  current_folder,
  real,
  remove,
  replacing,
  replacing_file,
)
from repjax.disk.locks import is_at, try_lock
from repjax.disk.manifest import MANIFEST, Snapshot, content, read_whole, write_manifest
from repjax.disk.private import NEW, holder_text, new_holder, private_folder, sweep
from repjax.disk.values import FUSED, missing, read_json, update_manifest, write_json
