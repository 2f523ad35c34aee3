//! One user's data on this device: outbox, cache, collections and clock, and the order in which they are written.
//!
//! In: what the app writes, what relays give and answer. Out: what the app sees, what a link is to send next, news for
//! subscribers. Every call blocks on the disk and belongs on a thread that may wait. Never touches a socket.
//!
//! ```text
//! device           this device's number in the hybrid logical clock, 16 hex digits
//! outbox.journal   what is owed: the app's writes; private, since drafts are in the clear
//! unwanted.journal what need not be moved between this device and a relay
//! local.json       settings that stay on this device; private
//! cache/           events that are signed, own and foreign, as an embedded store; holds the lock on the profile
//! ```
//!
//! The order: journal on disk → the app has its answer; a draft is signed → journal on disk → cache → relay. Whatever a
//! crash cuts off is done at the next start: every signed event of the outbox is put into the cache again, which does
//! nothing where it is there.

mod importing;
mod letters;
mod relaying;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{broadcast, watch};

use super::cache::{Cache, event_of};
use super::carry::{self, Carried, Carry};
use super::clock::World;
use super::keys::Keys;
use super::outbox::{DurableOutbox, OutboxError};
use super::routing::{self, RELAY_LIST, RelayList, Routing};
use super::status::{RelayStatus, Status};
use super::unwanted::Unwanted;
use crate::protocol::item::Item;
use crate::protocol::supersede::Verdict;
use crate::protocol::verify::Hashed;
use crate::protocol::{Event, EventId, Filter, PublicKey, Verified, label};
use crate::store::dir::write_atomically;
use crate::store::log::io_at;
use crate::store::{StoreError, fault};
use crate::sync::Collections;
use crate::sync::clock::{Clock, Device};
use crate::sync::draft::{Audience, Draft, Op, SettingsForm};
use crate::sync::nip44::Nip44;
use crate::sync::outbox::{Content, RelayUrl, Seq};
use crate::sync::shape::Schema;

pub use letters::{DeadLetter, Exported};
pub use relaying::{Answer, Arrival, Steps, form_of};

/// News that wait for a subscriber before it is told that it missed some.
const NEWS_MAX: usize = 4_096;

/// Where a profile is and what it may take.
#[derive(Clone, Debug)]
pub struct ProfileOptions {
    /// Its directory, made when missing.
    pub dir: PathBuf,
    /// Relays that keep the user's events, labelled ones too.
    pub relays: Vec<String>,
    /// Relays that may have training data.
    pub training_relays: Vec<String>,
    /// Bytes that may wait in the outbox.
    pub outbox_bytes_max: u64,
    /// Bytes of memory that the cache's buffers aim at.
    pub memory_bytes: usize,
}

/// An open profile.
pub struct Profile {
    dir: PathBuf,
    keys: Keys,
    cipher: Nip44,
    world: World,
    routing: Routing,
    cache: Cache,
    state: Mutex<State>,
    news: broadcast::Sender<Arc<Event>>,
    /// Own events that were new, with the relay that gave them.
    carried: broadcast::Sender<Carried>,
    /// Counts up when something new is owed.
    owed: watch::Sender<u64>,
    status: watch::Sender<Status>,
}

/// What became of events that a relay gave.
#[derive(Debug, Default)]
struct Taken {
    new: usize,
    /// Those of them that the user wrote.
    own: Vec<Item>,
    /// Overtaken or deleted here: coming again would change nothing.
    unwanted: Vec<EventId>,
}

/// What changes together, under one lock.
struct State {
    outbox: DurableOutbox,
    clock: Clock,
    /// Made from the cache when they are first asked for: some commands need none.
    collections: Option<Collections>,
    relays: BTreeMap<RelayUrl, RelayStatus>,
    /// The relays that a link is open to.
    up: BTreeSet<RelayUrl>,
    /// Signed and durable, but not yet in the cache.
    uncached: Vec<Verified<Event>>,
    unwanted: Unwanted,
}

impl Profile {
    /// Opens the profile of `keys`, making an empty one where there is none.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another process has it; when the disk refuses.
    pub fn open(options: &ProfileOptions, keys: Keys, world: World) -> Result<Profile, StoreError> {
        make_private_dir(&options.dir)?;
        let cache = Cache::open(&options.dir.join("cache"), options.memory_bytes)?;
        let outbox = DurableOutbox::open(&options.dir.join("outbox.journal"), options.outbox_bytes_max)?;
        let owed: Vec<Verified<Event>> = outbox.events().filter_map(|event| Verified::check(event).ok()).collect();
        cache.put(&owed, world.now_ms() / 1000)?;
        let mut clock = Clock::new(device(&options.dir, &world)?);
        outbox.rules().drafts().for_each(|(_, draft)| clock.resume(&draft.written));
        let dice = world.clone();
        let cipher = Nip44::new(&keys.secret_bytes(), move || dice.random_32()).expect("a key that signs also seals");
        let unwanted = Unwanted::open(&options.dir.join("unwanted.journal"), world.now_ms() / 1000)?;
        let (relays, up, uncached) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
        let profile = Profile {
            dir: options.dir.clone(),
            keys,
            cipher,
            world,
            routing: Routing::new(&options.relays, &options.training_relays),
            cache,
            state: Mutex::new(State { outbox, clock, collections: None, relays, up, uncached, unwanted }),
            news: broadcast::Sender::new(NEWS_MAX),
            carried: carry::channel(),
            owed: watch::Sender::new(0),
            status: watch::Sender::new(Status::default()),
        };
        profile.refresh(&profile.state());
        Ok(profile)
    }

    /// The profile's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Who the user is.
    pub fn keys(&self) -> &Keys {
        &self.keys
    }

    /// Time and chance.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Which relay may have what.
    pub fn routing(&self) -> &Routing {
        &self.routing
    }

    /// The events that are here.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Events as they become known, own and foreign, each once, in no order. A subscriber that is too slow is told that
    /// it missed some, and asks the cache.
    pub fn news(&self) -> broadcast::Receiver<Arc<Event>> {
        self.news.subscribe()
    }

    /// What other relays than this one give from now on.
    pub fn carry(&self, to: &RelayUrl) -> Carry {
        Carry::new(to.clone(), &self.carried)
    }

    /// Changes when something new is owed.
    pub fn owed(&self) -> watch::Receiver<u64> {
        self.owed.subscribe()
    }

    /// How the client is, at present and from now on.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// Seconds since 1970 by this machine's clock, corrected by what relays say.
    pub fn now_secs(&self) -> u64 {
        self.true_secs(&self.state().clock)
    }

    /// A clock that is wrong must not decide what has expired, as soon as a relay has told better.
    fn true_secs(&self, clock: &Clock) -> u64 {
        clock.true_ms(self.world.now_ms()) / 1000
    }

    /// Brings what is in memory to disk.
    ///
    /// # Errors
    /// When the last writes fail. Nothing that the app was told is lost even then.
    pub fn close(&self, deadline: Instant) -> Result<(), StoreError> {
        self.state().outbox.record(Vec::new(), true)?;
        self.cache.close(deadline)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writing and seeing.
impl Profile {
    /// Owes a signed event to the relays that may have it. It is durable, and in the cache, when this returns.
    ///
    /// # Errors
    /// [`OutboxError`]; nothing was taken then.
    pub fn publish(&self, event: Verified<Event>) -> Result<Seq, OutboxError> {
        let relays = self.relays_for(&event)?;
        let mut state = self.state();
        let state = &mut *state;
        let json = String::from_utf8(event.canonical().json.to_vec()).expect("canonical JSON is text");
        let seqs = state.outbox.queue(vec![(Content::Event(json), relays)])?;
        self.put(state, std::slice::from_ref(&event))?;
        self.tell_owed(state);
        Ok(seqs[0])
    }

    /// Makes one write, in as many forms as there are ops: dates it once and owes all of them to the relays that may have
    /// them, or none. They are durable when this returns, and part of what the app sees; they are signed when a relay is
    /// first there to take them.
    ///
    /// # Errors
    /// [`OutboxError`]; nothing was taken then.
    pub fn write(&self, ops: Vec<Op>) -> Result<Vec<Seq>, OutboxError> {
        self.write_all(vec![ops])
    }

    /// Makes several writes, all or none, each as [`Profile::write`] does and with a date of its own: of two that are made
    /// together the latter is the later.
    ///
    /// # Errors
    /// [`OutboxError`]; nothing was taken then.
    pub fn write_all(&self, writes: Vec<Vec<Op>>) -> Result<Vec<Seq>, OutboxError> {
        let mut state = self.state();
        let state = &mut *state;
        // The clock must know every stamp that is here.
        self.collections(state)?;
        let mut things = Vec::new();
        for ops in writes {
            let written = state.clock.write(self.world.now_ms());
            for op in ops {
                let draft = Draft { written, op };
                let relays = self.relays_for_draft(&draft)?;
                things.push((Content::Draft(Box::new(draft)), relays));
            }
        }
        let seqs = state.outbox.queue(things)?;
        self.tell_owed(state);
        Ok(seqs)
    }

    /// Looks at the collections and at the drafts that wait, oldest first.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn see<T>(&self, look: impl FnOnce(&Collections, &[&Draft]) -> T) -> Result<T, StoreError> {
        let mut state = self.state();
        let state = &mut *state;
        self.collections(state)?;
        let drafts: Vec<&Draft> = state.outbox.rules().drafts().map(|(_, draft)| draft).collect();
        Ok(look(state.collections.as_ref().expect("they were made a moment ago"), &drafts))
    }

    /// The collections, made from the cache if they were not yet. Shows the clock every stamp.
    fn collections<'s>(&self, state: &'s mut State) -> Result<&'s mut Collections, StoreError> {
        if state.collections.is_none() {
            let ours = Filter::from_json(&format!("{{\"#L\":[\"{}\"]}}", label::NAMESPACE)).expect("a constant");
            let mut collections = Collections::new(self.keys.pubkey());
            let now_secs = self.true_secs(&state.clock);
            self.cache.for_each(&[ours], now_secs, |row| {
                if let Some(Ok(event)) = event_of(row).map(Hashed::check) {
                    collections.absorb(&event.from_store(), &self.cipher, &mut state.clock);
                }
            })?;
            state.collections = Some(collections);
        }
        Ok(state.collections.as_mut().expect("made above"))
    }

    fn relays_for(&self, event: &Event) -> Result<Vec<RelayUrl>, OutboxError> {
        let audience = routing::audience_of(event);
        let relays = match self.routing.labelled(audience) {
            Some(relays) => relays,
            None => self.routing.public(event, |key| self.relay_list(key)),
        };
        some_relay(relays, audience)
    }

    fn relays_for_draft(&self, draft: &Draft) -> Result<Vec<RelayUrl>, OutboxError> {
        let audience = draft.op.audience();
        let relays = self.routing.labelled(audience).unwrap_or_else(|| {
            let own = self.relay_list(&self.keys.pubkey()).unwrap_or_default();
            self.routing.home().chain(own.write).collect()
        });
        some_relay(relays, audience)
    }

    fn relay_list(&self, key: &PublicKey) -> Option<RelayList> {
        let (authors, kinds) = (Some(vec![*key]), Some(vec![RELAY_LIST]));
        let filter = Filter { authors, kinds, limit: Some(1), ..Filter::default() };
        let found = self.cache.query(&[filter], self.world.now_ms() / 1000);
        found.ok()?.first().map(RelayList::of)
    }

    /// Puts events into the collections and the cache, and tells subscribers what was new.
    fn put(&self, state: &mut State, events: &[Verified<Event>]) -> Result<Taken, StoreError> {
        let mut lasting: Vec<Verified<Event>> =
            events.iter().filter(|event| !event.kind.is_ephemeral()).cloned().collect();
        if lasting.iter().any(|event| self.is_own_head(event)) {
            self.collections(state)?;
        }
        if let Some(collections) = &mut state.collections {
            for event in &lasting {
                collections.absorb(event, &self.cipher, &mut state.clock);
            }
            if !self.say_heads_again(state)? {
                // The version that it would replace stays here, and so does what only that one says. The next catch-up
                // brings this one again.
                lasting.retain(|event| !self.is_own_head(event));
            }
        }
        let verdicts = self.cache.put(&lasting, self.true_secs(&state.clock))?;
        fault::point("outbox.cached");
        let mut taken = Taken::default();
        for (event, verdict) in lasting.iter().zip(verdicts) {
            match verdict {
                Verdict::Store => {
                    taken.new += 1;
                    if event.pubkey == self.keys.pubkey() {
                        taken.own.push(Item { created_at: event.created_at, id: event.id });
                    }
                    // Nobody listens: that is no failure.
                    let _ = self.news.send(Arc::new((**event).clone()));
                }
                Verdict::Duplicate => {}
                _ => taken.unwanted.push(event.id),
            }
        }
        Ok(taken)
    }

    fn is_own_head(&self, event: &Event) -> bool {
        event.pubkey == self.keys.pubkey() && Schema::of(event) == Some(Schema::ChatHead)
    }

    /// Before the cache lets go of heads that others replace, what only those said is in the outbox. False when the outbox
    /// has no room for it.
    fn say_heads_again(&self, state: &mut State) -> Result<bool, StoreError> {
        let Some(collections) = &state.collections else { return Ok(true) };
        let drafts: Vec<&Draft> = state.outbox.rules().drafts().map(|(_, draft)| draft).collect();
        let due = collections.heads_due(&drafts);
        self.say_again(state, due)
    }

    /// Owes what is to be said again to the relays that may have it, each thing with a date of its own. False when the
    /// outbox has no room for it.
    fn say_again(&self, state: &mut State, due: Vec<Op>) -> Result<bool, StoreError> {
        let mut things = Vec::new();
        for op in due {
            let draft = Draft { written: state.clock.write(self.world.now_ms()), op };
            let mut relays = self.relays_for_draft(&draft).unwrap_or_default();
            if matches!(draft.op, Op::Settings { form: SettingsForm::Slot, .. }) {
                relays.retain(|relay| state.relays.get(relay).is_some_and(|status| status.slots));
            }
            if !relays.is_empty() {
                things.push((Content::Draft(Box::new(draft)), relays));
            }
        }
        if things.is_empty() {
            return Ok(true);
        }
        match state.outbox.queue(things) {
            Ok(_) => {
                self.tell_owed(state);
                Ok(true)
            }
            Err(OutboxError::Store(error)) => Err(error),
            Err(full) => {
                tracing::warn!("a merge is not published yet: {full}");
                Ok(false)
            }
        }
    }

    fn tell_owed(&self, state: &State) {
        self.refresh(state);
        self.owed.send_modify(|count| *count += 1);
    }

    fn refresh(&self, state: &State) {
        let rules = state.outbox.rules();
        let owed = rules.status();
        let mut relays = state.relays.clone();
        for relay in self.routing.named() {
            relays.entry(relay).or_default();
        }
        for (relay, status) in &mut relays {
            let link = rules.link_status(relay);
            (status.owed, status.in_flight) = (link.owed, link.in_flight);
        }
        let status = Status {
            waiting: owed.entries,
            drafts: owed.drafts,
            dead: owed.dead,
            oldest_draft_ms: owed.oldest_draft_ms,
            outbox_bytes: state.outbox.bytes(),
            damaged_bytes: state.outbox.damaged_bytes(),
            conflicts: state.collections.as_ref().map_or(0, |all| all.settings.conflicts().len()),
            relays,
        };
        self.status.send_if_modified(|old| {
            let changed = *old != status;
            *old = status;
            changed
        });
    }
}

fn some_relay(relays: Vec<RelayUrl>, audience: Audience) -> Result<Vec<RelayUrl>, OutboxError> {
    match (relays.is_empty(), audience) {
        (false, _) => Ok(relays),
        (true, Audience::Training) => Err(OutboxError::NoRelay("`training_relays` in [client] is empty")),
        (true, _) => Err(OutboxError::NoRelay("`relays` in [client] is empty")),
    }
}

fn make_private_dir(dir: &Path) -> Result<(), StoreError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(dir).map_err(io_at("create", dir))
}

/// This device's number, drawn once.
fn device(dir: &Path, world: &World) -> Result<Device, StoreError> {
    let file = dir.join("device");
    match fs::read_to_string(&file) {
        Ok(text) => Device::from_hex(text.trim())
            .ok_or_else(|| StoreError::Damaged(format!("{} holds no device number", file.display()))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            // 0 is no device: imported writes have it.
            let device = Device(world.chance().max(1));
            write_atomically(&file, format!("{device}\n").as_bytes())?;
            Ok(device)
        }
        Err(error) => Err(io_at("read", &file)(error)),
    }
}
