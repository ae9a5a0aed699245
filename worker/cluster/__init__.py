"""The worker as a member of a Distributed DataFusion cluster."""
