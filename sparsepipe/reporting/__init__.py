"""What a run came to: the headline table as plain data, and one self-contained HTML page."""
