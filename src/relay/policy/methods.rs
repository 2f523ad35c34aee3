//! The methods of the relay management API (NIP-86), and some of our own for members: what each takes, answers and decides.
//!
//! In: a method's name, its parameters, who calls. Out: a JSON result, a change to the [`Decisions`], and what must follow
//! from it ([`Effects`]) outside of them. Pure but for reading the store; saving and following up is for [`super::admin`].

use serde_json::{Value, json};

use super::decisions::{Decisions, ENTRIES_MAX};
use super::{Policy, members, moderation};
use crate::config::IpRange;
use crate::protocol::nip19::{parse_id, parse_pubkey};
use crate::protocol::{EventId, PublicKey};

/// Characters of a reason.
const REASON_CHARS_MAX: usize = 500;
/// Characters of the relay's name and of a role's texts.
pub const NAME_CHARS_MAX: usize = 200;
/// Characters of the relay's description, and of the URL of its icon.
const DESCRIPTION_CHARS_MAX: usize = 10_000;
/// Addresses and ranges that may be blocked: each is looked at for every new connection.
const BLOCKED_IPS_MAX: usize = 10_000;

/// Who calls a method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// The operator, at the command line of the relay's machine.
    Operator,
    /// Whoever has this key.
    Key(PublicKey),
}

/// What must follow from a decision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// This event is to be removed.
    pub erase: Option<EventId>,
    /// Connections from these addresses are to be closed.
    pub block: Option<IpRange>,
    /// Who has become a member.
    pub joined: Vec<PublicKey>,
    /// Who is none any more.
    pub left: Vec<PublicKey>,
    /// The list of members is to be published anew.
    pub members: bool,
    /// This role was made or changed.
    pub role: Option<String>,
    /// This role is gone.
    pub role_gone: Option<String>,
}

/// A method's answer: the `result`, or the text of `error`.
pub type Result<T = Value> = std::result::Result<T, String>;

type Ask = fn(&Policy, &Caller, &mut Params<'_>, u64) -> Result;
type Decide = fn(&Policy, &mut Decisions, &mut Params<'_>, &mut Effects, u64) -> Result;

/// What a method does.
#[derive(Clone, Copy)]
enum Does {
    /// Answers, and changes nothing.
    Answer(Ask),
    /// Changes what was decided.
    Change(Decide),
}

/// A method.
#[derive(Clone, Copy)]
pub struct Method {
    /// Its name, as NIP-86 writes it.
    pub name: &'static str,
    /// Its parameters, as the command line's help names them.
    pub params: &'static str,
    /// What it does, in some words.
    pub about: &'static str,
    /// Only where there are members.
    pub for_members: bool,
    does: Does,
}

const fn answers(name: &'static str, params: &'static str, about: &'static str, ask: Ask) -> Method {
    Method { name, params, about, for_members: false, does: Does::Answer(ask) }
}

const fn changes(name: &'static str, params: &'static str, about: &'static str, decide: Decide) -> Method {
    Method { name, params, about, for_members: false, does: Does::Change(decide) }
}

const fn for_members(method: Method) -> Method {
    Method { for_members: true, ..method }
}

/// Every method, those of NIP-86 first.
pub const METHODS: [Method; 39] = [
    answers("supportedmethods", "", "list the methods", supported),
    changes("banpubkey", "KEY [REASON]", "refuse a key's events and remove those that are stored", ban_key),
    changes("unbanpubkey", "KEY", "lift that", unban_key),
    answers("listbannedpubkeys", "", "list banned keys", |policy, _, _, _| keys(&policy.decided().banned_keys)),
    changes("allowpubkey", "KEY [REASON]", "let a key publish where only listed ones may, without a quota", allow_key),
    changes("unallowpubkey", "KEY", "lift that", |_, decided, params, _, _| {
        decided.allowed_keys.remove(&params.key()?);
        Ok(true.into())
    }),
    answers("listallowedpubkeys", "", "list allowed keys", |policy, _, _, _| keys(&policy.decided().allowed_keys)),
    for_members(changes("createrole", "ID [LABEL] [DESCRIPTION] [HUE] [ORDER]", "make a role", members::create_role)),
    for_members(changes("editrole", "ID [LABEL] [DESCRIPTION] [HUE] [ORDER]", "change a role", members::edit_role)),
    for_members(changes("deleterole", "ID", "delete a role", members::delete_role)),
    for_members(changes("assignrole", "KEY ROLE", "give a role to a member", members::assign_role)),
    for_members(changes("unassignrole", "KEY ROLE", "take it away", members::unassign_role)),
    changes("assignmethod", "KEY METHOD", "let a key call a method", assign_method),
    changes("unassignmethod", "KEY METHOD", "lift that", unassign_method),
    answers("listmethodassignees", "", "list keys that may call methods", list_assignees),
    answers("listeventsneedingmoderation", "", "list events that were reported", |policy, _, _, _| {
        let queue = moderation::queue(&*policy.store, &policy.decided().clone());
        Ok(json!(queue.map_err(|error| format!("the store cannot be read: {error}"))?))
    }),
    changes("allowevent", "ID [REASON]", "let an event pass, and end its moderation", allow_event),
    changes("unallowevent", "ID", "lift that", |_, decided, params, _, _| {
        decided.allowed_events.remove(&params.id()?);
        Ok(true.into())
    }),
    changes("banevent", "ID [REASON]", "remove an event and keep it out", ban_event),
    changes("unbanevent", "ID", "lift that", |_, decided, params, _, _| {
        decided.banned_events.remove(&params.id()?);
        Ok(true.into())
    }),
    answers("listbannedevents", "", "list banned events", |policy, _, _, _| events(&policy.decided().banned_events)),
    answers("listallowedevents", "", "list allowed events", |policy, _, _, _| events(&policy.decided().allowed_events)),
    changes("changerelayname", "NAME", "change the relay's name", |_, decided, params, _, _| {
        decided.name = Some(params.text(NAME_CHARS_MAX)?);
        Ok(true.into())
    }),
    changes("changerelaydescription", "TEXT", "change the relay's description", |_, decided, params, _, _| {
        decided.description = Some(params.text(DESCRIPTION_CHARS_MAX)?);
        Ok(true.into())
    }),
    changes("changerelayicon", "URL", "change the relay's icon", |_, decided, params, _, _| {
        decided.icon = Some(params.text(DESCRIPTION_CHARS_MAX)?);
        Ok(true.into())
    }),
    changes("allowkind", "KIND", "accept a kind; the first one allowed makes all others refused", allow_kind),
    changes("disallowkind", "KIND", "refuse a kind", |_, decided, params, _, _| {
        let kind = params.kind()?;
        decided.allowed_kinds.remove(&kind);
        decided.disallowed_kinds.insert(kind);
        Ok(true.into())
    }),
    answers("listallowedkinds", "", "list allowed kinds", |policy, _, _, _| Ok(json!(policy.decided().allowed_kinds))),
    answers("listdisallowedkinds", "", "list refused kinds", |policy, _, _, _| {
        Ok(json!(policy.decided().disallowed_kinds))
    }),
    changes("blockip", "IP|RANGE [REASON]", "serve an address no longer, and close its connections", block_ip),
    changes("unblockip", "IP|RANGE", "lift that", |_, decided, params, _, _| {
        let range = params.range()?;
        decided.blocked_ips.retain(|(blocked, _)| *blocked != range);
        Ok(true.into())
    }),
    answers("listblockedips", "", "list blocked addresses", |policy, _, _, _| {
        let decided = policy.decided();
        let entry = |(range, reason): &(IpRange, String)| with_reason("ip", &range.to_string(), reason);
        Ok(decided.blocked_ips.iter().map(entry).collect())
    }),
    for_members(changes("createinvite", "[USES] [DAYS]", "make an invitation", members::create_invite)),
    for_members(answers("listinvites", "", "list invitations", |policy, _, _, now| members::list_invites(policy, now))),
    for_members(changes("revokeinvite", "CODE", "end an invitation", members::revoke_invite)),
    for_members(answers("listmembers", "", "list members", |policy, _, _, _| members::list_members(policy))),
    for_members(changes("addmember", "KEY", "make somebody a member", members::add_member)),
    for_members(changes("removemember", "KEY", "end a membership", members::remove_member)),
    for_members(answers("listroles", "", "list roles", |policy, _, _, _| Ok(json!(policy.decided().roles)))),
];

/// The method of this name, where it is to be had: without members some are not.
fn find(policy: &Policy, name: &str) -> Option<&'static Method> {
    METHODS.iter().find(|method| method.name == name && (!method.for_members || policy.key.is_some()))
}

/// Whether a method changes nothing, so that it need not wait for the writer. One that nobody knows changes nothing.
pub fn only_answers(name: &str) -> bool {
    METHODS.iter().all(|method| method.name != name || matches!(method.does, Does::Answer(_)))
}

/// Whether this caller may call a method of this name at all.
pub fn may_call(policy: &Policy, caller: &Caller, name: &str) -> bool {
    match caller {
        Caller::Operator => true,
        Caller::Key(key) if policy.is_admin(key) => true,
        Caller::Key(key) => policy
            .decided()
            .grants
            .get(key)
            .is_some_and(|granted| !granted.is_empty() && (name == "supportedmethods" || granted.contains(name))),
    }
}

/// Carries out a call on the decisions; a change is saved when this returns.
///
/// # Errors
/// The text for the caller; nothing has changed then.
pub fn call(policy: &Policy, caller: &Caller, name: &str, params: &[Value], now: u64) -> Result<(Value, Effects)> {
    if !may_call(policy, caller, name) {
        return Err("this key may not call this method here".to_owned());
    }
    let method = find(policy, name).ok_or_else(|| format!("this relay does not know the method {name:.32}"))?;
    let mut params = Params { values: params, next: 0 };
    match method.does {
        Does::Answer(ask) => Ok((ask(policy, caller, &mut params, now)?, Effects::default())),
        Does::Change(decide) => policy.decide(|decided| {
            let mut effects = Effects::default();
            let result = decide(policy, decided, &mut params, &mut effects, now)?;
            Ok((result, effects))
        }),
    }
}

/// The parameters of a call, taken one after the other. Numbers may be written as texts, since a command line has
/// nothing else.
pub struct Params<'p> {
    values: &'p [Value],
    next: usize,
}

impl Params<'_> {
    fn take(&mut self) -> Option<&Value> {
        let value = self.values.get(self.next);
        self.next += 1;
        value.filter(|value| !value.is_null())
    }

    /// A text.
    ///
    /// # Errors
    /// When it is missing, no text, or too long.
    pub fn text(&mut self, chars_max: usize) -> Result<String> {
        let number = self.next + 1;
        match self.take() {
            Some(Value::String(text)) if text.chars().nth(chars_max).is_none() => Ok(text.clone()),
            Some(Value::String(_)) => Err(format!("parameter {number} has more than {chars_max} characters")),
            _ => Err(format!("parameter {number} must be a text")),
        }
    }

    /// A text that may be left out.
    ///
    /// # Errors
    /// When it is no text, or too long.
    pub fn optional_text(&mut self, chars_max: usize) -> Result<String> {
        match self.values.get(self.next) {
            None | Some(Value::Null) => {
                self.next += 1;
                Ok(String::new())
            }
            Some(_) => self.text(chars_max),
        }
    }

    fn reason(&mut self) -> Result<String> {
        self.optional_text(REASON_CHARS_MAX)
    }

    /// A public key: hex, npub or nprofile.
    ///
    /// # Errors
    /// When it is missing or none.
    pub fn key(&mut self) -> Result<PublicKey> {
        let text = self.text(crate::protocol::nip19::CHARS_MAX)?;
        parse_pubkey(&text).map(PublicKey).map_err(|error| format!("this is no public key: {error}"))
    }

    /// An event id: hex, note or nevent.
    ///
    /// # Errors
    /// When it is missing or none.
    pub fn id(&mut self) -> Result<EventId> {
        let text = self.text(crate::protocol::nip19::CHARS_MAX)?;
        parse_id(&text).map(EventId).map_err(|error| format!("this is no event id: {error}"))
    }

    fn kind(&mut self) -> Result<u16> {
        let number = self.number()?.ok_or("a kind is needed")?;
        u16::try_from(number).map_err(|_| "a kind is a number from 0 to 65535".to_owned())
    }

    fn range(&mut self) -> Result<IpRange> {
        let text = self.text(NAME_CHARS_MAX)?;
        text.trim().parse().map_err(|error: crate::config::IpRangeError| error.to_string())
    }

    /// A number that may be left out.
    ///
    /// # Errors
    /// When it is something else.
    pub fn number(&mut self) -> Result<Option<i64>> {
        let at = self.next + 1;
        let found = match self.take() {
            None => return Ok(None),
            Some(Value::String(text)) if text.is_empty() => return Ok(None),
            Some(Value::String(text)) => text.trim().parse().ok(),
            Some(value) => value.as_i64(),
        };
        found.map(Some).ok_or_else(|| format!("parameter {at} must be a whole number"))
    }
}

/// Refuses an entry more where a list is full.
///
/// # Errors
/// A text that says so.
pub fn room_for_one(entries: usize) -> Result<()> {
    if entries >= ENTRIES_MAX { Err(format!("the list is full: it has {ENTRIES_MAX} entries")) } else { Ok(()) }
}

fn with_reason(name: &str, what: &str, reason: &str) -> Value {
    if reason.is_empty() { json!({ name: what }) } else { json!({ name: what, "reason": reason }) }
}

fn keys(list: &std::collections::BTreeMap<PublicKey, String>) -> Result {
    Ok(list.iter().map(|(key, reason)| with_reason("pubkey", &key.to_hex(), reason)).collect())
}

fn events(list: &std::collections::BTreeMap<EventId, String>) -> Result {
    Ok(list.iter().map(|(id, reason)| with_reason("id", &id.to_hex(), reason)).collect())
}

fn supported(policy: &Policy, caller: &Caller, _: &mut Params<'_>, _: u64) -> Result {
    let names = METHODS.iter().map(|method| method.name).filter(|name| find(policy, name).is_some());
    Ok(names.filter(|name| may_call(policy, caller, name)).collect())
}

fn ban_key(policy: &Policy, decided: &mut Decisions, params: &mut Params<'_>, effects: &mut Effects, _: u64) -> Result {
    let (key, reason) = (params.key()?, params.reason()?);
    if policy.is_admin(&key) || policy.relay_key() == Some(key) {
        return Err("this key administers the relay".to_owned());
    }
    room_for_one(decided.banned_keys.len())?;
    decided.allowed_keys.remove(&key);
    members::end_membership(decided, &key, effects);
    decided.banned_keys.insert(key, reason);
    decided.erasing.insert(key);
    Ok(true.into())
}

fn unban_key(_: &Policy, decided: &mut Decisions, params: &mut Params<'_>, _: &mut Effects, _: u64) -> Result {
    let key = params.key()?;
    decided.banned_keys.remove(&key);
    decided.erasing.remove(&key);
    Ok(true.into())
}

fn allow_key(_: &Policy, decided: &mut Decisions, params: &mut Params<'_>, _: &mut Effects, _: u64) -> Result {
    let (key, reason) = (params.key()?, params.reason()?);
    room_for_one(decided.allowed_keys.len())?;
    decided.banned_keys.remove(&key);
    decided.erasing.remove(&key);
    decided.allowed_keys.insert(key, reason);
    Ok(true.into())
}

fn allow_event(_: &Policy, decided: &mut Decisions, params: &mut Params<'_>, _: &mut Effects, _: u64) -> Result {
    let (id, reason) = (params.id()?, params.reason()?);
    room_for_one(decided.allowed_events.len())?;
    decided.banned_events.remove(&id);
    decided.allowed_events.insert(id, reason);
    Ok(true.into())
}

fn ban_event(_: &Policy, decided: &mut Decisions, params: &mut Params<'_>, effects: &mut Effects, _: u64) -> Result {
    let (id, reason) = (params.id()?, params.reason()?);
    room_for_one(decided.banned_events.len())?;
    decided.allowed_events.remove(&id);
    decided.banned_events.insert(id, reason);
    effects.erase = Some(id);
    Ok(true.into())
}

/// Allowing what was disallowed, where all kinds are accepted, lifts that and no more: to refuse all other kinds from then
/// on is hardly what was meant.
fn allow_kind(policy: &Policy, decided: &mut Decisions, params: &mut Params<'_>, _: &mut Effects, _: u64) -> Result {
    let kind = params.kind()?;
    let was_disallowed = decided.disallowed_kinds.remove(&kind);
    let only_some = !policy.config().access.allow_kinds.is_empty() || !decided.allowed_kinds.is_empty();
    if !was_disallowed || only_some {
        decided.allowed_kinds.insert(kind);
    }
    Ok(true.into())
}

fn block_ip(_: &Policy, decided: &mut Decisions, params: &mut Params<'_>, effects: &mut Effects, _: u64) -> Result {
    let (range, reason) = (params.range()?, params.reason()?);
    decided.blocked_ips.retain(|(blocked, _)| *blocked != range);
    if decided.blocked_ips.len() >= BLOCKED_IPS_MAX {
        return Err(format!("the list is full: it has {BLOCKED_IPS_MAX} entries; block a range instead"));
    }
    decided.blocked_ips.push((range, reason));
    effects.block = Some(range);
    Ok(true.into())
}

fn assign_method(policy: &Policy, decided: &mut Decisions, params: &mut Params<'_>, _: &mut Effects, _: u64) -> Result {
    let (key, name) = (params.key()?, params.text(NAME_CHARS_MAX)?);
    if find(policy, &name).is_none() {
        return Ok(json!([false, "this relay does not know this method"]));
    }
    room_for_one(decided.grants.len())?;
    decided.grants.entry(key).or_default().insert(name);
    Ok(json!([true, ""]))
}

fn unassign_method(_: &Policy, decided: &mut Decisions, params: &mut Params<'_>, _: &mut Effects, _: u64) -> Result {
    let (key, name) = (params.key()?, params.text(NAME_CHARS_MAX)?);
    let Some(granted) = decided.grants.get_mut(&key) else {
        return Ok(json!([false, "this key may call no method"]));
    };
    if !granted.remove(&name) {
        return Ok(json!([false, "this key may not call this method"]));
    }
    if granted.is_empty() {
        decided.grants.remove(&key);
    }
    Ok(json!([true, ""]))
}

fn list_assignees(policy: &Policy, _: &Caller, _: &mut Params<'_>, _: u64) -> Result {
    let decided = policy.decided();
    Ok(decided.grants.iter().map(|(key, methods)| json!({ "pubkey": key, "methods": methods })).collect())
}
