"""What runs on a GPU: cell identity, the record, model loading, compression, evaluation, cost."""
