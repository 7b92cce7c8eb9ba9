"""The command `edge`: nginx in front of one or more servers."""
