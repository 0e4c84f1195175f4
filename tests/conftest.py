"""For every test."""

import os

# Read by the OpenMP runtime when torch is imported: threads that wait must not spin, or two busy processes on two cores
# slow each other down a hundredfold. The engine process sets the same.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
