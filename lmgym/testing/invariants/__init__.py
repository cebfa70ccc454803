"""What `check_trainer` holds a trainer to: small functions, each with a tolerance and the reason for it."""
