"""Conversations of several turns that a policy learns from: environments, tools, agents. Knows no model and no trainer."""
