"""What is typed: each command's options, and what is wired for it. Nothing else imports these."""
