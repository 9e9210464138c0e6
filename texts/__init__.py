"""Files of texts to rows and columns, with the place of every failure; nothing about models."""
