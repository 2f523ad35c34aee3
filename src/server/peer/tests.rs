#![allow(clippy::unwrap_used)]

use bytes::Bytes;

use super::*;
use crate::auth::Challenge;
use crate::protocol::EventId;
use crate::protocol::testing::{Author, NOW};
use crate::server::frames::tests::read;
use crate::store::Row;

fn peer(change: impl FnOnce(&mut Limits)) -> Peer {
    let mut config = Config::default();
    change(&mut config.limits);
    let gate = Arc::new(Gate::new(&config));
    Peer::new(Arc::new(config), gate, Session::new(Challenge::new([7; 16]), Authority::parse("localhost:7777")))
}

fn event_message() -> String {
    let json = Author::new(1).note(NOW, "").canonical().json.clone();
    message::publish(std::str::from_utf8(&json).unwrap())
}

fn req(peer: &mut Peer, id: &str) -> Action {
    peer.receive(&format!("[\"REQ\",\"{id}\",{{\"kinds\":[1,2]}}]"))
}

#[track_caller]
fn serial_of(action: Action) -> Serial {
    match action {
        Action::Subscribe { serial, .. } | Action::Count { serial, .. } => serial,
        other => panic!("unexpected {other:?}"),
    }
}

#[track_caller]
fn refused(action: Action, start: &str) -> Option<Serial> {
    match action {
        Action::Answer { text, ended } => {
            assert!(text.starts_with(start), "{text}");
            ended
        }
        other => panic!("unexpected {other:?}"),
    }
}

fn rows(serial: Serial, json: &[&'static str], end: PageEnd) -> Page {
    let row =
        |json: &&'static str| Row { id: EventId([0; 32]), created_at: 0, json: Bytes::from_static(json.as_bytes()) };
    Page { serial, rows: json.iter().map(row).collect(), end }
}

fn live(peer: &mut Peer, serial: Serial, json: &'static str, frames: &mut Frames) -> Result<(), TooSlow> {
    peer.live(serial, LiveEvent::new(Bytes::from_static(json.as_bytes())), frames)
}

/// At the cap a new id is refused and a known one replaces; a COUNT takes no place (T23).
#[test]
fn t23_the_cap_counts_subscriptions_only() {
    let mut peer = peer(|limits| limits.subscriptions_max = 2);
    let first = serial_of(req(&mut peer, "a"));
    let mut frames = Frames::default();
    peer.page(rows(first, &[], PageEnd::Eose(EoseHint::Finish)), &mut frames);
    let second = serial_of(req(&mut peer, "b"));
    peer.page(rows(second, &[], PageEnd::Eose(EoseHint::Finish)), &mut frames);
    assert_eq!(refused(req(&mut peer, "c"), "[\"CLOSED\",\"c\",\"error: at most 2 "), None);
    let count = peer.receive("[\"COUNT\",\"c\",{}]");
    assert!(matches!(count, Action::Count { .. }));
    let replaced = req(&mut peer, "a");
    assert!(matches!(replaced, Action::Subscribe { replaced: Some(old), .. } if old == first), "{replaced:?}");
    let closed = peer.receive("[\"CLOSE\",\"b\"]");
    assert!(matches!(closed, Action::Unsubscribe(serial) if serial == second), "{closed:?}");
    serial_of(req(&mut peer, "c"));
}

/// Too many filters or values are refused, and the subscription that the client meant to replace has ended with
/// the `CLOSED` that it reads (T24).
#[test]
fn t24_a_refused_req_ends_what_it_would_replace() {
    let mut peer = peer(|limits| {
        limits.filters_max = 2;
        limits.filter_values_max = 3;
        limits.subscription_values_max = 5;
    });
    let serial = serial_of(req(&mut peer, "a"));
    let ended = refused(peer.receive(r#"["REQ","a",{},{},{}]"#), "[\"CLOSED\",\"a\",\"error: at most 2 filters");
    assert_eq!(ended, Some(serial));
    let values = r#"["REQ","a",{"kinds":[1,2,3]},{"kinds":[4]}]"#;
    assert_eq!(refused(peer.receive(values), "[\"CLOSED\",\"a\",\"error: at most 3 values"), None);
    let serial = serial_of(peer.receive(r#"["REQ","a",{"kinds":[1,2,3]}]"#));
    let more = r#"["REQ","b",{"kinds":[1,2,3]}]"#;
    assert_eq!(refused(peer.receive(more), "[\"CLOSED\",\"b\",\"error: at most 5 values in all open"), None);
    let bad = peer.receive(r#"["REQ","a",{"kinds":["1"]}]"#);
    assert_eq!(refused(bad, "[\"CLOSED\",\"a\",\"invalid: kinds"), Some(serial));
}

/// A REQ waits for the answers to the EVENTs before it, and nothing more is read meanwhile (T25).
#[test]
fn t25_a_req_waits_for_earlier_events() {
    let mut peer = peer(|_| {});
    assert!(matches!(peer.receive(&event_message()), Action::Publish(_)));
    assert!(matches!(peer.receive(&event_message()), Action::Publish(_)));
    assert!(matches!(req(&mut peer, "a"), Action::Nothing));
    assert!(!peer.wants_input() && !peer.is_settled());
    peer.answered();
    assert!(peer.take_held().is_none());
    peer.answered();
    serial_of(peer.take_held().unwrap());
    assert!(peer.wants_input() && peer.is_settled());
}

/// Live events wait for the end of the stored ones and follow it in order; EOSE comes once (T24, T26).
#[test]
fn t26_live_events_follow_the_stored_ones() {
    let mut peer = peer(|_| {});
    let serial = serial_of(req(&mut peer, "a"));
    let mut frames = Frames::default();
    live(&mut peer, serial, "3", &mut frames).unwrap();
    assert!(peer.page(rows(serial, &["2"], PageEnd::Eose(EoseHint::More)), &mut frames).rest.is_none());
    live(&mut peer, serial, "4", &mut frames).unwrap();
    let event = |number: u8| format!("[\"EVENT\",\"a\",{number}]");
    let expected = [event(2), "[\"EOSE\",\"a\",[\"more\"]]".to_owned(), event(3), event(4)];
    assert_eq!(read(&frames), expected);
    assert_eq!(peer.held_live_bytes, 0);
}

/// After CLOSE, or under a new subscription of the same id, nothing of the old one arrives (T25).
#[test]
fn t25_nothing_arrives_after_close() {
    let mut peer = peer(|_| {});
    let mut frames = Frames::default();
    let old = serial_of(req(&mut peer, "a"));
    live(&mut peer, old, "1", &mut frames).unwrap();
    let new = serial_of(req(&mut peer, "a"));
    live(&mut peer, old, "1", &mut frames).unwrap();
    peer.page(rows(old, &["1"], PageEnd::Eose(EoseHint::Finish)), &mut frames);
    let count = serial_of(peer.receive("[\"COUNT\",\"a\",{}]"));
    peer.receive("[\"CLOSE\",\"a\"]");
    peer.page(rows(new, &["1"], PageEnd::Failed("error: x")), &mut frames);
    peer.page(rows(count, &[], PageEnd::Count { count: 1, approximate: false, hll: None }), &mut frames);
    assert_eq!(read(&frames), [""; 0]);
    assert_eq!((peer.held_live_bytes, peer.queries), (0, 0));
}

/// What a client has under way is bounded: unanswered events, running queries (also of subscriptions that it has
/// closed), held live events.
#[test]
fn what_is_under_way_is_bounded() {
    let mut peer = peer(|limits| {
        limits.events_in_flight_max = 1;
        limits.subscriptions_max = 2;
        limits.live_queue_bytes_max = 5;
    });
    peer.receive(&event_message());
    assert!(!peer.wants_input());
    peer.answered();
    let first = serial_of(req(&mut peer, "a"));
    peer.receive("[\"CLOSE\",\"a\"]");
    assert!(peer.wants_input());
    let second = serial_of(req(&mut peer, "a"));
    assert!(!peer.wants_input());
    let mut frames = Frames::default();
    peer.page(rows(first, &[], PageEnd::Eose(EoseHint::Finish)), &mut frames);
    assert!(peer.wants_input());
    assert_eq!(live(&mut peer, second, "12345", &mut frames), Ok(()));
    assert_eq!(live(&mut peer, second, "6", &mut frames), Err(TooSlow));
}

/// A query that fails ends its subscription with CLOSED and without EOSE; a failed COUNT is closed too.
#[test]
fn a_failed_query_is_closed() {
    let mut peer = peer(|_| {});
    let mut frames = Frames::default();
    let serial = serial_of(req(&mut peer, "a"));
    let count = serial_of(peer.receive("[\"COUNT\",\"c\",{}]"));
    let after = peer.page(rows(serial, &["1"], PageEnd::Failed("error: x")), &mut frames);
    assert_eq!(after.ended, Some(serial));
    peer.page(rows(count, &[], PageEnd::Failed("error: y")), &mut frames);
    let expected = ["[\"EVENT\",\"a\",1]", "[\"CLOSED\",\"a\",\"error: x\"]", "[\"CLOSED\",\"c\",\"error: y\"]"];
    assert_eq!(read(&frames), expected);
    assert_eq!(peer.serials().count(), 0);
}

/// The flow of NIP-42: a challenge, a refusal, a proof, an answer; a proof of the wrong kind is refused.
#[test]
fn authentication_opens_what_was_refused() {
    let mut peer = peer(|_| {});
    assert_eq!(peer.greeting(), format!("[\"AUTH\",\"{}\"]", "07".repeat(16)));
    let inbox = r#"["REQ","a",{"kinds":[1059]}]"#;
    assert_eq!(refused(peer.receive(inbox), "[\"CLOSED\",\"a\",\"auth-required: "), None);
    refused(peer.receive(&inbox.replace("REQ", "COUNT")), "[\"CLOSED\",\"a\",\"auth-required: ");
    let Action::Authenticate(note) = peer.receive(&event_message().replacen("EVENT", "AUTH", 1)) else {
        panic!("AUTH is for the session");
    };
    assert!(peer.authenticate(*note, None, NOW).0.contains(",false,\"invalid: an AUTH event has kind 22242, not 1\""));
    let tags = [vec!["relay", "ws://localhost:7777"], vec!["challenge", "07070707070707070707070707070707"]];
    let proof = Author::new(1).event(22_242, NOW, &tags, "");
    assert_eq!(peer.authenticate(proof.clone(), None, NOW), (message::ok(&proof.id, true, ""), true));
    assert_eq!(peer.authenticate(proof.clone(), None, NOW), (message::ok(&proof.id, true, ""), false));
    assert_eq!(peer.session.keys()[..], [proof.pubkey]);
    serial_of(peer.receive(inbox));
}
