"""What other tools open: a run's model in their formats, each compared with the model as it trained before it is there."""
