//! NIP-01, filters: exact reading, exact meaning, newest first, limits by filter.

use serde_json::{Value, json};
use sledge::protocol::Event;

use crate::support::stores::in_order;
use crate::support::{Client, Keys, NOW, Relay, ids};

/// Ten notes, two a second, from two authors.
async fn relay_with_notes() -> (Relay, Client, Vec<Event>) {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let notes: Vec<Event> = (0..10).map(|n| Keys::new(n % 2).note(NOW + n / 2, &format!("note {n}"))).collect();
    client.store_all(&notes).await;
    (relay, client, notes)
}

/// A malformed field closes the subscription and is never read as absent; the connection lives on.
#[tokio::test]
async fn t15_malformed_fields_are_refused() {
    let (_relay, mut client, notes) = relay_with_notes().await;
    let short = "a".repeat(63);
    let upper = "A".repeat(64);
    for filter in [
        json!({"kinds": ["1"]}),
        json!({"kinds": [1, -1]}),
        json!({"kinds": [65_536]}),
        json!({"kinds": [1.0]}),
        json!({"kinds": 1}),
        json!({"kinds": null}),
        json!({"limit": -1}),
        json!({"limit": "5"}),
        json!({"limit": 1.5}),
        json!({"limit": null}),
        json!({"since": 1.5}),
        json!({"since": "1"}),
        json!({"until": -1}),
        json!({"until": [1]}),
        json!({"ids": [short]}),
        json!({"ids": [upper]}),
        json!({"ids": "x"}),
        json!({"ids": [1]}),
        json!({"authors": [short]}),
        json!({"authors": [upper]}),
        json!({"authors": {}}),
        json!({"#e": [short]}),
        json!({"#e": [upper]}),
        json!({"#p": [short]}),
        json!({"#p": [upper]}),
        json!({"#t": "x"}),
        json!({"#t": [1]}),
        json!([]),
        json!("x"),
        json!(null),
    ] {
        for filters in [vec![filter.clone()], vec![json!({}), filter.clone()]] {
            let text = client.refused("s", &filters).await;
            assert!(text.starts_with("invalid: "), "{filter}: {text}");
            client.send(crate::support::client::request("COUNT", "c", &filters)).await;
            let text = client.closed("c").await;
            assert!(text.starts_with("invalid: "), "COUNT {filter}: {text}");
        }
    }
    assert_eq!(client.drain().await, Vec::<Value>::new(), "a refusal brings no EOSE");
    assert_eq!(client.query(json!({})).await.events.len(), notes.len());
}

/// Uppercase letters are tags of their own, whose values need be no hex.
#[tokio::test]
async fn t15_only_e_and_p_need_hex() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let event = Keys::new(1).draft(1, NOW).tag(["E", "x"]).tag(["a", "y"]).tag(["q", "Z"]).sign();
    client.store(&event).await;
    for filter in [json!({"#E": ["x"]}), json!({"#a": ["y"]}), json!({"#q": ["Z"]})] {
        assert_eq!(client.query_ids(filter).await, ids([&event]));
    }
    for filter in [json!({"#A": ["y"]}), json!({"#Q": ["Z"]}), json!({"#q": ["z"]})] {
        assert_eq!(client.query_ids(filter).await, ids([]));
    }
}

/// An empty list matches nothing, stored or live: EOSE at once.
#[tokio::test]
async fn t16_an_empty_list_matches_nothing() {
    let (_relay, mut client, _) = relay_with_notes().await;
    for filter in [json!({"ids": []}), json!({"authors": []}), json!({"kinds": []}), json!({"#t": []})] {
        let stored = client.req("s", std::slice::from_ref(&filter)).await;
        assert_eq!(stored.ids(), ids([]), "{filter}");
        assert_eq!(client.count(std::slice::from_ref(&filter)).await, 0, "{filter}");
    }
    client.req("marker", &[json!({"limit": 0})]).await;
    let note = Keys::new(1).note(NOW, "live");
    client.store(&note).await;
    client.live("marker").await;
    assert_eq!(client.drain().await, Vec::<Value>::new(), "the last filter is open and got nothing");
}

/// A key without a meaning would silently answer another question, so it is refused by its name.
#[tokio::test]
async fn t17_unknown_keys_are_named() {
    let (_relay, mut client, _) = relay_with_notes().await;
    for (filter, key) in [
        (json!({"search": "x"}), "search"),
        (json!({"#tt": ["x"]}), "#tt"),
        (json!({"#": ["x"]}), "#"),
        (json!({"#é": ["x"]}), "#é"),
        (json!({"#1": ["x"]}), "#1"),
        (json!({"&t": ["x"]}), "&t"),
        (json!({"Kinds": [1]}), "Kinds"),
        (json!({"kinds": [1], "author": []}), "author"),
    ] {
        let text = client.refused("s", std::slice::from_ref(&filter)).await;
        assert!(text.starts_with("unsupported: ") && text.contains(key), "{filter}: {text}");
    }
}

/// Each filter has its own limit; the union has no repeats and is newest first.
#[tokio::test]
async fn t18_limits_count_per_filter() {
    let (_relay, mut client, notes) = relay_with_notes().await;
    let newest = in_order(&notes);
    let author = json!({"authors": [Keys::new(0).hex()], "limit": 2});
    let of_author: Vec<String> = in_order(notes.iter().step_by(2)).into_iter().take(2).collect();
    let stored = client.req("s", &[json!({"limit": 3}), author.clone()]).await.ids();
    let expected: Vec<String> =
        newest.iter().filter(|id| newest[..3].contains(id) || of_author.contains(id)).cloned().collect();
    assert_eq!(stored, expected);
    let twice = client.req("s", &[json!({"limit": 4}), json!({"limit": 4}), json!({"limit": 1})]).await.ids();
    assert_eq!(twice, newest[..4]);
    let one_of = client.req("s", &[json!({"limit": 0}), json!({"ids": [newest[9]]})]).await.ids();
    assert_eq!(one_of, newest[9..]);
}

/// `limit: 0` asks for nothing stored but for what comes; no `limit` gives the newest `default_limit`.
#[tokio::test]
async fn t19_limit_zero_and_no_limit() {
    let relay = Relay::with(|config| {
        config.limits.limit_default = 3;
        config.limits.limit_max = 5;
    })
    .await;
    let mut client = relay.client().await;
    let notes: Vec<Event> = (0..8).map(|n| Keys::new(1).note(NOW + n, "")).collect();
    client.store_all(&notes).await;
    let newest = in_order(&notes);
    assert_eq!(client.query_ids(json!({})).await, newest[..3]);
    assert_eq!(client.query_ids(json!({"limit": 4})).await, newest[..4]);
    assert_eq!(client.query_ids(json!({"limit": 5_000})).await, newest[..5]);
    assert_eq!(client.query_ids(json!({"limit": u64::MAX})).await, newest[..5]);
    assert_eq!(client.req("live", &[json!({"limit": 0})]).await.ids(), ids([]));
    let late = Keys::new(1).note(NOW - 10, "old, but new here");
    client.store(&late).await;
    assert_eq!(client.live("live").await["id"], json!(late.id.to_hex()));
}

/// What is hidden (deleted, replaced, expired) does not use up the limit.
#[tokio::test]
async fn t20_hidden_rows_never_use_up_the_limit() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    let seen: Vec<Event> = (0..3).map(|n| keys.note(NOW - 100 + n, "seen")).collect();
    let deleted: Vec<Event> = (0..40).map(|n| keys.note(NOW + n, "deleted")).collect();
    let expiring: Vec<Event> = (0..40)
        .map(|n| keys.draft(1, NOW + n).tag(["expiration".to_owned(), (NOW + 50).to_string()]).content("e").sign())
        .collect();
    let hex = ids(&deleted);
    let targets: Vec<(&str, &str)> = hex.iter().map(|id| ("e", id.as_str())).collect();
    client.store_all(seen.iter().chain(&deleted).chain(&expiring)).await;
    client.store(&keys.deletion(NOW, &targets)).await;
    let filter = json!({"kinds": [1], "authors": [keys.hex()], "limit": 2});
    assert_eq!(client.query_ids(filter.clone()).await, in_order(&expiring)[..2], "all still there");
    relay.set_now(NOW + 50);
    assert_eq!(client.query_ids(filter.clone()).await, in_order(&seen)[..2]);
    let stored = client.req("s", &[filter, json!({"ids": ids(deleted.iter().chain(&expiring))})]).await;
    assert_eq!(stored.ids(), in_order(&seen)[..2]);
}

/// `created_at` descending, then the lowest id first, however the filter is answered.
#[tokio::test]
async fn t21_newest_first_then_lowest_id() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let notes: Vec<Event> = (0..60)
        .map(|n| Keys::new(n % 3).draft(1 + (n % 2) as u16, NOW + n % 4).tag(["t", "x"]).content(n.to_string()).sign())
        .collect();
    client.store_all(&notes).await;
    let newest = in_order(&notes);
    let authors: Vec<String> = (0..3).map(|n| Keys::new(n).hex()).collect();
    for filter in [
        json!({}),
        json!({"kinds": [1, 2]}),
        json!({"authors": authors}),
        json!({"authors": authors, "kinds": [2, 1]}),
        json!({"#t": ["x", "y"]}),
        json!({"ids": ids(&notes)}),
        json!({"since": NOW}),
        json!({"#t": ["x"], "kinds": [1, 2], "authors": authors, "until": NOW + 3}),
    ] {
        assert_eq!(client.query_ids(filter.clone()).await, newest, "{filter}");
        let mut limited = filter.clone();
        limited["limit"] = json!(7);
        assert_eq!(client.query_ids(limited).await, newest[..7], "{filter}");
    }
}

/// Both bounds are inclusive, any 64-bit number is one, and a span that ends before it begins is empty.
#[tokio::test]
async fn t22_bounds_are_inclusive_and_any_integer() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let notes: Vec<Event> = [0, 1, NOW - 1, NOW].map(|at| Keys::new(1).note(at, "")).into();
    client.store_all(&notes).await;
    let [zero, one, before, now] = [0, 1, 2, 3].map(|at| notes[at].id.to_hex());
    for (filter, expected) in [
        (json!({"since": NOW}), vec![&now]),
        (json!({"since": NOW, "until": NOW}), vec![&now]),
        (json!({"until": NOW - 1}), vec![&before, &one, &zero]),
        (json!({"since": 1, "until": NOW - 1}), vec![&before, &one]),
        (json!({"until": 0}), vec![&zero]),
        (json!({"since": 0, "until": 0}), vec![&zero]),
        (json!({"since": 2, "until": 1}), vec![]),
        (json!({"since": (1u64 << 32) + 5}), vec![]),
        (json!({"since": NOW, "until": 1u64 << 32}), vec![&now]),
        (json!({"since": NOW, "until": 1u64 << 53}), vec![&now]),
        (json!({"since": NOW, "until": 1u64 << 63}), vec![&now]),
        (json!({"since": NOW, "until": u64::MAX}), vec![&now]),
        (json!({"since": u64::MAX}), vec![]),
        (json!({"since": u64::MAX, "until": u64::MAX}), vec![]),
        (json!({"since": 1u64 << 63, "until": u64::MAX}), vec![]),
    ] {
        let mut by_author = filter.clone();
        by_author["authors"] = json!([Keys::new(1).hex()]);
        for filter in [filter, by_author] {
            let found = client.query_ids(filter.clone()).await;
            assert_eq!(found.iter().collect::<Vec<_>>(), expected, "{filter}");
            assert_eq!(client.count(std::slice::from_ref(&filter)).await, expected.len() as u64, "COUNT {filter}");
        }
    }
    for number in ["1e3", "-1", "18446744073709551616", "1.0", "\"1\""] {
        for key in ["since", "until"] {
            client.send(format!("[\"REQ\",\"s\",{{\"{key}\":{number}}}]")).await;
            let text = client.closed("s").await;
            assert!(text.starts_with("invalid: "), "{key} {number}: {text}");
        }
    }
}

/// Every condition must hold; within a list any item does; only a tag's first value counts.
#[tokio::test]
async fn conditions_are_and_lists_are_or() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    let tagged = |at, first: &str, second: &str| keys.draft(1, at).tag(["t", first, second]).sign();
    let [ab, ba] = [tagged(NOW, "a", "b"), tagged(NOW + 1, "b", "a")];
    let both = keys.draft(7, NOW + 2).tag(["t", "a"]).tag(["t", "b"]).tag(["r", "u"]).sign();
    client.store_all([&ab, &ba, &both]).await;
    for (filter, expected) in [
        (json!({"#t": ["a"]}), ids([&both, &ab])),
        (json!({"#t": ["a", "b", "c"]}), ids([&both, &ba, &ab])),
        (json!({"#t": ["a"], "kinds": [1]}), ids([&ab])),
        (json!({"#t": ["b"], "#r": ["u"]}), ids([&both])),
        (json!({"#t": ["c"]}), ids([])),
        (json!({"ids": [ab.id.to_hex()], "#t": ["b"]}), ids([])),
        (json!({"ids": [ab.id.to_hex()], "authors": [Keys::new(2).hex()]}), ids([])),
        (json!({"kinds": [7, 7, 1], "#t": ["b", "b"]}), ids([&both, &ba])),
    ] {
        assert_eq!(client.query_ids(filter.clone()).await, expected, "{filter}");
    }
}
