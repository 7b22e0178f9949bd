"""Make a data set: python preprocessing/preprocessor.py --dataset_name NAME; --help lists the flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the clone that this file stands in, installed or not

from hstu.cli.preprocess import main

if __name__ == "__main__":
    main()
