"""gRPC: a gateway process that speaks it with clients, and the daemon's supervisor of that process.

Only agent.rpc.supervisor belongs to the daemon, which never imports grpc: that costs 30 MB, and its core is C that
parses what strangers send.
"""
