"""What belongs together: channel groups, found by running the network once."""
