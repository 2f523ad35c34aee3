//! The relay on a port: accepts sockets, speaks HTTP and WebSocket, and hands messages to the relay.
//!
//! One task a connection. Nothing here knows how events are stored.

pub mod about;
pub mod admin;
pub mod connection;
pub mod control;
pub mod frames;
pub mod http;
pub mod idle;
pub mod negotiations;
pub mod open;
pub mod peer;
pub mod places;
#[cfg(test)]
mod tests;
pub mod wire;

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::config::Config;
use crate::relay::{Clock, Relay};
use crate::store::Store;
use connection::Connection;
use control::{Control, Status};
use http::Http;
use open::Open;
use places::Place;

/// Pause after the system refused a connection, usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Sent unasked to those for whom there is no place, all or their address's.
const FULL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";

/// A relay that listens.
pub struct Server {
    addr: SocketAddr,
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    accepting: JoinHandle<JoinSet<()>>,
    control: Option<Control>,
}

struct Shared {
    relay: Arc<Relay>,
    started: Instant,
    http: Http,
    open: Arc<Open>,
}

impl Server {
    /// Listens on the configured address (port 0: any free one) and serves until [`Server::stop`].
    ///
    /// # Errors
    /// When the address cannot be listened on, the store takes no writes, or the system gives no threads.
    pub async fn start(config: Arc<Config>, store: Arc<dyn Store>, clock: Clock) -> io::Result<Server> {
        let listener = TcpListener::bind(config.listen).await?;
        let addr = listener.local_addr()?;
        let relay = Relay::start(config.clone(), store, clock).map_err(io::Error::other)?;
        let (relay, open) = (Arc::new(relay), Arc::<Open>::default());
        let http = Http::new(relay.clone(), open.clone());
        let shared = Arc::new(Shared { relay, started: Instant::now(), http, open });
        let (stop, stopping) = watch::channel(false);
        let accepting = tokio::spawn(accept(listener, shared.clone(), stopping));
        tracing::info!(%addr, "listening");
        Ok(Server { addr, shared, stop, accepting, control: None })
    }

    /// Listens for the operator's commands too, on a socket in the data directory; see [`control`].
    ///
    /// # Errors
    /// When the socket cannot be made, for example because the directory's path is too long for one.
    pub fn listen_for_commands(&mut self, dir: &Path) -> io::Result<()> {
        self.control = Some(Control::start(dir, self.shared.clone(), self.stop.subscribe())?);
        Ok(())
    }

    /// The address that is listened on.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Stops within `stop_timeout_ms`: takes no more connections and messages, answers the events that were taken,
    /// closes the connections (1001, going away), writes and closes the store.
    ///
    /// # Errors
    /// When the store's last writes fail. Nothing that was answered is lost even then.
    pub async fn stop(self) -> io::Result<()> {
        let timeout = self.shared.relay.config().limits.stop_timeout();
        let deadline = Instant::now() + timeout;
        // The store keeps a part of the time for itself.
        let connections_until = Instant::now() + timeout / 2;
        let _ = self.stop.send(true);
        let mut connections = self.accepting.await.map_err(io::Error::other)?;
        self.shared.open.stop_all();
        let ended = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout_at(connections_until, ended).await.is_err() {
            tracing::debug!(connections = connections.len(), "connections cut off");
            connections.shutdown().await;
        }
        let relay = self.shared.relay.clone();
        let stopped = tokio::task::spawn_blocking(move || relay.stop(deadline.into_std())).await;
        if let Some(control) = self.control {
            control.close().await;
        }
        stopped.map_err(io::Error::other)?.map_err(io::Error::other)
    }
}

async fn accept(listener: TcpListener, shared: Arc<Shared>, mut stopping: watch::Receiver<bool>) -> JoinSet<()> {
    let connections_max = shared.relay.config().limits.connections_max;
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            _ = stopping.wait_for(|stop| *stop) => return connections,
        };
        match accepted {
            Ok((socket, peer)) => match shared.http.admit(peer.ip()) {
                Some(place) if connections.len() < connections_max => {
                    connections.spawn(serve(socket, place, peer, shared.clone(), stopping.clone()));
                }
                _ => {
                    tracing::debug!(connections = connections.len(), "a connection was refused for want of places");
                    let _ = socket.try_write(FULL);
                }
            },
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One connection, from its first byte to its last.
async fn serve(
    socket: TcpStream,
    place: Place,
    peer: SocketAddr,
    shared: Arc<Shared>,
    mut stopping: watch::Receiver<bool>,
) {
    // Answers must not wait for the client's acknowledgement of the one before.
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY was refused");
    }
    let timeout = shared.relay.config().limits.handshake_timeout();
    // The handshake is large and short: its memory goes when it is done.
    let handshake = Box::pin(tokio::time::timeout(timeout, shared.http.serve(socket, peer)));
    let shaken = tokio::select! {
        shaken = handshake => shaken.ok().flatten(),
        _ = stopping.wait_for(|stop| *stop) => None,
    };
    let Some(shaken) = shaken else {
        return;
    };
    let outbox = shared.relay.connect();
    let _open = shared.open.enter(&outbox, shaken.ip);
    if *stopping.borrow() {
        outbox.stop();
    }
    drop(stopping);
    let _place = place;
    let mut connection = Connection::new(shared.relay.clone(), outbox, shaken).await;
    connection.run().await;
}

impl Shared {
    fn status(&self) -> Status {
        Status {
            uptime_secs: self.started.elapsed().as_secs(),
            connections: self.open.len(),
            subscriptions: self.relay.subscriptions(),
            stats: self.relay.stats(),
        }
    }
}
