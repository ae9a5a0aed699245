"""A member of a cluster: what a worker does with the plans of Distributed DataFusion's coordinators."""
