"""`make chaos`: everything real, under load, while things die; then the books are compared."""
