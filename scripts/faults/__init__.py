"""The parts of inject_faults.py: faults at file-system calls, commands, and what must be left."""
