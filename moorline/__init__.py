"""The ground that serving, updater and daemon stand on; what a producer of events imports."""
