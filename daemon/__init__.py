"""What the serving process and the updater share, and how they are run."""
