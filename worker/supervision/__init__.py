"""Workers as processes of a supervisor's: what it shares with them, knows of them when they end, and does about it."""
