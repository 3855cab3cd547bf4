"""Publishing: the facts of a run, the model card, and what is sent to the Hub. The core imports nothing of it."""
