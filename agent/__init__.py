"""The daemon: configuration, life cycle, model table, scheduling, local IPC, CLI."""
