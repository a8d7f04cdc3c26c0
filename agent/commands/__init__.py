"""The command line: a module per command, with its options and the parts it puts together. Nothing else imports these."""
