"""What a fixed pool of KV memory holds, by the way it is handed out."""
