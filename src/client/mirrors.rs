//! Keeping this relay equal with others while it serves: one stream each, opened again with full jitter whenever it ends.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use super::clock::World;
use super::dial::RelayUrl;
use super::keys::Keys;
use super::link::{LinkOptions, Redial};
use super::stream::{Memory, Scope, Stream};
use crate::relay::Relay;
use crate::relay::ingest::Upstream;
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

impl Mirror {
    fn is_same(&self, other: &Mirror) -> bool {
        let pubkeys = |mirror: &Mirror| mirror.keys.iter().map(Keys::pubkey).collect::<Vec<_>>();
        (&self.url, &self.scope, self.private) == (&other.url, &other.scope, other.private)
            && pubkeys(self) == pubkeys(other)
    }
}

/// The streams; they end when this is dropped.
pub struct Mirrors {
    relay: Arc<Relay>,
    options: LinkOptions,
    world: World,
    streams: Vec<(Mirror, AbortHandle)>,
    tasks: JoinSet<()>,
}

impl Mirrors {
    /// Starts a stream with each.
    pub fn start(relay: &Arc<Relay>, mirrors: Vec<Mirror>, options: LinkOptions, world: &World) -> Mirrors {
        let (relay, world) = (relay.clone(), world.clone());
        let mut all = Mirrors { relay, options, world, streams: Vec::new(), tasks: JoinSet::new() };
        all.change(mirrors);
        all
    }

    /// Goes on with these: streams that stay the same are not touched, others end or begin.
    pub fn change(&mut self, wanted: Vec<Mirror>) {
        let mut before = std::mem::take(&mut self.streams);
        for mirror in wanted {
            let kept = before.iter().position(|(stream, _)| stream.is_same(&mirror)).map(|at| before.swap_remove(at));
            self.streams.push(kept.unwrap_or_else(|| {
                let work = keep_equal(self.relay.clone(), mirror.clone(), self.options, self.world.clone());
                (mirror, self.tasks.spawn(work))
            }));
        }
        before.iter().for_each(|(_, ended)| ended.abort());
        // Results of those that ended earlier are not kept for ever.
        while self.tasks.try_join_next().is_some() {}
    }

    /// Ends them. What is under way is found lacking again at the next start.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

async fn keep_equal(relay: Arc<Relay>, mirror: Mirror, options: LinkOptions, world: World) {
    let url = &mirror.url;
    let side = Side::new(relay, mirror.private, Upstream { url: url.to_string(), is_mirror: true });
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
