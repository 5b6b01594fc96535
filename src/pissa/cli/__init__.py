"""The command line: one thin file per subcommand that parses, calls one library function and prints."""
