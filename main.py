"""Trains a model from a config: python main.py --config configs/digits.py"""

import sys

from repjax.cli import program

if __name__ == "__main__":
  program(["train", *sys.argv[1:]])
