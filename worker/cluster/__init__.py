"""The dialect of Distributed DataFusion 4: plans that a coordinator sets, and exchange between workers."""
