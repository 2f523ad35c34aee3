//! `sledge serve`.

use std::net::SocketAddr;

use clap::Args;

/// Run the relay until SIGINT or SIGTERM
///
/// Runs the relay: WebSocket, relay information (NIP-11) and a landing page on one port. Creates the data directory
/// when there is none. SIGINT or SIGTERM ends it after what was accepted is answered and stored.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sledge serve
  sledge --store /var/lib/sledge serve --listen 0.0.0.0:7777")]
pub struct ServeArgs {
    /// Address and port [default: `listen` in the settings, else 127.0.0.1:7777]
    #[arg(long, value_name = "ADDR:PORT")]
    pub listen: Option<SocketAddr>,
}
