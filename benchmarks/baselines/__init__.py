"""What a user would run instead of an operator, written plainly; one file per operator."""
