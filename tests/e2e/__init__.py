"""The whole system from the outside: commands, bad input, crashes, exports, all on a tiny model made here."""
