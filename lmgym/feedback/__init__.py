"""Human feedback and its simulation: who judges responses, and the formats that training reads."""
