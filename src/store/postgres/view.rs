//! What the database holds that bears on a batch, and what the batch does to it.
//!
//! Read once for the whole batch, while nobody else may write, then kept up to date in memory as event after event is
//! judged: `protocol::supersede` decides, as it does for every store, and what it decided is written in one go.

use std::collections::{HashMap, HashSet};

use sqlx::postgres::PgConnection;
use sqlx::{Row, query};

use super::rows::{self, Columns, address, seconds};
use crate::protocol::slot::{self, Rank, Slot};
use crate::protocol::supersede::{
    Address, Known, Target, Verdict, Version, deleters, deletion_targets, judge, may_delete,
};
use crate::protocol::{Event, EventId, Kind, PublicKey, Verified};
use crate::store::StoreError;
use crate::store::schema::address_hash;

/// What a tombstone forbids, as its column `what` has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum What {
    /// An event by its id, if the requester may delete it.
    Id = 1,
    /// The versions of an address up to a time.
    Address = 2,
    /// All of a key's up to a time.
    Vanish = 3,
}

struct Tombstone {
    requester: PublicKey,
    until: u64,
}

/// An event that can be read at this point of the batch.
enum Held<'b> {
    /// It is in the database; nothing more about it matters.
    There,
    /// It is in the database and some event of the batch asks for it to be deleted.
    Named(Box<Event>),
    /// It was stored by this batch; its number among the new ones.
    New(&'b Event, usize),
}

/// The view, and the writes it has led to.
#[derive(Default)]
pub(super) struct View<'b> {
    held: HashMap<EventId, Held<'b>>,
    current: HashMap<[u8; 16], Version>,
    tombstones: HashMap<(What, Vec<u8>), Vec<Tombstone>>,
    gone: HashMap<[u8; 16], Version>,
    /// The kept versions of the settings of authors who write some.
    settings: HashMap<PublicKey, Vec<slot::Version>>,
    /// What is to be written.
    pub(super) writes: Writes<'b>,
}

/// The outcome of a batch, or of the part of it that was judged.
#[derive(Default)]
pub(super) struct Writes<'b> {
    /// Events to insert, and whether they are news; what the same batch took out again is none.
    new: Vec<Option<(&'b Verified<Event>, bool)>>,
    /// Ids to delete.
    pub(super) removed: Vec<EventId>,
    pub(super) tombstones: TombstoneColumns,
    gone: HashSet<[u8; 16]>,
}

/// New tombstones, a column each.
#[derive(Default)]
pub(super) struct TombstoneColumns {
    pub(super) what: Vec<i16>,
    pub(super) targets: Vec<Vec<u8>>,
    pub(super) requesters: Vec<Vec<u8>>,
    pub(super) until: Vec<i64>,
    pub(super) requests: Vec<Vec<u8>>,
}

/// What has to be known to judge a batch.
#[derive(Default)]
struct Question {
    ids: HashSet<[u8; 32]>,
    /// Those of the ids whose events must be looked at.
    named: HashSet<[u8; 32]>,
    addresses: HashSet<[u8; 16]>,
    keys: HashSet<[u8; 32]>,
    /// Those who write settings.
    settings_of: HashSet<[u8; 32]>,
}

impl Question {
    fn about(events: &[Verified<Event>]) -> Question {
        let mut question = Question::default();
        for event in events {
            question.ids.insert(event.id.0);
            question.addresses.extend(address(event));
            question.keys.extend(deleters(event).map(|key| key.0));
            if slot::is_version(&**event) {
                question.settings_of.insert(event.pubkey.0);
            }
            if event.kind == Kind::DELETION {
                for target in deletion_targets(event) {
                    match target {
                        Target::Event(id) => {
                            question.ids.insert(id.0);
                            question.named.insert(id.0);
                        }
                        Target::Address(address) => _ = question.addresses.insert(address_hash(&address)),
                    }
                }
            }
        }
        question
    }
}

fn column<const N: usize>(set: &HashSet<[u8; N]>) -> Vec<Vec<u8>> {
    set.iter().map(|bytes| bytes.to_vec()).collect()
}

/// Everything that bears on a batch, in one answer. The first column says what a row is.
const KNOWN: &str = "
SELECT 0::smallint AS what, id AS target, NULL::bytea AS other, created_at AS at,
       CASE WHEN id = ANY($2) THEN json END AS json
  FROM sledge.events WHERE id = ANY($1)
UNION ALL SELECT 10::smallint, address, id, created_at, NULL FROM sledge.events WHERE address = ANY($3)
UNION ALL SELECT 11::smallint, address, id, created_at, NULL FROM sledge.gone WHERE address = ANY($3)
UNION ALL SELECT what, target, requester, until, NULL FROM sledge.tombstones WHERE what = 1 AND target = ANY($1)
UNION ALL SELECT what, target, requester, until, NULL FROM sledge.tombstones WHERE what = 2 AND target = ANY($3)
UNION ALL SELECT what, target, requester, until, NULL FROM sledge.tombstones WHERE what = 3 AND target = ANY($4)
UNION ALL SELECT 12::smallint, id, NULL, created_at, json FROM sledge.events WHERE pubkey = ANY($5) AND kind = 10001";

impl<'b> View<'b> {
    /// Reads what bears on `events`.
    pub(super) async fn load(
        connection: &mut PgConnection,
        events: &[Verified<Event>],
    ) -> Result<Result<View<'b>, StoreError>, sqlx::Error> {
        let question = Question::about(events);
        let known = query(KNOWN)
            .bind(column(&question.ids))
            .bind(column(&question.named))
            .bind(column(&question.addresses))
            .bind(column(&question.keys))
            .bind(column(&question.settings_of));
        let mut view = View::default();
        for row in known.fetch_all(connection).await? {
            let target: &[u8] = row.try_get(1)?;
            let other: Option<&[u8]> = row.try_get(2)?;
            let row = KnownRow {
                what: row.try_get(0)?,
                target,
                other: other.unwrap_or_default(),
                at: row.try_get::<i64, _>(3)?.unsigned_abs(),
                json: row.try_get(4)?,
            };
            if let Err(error) = view.take_in(&row) {
                return Ok(Err(error));
            }
        }
        Ok(Ok(view))
    }

    fn take_in(&mut self, row: &KnownRow<'_>) -> Result<(), StoreError> {
        let version = || Ok::<_, StoreError>(Version { created_at: row.at, id: rows::id(row.other)? });
        let what = match row.what {
            0 => {
                let event = row.json.map(rows::event).transpose()?;
                let held = event.map_or(Held::There, |event| Held::Named(Box::new(event)));
                self.held.insert(rows::id(row.target)?, held);
                return Ok(());
            }
            10 => {
                self.current.insert(rows::key(row.target)?, version()?);
                return Ok(());
            }
            11 => {
                self.gone.insert(rows::key(row.target)?, version()?);
                return Ok(());
            }
            12 => {
                let event = rows::event(row.json.unwrap_or_default())?;
                if slot::is_version(&event) {
                    self.settings.entry(event.pubkey).or_default().push(slot::Version::of(&event));
                }
                return Ok(());
            }
            1 => What::Id,
            2 => What::Address,
            _ => What::Vanish,
        };
        let tombstone = Tombstone { requester: rows::pubkey(row.other)?, until: row.at };
        self.tombstones.entry((what, row.target.to_vec())).or_default().push(tombstone);
        Ok(())
    }

    /// Judges an event and, if it is to be stored, takes it up with all it causes, except what a request to vanish takes
    /// out: that is for the database to find.
    pub(super) fn add(&mut self, event: &'b Verified<Event>, now: u64) -> Verdict {
        let known = self.known(event, now);
        let verdict = judge(event, &known, now);
        match verdict {
            Verdict::Store | Verdict::StoreFormer => {
                self.put(event, known.current, verdict == Verdict::Store);
                self.bound_settings(event, now);
            }
            Verdict::Deleted if known.deleted_by_id => self.note_gone(event, known.current),
            _ => {}
        }
        verdict
    }

    fn known(&self, event: &Event, now: u64) -> Known {
        let address = address(event);
        let latest = |what, target: &[u8]| self.tombstones(what, target).map(|stone| stone.until).max();
        let deleters: Vec<PublicKey> = deleters(event).collect();
        Known {
            stored: self.held.contains_key(&event.id),
            current: address.and_then(|address| self.current.get(&address).copied()),
            deleted_by_id: self.tombstones(What::Id, &event.id.0).any(|stone| deleters.contains(&stone.requester)),
            address_deleted_until: address.and_then(|address| latest(What::Address, &address)),
            deleted_version: address.and_then(|address| self.gone.get(&address).copied()),
            vanished_until: deleters.iter().filter_map(|key| latest(What::Vanish, &key.0)).max(),
            rank: slot::is_version(event).then(|| self.settings_with(event, now).0),
        }
    }

    /// Where a version of settings stands among its author's, and which are too many with it.
    fn settings_with(&self, event: &Event, now: u64) -> (Rank, HashSet<EventId>) {
        let versions = self.settings.get(&event.pubkey).cloned().unwrap_or_default();
        Slot::new(versions).with(slot::Version::of(event), now)
    }

    /// Takes up a version of settings that is stored, and takes out those that are too many with it.
    fn bound_settings(&mut self, event: &Event, now: u64) {
        if !slot::is_version(event) {
            return;
        }
        let (_, gone) = self.settings_with(event, now);
        self.settings.entry(event.pubkey).or_default().push(slot::Version::of(event));
        gone.iter().for_each(|id| self.remove(id));
    }

    fn tombstones(&self, what: What, target: &[u8]) -> impl Iterator<Item = &Tombstone> {
        self.tombstones.get(&(what, target.to_vec())).into_iter().flatten()
    }

    fn put(&mut self, event: &'b Verified<Event>, replaced: Option<Version>, is_news: bool) {
        if let Some(replaced) = replaced {
            self.remove(&replaced.id);
        }
        self.held.insert(event.id, Held::New(event, self.writes.new.len()));
        self.writes.new.push(Some((event, is_news)));
        if let Some(address) = address(event) {
            self.current.insert(address, Version::of(event));
        }
        match event.kind {
            Kind::DELETION => deletion_targets(event).for_each(|target| self.delete(event, &target)),
            Kind::VANISH => self.forbid(What::Vanish, &event.pubkey.0, event),
            _ => {}
        }
    }

    /// Takes out what a deletion request names and its author may delete (NIP-09), and forbids its return.
    fn delete(&mut self, request: &Event, target: &Target) {
        match target {
            Target::Event(id) => {
                self.forbid(What::Id, &id.0, request);
                let named = match self.held.get(id) {
                    Some(Held::New(event, _)) => {
                        Some((address(event), Version::of(event), may_delete(&request.pubkey, *event)))
                    }
                    Some(Held::Named(event)) => {
                        Some((address(event), Version::of(event), may_delete(&request.pubkey, &**event)))
                    }
                    Some(Held::There) | None => None,
                };
                let Some((address, version, true)) = named else { return };
                self.remove(id);
                if let Some(address) = address {
                    // Whoever is stored at an address is its occupant.
                    self.current.remove(&address);
                    self.push_gone(address, version);
                }
            }
            Target::Address(address) => {
                let hash = address_hash(address);
                self.forbid(What::Address, &hash, request);
                let current =
                    self.current.get(&hash).filter(|version| version.created_at <= request.created_at).copied();
                if let Some(current) = current {
                    self.current.remove(&hash);
                    self.remove(&current.id);
                }
            }
        }
    }

    fn forbid(&mut self, what: What, target: &[u8], request: &Event) {
        let tombstone = Tombstone { requester: request.pubkey, until: request.created_at };
        let stones = self.tombstones.entry((what, target.to_vec())).or_default();
        stones.push(tombstone);
        let columns = &mut self.writes.tombstones;
        columns.what.push(what as i16);
        columns.targets.push(target.to_vec());
        columns.requesters.push(request.pubkey.0.to_vec());
        columns.until.push(seconds(request.created_at));
        columns.requests.push(request.id.0.to_vec());
    }

    /// Notes that a version of an address is deleted, and takes out what it would have replaced had it come earlier.
    fn note_gone(&mut self, deleted: &Event, current: Option<Version>) {
        let Some(address) = Address::of(deleted).map(|address| address_hash(&address)) else { return };
        let version = Version::of(deleted);
        self.push_gone(address, version);
        if let Some(current) = current.filter(|current| version.replaces(current)) {
            self.current.remove(&address);
            self.remove(&current.id);
        }
    }

    fn push_gone(&mut self, address: [u8; 16], version: Version) {
        let newest = self.gone.entry(address).or_insert(version);
        if version.replaces(newest) {
            *newest = version;
        }
        self.writes.gone.insert(address);
    }

    fn remove(&mut self, id: &EventId) {
        self.settings.values_mut().for_each(|versions| versions.retain(|version| version.id != *id));
        match self.held.remove(id) {
            Some(Held::New(_, number)) => self.writes.new[number] = None,
            // The occupant of an address need not have been asked for by id.
            Some(Held::There | Held::Named(_)) | None => self.writes.removed.push(*id),
        }
    }

    /// The new rows of `gone`: addresses, times, ids.
    pub(super) fn gone_columns(&self) -> (Vec<Vec<u8>>, Vec<i64>, Vec<Vec<u8>>) {
        let gone = self.writes.gone.iter().filter_map(|address| Some((address, self.gone.get(address)?)));
        let mut columns = (Vec::new(), Vec::new(), Vec::new());
        for (address, version) in gone {
            columns.0.push(address.to_vec());
            columns.1.push(seconds(version.created_at));
            columns.2.push(version.id.0.to_vec());
        }
        columns
    }
}

impl Writes<'_> {
    /// The new rows of `events`, in the order of storing.
    pub(super) fn columns(&self) -> Columns {
        let mut columns = Columns::default();
        self.new.iter().flatten().for_each(|(event, is_news)| columns.push(event, *is_news));
        columns
    }
}

struct KnownRow<'r> {
    what: i16,
    target: &'r [u8],
    other: &'r [u8],
    at: u64,
    json: Option<&'r str>,
}
