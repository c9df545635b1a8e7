"""A description becomes objects: the model, the data and all that an algorithm asks for."""
