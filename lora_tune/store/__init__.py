"""The study folder: records, lock file, Optuna database, atomic publishing."""
