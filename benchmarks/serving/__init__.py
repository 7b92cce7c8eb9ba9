"""The served classifier beside what people would use instead, and beside the limits of machine and frontend."""
