"""What a completion is worth: reward functions of the user, and those that are built in. Knows no model and no tensor."""
