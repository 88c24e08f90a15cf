"""What was measured, for people: tables, pictures, the model card."""
