"""The package as it is published: what wheel and source hold, how the README looks, what type checkers see."""
