"""Study folder to console table, Markdown, CSV, JSON. Never trains, never imports torch."""
