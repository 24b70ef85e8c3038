"""Everything that knows Flower: its simulation, and federations over real machines."""

import os

# flwr reads it once, when it is imported.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
