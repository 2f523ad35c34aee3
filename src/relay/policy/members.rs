//! Members of the relay, invitations, and requests to join and leave (NIP-43).
//!
//! In: requests of kinds 28934 and 28936, the members' part of the management methods.
//! Out: the answer to a request, and events signed by the relay: its list of members (13534), who came and went (8000,
//! 8001), roles (33534). A request is answered and goes nowhere else: it holds an invitation.
//!
//! <https://github.com/nostr-protocol/nips/blob/master/43.md>

use std::collections::btree_map::Entry;

use secp256k1::rand::{RngCore, rng};
use serde_json::{Value, json};

use super::Policy;
use super::decisions::{Decisions, Invite, Member, Role};
use super::key::RelayKey;
use super::methods::{Effects, NAME_CHARS_MAX, Params, Result, room_for_one};
use crate::protocol::{Event, Filter, Kind, PublicKey, Tags, Verified};
use crate::store::{Store, StoreError, for_each_match};

/// How far a request's `created_at` may be from now, seconds: an old request must not bring anybody back.
const REQUEST_SECS_MAX: u64 = 300;
/// Members that the list names, those who joined last: an event of this many tags is 400 kB. NIP-43 says that the list
/// need not be complete.
const LISTED_MAX: usize = 5_000;
/// Random bytes of an invitation's code: more than anybody guesses.
const CODE_BYTES: usize = 12;
/// Uses of one invitation.
const USES_MAX: i64 = 100_000;
/// Roles, each an event.
const ROLES_MAX: usize = 1_000;
const DAY_SECS: u64 = 24 * 60 * 60;

/// Whether events of this kind are requests to the relay itself.
pub fn is_request(kind: Kind) -> bool {
    kind == Kind::JOIN || kind == Kind::LEAVE
}

/// What became of a request.
#[derive(Debug)]
pub struct Answered {
    /// The flag of `OK`.
    pub accepted: bool,
    /// The text of `OK`.
    pub text: String,
    /// What the relay has to publish for it.
    pub events: Vec<Verified<Event>>,
}

impl Answered {
    fn refused(text: impl Into<String>) -> Answered {
        Answered { accepted: false, text: text.into(), events: Vec::new() }
    }
}

/// Answers a request of a kind that [`is_request`]. On the writer's thread: it saves.
pub fn answer(policy: &Policy, request: &Event, now: u64) -> Answered {
    let Some(key) = &policy.key else {
        return Answered::refused(super::Refusal::NoMembers.to_string());
    };
    if request.created_at.abs_diff(now) > REQUEST_SECS_MAX {
        return Answered::refused("invalid: created_at must be now, give or take a few minutes");
    }
    if request.kind == Kind::LEAVE && !request.is_protected() {
        return Answered::refused("invalid: a request to leave has a - tag (NIP-70)");
    }
    let decided = policy.decide(|decided| {
        let mut effects = Effects::default();
        let text = match request.kind == Kind::JOIN {
            true => join(policy, decided, request, &mut effects, now)?,
            false => leave(decided, request, &mut effects)?,
        };
        Ok((text, events_for(key, decided, &effects, now)))
    });
    match decided {
        Ok((text, events)) => Answered { accepted: true, text, events },
        Err(text) if text.contains(": ") => Answered::refused(text),
        Err(text) => Answered::refused(format!("error: {text}")),
    }
}

fn join(policy: &Policy, decided: &mut Decisions, request: &Event, effects: &mut Effects, now: u64) -> Result<String> {
    if decided.members.contains_key(&request.pubkey) {
        return Ok("duplicate: you are already a member of this relay".to_owned());
    }
    let code = request.tags.values("claim").next().unwrap_or_default();
    let Some(invite) = decided.invites.get_mut(code) else {
        return Err("restricted: that is an invalid invite code".to_owned());
    };
    if invite.expires <= now {
        decided.invites.remove(code);
        return Err("restricted: that invite code is expired".to_owned());
    }
    invite.uses = invite.uses.saturating_sub(1);
    if invite.uses == 0 {
        decided.invites.remove(code);
    }
    begin_membership(decided, request.pubkey, effects, now)?;
    let config = policy.config();
    let name = decided.name.as_ref().unwrap_or(&config.info.name);
    let relay = if config.service_url.is_empty() { name } else { &config.service_url };
    Ok(format!("info: welcome to {relay}"))
}

fn leave(decided: &mut Decisions, request: &Event, effects: &mut Effects) -> Result<String> {
    match end_membership(decided, &request.pubkey, effects) {
        true => Ok("info: you are no longer a member of this relay".to_owned()),
        false => Ok("duplicate: you are no member of this relay".to_owned()),
    }
}

fn begin_membership(decided: &mut Decisions, key: PublicKey, effects: &mut Effects, now: u64) -> Result<()> {
    room_for_one(decided.members.len())?;
    if let Entry::Vacant(place) = decided.members.entry(key) {
        place.insert(Member { since: now, ..Member::default() });
        effects.joined.push(key);
        effects.members = true;
    }
    Ok(())
}

/// Ends a membership and the invitations of that member; false when there was none.
pub fn end_membership(decided: &mut Decisions, key: &PublicKey, effects: &mut Effects) -> bool {
    let was_member = decided.members.remove(key).is_some();
    if was_member {
        decided.invites.retain(|_, invite| invite.by.as_ref() != Some(key));
        effects.left.push(*key);
        effects.members = true;
    }
    was_member
}

/// The events that tell the world what has changed.
pub fn events_for(key: &RelayKey, decided: &mut Decisions, effects: &Effects, now: u64) -> Vec<Verified<Event>> {
    let mut events = Vec::new();
    let mut sign = |decided: &mut Decisions, kind, tags: Tags| {
        let at = decided.sign_at(now);
        events.push(key.sign(kind, at, tags));
    };
    for (who, kind) in [(&effects.joined, Kind::MEMBER_ADDED), (&effects.left, Kind::MEMBER_REMOVED)] {
        for member in who {
            sign(decided, kind, Tags::from_lists([vec!["-"], vec!["p", &member.to_hex()]]));
        }
    }
    if effects.members {
        let tags = list_tags(decided);
        sign(decided, Kind::MEMBERS, tags);
    }
    if let Some(id) = &effects.role {
        let tags = role_tags(id, &decided.roles[id]);
        sign(decided, Kind::ROLE, tags);
    }
    if let Some(id) = &effects.role_gone {
        let address = format!("{}:{}:{id}", Kind::ROLE, key.public());
        sign(decided, Kind::DELETION, Tags::from_lists([vec!["-"], vec!["a", &address]]));
    }
    events
}

/// The list of members, if the one that is stored says something else: the settings, or a restore, may have come between.
///
/// # Errors
/// When the store cannot be read.
pub fn list_if_stale(
    policy: &Policy,
    store: &dyn Store,
    now: u64,
) -> std::result::Result<Vec<Verified<Event>>, StoreError> {
    let Some(key) = &policy.key else { return Ok(Vec::new()) };
    let filter = Filter { authors: Some(vec![key.public()]), kinds: Some(vec![Kind::MEMBERS]), ..Filter::default() };
    let mut stored = None;
    for_each_match(store, vec![filter], |row| {
        stored = std::str::from_utf8(&row.json).ok().and_then(|json| Event::from_json(json).ok());
        Ok::<(), StoreError>(())
    })?;
    if stored.as_ref().is_some_and(|stored| stored.tags == list_tags(&policy.decided())) {
        return Ok(Vec::new());
    }
    let now = now.max(stored.map_or(0, |stored| stored.created_at + 1));
    let effects = Effects { members: true, ..Effects::default() };
    Ok(policy.decide(|decided| Ok(events_for(key, decided, &effects, now))).unwrap_or_default())
}

fn list_tags(decided: &Decisions) -> Tags {
    let mut members: Vec<_> = decided.members.iter().collect();
    members.sort_by_key(|(_, member)| std::cmp::Reverse(member.since));
    members.truncate(LISTED_MAX);
    let tag = |(key, member): (&PublicKey, &Member)| {
        ["member".to_owned(), key.to_hex()].into_iter().chain(member.roles.iter().cloned()).collect::<Vec<_>>()
    };
    Tags::from_lists(std::iter::once(vec!["-".to_owned()]).chain(members.into_iter().map(tag)))
}

fn role_tags(id: &str, role: &Role) -> Tags {
    let mut tags = vec![vec!["-".to_owned()], vec!["d".to_owned(), id.to_owned()]];
    let mut add = |name: &str, value: String| {
        if !value.is_empty() {
            tags.push(vec![name.to_owned(), value]);
        }
    };
    add("label", role.label.clone());
    add("description", role.description.clone());
    add("color", role.color.map(|hue| hue.to_string()).unwrap_or_default());
    add("order", role.order.map(|order| order.to_string()).unwrap_or_default());
    Tags::from_lists(tags)
}

/// Makes an invitation; its code.
///
/// # Errors
/// When there are too many.
pub fn new_invite(
    policy: &Policy,
    decided: &mut Decisions,
    uses: u32,
    days: Option<u64>,
    by: Option<PublicKey>,
    now: u64,
) -> Result<String> {
    decided.invites.retain(|_, invite| invite.expires > now);
    room_for_one(decided.invites.len())?;
    let mut bytes = [0; CODE_BYTES];
    rng().fill_bytes(&mut bytes);
    let code = faster_hex::hex_string(&bytes);
    let expires = now + days.unwrap_or(policy.config().members.invite_days) * DAY_SECS;
    decided.invites.insert(code.clone(), Invite { uses, expires, by });
    Ok(code)
}

/// `createinvite [USES] [DAYS]`: the code, and how far it reaches.
pub fn create_invite(
    policy: &Policy,
    decided: &mut Decisions,
    params: &mut Params<'_>,
    _: &mut Effects,
    now: u64,
) -> Result {
    let uses = params.number()?.unwrap_or(1);
    let days = params.number()?;
    if !(1..=USES_MAX).contains(&uses) || days.is_some_and(|days| !(1..=3_650).contains(&days)) {
        return Err(format!("an invitation is for 1 to {USES_MAX} people and for 1 to 3650 days"));
    }
    let code = new_invite(policy, decided, uses as u32, days.map(|days| days as u64), None, now)?;
    let expires = decided.invites[&code].expires;
    Ok(json!({ "claim": code, "uses": uses, "expires": expires }))
}

/// `listinvites`.
pub fn list_invites(policy: &Policy, now: u64) -> Result {
    let decided = policy.decided();
    let valid = decided.invites.iter().filter(|(_, invite)| invite.expires > now);
    let entry = |(code, invite): (&String, &Invite)| {
        let mut entry = json!({ "claim": code, "uses": invite.uses, "expires": invite.expires });
        if let Some(by) = &invite.by {
            entry["by"] = json!(by);
        }
        entry
    };
    Ok(valid.map(entry).collect())
}

/// `revokeinvite CODE`.
pub fn revoke_invite(_: &Policy, decided: &mut Decisions, params: &mut Params<'_>, _: &mut Effects, _: u64) -> Result {
    let code = params.text(NAME_CHARS_MAX)?;
    match decided.invites.remove(&code) {
        Some(_) => Ok(true.into()),
        None => Err("there is no such invitation".to_owned()),
    }
}

/// `listmembers`.
pub fn list_members(policy: &Policy) -> Result {
    let decided = policy.decided();
    let entry =
        |(key, member): (&PublicKey, &Member)| json!({ "pubkey": key, "since": member.since, "roles": member.roles });
    Ok(decided.members.iter().map(entry).collect())
}

/// `addmember KEY`.
pub fn add_member(
    _: &Policy,
    decided: &mut Decisions,
    params: &mut Params<'_>,
    effects: &mut Effects,
    now: u64,
) -> Result {
    let key = params.key()?;
    if decided.banned_keys.contains_key(&key) {
        return Err("this key is banned; unbanpubkey lifts that".to_owned());
    }
    begin_membership(decided, key, effects, now)?;
    Ok(true.into())
}

/// `removemember KEY`.
pub fn remove_member(
    _: &Policy,
    decided: &mut Decisions,
    params: &mut Params<'_>,
    effects: &mut Effects,
    _: u64,
) -> Result {
    end_membership(decided, &params.key()?, effects);
    Ok(true.into())
}

fn role_of(params: &mut Params<'_>, before: Role) -> Result<Role> {
    let or_before = |text: String, before: String| if text.is_empty() { before } else { text };
    let label = or_before(params.optional_text(NAME_CHARS_MAX)?, before.label);
    let description = or_before(params.optional_text(NAME_CHARS_MAX)?, before.description);
    let color = match params.number()? {
        None => before.color,
        Some(hue @ 0..=360) => Some(hue as u16),
        Some(_) => return Err("a color is a hue from 0 to 360".to_owned()),
    };
    Ok(Role { label, description, color, order: params.number()?.or(before.order) })
}

/// `createrole ID …`.
pub fn create_role(
    _: &Policy,
    decided: &mut Decisions,
    params: &mut Params<'_>,
    effects: &mut Effects,
    _: u64,
) -> Result {
    let id = params.text(NAME_CHARS_MAX)?;
    if id.is_empty() || decided.roles.contains_key(&id) {
        return Err("a new role needs an id that no other has".to_owned());
    }
    if decided.roles.len() >= ROLES_MAX {
        return Err(format!("there are {ROLES_MAX} roles already"));
    }
    let role = role_of(params, Role::default())?;
    effects.role = Some(id.clone());
    decided.roles.insert(id, role);
    Ok(true.into())
}

/// `editrole ID …`: what is left out stays.
pub fn edit_role(
    _: &Policy,
    decided: &mut Decisions,
    params: &mut Params<'_>,
    effects: &mut Effects,
    _: u64,
) -> Result {
    let id = params.text(NAME_CHARS_MAX)?;
    let role = decided.roles.get_mut(&id).ok_or_else(no_role)?;
    *role = role_of(params, std::mem::take(role))?;
    effects.role = Some(id);
    Ok(true.into())
}

/// `deleterole ID`: nobody has it any more.
pub fn delete_role(
    _: &Policy,
    decided: &mut Decisions,
    params: &mut Params<'_>,
    effects: &mut Effects,
    _: u64,
) -> Result {
    let id = params.text(NAME_CHARS_MAX)?;
    decided.roles.remove(&id).ok_or_else(no_role)?;
    for member in decided.members.values_mut() {
        effects.members |= member.roles.remove(&id);
    }
    effects.role_gone = Some(id);
    Ok(true.into())
}

/// `assignrole KEY ROLE`.
pub fn assign_role(
    _: &Policy,
    decided: &mut Decisions,
    params: &mut Params<'_>,
    effects: &mut Effects,
    _: u64,
) -> Result {
    let (key, id) = (params.key()?, params.text(NAME_CHARS_MAX)?);
    if !decided.roles.contains_key(&id) {
        return Err(no_role());
    }
    let member = decided.members.get_mut(&key).ok_or_else(no_member)?;
    effects.members = member.roles.insert(id);
    Ok(true.into())
}

/// `unassignrole KEY ROLE`.
pub fn unassign_role(
    _: &Policy,
    decided: &mut Decisions,
    params: &mut Params<'_>,
    effects: &mut Effects,
    _: u64,
) -> Result {
    let (key, id) = (params.key()?, params.text(NAME_CHARS_MAX)?);
    let member = decided.members.get_mut(&key).ok_or_else(no_member)?;
    effects.members = member.roles.remove(&id);
    Ok(Value::Bool(true))
}

fn no_role() -> String {
    "there is no such role".to_owned()
}

fn no_member() -> String {
    "this key is no member".to_owned()
}
