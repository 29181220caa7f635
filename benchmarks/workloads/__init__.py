"""Ordinary GPU programs on real input; they know nothing of acb and run as plain scripts."""
