//! A device with the client on it: a profile in a directory of its own, which survives restarts.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sledge::client::clock::World;
use sledge::client::keys::Keys;
use sledge::client::link::LinkOptions;
use sledge::client::links::{self, Visit};
use sledge::client::profile::{Profile, ProfileOptions};
use sledge::protocol::{Event, Filter, Kind, Tags, Verified};
use sledge::sync::outbox::RelayUrl;
use tempfile::TempDir;

use super::client::{PATIENCE, soon};
use super::stores::once_free;

/// Seconds since 1970: a client learns the time from the relay's HTTP, which has the machine's clock.
pub fn today() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// Links without waits.
pub fn quick() -> LinkOptions {
    LinkOptions { reconnect_first: Duration::ZERO, reconnect_max: Duration::ZERO, ..LinkOptions::default() }
}

/// One device of one user.
pub struct Device {
    _dir: TempDir,
    options: ProfileOptions,
    keys: Keys,
    profile: Option<Arc<Profile>>,
}

impl Device {
    /// A new device of user `user` that keeps its events on these relays.
    pub fn new(user: u8, relays: &[&str]) -> Device {
        Device::with(user, relays, |_| {})
    }

    /// With settings of its own.
    pub fn with(user: u8, relays: &[&str], change: impl FnOnce(&mut ProfileOptions)) -> Device {
        let dir = TempDir::new().expect("a temporary directory");
        let mut options = ProfileOptions {
            dir: dir.path().to_owned(),
            relays: relays.iter().map(|url| (*url).to_owned()).collect(),
            training_relays: Vec::new(),
            outbox_bytes_max: 64 << 20,
            memory_bytes: 1 << 20,
        };
        change(&mut options);
        let keys = Keys::from_secret_bytes([user; 32]).expect("a valid key");
        let mut device = Device { _dir: dir, options, keys, profile: None };
        device.start(World::system());
        device
    }

    fn start(&mut self, world: World) {
        let open = || Profile::open(&self.options, self.keys.clone(), world.clone());
        self.profile = Some(Arc::new(once_free(open)));
    }

    /// As after a crash: nothing is closed first.
    pub fn restart(&mut self) {
        self.restart_in(World::system());
    }

    /// As [`Device::restart`], with another clock.
    pub fn restart_in(&mut self, world: World) {
        let profile = self.profile.take().expect("it is open");
        assert_eq!(Arc::strong_count(&profile), 1, "somebody uses the profile still");
        drop(profile);
        self.start(world);
    }

    pub fn profile(&self) -> &Arc<Profile> {
        self.profile.as_ref().expect("it is open")
    }

    /// Signs and publishes.
    pub fn publish(&self, kind: u16, created_at: u64, tags: &[&[&str]], content: &str) -> Event {
        let tags = Tags::from_lists(tags.iter().map(|tag| tag.iter()));
        let event = self.keys.sign(Kind(kind), created_at, tags, content.to_owned());
        self.profile().publish(event.clone()).expect("room in the outbox");
        (*event).clone()
    }

    /// Visits all relays once.
    pub async fn visit(&self) -> Vec<Visit> {
        let visiting = links::visit_all(self.profile(), quick(), PATIENCE);
        soon("the visit", visiting).await.into_values().collect()
    }

    /// Visits all relays once, and all must be settled.
    #[track_caller]
    pub fn sync(&self) -> impl Future<Output = ()> {
        let place = std::panic::Location::caller();
        async move {
            let visits = self.visit().await;
            assert!(visits.iter().all(|visit| *visit == Visit::Settled), "{place}: {visits:?}");
        }
    }

    /// The ids of all events here, sorted.
    pub fn ids(&self) -> Vec<String> {
        let events = self.profile().cache().query(&[Filter::default()], today()).expect("a readable cache");
        let mut ids = super::ids(&events);
        ids.sort();
        ids
    }

    /// How much waits in the outbox.
    pub fn waiting(&self) -> usize {
        self.profile().status().borrow().waiting
    }

    /// Waits until the status is as wanted.
    pub async fn until(&self, what: &str, wanted: impl Fn(&sledge::client::status::Status) -> bool) {
        let mut status = self.profile().status();
        soon(what, status.wait_for(wanted)).await.expect("the profile lives");
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(profile) = self.profile.take() {
            let _ = profile.close(Instant::now() + PATIENCE);
        }
    }
}

/// An event of a user's other device, verified.
pub fn signed(user: u8, kind: u16, created_at: u64, tags: &[&[&str]], content: &str) -> Verified<Event> {
    let keys = Keys::from_secret_bytes([user; 32]).expect("a valid key");
    keys.sign(Kind(kind), created_at, Tags::from_lists(tags.iter().map(|tag| tag.iter())), content.to_owned())
}

/// A relay's URL as the outbox writes it.
pub fn relay_url(url: &str) -> RelayUrl {
    RelayUrl::new(url)
}
