"""`make chaos`: everything real, under load and faults; then the accounting is compared."""
