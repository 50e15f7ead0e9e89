"""What turns feedback into a gradient: batches, losses, the trainer and its optimiser."""
