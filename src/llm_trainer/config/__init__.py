"""What a run is made of, described. A leaf: pydantic and the standard library only."""
