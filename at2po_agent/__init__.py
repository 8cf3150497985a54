"""The agent SDK: trees of turns, credit, losses, rollouts and training."""
