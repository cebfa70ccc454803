"""Human feedback and its simulation: who ranks responses, and the formats that training reads."""
