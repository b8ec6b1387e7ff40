"""Emoji scenes: pictures of sprites on coloured grounds, with documents whose answers can be checked exactly."""
