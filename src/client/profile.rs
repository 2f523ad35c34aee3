//! One user's data on this device: outbox, cache and clock in a directory, and the order in which they are written.
//!
//! In: what the app publishes, what relays give and answer. Out: what a link is to send next, news for subscribers.
//! Every call blocks on the disk and belongs on a thread that may wait. Never touches a socket.
//!
//! ```text
//! device           this device's number in the hybrid logical clock, 16 hex digits
//! outbox.journal   what is owed: the app's writes; private, drafts are in the clear
//! cache/           events that are signed, own and foreign, as an embedded store; holds the lock on the profile
//! ```
//!
//! The order: journal on disk → the app has its answer; a draft is signed → journal on disk → cache → relay. Whatever a
//! crash cuts off is done at the next start: every signed event of the outbox is put into the cache again, which does
//! nothing where it is there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::{broadcast, watch};

use super::cache::Cache;
use super::clock::World;
use super::keys::Keys;
use super::outbox::{DurableOutbox, OutboxError};
use super::routing::{Audience, RELAY_LIST, RelayList, Routing};
use super::status::{RelayStatus, Status};
use crate::protocol::supersede::Verdict;
use crate::protocol::{Event, EventId, Filter, PublicKey, Verified};
use crate::store::StoreError;
use crate::store::dir::write_atomically;
use crate::store::fault;
use crate::store::log::io_at;
use crate::sync::clock::{Clock, Device};
use crate::sync::outbox::{Change, Content, Debt, RelayUrl, Seq, Step};

/// News that wait for a subscriber before it is told that it missed some.
const NEWS_MAX: usize = 4_096;
/// Steps that are taken at a time for one relay: a window, and the signatures it needs.
const STEPS_MAX: usize = 128;

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
    keys: Keys,
    world: World,
    routing: Routing,
    cache: Cache,
    state: Mutex<State>,
    news: broadcast::Sender<Arc<Event>>,
    /// Counts up when something new is owed.
    owed: watch::Sender<u64>,
    status: watch::Sender<Status>,
}

struct State {
    outbox: DurableOutbox,
    clock: Clock,
    relays: BTreeMap<RelayUrl, RelayStatus>,
    /// Signed and durable, but not yet in the cache.
    uncached: Vec<Verified<Event>>,
}

/// What a link is to do next.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Steps {
    /// Canonical JSON of events to be sent, in this order.
    pub events: Vec<String>,
    /// Nothing goes out before the keys are proven.
    pub authenticate: bool,
    /// When to ask again, milliseconds since 1970; `None`: when something happens.
    pub wait_until_ms: Option<u64>,
}

/// A relay's answer to an event.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The event.
    pub id: EventId,
    /// Whether the relay has it.
    pub accepted: bool,
    /// Why.
    pub text: String,
}

/// Something that a relay refused for good.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct DeadLetter {
    /// Its number in the outbox.
    pub seq: u64,
    /// The relay.
    pub relay: String,
    /// What the relay said.
    pub reason: String,
    /// The event's id, once it is signed.
    pub id: Option<String>,
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
        let clock = Clock::new(device(&options.dir, &world)?);
        let routing = Routing::new(&options.relays, &options.training_relays);
        let owed: Vec<Verified<Event>> = outbox.events().filter_map(|event| Verified::check(event).ok()).collect();
        cache.put(&owed, world.now_ms() / 1000)?;
        let profile = Profile {
            keys,
            world,
            routing,
            cache,
            state: Mutex::new(State { outbox, clock, relays: BTreeMap::new(), uncached: Vec::new() }),
            news: broadcast::Sender::new(NEWS_MAX),
            owed: watch::Sender::new(0),
            status: watch::Sender::new(Status::default()),
        };
        profile.refresh(&profile.state());
        Ok(profile)
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
        self.state().clock.true_ms(self.world.now_ms()) / 1000
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

/// Publishing.
impl Profile {
    /// Owes a signed event to the relays that may have it. It is durable, and in the cache, when this returns.
    ///
    /// # Errors
    /// [`OutboxError`]; nothing was taken then.
    pub fn publish(&self, event: Verified<Event>) -> Result<Seq, OutboxError> {
        let relays = self.relays_for(&event)?;
        let mut state = self.state();
        let seqs = state.outbox.queue(vec![(Content::Event(json_of(&event)), relays)])?;
        self.put(std::slice::from_ref(&event))?;
        self.refresh(&state);
        self.owed.send_modify(|count| *count += 1);
        Ok(seqs[0])
    }

    /// Tries dead letters again: those of one number, or all. Returns how many.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn revive(&self, seq: Option<Seq>) -> Result<usize, StoreError> {
        let mut state = self.state();
        let dead: Vec<(Seq, RelayUrl)> = state
            .outbox
            .rules()
            .dead_letters()
            .filter(|(dead, _, _)| seq.is_none_or(|seq| seq == *dead))
            .map(|(seq, relay, _)| (seq, relay.clone()))
            .collect();
        let changes: Vec<Change> =
            dead.iter().filter_map(|(seq, relay)| state.outbox.rules_mut().revive(*seq, relay)).collect();
        let count = changes.len();
        state.outbox.record(changes, true)?;
        self.refresh(&state);
        self.owed.send_modify(|owed| *owed += 1);
        Ok(count)
    }

    /// Takes an entry out of the outbox, as a person decides who has seen why it is refused. False if there is none.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn discard(&self, seq: Seq) -> Result<bool, StoreError> {
        let mut state = self.state();
        let change = state.outbox.rules_mut().withdraw(seq);
        let found = change.is_some();
        state.outbox.record(change.into_iter().collect(), true)?;
        self.refresh(&state);
        Ok(found)
    }

    /// What relays refused for good.
    pub fn dead_letters(&self) -> Vec<DeadLetter> {
        let state = self.state();
        let rules = state.outbox.rules();
        let letter = |(seq, relay, reason): (Seq, &RelayUrl, &str)| DeadLetter {
            seq: seq.0,
            relay: relay.to_string(),
            reason: reason.to_owned(),
            id: rules.entry(seq).and_then(|entry| entry.id).map(|id| id.to_hex()),
        };
        rules.dead_letters().map(letter).collect()
    }

    /// Calls `each` with every entry of the outbox: number, content as JSON, and the relays that are owed.
    pub fn for_each_owed(&self, mut each: impl FnMut(u64, serde_json::Value, Vec<String>)) {
        let state = self.state();
        for (seq, entry) in state.outbox.rules().entries() {
            let content = match &entry.content {
                Content::Event(json) => serde_json::from_str(json),
                draft => serde_json::to_value(draft),
            };
            let unpaid = entry.debts.iter().filter(|(_, debt)| !matches!(debt, Debt::Paid(_)));
            each(seq.0, content.unwrap_or_default(), unpaid.map(|(relay, _)| relay.to_string()).collect());
        }
    }

    /// Every relay that is owed something, whether it is named in the settings or not.
    pub fn owed_relays(&self) -> Vec<RelayUrl> {
        let state = self.state();
        let entries = state.outbox.rules().entries();
        let debts = entries.flat_map(|(_, entry)| &entry.debts);
        let owed: std::collections::BTreeSet<&RelayUrl> =
            debts.filter(|(_, debt)| **debt == Debt::Owed).map(|(relay, _)| relay).collect();
        owed.into_iter().cloned().collect()
    }

    fn relays_for(&self, event: &Event) -> Result<Vec<RelayUrl>, OutboxError> {
        let audience = Audience::of(event);
        let relays = match self.routing.labelled(audience) {
            Some(relays) => relays,
            None => self.routing.public(event, |key| self.relay_list(key)),
        };
        match (relays.is_empty(), audience) {
            (false, _) => Ok(relays),
            (true, Audience::Training) => Err(OutboxError::NoRelay("`training_relays` in [client] is empty")),
            (true, _) => Err(OutboxError::NoRelay("`relays` in [client] is empty")),
        }
    }

    fn relay_list(&self, key: &PublicKey) -> Option<RelayList> {
        let filter =
            Filter { authors: Some(vec![*key]), kinds: Some(vec![RELAY_LIST]), limit: Some(1), ..Filter::default() };
        let found = self.cache.query(&[filter], self.world.now_ms() / 1000);
        found.ok()?.first().map(RelayList::of)
    }

    /// Puts events into the cache and tells subscribers what was new. How many were.
    fn put(&self, events: &[Verified<Event>]) -> Result<usize, StoreError> {
        let lasting: Vec<Verified<Event>> = events.iter().filter(|event| !event.kind.is_ephemeral()).cloned().collect();
        let verdicts = self.cache.put(&lasting, self.world.now_ms() / 1000)?;
        fault::point("outbox.cached");
        let new = lasting.iter().zip(verdicts).filter(|(_, verdict)| *verdict == Verdict::Store);
        let mut count = 0;
        for (event, _) in new {
            count += 1;
            // Nobody listens: that is no failure.
            let _ = self.news.send(Arc::new((**event).clone()));
        }
        Ok(count)
    }
}

/// What links do.
impl Profile {
    /// A link came up. `proven`: it knows our keys. The relay's clock corrects ours, and what is unsigned is dated anew.
    pub fn link_up(&self, relay: &RelayUrl, proven: bool, clock_offset_ms: Option<i64>) {
        let mut state = self.state();
        let state = &mut *state;
        let rules = state.outbox.rules_mut();
        rules.link_up(relay);
        if proven {
            rules.authenticated(relay);
        }
        if let Some(offset_ms) = clock_offset_ms {
            state.clock.correct(offset_ms);
            state.clock.restamp(self.world.now_ms(), rules.dates_mut());
        }
    }

    /// A link is gone.
    pub fn link_down(&self, relay: &RelayUrl) {
        self.state().outbox.rules_mut().link_down(relay);
    }

    /// The relay has judged our proof; what was refused for want of one is sent again.
    pub fn authenticated(&self, relay: &RelayUrl) {
        self.state().outbox.rules_mut().authenticated(relay);
    }

    /// What the link is to do next. What it is to send is signed, durable and in the cache when this returns.
    ///
    /// # Errors
    /// When the disk refuses. Nothing may be sent then, and the link counts as gone.
    pub fn steps(&self, relay: &RelayUrl, answer_time_ms: u64) -> Result<Steps, StoreError> {
        let mut state = self.state();
        let state = &mut *state;
        let now_ms = self.world.now_ms();
        let rules = state.outbox.rules_mut();
        rules.time_out(relay, now_ms.saturating_sub(answer_time_ms), now_ms, self.world.chance());
        let mut steps = Steps::default();
        let mut changes = Vec::new();
        for _ in 0..STEPS_MAX {
            match rules.next(relay, now_ms) {
                Step::Sign(seq) => {
                    let event = sign(rules, &self.keys, seq);
                    changes.push(rules.freeze(seq, &event));
                    state.uncached.push(event);
                }
                Step::Send { event, .. } => steps.events.push(event),
                Step::Authenticate => {
                    steps.authenticate = true;
                    break;
                }
                Step::Wait(until) => {
                    steps.wait_until_ms = until;
                    break;
                }
            }
        }
        if let Err(error) = self.make_durable(state, changes) {
            // What was taken for sent is owed as before.
            state.outbox.rules_mut().link_down(relay);
            return Err(error);
        }
        self.refresh(state);
        Ok(steps)
    }

    fn make_durable(&self, state: &mut State, changes: Vec<Change>) -> Result<(), StoreError> {
        state.outbox.record(changes, true)?;
        if !state.uncached.is_empty() {
            self.put(&state.uncached)?;
            state.uncached.clear();
        }
        Ok(())
    }

    /// Takes a relay's answers.
    ///
    /// # Errors
    /// When the disk refuses; the answers hold until the next start, and the relay is asked again then.
    pub fn answered(&self, relay: &RelayUrl, answers: &[Answer]) -> Result<(), StoreError> {
        let mut state = self.state();
        let now_ms = self.world.now_ms();
        let mut changes = Vec::new();
        for Answer { id, accepted, text } in answers {
            let chance = self.world.chance();
            changes.extend(state.outbox.rules_mut().answer(relay, id, *accepted, text, now_ms, chance));
        }
        fault::point("outbox.answered");
        let recorded = state.outbox.record(changes, false);
        self.refresh(&state);
        recorded
    }

    /// Takes events that a relay gave. How many were new; those that are not what they claim to be are passed over.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn take(&self, events: Vec<Event>) -> Result<usize, StoreError> {
        let checked = events.into_iter().filter_map(|event| {
            let id = event.id;
            let checked = Verified::check(event);
            checked.inspect_err(|problem| tracing::warn!(%id, "a relay gave a false event: {problem}")).ok()
        });
        let checked: Vec<Verified<Event>> = checked.collect();
        if checked.is_empty() { Ok(0) } else { self.put(&checked) }
    }

    /// Whether this relay is owed the event, or refused it: then no reconciliation needs to upload it.
    pub fn is_in_outbox(&self, relay: &RelayUrl, ids: &[EventId]) -> Vec<bool> {
        let state = self.state();
        let known: std::collections::HashSet<EventId> = state
            .outbox
            .rules()
            .entries()
            .filter(|(_, entry)| entry.debts.get(relay).is_some_and(|debt| !matches!(debt, Debt::Paid(_))))
            .filter_map(|(_, entry)| entry.id)
            .collect();
        ids.iter().map(|id| known.contains(id)).collect()
    }

    /// How much this relay is owed.
    pub fn owed_to(&self, relay: &RelayUrl) -> usize {
        self.state().outbox.rules().link_status(relay).owed
    }

    /// Changes what is told of a relay.
    pub fn tell(&self, relay: &RelayUrl, change: impl FnOnce(&mut RelayStatus)) {
        let mut state = self.state();
        change(state.relays.entry(relay.clone()).or_default());
        self.refresh(&state);
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
            conflicts: 0,
            relays,
        };
        self.status.send_if_modified(|old| {
            let changed = *old != status;
            *old = status;
            changed
        });
    }
}

fn sign(rules: &crate::sync::outbox::Outbox, keys: &Keys, seq: Seq) -> Verified<Event> {
    let drafts = rules.drafts_told_with(seq);
    let (_, draft) = drafts.first().expect("only drafts are to be signed");
    let crate::sync::draft::Op::Plain(plain) = &draft.op;
    let tags = crate::protocol::Tags::from_lists(plain.tags.iter().filter(|tag| !tag.is_empty()));
    let kind = crate::protocol::Kind(plain.kind);
    keys.sign(kind, draft.written.stamp.second(), tags, plain.content.clone())
}

fn json_of(event: &Verified<Event>) -> String {
    String::from_utf8(event.canonical().json.to_vec()).expect("canonical JSON is text")
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
