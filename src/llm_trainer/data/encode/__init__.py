"""Samples -> token ids on disk."""
