//! Keeping this relay equal with others while it serves: one stream each, opened again with full jitter whenever it ends.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::clock::World;
use super::dial::RelayUrl;
use super::keys::Keys;
use super::link::{LinkOptions, Redial};
use super::stream::{Memory, Scope, Stream};
use crate::relay::Relay;
use crate::relay::side::Side;

/// One of the other relays.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// Where it is.
    pub url: RelayUrl,
    /// What is kept equal with it.
    pub scope: Scope,
    /// Whether private and protected events go too.
    pub private: bool,
    /// The keys that are proven to it.
    pub keys: Arc<[Keys]>,
}

/// The streams; they end when this is dropped.
#[derive(Debug, Default)]
pub struct Mirrors {
    tasks: JoinSet<()>,
}

impl Mirrors {
    /// Starts a stream with each.
    pub fn start(relay: &Arc<Relay>, mirrors: Vec<Mirror>, options: LinkOptions, world: &World) -> Mirrors {
        let mut tasks = JoinSet::new();
        for mirror in mirrors {
            tasks.spawn(keep_equal(relay.clone(), mirror, options, world.clone()));
        }
        Mirrors { tasks }
    }

    /// Ends them. What is under way is found lacking again at the next start.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

async fn keep_equal(relay: Arc<Relay>, mirror: Mirror, options: LinkOptions, world: World) {
    let side = Side::new(relay, mirror.private);
    let url = &mirror.url;
    let mut redial = Redial::new(url.clone(), options, mirror.keys.clone(), world);
    let mut memory = Memory::default();
    loop {
        let link = redial.open(|error| tracing::debug!(relay = %url, %error, "a mirror cannot be reached")).await;
        let mut stream =
            Stream::new(link, side.clone(), mirror.scope.clone(), watch::channel(Default::default()).0, memory);
        let mut is_level = false;
        let Err(error) = stream.follow(|| is_level = true).await;
        if is_level {
            redial.worked();
        }
        let moved = stream.moved();
        tracing::info!(relay = %url, %error, stored = moved.stored, sent = moved.sent, "a mirror's stream ended");
        memory = stream.into_memory();
        redial.pause().await;
    }
}
