//! NIP-09, deletion requests: what they reach, what they do not, and that what is gone stays gone.

use serde_json::json;
use sledge::protocol::Event;

use crate::support::paths::History;
use crate::support::stores::holds;
use crate::support::{Keys, NOW, Relay, ids};

const DELETED: &str = "blocked: deleted";

/// A stranger's request has no effect, whether it comes before or after the event or address that it names.
#[tokio::test]
async fn t06_foreign_deletion_does_not_block_the_author() {
    let stranger = Keys::new(9);
    let pieces = |author: &Keys| {
        let note = author.note(NOW, "mine");
        let article = author.draft(30_023, NOW).tag(["d", "x"]).sign();
        let request = stranger.deletion(NOW + 5, &[("e", &note.id.to_hex()), ("a", &author.address(30_023, "x"))]);
        [note, article, request]
    };
    let [note, article, request] = pieces(&Keys::new(1));
    let before = History::new().stored(&request).stored(&note).stored(&article).keeps([&request, &note, &article]);
    let [note, article, request] = pieces(&Keys::new(2));
    let after = History::new().stored(&note).stored(&article).stored(&request).keeps([&request, &note, &article]);
    before.then(after).holds_on_every_path().await;
}

/// The author's request that comes first keeps the event out.
#[tokio::test]
async fn t07_a_deletion_before_its_event_blocks_it() {
    let mut history = History::new();
    // `e` reaches the event whatever the two dates say.
    for (author, at) in [(1, NOW - 10), (2, NOW), (3, NOW + 10)] {
        let keys = Keys::new(author);
        let (note, other) = (keys.note(NOW, "regretted"), keys.note(NOW, "kept"));
        let request = keys.deletion(at, &[("e", &note.id.to_hex())]);
        history = history.stored(&request).refused(&note, DELETED).stored(&other).keeps([&request, &other]);
    }
    history.holds_on_every_path().await;
}

/// An `a` tag reaches every version up to its own second and none after it, for all replaceable kinds, and a `d` with
/// colons in it.
#[tokio::test]
async fn t08_an_address_is_deleted_up_to_the_request() {
    let pieces = |author: u64, kind, d: &str| {
        let keys = Keys::new(author);
        let [old, same, newer] = [NOW - 1, NOW, NOW + 1].map(|at| keys.draft(kind, at).tag(["d", d]).sign());
        [old, same, newer, keys.deletion(NOW, &[("a", &keys.address(kind, d))])]
    };
    let mut history = History::new();
    for (kind, d) in [(0, ""), (3, ""), (10_002, ""), (30_023, "x"), (30_023, ""), (30_023, "a:b::c")] {
        let [old, same, newer, request] = pieces(1, kind, d);
        let after = History::new().stored(&same).stored(&request).refused(&old, DELETED).refused(&same, DELETED);
        history = history.then(after.stored(&newer).keeps([&request, &newer]));
        let [old, same, newer, request] = pieces(2, kind, d);
        let before = History::new().stored(&request).refused(&same, DELETED).stored(&newer).refused(&old, DELETED);
        history = history.then(before.keeps([&request, &newer]));
        let [_, _, newer, request] = pieces(3, kind, d);
        history = history.stored(&newer).stored(&request).keeps([&newer, &request]);
    }
    history.holds_on_every_path().await;
}

/// Other `d` values, kinds and authors of the same words are not the named address.
#[tokio::test]
async fn t08_neighbouring_addresses_stay() {
    let keys = Keys::new(1);
    let events = [
        keys.draft(30_023, NOW).tag(["d", "xy"]).sign(),
        keys.draft(30_023, NOW).tag(["d", "x:"]).sign(),
        keys.draft(30_024, NOW).tag(["d", "x"]).sign(),
        keys.draft(30_023, NOW).sign(),
        Keys::new(2).draft(30_023, NOW).tag(["d", "x"]).sign(),
        keys.draft(1, NOW).tag(["d", "x"]).sign(),
    ];
    let request = keys.deletion(NOW + 1, &[("a", &keys.address(30_023, "x")), ("a", &keys.address(1, "x"))]);
    let history = events.iter().fold(History::new(), History::stored).stored(&request);
    let kept: Vec<_> = events.iter().chain([&request]).collect();
    history.keeps(kept).holds_on_every_path().await;
}

/// Deleting a deletion has no effect, so what it deleted does not come back.
#[tokio::test]
async fn t09_a_deletion_cannot_be_deleted() {
    let pieces = |author| {
        let keys = Keys::new(author);
        let note = keys.note(NOW, "gone");
        let first = keys.deletion(NOW, &[("e", &note.id.to_hex())]);
        let second = keys.deletion(NOW + 1, &[("e", &first.id.to_hex())]);
        (note, first, second)
    };
    let (note, first, second) = pieces(1);
    let after = History::new().stored(&note).stored(&first).stored(&second).refused(&note, DELETED);
    let after = after.keeps([&first, &second]);
    let (note, first, second) = pieces(2);
    let before = History::new().stored(&second).stored(&first).refused(&note, DELETED).keeps([&first, &second]);
    after.then(before).holds_on_every_path().await;
}

/// Own targets go, foreign ones stay, and the request itself is accepted.
#[tokio::test]
async fn t10_mixed_targets_delete_only_the_own() {
    let (keys, stranger) = (Keys::new(1), Keys::new(2));
    let (own, foreign) = (keys.note(NOW, "own"), stranger.note(NOW, "foreign"));
    let foreign_list = stranger.draft(10_002, NOW).sign();
    let own_list = keys.draft(10_002, NOW).sign();
    let request = keys.deletion(
        NOW + 1,
        &[
            ("e", &foreign.id.to_hex()),
            ("a", &stranger.address(10_002, "")),
            ("e", &own.id.to_hex()),
            ("a", &keys.address(10_002, "")),
        ],
    );
    let history = History::new().stored(&own).stored(&foreign).stored(&own_list).stored(&foreign_list).stored(&request);
    history
        .refused(&own, DELETED)
        .refused(&own_list, DELETED)
        .keeps([&foreign, &foreign_list, &request])
        .holds_on_every_path()
        .await;
}

/// A request whose targets are all of one sort, foreign, unreadable or absent deletes nothing else.
#[tokio::test]
async fn t11_no_readable_ids_is_not_all_ids() {
    let keys = Keys::new(1);
    let bystanders = [keys.note(NOW, "a"), keys.note(NOW, "b"), keys.draft(30_023, NOW).tag(["d", "x"]).sign()];
    let requests = [
        keys.deletion(NOW + 1, &[("a", &keys.address(30_023, "unknown"))]),
        keys.deletion(NOW + 2, &[]),
        keys.deletion(NOW + 3, &[("e", ""), ("a", ""), ("e", "x"), ("a", "1:"), ("a", &keys.hex())]),
        keys.draft(5, NOW + 4).tag(["e"]).tag(["a"]).tag(["k", "1"]).sign(),
        keys.deletion(NOW + 5, &[("e", &"0".repeat(64))]),
    ];
    let history = bystanders.iter().chain(&requests).fold(History::new(), History::stored);
    let kept: Vec<_> = bystanders.iter().chain(&requests).collect();
    history.keeps(kept).holds_on_every_path().await;
}

/// What was deleted is refused through every door: EVENT and import, before and after restart and compaction.
#[tokio::test]
async fn t12_deleted_events_stay_out_through_every_door() {
    let keys = Keys::new(1);
    let notes: Vec<_> = (0..5).map(|n| keys.note(NOW + n, "out")).collect();
    let article = keys.draft(30_023, NOW).tag(["d", "x"]).sign();
    let address = keys.address(30_023, "x");
    let hex = ids(&notes);
    let mut targets: Vec<(&str, &str)> = hex.iter().map(|id| ("e", id.as_str())).collect();
    targets.push(("a", &address));
    let request = keys.deletion(NOW, &targets);
    let mut history = notes.iter().fold(History::new(), History::stored).stored(&article).stored(&request);
    for event in notes.iter().chain([&article]) {
        history = history.refused(event, DELETED).refused(event, DELETED);
    }
    history.keeps([&request]).holds_on_every_path().await;
}

/// A gift wrap's author is a throw-away key, so its recipient may delete it; anybody else named in it may not.
#[tokio::test]
async fn t13_a_gift_wrap_is_deleted_by_its_recipient_or_author() {
    let (recipient, stranger) = (Keys::new(2), Keys::new(3));
    let wrap = |author: u64| {
        let draft = Keys::new(author).draft(1_059, NOW).tag(["p", &recipient.hex()]);
        draft.tag(["e", &stranger.hex()]).sign()
    };
    let delete = |by: &Keys, event: &Event| by.deletion(NOW + 1, &[("e", &event.id.to_hex())]);
    let mut history = History::new();
    for (author, deleter) in [(10, &recipient), (11, &Keys::new(11))] {
        let event = wrap(author);
        let request = delete(deleter, &event);
        history = history.stored(&event).stored(&request).refused(&event, DELETED).keeps([&request]);
    }
    let event = wrap(12);
    let request = delete(&recipient, &event);
    history = history.stored(&request).refused(&event, DELETED).keeps([&request]);
    let event = wrap(13);
    let request = delete(&stranger, &event);
    history = history.stored(&request).stored(&event).keeps([&request, &event]);
    // The privilege is for gift wraps only.
    let note = Keys::new(14).draft(1, NOW).tag(["p", &recipient.hex()]).sign();
    let request = delete(&recipient, &note);
    history.stored(&note).stored(&request).keeps([&note, &request]).holds_on_every_path().await;
}

/// When the OK of a deletion arrives, the deleted words are no longer on the disk.
#[tokio::test]
async fn t12_deleted_bytes_are_gone_before_the_ok() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    let note = keys.note(NOW, "the unmistakable words of a regretted note");
    client.store(&note).await;
    assert!(holds(relay.dir(), "unmistakable words"), "the search finds what is there");
    client.store(&keys.deletion(NOW + 1, &[("e", &note.id.to_hex())])).await;
    assert!(!holds(relay.dir(), "unmistakable words"));
    assert_eq!(client.query_ids(json!({"kinds": [1]})).await, ids([]));
}
