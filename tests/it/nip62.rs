//! NIP-62, requests to vanish: the key's events leave, bytes included, and stay out.

use std::process::Stdio;

use crate::support::binary::{Binary, lines};
use crate::support::paths::History;
use crate::support::relay::SERVICE_URL;
use crate::support::stores::{holds, open_store};
use crate::support::{Keys, NOW, Relay, ids, verified};
use serde_json::json;
use sledge::protocol::Event;
use sledge::protocol::supersede::Verdict;
use sledge::store::embedded::EmbeddedStore;
use sledge::store::{Removal, Store};

const VANISHED: &str = "blocked: ";

fn vanish(keys: &Keys, at: u64, relay: &str) -> Event {
    keys.draft(62, at).tag(["relay", relay]).sign()
}

/// Everything of the key up to the request's second goes: notes, lists, deletions; what is newer or foreign stays.
#[tokio::test]
async fn t14_vanish_takes_all_up_to_its_second() {
    let other = Keys::new(99);
    let mut history = History::new();
    for (author, url) in
        [(1, SERVICE_URL), (2, "wss://relay.example.com"), (3, "ALL_RELAYS"), (4, "WSS://Relay.example.com:443")]
    {
        let keys = Keys::new(author);
        let gone = [
            keys.note(NOW - 5, "old"),
            keys.note(NOW, "same second"),
            keys.draft(0, NOW - 1).sign(),
            keys.draft(30_023, NOW - 1).tag(["d", "x"]).sign(),
            keys.deletion(NOW - 1, &[("e", &"0".repeat(64))]),
        ];
        let stays = [
            keys.note(NOW + 1, "newer"),
            other.note(NOW - author, "foreign"),
            other.draft(1, NOW).tag(["p", &keys.hex()]).sign(),
        ];
        let request = vanish(&keys, NOW, url);
        // Half of them have the request before everything, the others after it.
        history = if author % 2 == 0 {
            let asked = gone.iter().fold(history.stored(&request), |history, event| history.refused(event, VANISHED));
            stays.iter().fold(asked, History::stored)
        } else {
            let asked = gone.iter().chain(&stays).fold(history, History::stored).stored(&request);
            gone.iter().fold(asked, |history, event| history.refused(event, VANISHED))
        };
        history = history.keeps(stays.iter().chain([&request]));
    }
    history.holds_on_every_path().await;
}

/// A request that names other relays only is refused and has no effect.
#[tokio::test]
async fn t14_vanish_for_another_relay_has_no_effect() {
    let mut history = History::new();
    let urls = ["wss://other.example.com/", "ws://relay.example.com/", "all_relays", ""];
    for (author, url) in urls.into_iter().enumerate() {
        let keys = Keys::new(author as u64);
        let note = keys.note(NOW, "stays");
        history = history.stored(&note).refused(&vanish(&keys, NOW + 1, url), "invalid: ").keeps([&note]);
    }
    history.holds_on_every_path().await;
}

/// Requests to vanish stay, as the relay's record of why it refuses: older and newer ones, in any order.
#[tokio::test]
async fn t14_requests_to_vanish_stay() {
    let both = |author| [NOW, NOW + 1].map(|at| vanish(&Keys::new(author), at, "ALL_RELAYS"));
    let [old, new] = both(1);
    let history = History::new().stored(&old).stored(&new).keeps([&old, &new]);
    let [old, new] = both(2);
    history.stored(&new).stored(&old).keeps([&old, &new]).holds_on_every_path().await;
}

/// Gift wraps to the key go too, later ones come in again.
#[tokio::test]
async fn t14_vanish_takes_gift_wraps_to_the_key() {
    let (keys, sender, friend) = (Keys::new(1), Keys::new(2), Keys::new(3));
    let wrap = |at, to: &Keys| sender.draft(1_059, at).tag(["p", &to.hex()]).sign();
    let (to_key, to_friend, later) = (wrap(NOW, &keys), wrap(NOW, &friend), wrap(NOW + 1, &keys));
    let request = vanish(&keys, NOW, SERVICE_URL);
    let history = History::new().stored(&to_key).stored(&to_friend).stored(&request).refused(&to_key, VANISHED);
    history.stored(&later).keeps([&to_friend, &later, &request]).holds_on_every_path().await;
}

/// A deletion request against a request to vanish has no effect.
#[tokio::test]
async fn t14_a_vanish_cannot_be_deleted() {
    let pieces = |author| {
        let keys = Keys::new(author);
        let request = vanish(&keys, NOW, "ALL_RELAYS");
        let deletion = keys.deletion(NOW + 1, &[("e", &request.id.to_hex())]);
        (keys.note(NOW, "gone"), request, deletion)
    };
    let (note, request, deletion) = pieces(1);
    let history = History::new().stored(&note).stored(&request).stored(&deletion).refused(&note, VANISHED);
    let history = history.keeps([&request, &deletion]);
    let (note, request, deletion) = pieces(2);
    let history = history.stored(&deletion).stored(&request).refused(&note, VANISHED).keeps([&request, &deletion]);
    history.holds_on_every_path().await;
}

/// When the OK arrives, the words are no longer on the disk, those of gift wraps included.
#[tokio::test]
async fn t14_vanished_bytes_are_gone_before_the_ok() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let (keys, sender) = (Keys::new(1), Keys::new(2));
    let words = ["the unmistakable words of a note", "the unmistakable words of a gift wrap"];
    client.store(&keys.note(NOW, words[0])).await;
    client.store(&sender.draft(1_059, NOW).tag(["p", &keys.hex()]).content(words[1]).sign()).await;
    assert!(words.iter().all(|words| holds(relay.dir(), words)), "the search finds what is there");
    client.store(&vanish(&keys, NOW, SERVICE_URL)).await;
    assert!(words.iter().all(|words| !holds(relay.dir(), words)));
    assert_eq!(client.query_ids(json!({"kinds": [1, 1_059]})).await, ids([]));
}

/// An author of more events than one write takes out: a process that ends half-way leaves a sound store without the
/// request, which was not answered; sent again it takes the rest, from the disk too, and holds.
#[test]
fn t14_a_large_author_vanishes_in_portions_that_a_crash_may_part() {
    let binary = Binary::new();
    let (author, friend) = (Keys::new(1), Keys::new(2));
    let secret = |n: u64| format!("a secret of the one who vanishes, number {n}");
    let notes: Vec<_> = (0..2_300).map(|n| author.note(NOW + n, &secret(n))).collect();
    let wrap = |n| friend.draft(1059, NOW + n).tag(["p", &author.hex()]).content(secret(n)).sign();
    let wraps: Vec<_> = (0..50).map(wrap).collect();
    let others: Vec<_> = (0..10).map(|n| friend.draft(1, NOW + n).tag(["p", &author.hex()]).sign()).collect();
    binary.import(notes.iter().chain(&wraps).chain(&others));
    let request = author.draft(62, NOW + 5_000).tag(["relay", "ALL_RELAYS"]).sign();
    let file = binary.file("request.jsonl", lines([&request]));

    for left in [2_300 - 1_000 + 60, 2_300 - 2_000 + 60] {
        let mut command = binary.command(&["import", &file]);
        let ended = command.env("SLEDGE_FAULT", "vanish.portion").stderr(Stdio::null()).status().unwrap();
        assert!(!ended.success(), "{ended}");
        assert_eq!(binary.exported_ids().len(), left);
        let verified = binary.run(&["verify"]);
        assert_eq!(verified.code, Some(0), "{verified:?}");
    }
    binary.import([&request]);
    let mut expected = ids(others.iter().chain([&request]));
    expected.sort();
    assert_eq!(binary.exported_ids(), expected);
    assert_eq!(binary.run(&["verify"]).code, Some(0));
    assert!(!holds(binary.data(), "a secret of the one"), "the bytes are gone");
    binary.run_with(&["import", "-"], lines(&notes).as_bytes());
    assert_eq!(binary.exported_ids(), expected, "and they stay away");
}

/// A request that the operator deletes holds no longer, at once and after a restart; an earlier one of the same key does.
#[test]
fn t14_a_deleted_request_to_vanish_holds_no_longer() {
    let dir = tempfile::tempdir().unwrap();
    let store = open_store(dir.path());
    let author = Keys::new(1);
    let request = |at| author.draft(62, at).tag(["relay", "ALL_RELAYS"]).sign();
    let (early, late) = (request(NOW + 10), request(NOW + 100));
    let apply = |store: &EmbeddedStore, event: &Event| store.apply(&[verified(event)], NOW + 200).unwrap().verdicts[0];
    assert_eq!([&early, &late].map(|request| apply(&store, request)), [Verdict::Store; 2]);
    let (old, newer) = (author.note(NOW + 5, "before both"), author.note(NOW + 50, "between them"));
    assert_eq!([&old, &newer].map(|note| apply(&store, note)), [Verdict::Vanished; 2]);
    assert_eq!(store.remove(&[late.id], Removal::Operator).unwrap(), 1);
    assert_eq!([&old, &newer].map(|note| apply(&store, note)), [Verdict::Vanished, Verdict::Store]);
    drop(store);
    let store = open_store(dir.path());
    assert_eq!(apply(&store, &old), Verdict::Vanished);
    assert_eq!(store.remove(&[early.id], Removal::Operator).unwrap(), 1);
    assert_eq!(apply(&store, &old), Verdict::Store);
}
