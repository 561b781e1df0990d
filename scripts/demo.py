#!/usr/bin/env python3
"""The same story from one seed in every framework that was asked for, side by side."""

from __future__ import annotations

import sys

from gpt2_app.demo import main

if __name__ == "__main__":
    sys.exit(main())
