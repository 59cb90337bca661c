"""Commands: arguments in, words and exit statuses out. Nothing imports this room."""
