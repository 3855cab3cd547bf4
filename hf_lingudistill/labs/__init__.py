"""Around the core, each usable on its own: evaluate, diagnose, memory planning, metrics and the demo. The core imports nothing of it."""
