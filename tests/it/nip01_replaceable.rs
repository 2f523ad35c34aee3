//! NIP-01, replaceable and addressable events: one event an address, the same one whatever the order of arrival.

use sledge::protocol::Event;

use crate::support::paths::History;
use crate::support::{Keys, NOW};

/// Two versions in the same second, the one with the lower id first.
fn twins(keys: &Keys, kind: u16, tags: &[&[&str]]) -> [Event; 2] {
    let version = |content| {
        let draft = keys.draft(kind, NOW).content(content);
        tags.iter().fold(draft, |draft, tag| draft.tag(tag.iter().copied())).sign()
    };
    let mut versions = [version("one"), version("two")];
    versions.sort_by_key(|version| version.id);
    versions
}

/// Equal `created_at`: the lowest id stays, in both orders of arrival.
#[tokio::test]
async fn t01_equal_seconds_leave_the_lowest_id() {
    let (mut history, one, two) = (History::new(), Keys::new(1), Keys::new(2));
    for (kind, tags) in [(0, &[] as &[&[&str]]), (10_002, &[]), (30_023, &[&["d", "x"]])] {
        let [low, high] = twins(&one, kind, tags);
        history = history.stored(&low).duplicate(&high).keeps([&low]);
        let [low, high] = twins(&two, kind, tags);
        history = history.stored(&high).stored(&low).keeps([&low]);
    }
    history.holds_on_every_path().await;
}

/// A version older than the stored one is neither stored nor broadcast, and its sender need not send it again.
#[tokio::test]
async fn t02_an_older_version_is_a_duplicate() {
    let keys = Keys::new(1);
    let version = |kind, at| keys.draft(kind, at).tag(["d", "x"]).sign();
    let mut history = History::new();
    for kind in [3, 11_111, 30_000] {
        let [old, new, newest] = [NOW - 1, NOW, NOW + 1].map(|at| version(kind, at));
        history = history.stored(&new).duplicate(&old).stored(&newest).duplicate(&new).duplicate(&old).keeps([&newest]);
    }
    history.holds_on_every_path().await;
}

/// No `d` tag, `["d"]` and `["d",""]` are one address; of several `d` tags the first counts, wherever it stands.
#[tokio::test]
async fn t03_the_first_d_is_the_address() {
    let keys = Keys::new(1);
    let draft = |at| keys.draft(30_023, at);
    let versions = [
        draft(NOW).sign(),
        draft(NOW + 1).tag(["d"]).sign(),
        draft(NOW + 2).tag(["d", ""]).sign(),
        draft(NOW + 3).tag(["d", "", "x"]).tag(["d", "y"]).sign(),
        draft(NOW + 4).tag(["t", "d"]).tag(["d"]).tag(["d", "y"]).sign(),
    ];
    let others = [
        draft(NOW).tag(["t", "z"]).tag(["d", "y"]).tag(["d", ""]).sign(),
        draft(NOW).tag(["d", " "]).sign(),
        keys.draft(30_024, NOW).sign(),
        Keys::new(2).draft(30_023, NOW).sign(),
    ];
    let history = others.iter().chain(&versions).fold(History::new(), History::stored);
    history.keeps([&others[0], &others[1], &others[2], &others[3], &versions[4]]).holds_on_every_path().await;
}

/// Long `d` values are compared whole, not by a beginning that fits a key.
#[tokio::test]
async fn t04_long_d_values_never_collide() {
    let keys = Keys::new(1);
    let mut history = History::new();
    for length in [255, 256, 300, 5_000] {
        let version = |last: &str, at| keys.draft(30_000, at).tag(["d".to_owned(), "x".repeat(length) + last]).sign();
        let [a1, b1, c1, a2] = [version("a", NOW), version("b", NOW), version("c", NOW), version("a", NOW + 1)];
        history = history.stored(&a1).stored(&b1).stored(&c1).stored(&a2).duplicate(&a1).keeps([&b1, &c1, &a2]);
    }
    history.holds_on_every_path().await;
}

/// Kinds 0, 3 and 10000-19999 are replaceable; 41 is regular, and so are the neighbours of the range.
#[tokio::test]
async fn t05_only_replaceable_kinds_are_replaced() {
    let keys = Keys::new(1);
    let pair = |kind| [NOW, NOW + 1].map(|at| keys.draft(kind, at).tag(["d", "x"]).sign());
    let regular: Vec<Event> = [1, 2, 4, 41, 9_999, 40_000].into_iter().flat_map(pair).collect();
    let replaceable: Vec<[Event; 2]> = [0, 3, 10_000, 19_999, 30_000, 39_999].map(pair).into();
    let history = regular.iter().chain(replaceable.iter().flatten()).fold(History::new(), History::stored);
    let kept: Vec<&Event> = regular.iter().chain(replaceable.iter().map(|[_, new]| new)).collect();
    history.keeps(kept).holds_on_every_path().await;
}
