//! Who may write: lists of the settings, decisions of admins (NIP-86), members (NIP-43), web of trust, quotas.
//!
//! In: an event and who sends it, as one of the ingest stages, before anything costly; decisions, on the writer's thread
//! alone. Out: a [`Refusal`], or nothing. A check takes no lock that anybody holds for long and asks no disk; where nothing
//! is set it is a handful of look-ups in empty lists.
//!
//! What was decided goes before what the settings say, and is in force once it is saved. Every door asks: clients, import
//! and sync. Who may *publish* (listed keys, addresses, quotas) is asked of clients only; what is banned, denied or of a
//! refused kind is kept out by every door.

pub mod admin;
pub mod decisions;
pub mod invitations;
pub mod key;
pub mod members;
pub mod methods;
pub mod moderation;
pub mod quota;
pub mod settings;
#[cfg(test)]
mod tests;
pub mod trust;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use arc_swap::ArcSwap;
use decisions::Decisions;
use key::RelayKey;
use quota::{Limits, Quotas, UsedUp};
use settings::{Settings, WrongKey};
use trust::Trust;

use super::ingest::{Sender, Source};
use crate::config::{Access, Config, Writers};
use crate::protocol::{Event, Kind, PublicKey};
use crate::store::{Store, StoreError};

/// Why an event is refused. `Display` is the `OK` text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// An admin removed this very event.
    #[error("blocked: this event was removed from this relay")]
    EventBanned,
    /// An admin or the settings refuse the author.
    #[error("blocked: this key may not publish here")]
    KeyBanned,
    /// The kind is not accepted.
    #[error("blocked: events of kind {0} are not accepted here")]
    Kind(Kind),
    /// The address is not among those that may publish.
    #[error("blocked: your address may not publish here")]
    Ip,
    /// Neither the author nor whoever sends it is listed, and nobody has authenticated: that might help.
    #[error("auth-required: only listed keys may publish here; authenticate with one")]
    UnlistedUnproven,
    /// Neither the author nor whoever sends it is listed.
    #[error("restricted: only listed keys may publish here")]
    Unlisted,
    /// The web of trust was not read yet, and nothing else lists the author.
    #[error("error: this relay is still reading whom it trusts; try again in a moment")]
    TrustUnread,
    /// A quota is used up.
    #[error("rate-limited: {0}; it begins anew at midnight UTC")]
    UsedUp(#[from] UsedUp),
    /// A request that only makes sense where there are members.
    #[error("restricted: this relay has no members that one could join (NIP-43)")]
    NoMembers,
    /// A token for an HTTP request (NIP-98), which is a secret for a minute.
    #[error("invalid: kind 27235 belongs in the header of an HTTP request")]
    HttpToken,
    /// Only the relay issues invitations.
    #[error("blocked: the relay alone issues its invitations")]
    ForeignInvite,
}

/// Why there is no policy to go by.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A key in the settings.
    #[error("{}: {}", .0.setting, .0)]
    Setting(#[from] WrongKey),
    /// What was decided cannot be read. Starting without would let in whom an admin has banned.
    #[error("what was decided about who may write cannot be read ({0}); restore it from a backup, or delete the blob")]
    Decisions(String),
    /// The relay's own key.
    #[error("the relay's own key ({place}): {problem}")]
    Key {
        /// Where it is.
        place: String,
        /// What is wrong with it; never the key.
        problem: String,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What the settings say, until a reload.
struct Rules {
    config: Arc<Config>,
    settings: Settings,
    limits: Limits,
}

impl Rules {
    fn new(config: Arc<Config>) -> Result<Rules, WrongKey> {
        Ok(Rules { settings: Settings::new(&config)?, limits: Limits::new(&config.access), config })
    }
}

/// Who may write, and who decides.
pub struct Policy {
    rules: ArcSwap<Rules>,
    store: Arc<dyn Store>,
    decided: RwLock<Decisions>,
    /// Held while something is decided: one decision at a time.
    deciding: Mutex<()>,
    quotas: Quotas,
    trust: Arc<Trust>,
    /// Where there are members.
    key: Option<RelayKey>,
}

impl Policy {
    /// The policy of these settings, with what was decided about this store.
    ///
    /// # Errors
    /// [`PolicyError`]: there is no safe way to go on without.
    pub fn open(config: Arc<Config>, store: Arc<dyn Store>) -> Result<Policy, PolicyError> {
        let rules = Rules::new(config.clone())?;
        let decided = saved(&*store)?;
        let key = match config.members.enabled {
            true => Some(RelayKey::open(&config.members.key_file, &*store)?),
            false => None,
        };
        let trust = Arc::new(Trust::new(rules.settings.trust_roots.clone(), &config.trust));
        let (rules, decided) = (ArcSwap::from_pointee(rules), RwLock::new(decided));
        Ok(Policy { rules, store, decided, deciding: Mutex::default(), quotas: Quotas::default(), trust, key })
    }

    /// Goes by other settings from now on. Members, the web of trust and the plugin keep those of the start.
    pub fn reload(&self, config: Arc<Config>) {
        match Rules::new(config) {
            Ok(rules) => self.rules.store(Arc::new(rules)),
            Err(wrong) => tracing::error!(setting = wrong.setting, "{wrong}; the lists of before hold"),
        }
    }

    /// The settings in force.
    fn config(&self) -> Arc<Config> {
        self.rules.load().config.clone()
    }

    /// Takes over what another relay on the same store has decided. On the writer's thread.
    pub fn refresh(&self) {
        let _not_while_deciding = super::lock(&self.deciding);
        match saved(&*self.store) {
            Ok(decided) if decided != *self.decided() => {
                *self.decided.write().unwrap_or_else(PoisonError::into_inner) = decided;
            }
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, "what was decided cannot be read; what was known before holds"),
        }
    }

    /// Starts reading the web of trust, if there is one.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start_trust(&self) -> std::io::Result<trust::Reader> {
        let every = Duration::from_secs(self.config().trust.refresh_secs);
        trust::Reader::start(self.trust.clone(), self.store.clone(), every)
    }

    /// What was decided, as it is now.
    pub fn decided(&self) -> RwLockReadGuard<'_, Decisions> {
        self.decided.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The relay's own public key, where it has one (NIP-11 `self`).
    pub fn relay_key(&self) -> Option<PublicKey> {
        self.key.as_ref().map(RelayKey::public)
    }

    /// Whether this key administers the relay.
    pub fn is_admin(&self, key: &PublicKey) -> bool {
        self.rules.load().settings.admins.contains(key)
    }

    /// Whether this key may call some method of the management API.
    pub fn may_manage(&self, key: &PublicKey) -> bool {
        self.is_admin(key) || self.decided().grants.contains_key(key)
    }

    /// Whether anybody may call the management API from afar.
    pub fn has_admins(&self) -> bool {
        !self.rules.load().settings.admins.is_empty() || !self.decided().grants.is_empty()
    }

    /// Whether some people may not publish (NIP-11 `restricted_writes`). Bans of single keys are no such rule.
    pub fn restricts_writes(&self) -> bool {
        let access = &self.rules.load().config.access;
        access.write == Writers::Listed
            || !access.allow_kinds.is_empty()
            || !access.allow_ips.is_empty()
            || !self.decided().allowed_kinds.is_empty()
    }

    /// Whether clients at this address are not served at all.
    pub fn blocks(&self, ip: IpAddr) -> bool {
        let rules = self.rules.load();
        rules.config.access.deny_ips.iter().any(|range| range.contains(ip)) || self.decided().blocks(ip)
    }

    /// Whether `sender` may hand in `event`. Nothing of the event has been verified yet. `now` is in seconds since 1970.
    ///
    /// # Errors
    /// The first [`Refusal`].
    pub fn check(&self, event: &Event, sender: &Sender, now: u64) -> Result<(), Refusal> {
        let decided = self.decided();
        check_bans(&decided, event)?;
        if decided.allowed_events.contains_key(&event.id) {
            return Ok(());
        }
        let rules = self.rules.load();
        if rules.settings.deny_keys.contains(&event.pubkey) && !decided.allowed_keys.contains_key(&event.pubkey) {
            return Err(Refusal::KeyBanned);
        }
        if members::is_request(event.kind) {
            return if self.key.is_some() { Ok(()) } else { Err(Refusal::NoMembers) };
        }
        if event.kind == Kind::INVITE && self.key.is_some() {
            return Err(Refusal::ForeignInvite);
        }
        if event.kind == Kind::HTTP_AUTH {
            return Err(Refusal::HttpToken);
        }
        check_kind(&rules.config.access, &decided, event.kind)?;
        if sender.source != Source::Client {
            return Ok(());
        }
        self.check_publisher(&rules, &decided, event, sender, now)
    }

    /// What a client must be to publish, beyond not being banned.
    fn check_publisher(
        &self,
        rules: &Rules,
        decided: &Decisions,
        event: &Event,
        sender: &Sender,
        now: u64,
    ) -> Result<(), Refusal> {
        let access = &rules.config.access;
        if let Some(ip) = sender.ip
            && !access.allow_ips.is_empty()
            && !access.allow_ips.iter().any(|range| range.contains(ip))
        {
            return Err(Refusal::Ip);
        }
        // A request to vanish is everybody's right.
        if access.write == Writers::Listed && event.kind != Kind::VANISH {
            self.check_listed(access, decided, event, sender)?;
        }
        if !self.is_favoured(decided, &event.pubkey) {
            self.quotas.check(&rules.limits, &event.pubkey, sender.ip, now)?;
        }
        Ok(())
    }

    /// Counts an event that was found to be good towards the quotas.
    pub fn count(&self, event: &Event, bytes: usize, sender: &Sender, now: u64) {
        if sender.source == Source::Client && !self.is_favoured(&self.decided(), &event.pubkey) {
            self.quotas.count(&self.rules.load().limits, &event.pubkey, sender.ip, bytes, now);
        }
    }

    /// Looks once more at an event that has waited: somebody may have been banned meanwhile.
    ///
    /// # Errors
    /// [`Refusal::EventBanned`] or [`Refusal::KeyBanned`].
    pub fn recheck(&self, event: &Event) -> Result<(), Refusal> {
        check_bans(&self.decided(), event)
    }

    fn check_listed(
        &self,
        access: &Access,
        decided: &Decisions,
        event: &Event,
        sender: &Sender,
    ) -> Result<(), Refusal> {
        let mut unread = false;
        let mut is_listed = |key: &PublicKey| match self.lists(decided, key) {
            Some(listed) => listed,
            None => {
                unread = true;
                false
            }
        };
        if is_listed(&event.pubkey) || sender.keys.iter().any(&mut is_listed) {
            return Ok(());
        }
        if access.inbox_kinds.iter().any(|range| range.contains(event.kind.0)) {
            // One that names a stranger too would be a way in for what is meant for strangers.
            let mut receivers = event.tags.values("p").map(PublicKey::from_hex).peekable();
            if receivers.peek().is_some() && receivers.all(|key| key.is_some_and(|key| is_listed(&key))) {
                return Ok(());
            }
        }
        Err(match (unread, sender.keys.is_empty()) {
            (true, _) => Refusal::TrustUnread,
            (_, true) => Refusal::UnlistedUnproven,
            _ => Refusal::Unlisted,
        })
    }

    /// Whether a key may publish where only listed ones may; `None`: only the web of trust can tell, and does not yet.
    fn lists(&self, decided: &Decisions, key: &PublicKey) -> Option<bool> {
        if decided.banned_keys.contains_key(key) {
            return Some(false);
        }
        if self.is_favoured(decided, key) || self.is_member(decided, key) {
            return Some(true);
        }
        self.trust.reaches(key)
    }

    /// Whether no quota holds for a key.
    fn is_favoured(&self, decided: &Decisions, key: &PublicKey) -> bool {
        self.rules.load().settings.allow_keys.contains(key)
            || decided.allowed_keys.contains_key(key)
            || self.is_admin(key)
    }

    fn is_member(&self, decided: &Decisions, key: &PublicKey) -> bool {
        self.key.is_some() && decided.members.contains_key(key)
    }

    /// Changes what was decided, saves it, and puts it in force; whatever `change` returns comes back. Where `change`
    /// refuses or saving fails, nothing has changed.
    ///
    /// # Errors
    /// That of `change`; a text for the admin when it cannot be saved.
    fn decide<T>(&self, change: impl FnOnce(&mut Decisions) -> Result<T, String>) -> Result<T, String> {
        let _one_at_a_time = super::lock(&self.deciding);
        // Another relay on the same store may have decided something meanwhile.
        let before = saved(&*self.store).map_err(|error| {
            tracing::error!(%error, "what was decided cannot be read");
            "the decision could not be saved; the relay's log says why".to_owned()
        })?;
        let mut next = before.clone();
        let value = change(&mut next)?;
        if next == before {
            return Ok(value);
        }
        self.store.save_state(decisions::BLOB, &next.to_blob()).map_err(|error| {
            tracing::error!(%error, "a decision could not be saved and is not in force");
            "the decision could not be saved; the relay's log says why".to_owned()
        })?;
        *self.decided.write().unwrap_or_else(PoisonError::into_inner) = next;
        Ok(value)
    }
}

/// What was decided about a store.
fn saved(store: &dyn Store) -> Result<Decisions, PolicyError> {
    match store.load_state(decisions::BLOB)? {
        Some(blob) => Decisions::from_blob(&blob).map_err(PolicyError::Decisions),
        None => Ok(Decisions::default()),
    }
}

fn check_bans(decided: &Decisions, event: &Event) -> Result<(), Refusal> {
    if decided.banned_events.contains_key(&event.id) {
        return Err(Refusal::EventBanned);
    }
    if decided.banned_keys.contains_key(&event.pubkey) && !decided.allowed_events.contains_key(&event.id) {
        return Err(Refusal::KeyBanned);
    }
    Ok(())
}

fn check_kind(access: &Access, decided: &Decisions, kind: Kind) -> Result<(), Refusal> {
    let named = |ranges: &[crate::config::KindRange]| ranges.iter().any(|range| range.contains(kind.0));
    if decided.disallowed_kinds.contains(&kind.0) {
        return Err(Refusal::Kind(kind));
    }
    if decided.allowed_kinds.contains(&kind.0) {
        return Ok(());
    }
    let only_some = !access.allow_kinds.is_empty() || !decided.allowed_kinds.is_empty();
    let takes_away = kind == Kind::DELETION || kind == Kind::VANISH;
    if named(&access.deny_kinds) || (only_some && !named(&access.allow_kinds) && !takes_away) {
        return Err(Refusal::Kind(kind));
    }
    Ok(())
}
