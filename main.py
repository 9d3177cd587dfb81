"""Trains a model from a config: python main.py --config configs/digits.py"""

import sys

from repjax.cli import train

if __name__ == "__main__":
  train.main(sys.argv[1:])
