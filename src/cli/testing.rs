//! What the unit tests of the commands share.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Runtime;

use super::store;
use crate::config::Config;
use crate::protocol::testing::sign;
use crate::protocol::{Event, Filter, Verified};
use crate::relay::Clock;
use crate::server::Server;
use crate::store::Store;
use crate::store::embedded::EmbeddedStore;

/// A signed event by an author who is always the same.
pub fn event(kind: u16, created_at: u64, tags: &[[&str; 2]], content: &str) -> Verified<Event> {
    let tags: Vec<&[&str]> = tags.iter().map(|tag| &tag[..]).collect();
    sign(7, kind, created_at, &tags, content)
}

/// A signed note of kind 1.
pub fn note(created_at: u64, content: &str) -> Verified<Event> {
    event(1, created_at, &[], content)
}

/// An event as a line of JSON, without the line feed.
pub fn json(event: &Verified<Event>) -> String {
    String::from_utf8(event.canonical().json.to_vec()).unwrap()
}

/// Settings for a store in `folder`.
pub fn config_for(folder: &Path) -> Config {
    Config { store: folder.to_str().unwrap().to_owned(), ..Config::default() }
}

/// Settings for a store in `folder` that holds these events and is closed.
pub fn store_with(folder: &Path, events: impl IntoIterator<Item = Verified<Event>>) -> Config {
    let config = config_for(folder);
    let events: Vec<_> = events.into_iter().collect();
    let store = store::open_or_create(&config).unwrap();
    store.apply(&events, 0).unwrap();
    store.close(Instant::now() + std::time::Duration::from_secs(60)).unwrap();
    config
}

/// `created_at` of everything that is stored, newest first.
pub fn dates(config: &Config) -> Vec<u64> {
    let mut dates = Vec::new();
    store::with_existing(config, |opened| {
        store::for_each_row(config, &**opened, store::query([Filter::default()], 0), |row| {
            dates.push(row.created_at);
            Ok(())
        })
    })
    .unwrap();
    dates
}

/// A relay on a store of its own, until dropped.
pub struct Relay {
    /// Where it listens.
    pub url: String,
    /// What it has.
    pub store: Arc<EmbeddedStore>,
    runtime: Runtime,
    server: Option<Server>,
}

impl Relay {
    /// Starts one on these settings and a free port.
    pub fn start(mut config: Config) -> Relay {
        config.listen = "127.0.0.1:0".parse().unwrap();
        let store = store::open_or_create(&config).unwrap();
        let runtime = Runtime::new().unwrap();
        let shared: Arc<dyn Store> = store.clone();
        let server = runtime.block_on(Server::start(Arc::new(config), shared, Clock::system())).unwrap();
        Relay { url: format!("ws://{}", server.addr()), store, runtime, server: Some(server) }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            self.runtime.block_on(server.stop()).unwrap();
        }
    }
}
