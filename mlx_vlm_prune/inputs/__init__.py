"""What a user gives: pictures, which are not trusted, and prompts."""
