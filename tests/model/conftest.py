"""Fixtures of the model's tests. Threads that wait must not spin: test machines are shared."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # Read by the OpenMP runtime when torch loads it.
