#![allow(clippy::unwrap_used)]

use std::sync::mpsc;

use serde_json::{Value, json};

use super::admin::{Answer, Call, Chore, Desk};
use super::methods::{Caller, METHODS};
use super::*;
use crate::protocol::testing::{Author, NOW, sign};
use crate::protocol::{EventId, Filter, Verified};
use crate::store::for_each_match;
use crate::store::memory::MemoryStore;

pub(super) struct Room {
    pub(super) policy: Arc<Policy>,
    store: MemoryStore,
}

pub(super) const ADMIN: u8 = 9;

pub(super) fn key(number: u8) -> PublicKey {
    Author::new(number).note(NOW, "").pubkey
}

pub(super) fn room(change: impl FnOnce(&mut Config)) -> Room {
    room_on(MemoryStore::new(), change)
}

fn room_on(store: MemoryStore, change: impl FnOnce(&mut Config)) -> Room {
    let mut config = Config::default();
    config.access.admins = vec![key(ADMIN).to_hex()];
    change(&mut config);
    let policy = Policy::open(Arc::new(config), Arc::new(store.clone())).unwrap();
    Room { policy: Arc::new(policy), store }
}

impl Room {
    fn desk(&self) -> Desk<'_> {
        Desk { store: &self.store, fanout: None, now: NOW }
    }

    /// Does work to its end.
    fn work(&self, mut chore: Chore) -> usize {
        (1..).find(|_| !chore(&self.desk())).unwrap()
    }

    fn answer(&self, caller: Caller, method: &str, params: Value) -> Answer {
        let (tell, told) = mpsc::channel();
        let params = params.as_array().unwrap().clone();
        let call = Call { caller, method: method.to_owned(), params };
        self.work(admin::chore(self.policy.clone(), call, move |answer| tell.send(answer).unwrap()));
        told.try_recv().unwrap()
    }

    #[track_caller]
    pub(super) fn call(&self, method: &str, params: Value) -> Value {
        self.answer(Caller::Operator, method, params).result.unwrap()
    }

    fn check(&self, event: &Event, sender: &Sender) -> Result<(), Refusal> {
        self.policy.check(event, sender, NOW)
    }

    pub(super) fn request(&self, event: &Event) -> (bool, String) {
        let answered = members::answer(&self.policy, event, NOW);
        self.desk().publish(&answered.events).unwrap();
        (answered.accepted, answered.text)
    }

    fn stored(&self, kind: u16) -> Vec<Event> {
        let mut events = Vec::new();
        let filter = Filter { kinds: Some(vec![Kind(kind)]), ..Filter::default() };
        for_each_match(&self.store, vec![filter], |row| {
            events.push(Event::from_json(std::str::from_utf8(&row.json).unwrap()).unwrap());
            Ok::<(), StoreError>(())
        })
        .unwrap();
        events
    }
}

fn client(keys: &[u8]) -> Sender {
    Sender::client([192, 0, 2, 1].into(), keys.iter().map(|number| key(*number)).collect())
}

fn note(author: u8) -> Verified<Event> {
    Author::new(author).note(NOW, "")
}

/// Lists of the settings: keys, kinds, addresses; import passes by what only says who may publish.
#[test]
fn lists_of_the_settings() {
    let room = room(|config| {
        config.access.deny_keys = vec![key(2).to_hex()];
        config.access.allow_kinds = vec!["1".parse().unwrap(), "30000-39999".parse().unwrap()];
        config.access.deny_kinds = vec!["30005".parse().unwrap()];
        config.access.allow_ips = vec!["192.0.2.0/24".parse().unwrap()];
        config.access.deny_ips = vec!["203.0.113.0/24".parse().unwrap()];
    });
    let from = client(&[]);
    let of_kind = |kind| sign(1, kind, NOW, &[], "");
    assert_eq!(room.check(&note(1), &from), Ok(()));
    assert_eq!(room.check(&note(2), &from), Err(Refusal::KeyBanned));
    assert_eq!(room.check(&note(2), &Sender::import()), Err(Refusal::KeyBanned));
    for kind in [7, 29_999, 30_005] {
        assert_eq!(room.check(&of_kind(kind), &from), Err(Refusal::Kind(Kind(kind))));
    }
    for kind in [5, 62, 30_000, 39_999] {
        assert_eq!(room.check(&of_kind(kind), &from), Ok(()), "{kind}");
    }
    let elsewhere = Sender::client([198, 51, 100, 1].into(), Arc::default());
    assert_eq!(room.check(&note(1), &elsewhere), Err(Refusal::Ip));
    assert_eq!(room.check(&note(1), &Sender::import()), Ok(()));
    assert!(room.policy.blocks([203, 0, 113, 9].into()) && !room.policy.blocks([192, 0, 2, 1].into()));
    assert!(room.policy.restricts_writes());
}

/// Where only listed keys may publish: the author or the sender is listed, or a message to somebody listed; a request to
/// vanish is everybody's right.
#[test]
fn only_listed_keys_may_publish() {
    let room = room(|config| {
        config.access.write = Writers::Listed;
        config.access.allow_keys = vec![key(1).to_hex()];
    });
    assert_eq!(room.check(&note(1), &client(&[])), Ok(()));
    assert_eq!(room.check(&note(ADMIN), &client(&[])), Ok(()));
    assert_eq!(room.check(&note(2), &client(&[])), Err(Refusal::UnlistedUnproven));
    assert_eq!(room.check(&note(2), &client(&[3])), Err(Refusal::Unlisted));
    assert_eq!(room.check(&note(2), &client(&[3, 1])), Ok(()));
    assert_eq!(room.check(&note(2), &Sender::import()), Ok(()));
    assert_eq!(room.check(&sign(2, 62, NOW, &[], ""), &client(&[])), Ok(()));
    let (listed, stranger) = (key(1).to_hex(), key(3).to_hex());
    let wrap = |tags: &[&[&str]]| room.check(&sign(2, 1059, NOW, tags, ""), &client(&[3]));
    assert_eq!(wrap(&[&["p", &listed]]), Ok(()));
    assert_eq!(wrap(&[&["p", &listed], &["p", &stranger]]), Err(Refusal::Unlisted));
    assert_eq!(wrap(&[]), Err(Refusal::Unlisted));
    room.call("allowpubkey", json!([key(2).to_hex()]));
    assert_eq!(room.check(&note(2), &client(&[])), Ok(()));
    room.call("unallowpubkey", json!([key(2).to_hex()]));
    assert_eq!(room.check(&note(2), &client(&[])), Err(Refusal::UnlistedUnproven));
}

/// Nobody waits for the web of trust, and whoever it reaches may publish.
#[test]
fn the_web_of_trust_lists_keys() {
    let room = room(|config| {
        config.access.write = Writers::Listed;
        config.trust.roots = vec![key(1).to_hex()];
    });
    room.store.apply(&[sign(1, 3, NOW, &[&["p", &key(2).to_hex()]], "")], NOW).unwrap();
    assert_eq!(room.check(&note(1), &client(&[])), Ok(()));
    assert_eq!(room.check(&note(2), &client(&[])), Err(Refusal::TrustUnread));
    room.policy.trust.read(&room.store).unwrap();
    assert_eq!(room.check(&note(2), &client(&[])), Ok(()));
    assert_eq!(room.check(&note(3), &client(&[])), Err(Refusal::UnlistedUnproven));
    room.call("banpubkey", json!([key(2).to_hex()]));
    assert_eq!(room.check(&note(3), &client(&[2])), Err(Refusal::Unlisted), "a banned key vouches for nobody");
}

/// A quota holds for those who are not favoured, and is counted for what was accepted.
#[test]
fn quotas_spare_the_favoured() {
    let room = room(|config| {
        config.access.key_events_per_day_max = 1;
        config.access.allow_keys = vec![key(1).to_hex()];
    });
    for author in [1, 2, ADMIN] {
        room.policy.count(&note(author), 100, &client(&[]), NOW);
    }
    assert_eq!(room.check(&note(1), &client(&[])), Ok(()));
    assert_eq!(room.check(&note(ADMIN), &client(&[])), Ok(()));
    let refusal = room.check(&note(2), &client(&[])).unwrap_err();
    assert!(refusal.to_string().starts_with("rate-limited: "), "{refusal}");
    room.policy.count(&note(3), 100, &Sender::import(), NOW);
    assert_eq!(room.check(&note(3), &client(&[])), Ok(()));
}

/// A ban removes what is stored, however much, in steps; it outlives a restart, in the midst of it too; requests to vanish
/// hold on.
#[test]
fn a_ban_removes_what_is_stored() {
    let room = room(|_| {});
    let notes: Vec<_> = (0..1_200).map(|n| Author::new(1).note(NOW + n, "")).collect();
    let vanish = sign(1, 62, NOW - 9, &[&["relay", "ALL_RELAYS"]], "");
    room.store.apply(&notes, NOW).unwrap();
    room.store.apply(&[vanish.clone(), note(2)], NOW).unwrap();
    let call = Call {
        caller: Caller::Operator,
        method: "banpubkey".to_owned(),
        params: vec![json!(key(1).to_hex()), json!("spam")],
    };
    let (tell, told) = mpsc::channel();
    let mut chore = admin::chore(room.policy.clone(), call, move |answer| tell.send(answer).unwrap());
    assert!(chore(&room.desk()) && chore(&room.desk()), "more than one step");
    assert!(told.try_recv().is_err() && room.store.stats().events > 2);
    assert_eq!(room.check(&notes[0], &client(&[])), Err(Refusal::KeyBanned));
    drop(chore);

    let room = room_on(room.store.clone(), |_| {});
    assert_eq!(room.check(&notes[0], &Sender::import()), Err(Refusal::KeyBanned), "after a restart");
    room.work(admin::start_chore(room.policy.clone()));
    assert_eq!(room.store.stats().events, 2);
    assert!(room.store.contains(&vanish.id).unwrap());
    let listed = json!([{"pubkey": key(1).to_hex(), "reason": "spam"}]);
    assert_eq!(room.call("listbannedpubkeys", json!([])), listed);
    assert!(room.policy.decided().erasing.is_empty());
    room.call("allowpubkey", json!([key(1).to_hex()]));
    assert_eq!(room.call("listbannedpubkeys", json!([])), json!([]));
    assert_eq!(room.check(&notes[0], &client(&[])), Ok(()));
}

/// A banned event is removed and kept out by every door, and also when it has waited; an allowed one passes in spite of its
/// author.
#[test]
fn single_events_are_banned_and_allowed() {
    let room = room(|_| {});
    room.store.apply(&[note(1)], NOW).unwrap();
    let id = note(1).id;
    assert_eq!(room.policy.recheck(&note(1)), Ok(()));
    room.call("banevent", json!([id.to_hex(), "bad"]));
    assert_eq!(room.store.stats().events, 0);
    for sender in [client(&[]), Sender::import()] {
        assert_eq!(room.check(&note(1), &sender), Err(Refusal::EventBanned));
    }
    assert_eq!(room.policy.recheck(&note(1)), Err(Refusal::EventBanned));
    room.call("banpubkey", json!([key(1).to_hex()]));
    room.call("allowevent", json!([id.to_hex()]));
    assert_eq!(room.check(&note(1), &client(&[])), Ok(()));
    assert_eq!(room.policy.recheck(&note(1)), Ok(()));
    assert_eq!(room.call("listbannedevents", json!([])), json!([]));
    room.call("unallowevent", json!([id.to_hex()]));
    assert_eq!(room.check(&note(1), &client(&[])), Err(Refusal::KeyBanned));
}

/// Allowing a kind that was disallowed lifts that alone; allowing one from the start refuses the others.
#[test]
fn kinds_are_allowed_and_disallowed() {
    let room = room(|_| {});
    let allowed = |kind| room.check(&sign(1, kind, NOW, &[], ""), &client(&[])).is_ok();
    room.call("disallowkind", json!([7]));
    assert!(!allowed(7) && allowed(1));
    assert_eq!(room.call("listdisallowedkinds", json!([])), json!([7]));
    room.call("allowkind", json!([7]));
    assert!(allowed(7) && allowed(1));
    room.call("allowkind", json!(["1"]));
    assert!(!allowed(7) && allowed(1) && allowed(5) && room.policy.restricts_writes());
    assert_eq!(room.call("listallowedkinds", json!([])), json!([1]));
    room.call("disallowkind", json!([1]));
    assert!(allowed(7) && !allowed(1));
}

/// Admins may call everything, others what they were granted; what is listed is what may be called.
#[test]
fn callers_may_what_they_may() {
    let room = room(|_| {});
    let (admin, friend, stranger) = (Caller::Key(key(ADMIN)), Caller::Key(key(1)), Caller::Key(key(2)));
    let supported = |caller| room.answer(caller, "supportedmethods", json!([])).result;
    let all = supported(Caller::Operator).unwrap();
    assert_eq!(supported(admin).unwrap(), all);
    let open = METHODS.iter().filter(|method| !method.for_members).count();
    assert_eq!(all.as_array().unwrap().len(), open, "those for members are not to be had");
    assert!(supported(friend).is_err());
    let grant = |method: &str| room.call("assignmethod", json!([key(1).to_hex(), method]));
    assert_eq!(grant("banevent"), json!([true, ""]));
    assert_eq!(grant("explode")[0], false);
    assert_eq!(supported(friend).unwrap(), json!(["supportedmethods", "banevent"]));
    let id = EventId([1; 32]).to_hex();
    assert!(room.answer(friend, "banevent", json!([id])).result.is_ok());
    assert!(room.answer(friend, "banpubkey", json!([key(3).to_hex()])).result.is_err());
    assert!(room.answer(stranger, "banevent", json!([id])).result.is_err());
    let listed = json!([{"pubkey": key(1).to_hex(), "methods": ["banevent"]}]);
    assert_eq!(room.call("listmethodassignees", json!([])), listed);
    room.call("unassignmethod", json!([key(1).to_hex(), "banevent"]));
    assert!(room.answer(friend, "banevent", json!([id])).result.is_err());
}

/// Wrong parameters are named and change nothing; admins cannot be banned.
#[test]
fn wrong_calls_change_nothing() {
    let room = room(|config| config.members.enabled = true);
    let before = room.policy.decided().clone();
    for (method, params) in [
        ("banpubkey", json!([])),
        ("banpubkey", json!(["npub1"])),
        ("banpubkey", json!([7])),
        ("banpubkey", json!([key(ADMIN).to_hex()])),
        ("banpubkey", json!([key(1).to_hex(), 7])),
        ("banpubkey", json!([key(1).to_hex(), "x".repeat(501)])),
        ("banevent", json!(["xyz"])),
        ("allowkind", json!([65_536])),
        ("allowkind", json!([1.5])),
        ("allowkind", json!(["one"])),
        ("blockip", json!(["localhost"])),
        ("changerelayname", json!([null])),
        ("createinvite", json!([0])),
        ("createinvite", json!([1, 100_000])),
        ("createrole", json!([""])),
        ("createrole", json!(["id", "", "", 361])),
        ("assignrole", json!([key(1).to_hex(), "none"])),
        ("explode", json!([])),
    ] {
        let problem = room.answer(Caller::Operator, method, params.clone()).result.unwrap_err();
        assert!(problem.len() > 8, "{method} {params}: {problem}");
    }
    assert_eq!(*room.policy.decided(), before);
}

pub(super) fn join(author: u8, at: u64, claim: &str) -> Verified<Event> {
    sign(author, 28934, at, &[&["-"], &["claim", claim]], "")
}

/// An invitation lets in as many as it says, not after its time; who joins and leaves is published, signed by the relay.
#[test]
fn members_join_and_leave() {
    let room = room(|config| {
        config.members.enabled = true;
        config.access.write = Writers::Listed;
    });
    let relay = room.policy.relay_key().unwrap();
    let invite = room.call("createinvite", json!([2, 1]));
    let code = invite["claim"].as_str().unwrap();
    assert_eq!((&invite["uses"], &invite["expires"]), (&json!(2), &json!(NOW + 86_400)));
    assert_eq!(room.check(&join(1, NOW, code), &client(&[])), Ok(()));
    assert_eq!(room.check(&note(1), &client(&[])), Err(Refusal::UnlistedUnproven));
    assert!(room.request(&join(1, NOW, "wrong")).1.starts_with("restricted: "));
    assert!(room.request(&join(1, NOW - 301, code)).1.starts_with("invalid: "), "an old request");
    let (accepted, text) = room.request(&join(1, NOW, code));
    assert!(accepted && text.starts_with("info: welcome"), "{text}");
    assert_eq!(room.check(&note(1), &client(&[])), Ok(()));
    let (accepted, text) = room.request(&join(1, NOW, code));
    assert!(accepted && text.starts_with("duplicate: "), "{text}");
    assert!(room.request(&join(2, NOW, code)).0);
    assert!(!room.request(&join(3, NOW, code)).0, "it was for two");

    let list = room.stored(13534);
    let members: Vec<&str> = list[0].tags.values("member").collect();
    assert_eq!((list.len(), list[0].pubkey, list[0].is_protected()), (1, relay, true));
    assert_eq!(members.len(), 2);
    assert_eq!(room.stored(8000).len(), 2);
    let leave = |tags: &[&[&str]]| room.request(&sign(1, 28936, NOW, tags, ""));
    assert!(!leave(&[]).0, "without the tag of NIP-70");
    assert!(leave(&[&["-"]]).0);
    assert!(leave(&[&["-"]]).1.starts_with("duplicate: "));
    assert_eq!(room.stored(13534)[0].tags.values("member").collect::<Vec<_>>(), [key(2).to_hex()]);
    assert_eq!(room.stored(8001)[0].tags.values("p").collect::<Vec<_>>(), [key(1).to_hex()]);
    assert_eq!(room.check(&note(1), &client(&[])), Err(Refusal::UnlistedUnproven));
    room.call("banpubkey", json!([key(2).to_hex()]));
    assert_eq!(room.stored(13534)[0].tags.values("member").count(), 0);
}

/// An invitation that has expired says so; without members there is nothing to join.
#[test]
fn invitations_end() {
    let room = room(|config| config.members.enabled = true);
    let invite = room.call("createinvite", json!([]));
    let code = invite["claim"].as_str().unwrap().to_owned();
    let expires = invite["expires"].as_u64().unwrap();
    let late = members::answer(&room.policy, &join(1, expires, &code), expires);
    assert!(late.text.contains("expired"), "{}", late.text);
    let other = room.call("createinvite", json!([5]))["claim"].clone();
    assert_eq!(room.call("listinvites", json!([])).as_array().unwrap().len(), 2);
    room.call("revokeinvite", json!([other]));
    assert!(!room.request(&join(1, NOW, other.as_str().unwrap())).0);
    let closed = self::room(|_| {});
    assert_eq!(closed.check(&join(1, NOW, &code), &client(&[])), Err(Refusal::NoMembers));
}

/// Roles are events of the relay, go with the list, and leave it.
#[test]
fn roles_are_published() {
    let room = room(|config| config.members.enabled = true);
    room.work(admin::start_chore(room.policy.clone()));
    assert_eq!(room.stored(13534).len(), 1, "an empty list");
    let member = key(1).to_hex();
    room.call("addmember", json!([member]));
    room.call("createrole", json!(["28b7", "king", "ruler", 37, "1"]));
    room.call("assignrole", json!([member, "28b7"]));
    room.call("editrole", json!(["28b7", "queen"]));
    let tags =
        |event: &Event| event.tags.iter().map(|tag| tag.items().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>();
    let role = room.stored(33534);
    assert_eq!(tags(&role[0]), ["-", "d 28b7", "label queen", "description ruler", "color 37", "order 1"]);
    assert_eq!(tags(&room.stored(13534)[0]), ["-".to_owned(), format!("member {member} 28b7")]);
    room.call("deleterole", json!(["28b7"]));
    assert_eq!((room.stored(33534).len(), tags(&room.stored(13534)[0]).len()), (0, 2));
    assert_eq!(room.call("listmembers", json!([]))[0]["roles"], json!([]));
    assert_eq!(room.call("listroles", json!([])), json!({}));
}

/// A blob that cannot be understood stops the start: it may hold bans.
#[test]
fn decisions_that_cannot_be_read_stop_the_start() {
    let store = MemoryStore::new();
    store.save_state(decisions::BLOB, b"{").unwrap();
    let opened = Policy::open(Arc::new(Config::default()), Arc::new(store));
    assert!(matches!(opened.map(drop), Err(PolicyError::Decisions(_))));
}

/// A reload changes the lists at once, and what was decided stays.
#[test]
fn lists_follow_a_reload() {
    let room = room(|_| {});
    room.call("banpubkey", json!([key(2).to_hex()]));
    let mut config = Config::default();
    config.access.deny_keys = vec![key(1).to_hex()];
    config.access.key_events_per_day_max = 1;
    room.policy.count(&note(3), 10, &client(&[]), NOW);
    room.policy.reload(Arc::new(config.clone()));
    assert_eq!(room.check(&note(1), &client(&[])), Err(Refusal::KeyBanned));
    assert_eq!(room.check(&note(2), &client(&[])), Err(Refusal::KeyBanned));
    room.policy.count(&note(3), 10, &client(&[]), NOW);
    assert!(matches!(room.check(&note(3), &client(&[])), Err(Refusal::UsedUp(_))));
    assert!(!room.policy.is_admin(&key(ADMIN)));
    config.access.deny_keys = vec!["nonsense".to_owned()];
    room.policy.reload(Arc::new(config));
    assert_eq!(room.check(&note(1), &client(&[])), Err(Refusal::KeyBanned), "the lists of before hold");
}
