"""Small faults, put in one at a time; `python -m tests.mutants` says which ones nothing notices."""
