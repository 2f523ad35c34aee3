//! The web of trust: whom the roots follow, and at depth 2 whom those follow, by the contact lists (kind 3) that the store
//! has.
//!
//! A thread of its own reads the lists, at the start, every so often, and when a root has published a new one; the web of
//! before holds meanwhile. Nobody waits for it: until the first reading is done, the answer is "not known yet".
//! Bounded: keys beyond the settings' number are left out, those nearest to the roots last.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::Duration;

use crate::config;
use crate::protocol::{Event, Filter, Kind, PublicKey};
use crate::relay::lock;
use crate::store::{Store, StoreError, for_each_match};

/// Authors of one question to the store.
const AUTHORS_AT_ONCE: usize = 500;

/// Half of a key: enough that nobody finds another one with the same half.
type Half = [u8; 16];

/// The web as it was last read.
pub struct Trust {
    roots: Vec<PublicKey>,
    depth: u64,
    keys_max: usize,
    reached: RwLock<Option<HashSet<Half>>>,
}

fn half(key: &PublicKey) -> Half {
    key.0[..16].try_into().expect("16 of 32 bytes")
}

impl Trust {
    /// A web that begins at these roots and is not read yet.
    pub fn new(roots: Vec<PublicKey>, settings: &config::Trust) -> Trust {
        let keys_max = usize::try_from(settings.keys_max).unwrap_or(usize::MAX);
        Trust { roots, depth: settings.depth, keys_max, reached: RwLock::default() }
    }

    /// Whether there is a web.
    pub fn is_set(&self) -> bool {
        !self.roots.is_empty()
    }

    /// Whether the web reaches this key; `None`: not known yet.
    pub fn reaches(&self, key: &PublicKey) -> Option<bool> {
        if self.roots.is_empty() {
            return Some(false);
        }
        if self.roots.contains(key) {
            return Some(true);
        }
        let reached = self.reached.read().unwrap_or_else(PoisonError::into_inner);
        reached.as_ref().map(|reached| reached.contains(&half(key)))
    }

    /// Whether a stored event may change what the roots reach.
    fn is_moved_by(&self, event: &Event) -> bool {
        event.kind == Kind::CONTACTS && self.roots.contains(&event.pubkey)
    }

    /// Reads the contact lists. Returns how many keys the web reaches.
    ///
    /// # Errors
    /// When the store cannot be read; the web of before holds then.
    pub fn read(&self, store: &dyn Store) -> Result<usize, StoreError> {
        let mut reached: HashSet<Half> = self.roots.iter().map(half).collect();
        let mut at = self.roots.clone();
        for _ in 0..self.depth {
            let mut next = Vec::new();
            for authors in at.chunks(AUTHORS_AT_ONCE) {
                self.follow(store, authors, &mut reached, &mut next)?;
            }
            at = next;
        }
        let count = reached.len();
        *self.reached.write().unwrap_or_else(PoisonError::into_inner) = Some(reached);
        Ok(count)
    }

    fn follow(
        &self,
        store: &dyn Store,
        authors: &[PublicKey],
        reached: &mut HashSet<Half>,
        next: &mut Vec<PublicKey>,
    ) -> Result<(), StoreError> {
        let mut authors = authors.to_vec();
        authors.sort_unstable();
        authors.dedup();
        let filter = Filter { authors: Some(authors), kinds: Some(vec![Kind::CONTACTS]), ..Filter::default() };
        for_each_match(store, vec![filter], |row| {
            let list = std::str::from_utf8(&row.json).ok().and_then(|json| Event::from_json(json).ok());
            for key in list.iter().flat_map(|list| list.tags.values("p")).filter_map(PublicKey::from_hex) {
                if reached.len() < self.keys_max && reached.insert(half(&key)) {
                    next.push(key);
                }
            }
            Ok::<(), StoreError>(())
        })
    }
}

/// The thread that reads, until dropped.
pub struct Reader(Arc<Shared>);

struct Shared {
    trust: Arc<Trust>,
    signal: Mutex<Signal>,
    changed: Condvar,
}

#[derive(Default)]
struct Signal {
    stale: bool,
    stopping: bool,
}

impl Reader {
    /// Starts the thread where there is a web to read.
    ///
    /// # Errors
    /// When the system refuses it.
    pub fn start(trust: Arc<Trust>, store: Arc<dyn Store>, every: Duration) -> std::io::Result<Reader> {
        let shared = Arc::new(Shared { trust, signal: Mutex::default(), changed: Condvar::new() });
        if shared.trust.is_set() {
            let own = shared.clone();
            std::thread::Builder::new().name("trust".to_owned()).spawn(move || own.run(&*store, every))?;
        }
        Ok(Reader(shared))
    }

    /// An event was stored: a new list of a root is read soon.
    pub fn stored(&self, event: &Event) {
        if self.0.trust.is_moved_by(event) {
            lock(&self.0.signal).stale = true;
            self.0.changed.notify_all();
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        lock(&self.0.signal).stopping = true;
        self.0.changed.notify_all();
    }
}

impl Shared {
    fn run(&self, store: &dyn Store, every: Duration) {
        loop {
            match self.trust.read(store) {
                Ok(keys) => tracing::info!(keys, "the web of trust was read"),
                Err(error) => tracing::warn!(%error, "the web of trust could not be read; the one before holds"),
            }
            let signal = lock(&self.signal);
            let quiet = |signal: &mut Signal| !signal.stale && !signal.stopping;
            let mut signal =
                self.changed.wait_timeout_while(signal, every, quiet).unwrap_or_else(PoisonError::into_inner).0;
            if signal.stopping {
                return;
            }
            signal.stale = false;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config::Config;
    use crate::protocol::testing::{Author, NOW, sign};
    use crate::store::memory::MemoryStore;

    fn key(number: u8) -> PublicKey {
        Author::new(number).note(NOW, "").pubkey
    }

    /// Author `who` follows these.
    fn follow(store: &MemoryStore, who: u8, at: u64, whom: &[u8]) {
        let keys: Vec<String> = whom.iter().map(|number| key(*number).to_hex()).collect();
        let tags: Vec<[&str; 2]> = keys.iter().map(|key| ["p", key.as_str()]).collect();
        let tags: Vec<&[&str]> = tags.iter().map(|tag| &tag[..]).collect();
        store.apply(&[sign(who, 3, at, &tags, "")], NOW).unwrap();
    }

    fn trust(depth: u64, keys_max: u64) -> Trust {
        let settings = config::Trust { depth, keys_max, ..Config::default().trust };
        Trust::new(vec![key(1)], &settings)
    }

    fn reached(trust: &Trust) -> Vec<u8> {
        (1..=6).filter(|number| trust.reaches(&key(*number)) == Some(true)).collect()
    }

    /// Depth by depth; an unfollow counts at the next reading; before the first one only the roots are known.
    #[test]
    fn the_web_reaches_as_far_as_its_depth() {
        let store = MemoryStore::new();
        follow(&store, 1, NOW, &[2, 3]);
        follow(&store, 2, NOW, &[4, 1]);
        follow(&store, 4, NOW, &[5]);
        let (near, far) = (trust(1, 100), trust(2, 100));
        assert_eq!((near.reaches(&key(1)), near.reaches(&key(2))), (Some(true), None));
        near.read(&store).unwrap();
        far.read(&store).unwrap();
        assert_eq!((reached(&near), reached(&far)), (vec![1, 2, 3], vec![1, 2, 3, 4]));
        follow(&store, 1, NOW + 1, &[3]);
        far.read(&store).unwrap();
        assert_eq!(reached(&far), [1, 3]);
    }

    /// The bound keeps the nearest.
    #[test]
    fn memory_is_bounded() {
        let store = MemoryStore::new();
        follow(&store, 1, NOW, &[2, 3]);
        follow(&store, 2, NOW, &[4, 5, 6]);
        let bounded = trust(2, 4);
        assert_eq!(bounded.read(&store).unwrap(), 4);
        assert_eq!(reached(&bounded), [1, 2, 3, 4]);
    }

    /// Without roots there is no web and no thread.
    #[test]
    fn no_roots_no_web() {
        let none = Trust::new(Vec::new(), &Config::default().trust);
        assert_eq!((none.is_set(), none.reaches(&key(1))), (false, Some(false)));
        let reader = Reader::start(Arc::new(none), Arc::new(MemoryStore::new()), Duration::from_secs(60)).unwrap();
        assert_eq!(Arc::strong_count(&reader.0), 1);
    }
}
