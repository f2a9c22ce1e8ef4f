"""One module per subcommand of `pointsman`."""
