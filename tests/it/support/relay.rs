//! A relay inside the test's own process: port 0, a clock that only the test moves, a directory of its own.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use sledge::config::Config;
use sledge::relay::Clock;
use sledge::server::Server;
use sledge::store::Store;
use tempfile::TempDir;

use super::client::soon;
use super::stores::open_store;
use super::{Client, NOW};

/// Under which URL the relays of these tests are known.
pub const SERVICE_URL: &str = "wss://relay.example.com/";

/// A running relay.
pub struct Relay {
    server: Server,
    clock: Arc<AtomicU64>,
    config: Arc<Config>,
    dir: TempDir,
}

impl Relay {
    pub async fn start() -> Relay {
        Relay::with(|_| {}).await
    }

    /// Starts with settings of its own.
    pub async fn with(change: impl FnOnce(&mut Config)) -> Relay {
        let mut config = Config { service_url: SERVICE_URL.to_owned(), ..Config::default() };
        config.listen = ([127, 0, 0, 1], 0).into();
        change(&mut config);
        let dir = TempDir::new().expect("a temporary directory");
        Relay::run(Arc::new(config), dir, Arc::new(AtomicU64::new(NOW))).await
    }

    async fn run(config: Arc<Config>, dir: TempDir, clock: Arc<AtomicU64>) -> Relay {
        Relay::run_over(Arc::new(open_store(dir.path())), config, dir, clock).await
    }

    async fn run_over(store: Arc<dyn Store>, config: Arc<Config>, dir: TempDir, clock: Arc<AtomicU64>) -> Relay {
        let server = Server::start(Arc::clone(&config), store, Clock::manual(Arc::clone(&clock)));
        let server = soon("the relay to start", server).await.expect("a free port on loopback");
        Relay { server, clock, config, dir }
    }

    /// Starts on a store that the test has opened; the directory plays no part.
    #[cfg(feature = "postgres")]
    pub async fn over(store: Arc<dyn Store>) -> Relay {
        let mut config = Config { service_url: SERVICE_URL.to_owned(), ..Config::default() };
        config.listen = ([127, 0, 0, 1], 0).into();
        let dir = TempDir::new().expect("a temporary directory");
        Relay::run_over(store, Arc::new(config), dir, Arc::new(AtomicU64::new(NOW))).await
    }

    pub async fn client(&self) -> Client {
        Client::connect(self.server.addr()).await
    }

    /// The relay behind the sockets.
    pub fn served(&self) -> Arc<sledge::relay::Relay> {
        self.server.relay().clone()
    }

    pub fn addr(&self) -> std::net::SocketAddr {
        self.server.addr()
    }

    /// The data directory.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Moves the relay's clock.
    pub fn set_now(&self, now: u64) {
        self.clock.store(now, Ordering::SeqCst);
    }

    /// Stops the relay; the directory stays as it is then.
    pub async fn stop(self) -> Stopped {
        soon("the relay to stop", self.server.stop()).await.expect("the last writes succeed");
        Stopped { clock: self.clock, config: self.config, dir: self.dir }
    }

    /// Stops and starts again on the same directory.
    pub async fn restart(self) -> Relay {
        self.stop().await.start().await
    }
}

/// A relay that was stopped, with its data.
pub struct Stopped {
    clock: Arc<AtomicU64>,
    config: Arc<Config>,
    dir: TempDir,
}

impl Stopped {
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub async fn start(self) -> Relay {
        Relay::run(self.config, self.dir, self.clock).await
    }

    /// Starts on an address that clients know already.
    pub async fn start_on(self, addr: std::net::SocketAddr) -> Relay {
        let config = Config { listen: addr, ..(*self.config).clone() };
        Relay::run(Arc::new(config), self.dir, self.clock).await
    }
}
