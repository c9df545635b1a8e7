"""From files to batches: rows -> samples -> ids -> token stores -> a resumable stream of micro-batches."""
