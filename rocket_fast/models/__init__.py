"""The towers, the heads and the dual encoder they make up."""
