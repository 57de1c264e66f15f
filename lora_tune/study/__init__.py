"""The study file: models, loader, located errors."""
