"""Train several members and use them as one model."""
