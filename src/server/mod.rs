//! The relay on a port: accepts sockets, speaks HTTP and WebSocket, and hands messages to the relay.
//!
//! One task a connection. Nothing here knows how events are stored.

pub mod about;
pub mod admin;
pub mod connection;
pub mod control;
pub mod deflate;
pub mod frames;
pub mod handover;
pub mod http;
pub mod idle;
mod metrics;
pub mod negotiations;
pub mod open;
pub mod peer;
pub mod places;
pub mod rate;
pub mod reader;
pub mod socket;
#[cfg(test)]
mod tests;
pub mod tls;
pub mod wire;

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::config::{self, Config, ConfigError, Reloaded};
use crate::relay::{Clock, Relay};
use crate::store::Store;
use crate::store::dir::free_bytes_at;
use connection::Connection;
use control::{Control, Equals, Queues, Status};
use http::{Client, Http, Shaken};
use open::Open;
use places::Place;
use rate::{Clients, Meter};
use socket::Socket;
use tls::{Tls, TlsError};

/// Pause after the system refused a connection, usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Time for handshakes that are under way when the relay stops.
const LAST_HANDSHAKES_TIME_MAX: Duration = Duration::from_millis(500);

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
    /// What makes this relay equal with others, once it is there.
    equals: OnceLock<Arc<dyn Equals>>,
    clients: Arc<Clients>,
    /// The data directory, where there is one.
    dir: OnceLock<PathBuf>,
    /// Copies of the listening sockets, to be passed to the process that takes over.
    passed_on: Vec<std::net::TcpListener>,
    /// Whether they were.
    handed_over: watch::Sender<bool>,
    /// What speaks TLS on the second port, if there is one.
    tls: Option<Arc<Tls>>,
    open: Arc<Open>,
}

impl Server {
    /// Listens on the configured address (port 0: any free one) and serves until [`Server::stop`].
    ///
    /// # Errors
    /// When the address cannot be listened on, the store takes no writes, or the system gives no threads.
    pub async fn start(config: Arc<Config>, store: Arc<dyn Store>, clock: Clock) -> io::Result<Server> {
        let plain = TcpListener::bind(config.listen).await?.into_std()?;
        Server::start_on(Sockets { plain, encrypted: None }, config, store, clock)
    }

    /// As [`Server::start`], on sockets that listen already: from a service manager, or from the relay before this.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn start_on(sockets: Sockets, config: Arc<Config>, store: Arc<dyn Store>, clock: Clock) -> io::Result<Server> {
        let addr = sockets.plain.local_addr()?;
        let encrypted = encrypted(&config.tls, sockets.encrypted);
        let encrypted = encrypted.map_err(|error| io::Error::other(format!("[tls]: {error}")))?;
        let tls = encrypted.as_ref().map(|(_, tls)| tls.clone());
        let ports = std::iter::once((sockets.plain, None)).chain(encrypted.map(|(socket, tls)| (socket, Some(tls))));
        let (mut listeners, mut passed_on) = (Vec::new(), Vec::new());
        for (socket, tls) in ports {
            socket.set_nonblocking(true)?;
            passed_on.push(socket.try_clone()?);
            listeners.push(Listener { socket: TcpListener::from_std(socket)?, tls });
        }
        let relay = Arc::new(Relay::start(config, store, clock).map_err(io::Error::other)?);
        let (clients, open) = (Arc::new(Clients::new(Instant::now())), Arc::<Open>::default());
        let shared = Arc::new(Shared {
            started: Instant::now(),
            http: Http::new(relay.clone(), clients.clone(), open.clone()),
            relay,
            dir: OnceLock::new(),
            passed_on,
            handed_over: watch::Sender::new(false),
            clients,
            tls,
            open,
            equals: OnceLock::new(),
        });
        let (stop, stopping) = watch::channel(false);
        let accepting = tokio::spawn(accept(listeners, shared.clone(), stopping));
        tracing::info!(%addr, "listening");
        Ok(Server { addr, shared, stop, accepting, control: None })
    }

    /// Listens for the operator's commands too, on a socket in `dir`, which this process must own; see [`control`].
    ///
    /// # Errors
    /// When the socket cannot be made, for example because the directory's path is too long for one.
    pub fn listen_for_commands(&mut self, dir: &Path) -> io::Result<()> {
        self.control = Some(Control::start(dir, self.shared.clone(), self.stop.subscribe())?);
        Ok(())
    }

    /// From now on tells how much room the disk that holds this folder has. Only the first call counts.
    pub fn watch_disk_of(&self, dir: &Path) {
        let _ = self.shared.dir.set(dir.to_owned());
    }

    /// The relay that is served.
    pub fn relay(&self) -> &Arc<Relay> {
        &self.shared.relay
    }

    /// From now on the operator's command to make this relay equal with another one is carried out by this. Only the
    /// first call counts.
    pub fn reach_out_by(&self, equals: Arc<dyn Equals>) {
        let _ = self.shared.equals.set(equals);
    }

    /// Serves metrics where the settings say so; the address.
    ///
    /// # Errors
    /// When that cannot be listened on.
    pub async fn serve_metrics(&self) -> io::Result<Option<SocketAddr>> {
        let Some(addr) = self.config().operation.metrics_addr().map_err(io::Error::other)? else {
            return Ok(None);
        };
        let listener = metrics::listen(addr).await?;
        let addr = listener.local_addr()?;
        tokio::spawn(metrics::serve(listener, self.shared.clone(), self.stop.subscribe()));
        Ok(Some(addr))
    }

    /// The settings in force.
    pub fn config(&self) -> Arc<Config> {
        self.shared.relay.config()
    }

    /// Puts in force what of `wanted` can be without a restart.
    ///
    /// # Errors
    /// When that does not go together with what stays; nothing has changed then.
    pub fn reload(&self, wanted: &Config) -> Result<Reloaded, ConfigError> {
        let reloaded = config::reload(&self.config(), wanted)?;
        self.shared.relay.reload(reloaded.config.clone());
        Ok(reloaded)
    }

    /// Reads certificate and key again if their files have changed; whether they had.
    ///
    /// # Errors
    /// When they cannot be used; the old certificate stays in use.
    pub fn reload_certificate(&self) -> Result<bool, TlsError> {
        self.shared.tls.as_ref().map_or(Ok(false), |tls| tls.reload())
    }

    /// Returns once another process has taken the listening sockets over: this one is to stop.
    pub async fn handed_over(&self) {
        let mut handed_over = self.shared.handed_over.subscribe();
        if handed_over.wait_for(|done| *done).await.is_err() {
            // The sender lives as long as this server.
            std::future::pending().await
        }
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

/// Sockets that listen already.
#[derive(Debug)]
pub struct Sockets {
    /// For WebSocket and HTTP.
    pub plain: std::net::TcpListener,
    /// For the same inside TLS; used where the settings ask for its address.
    pub encrypted: Option<std::net::TcpListener>,
}

/// A port that is listened on.
struct Listener {
    socket: TcpListener,
    tls: Option<Arc<Tls>>,
}

/// The encrypted port of the settings: on the socket of the relay before this one, where that has the same address.
fn encrypted(
    settings: &config::Tls,
    taken: Option<std::net::TcpListener>,
) -> io::Result<Option<(std::net::TcpListener, Arc<Tls>)>> {
    let Some(addr) = settings.addr().map_err(io::Error::other)? else {
        return Ok(None);
    };
    let tls = Tls::new(settings).map_err(io::Error::other)?;
    let socket = match taken.filter(|taken| listens_on(taken, addr)) {
        Some(taken) => taken,
        None => std::net::TcpListener::bind(addr)?,
    };
    tracing::info!(addr = %socket.local_addr()?, "TLS is spoken");
    Ok(Some((socket, Arc::new(tls))))
}

/// Whether a socket is the one that the settings ask for; any is, where they leave the port open.
pub fn listens_on(socket: &std::net::TcpListener, wanted: SocketAddr) -> bool {
    wanted.port() == 0 || socket.local_addr().is_ok_and(|addr| addr == wanted)
}

/// The next connection on any of the ports, and what speaks TLS with it.
async fn next(listeners: &[Listener]) -> io::Result<(TcpStream, SocketAddr, Option<Arc<Tls>>)> {
    std::future::poll_fn(|cx| {
        let accepted = listeners.iter().find_map(|listener| match listener.socket.poll_accept(cx) {
            Poll::Ready(accepted) => Some(accepted.map(|(socket, peer)| (socket, peer, listener.tls.clone()))),
            Poll::Pending => None,
        });
        accepted.map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

async fn accept(listeners: Vec<Listener>, shared: Arc<Shared>, mut stopping: watch::Receiver<bool>) -> JoinSet<()> {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = next(&listeners) => accepted,
            Some(_) = connections.join_next() => continue,
            _ = stopping.wait_for(|stop| *stop) => return connections,
        };
        match accepted {
            Ok((socket, peer, tls)) => {
                let connections_max = shared.relay.config().limits.connections_max;
                match shared.http.admit(peer.ip(), Instant::now()) {
                    Some(place) if connections.len() < connections_max => {
                        let newcomer = Newcomer { socket, peer, tls, place };
                        connections.spawn(serve(newcomer, shared.clone(), stopping.clone()));
                    }
                    _ => {
                        shared.relay.counters().turned_away.add(1);
                        tracing::debug!(connections = connections.len(), "a connection was refused for want of places");
                        if tls.is_none() {
                            let _ = socket.try_write(FULL);
                        }
                    }
                }
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A connection that has just been accepted.
struct Newcomer {
    socket: TcpStream,
    peer: SocketAddr,
    tls: Option<Arc<Tls>>,
    place: Place,
}

/// From a bare socket to a WebSocket.
async fn shake_hands(socket: TcpStream, tls: Option<Arc<Tls>>, peer: SocketAddr, http: &Http) -> Option<Shaken> {
    let socket = match tls {
        None => Socket::Plain(socket),
        Some(tls) => match tls.accept(socket).await {
            Ok(socket) => socket,
            Err(error) => {
                tracing::debug!(%error, "no TLS");
                return None;
            }
        },
    };
    http.serve(socket, peer).await
}

/// One connection, from its first byte to its last.
async fn serve(newcomer: Newcomer, shared: Arc<Shared>, mut stopping: watch::Receiver<bool>) {
    let Newcomer { socket, peer, tls, place } = newcomer;
    // Answers must not wait for the client's acknowledgement of the one before.
    if let Err(error) = socket.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY was refused");
    }
    let timeout = shared.relay.config().limits.handshake_timeout();
    // The handshake is large and short: its memory goes when it is done.
    let handshake = Box::pin(tokio::time::timeout(timeout, shake_hands(socket, tls, peer, &shared.http)));
    // Who was accepted in the last moment still gets an answer.
    let last_handshakes = async {
        let _ = stopping.wait_for(|stop| *stop).await;
        tokio::time::sleep(LAST_HANDSHAKES_TIME_MAX).await;
    };
    let shaken = tokio::select! {
        shaken = handshake => shaken.ok().flatten(),
        () = last_handshakes => None,
    };
    let Some(shaken) = shaken else {
        return;
    };
    shared.relay.counters().connections.add(1);
    let outbox = shared.relay.connect();
    let _open = shared.open.enter(&outbox, shaken.client.ip);
    if *stopping.borrow() {
        outbox.stop();
    }
    drop(stopping);
    let meter = shared.meter(&shaken.client);
    let _place = place;
    let mut connection = Connection::new(shared.relay.clone(), outbox, meter, shaken);
    connection.run().await;
}

impl Shared {
    /// The limits on a client.
    fn meter(&self, client: &Client) -> Meter {
        let is_exempt = client.is_local || client.is_operator || self.relay.config().rate.exempts(client.ip);
        let account = (!is_exempt).then(|| self.clients.account(client.ip, Instant::now()));
        Meter::new(self.clients.clone(), account, self.relay.live_config().clone())
    }

    fn status(&self) -> Status {
        let (writer_events, writer_bytes) = self.relay.writer_queue();
        let disk_free_bytes = self.dir.get().and_then(|dir| free_bytes_at(dir).ok());
        Status {
            uptime_secs: self.started.elapsed().as_secs(),
            connections: self.open.len(),
            subscriptions: self.relay.subscriptions(),
            banned: self.clients.banned(Instant::now()),
            problem: self.relay.problem().map(str::to_owned),
            figures: self.relay.counters().figures(),
            queries: self.relay.query_figures(),
            queues: Queues { writer_events, writer_bytes, disk_free_bytes },
            stats: self.relay.stats(),
        }
    }
}
