"""Files of any schema -> samples."""
