"""What a person looks at: plots, tables, reports."""
