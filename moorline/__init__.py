"""What serving, updater and daemon share; a producer of events may import it too."""
