"""One module for each command: its options, and `main(argv)`."""
