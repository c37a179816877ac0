"""What is on disk: databases, blobs, trust, registry, output cache."""
