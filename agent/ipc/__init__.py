"""How clients on this machine reach the daemon."""
