//! NIP-67, what EOSE says about the rest.

use serde_json::json;
use sledge::protocol::Event;

use crate::support::stores::in_order;
use crate::support::{Client, Keys, NOW, Relay, ids};

/// `per_second` notes in each of `seconds` seconds.
fn notes(seconds: u64, per_second: u64) -> Vec<Event> {
    let at = |n: u64| Keys::new(n % 3).note(NOW + n / per_second, &n.to_string());
    (0..seconds * per_second).map(at).collect()
}

/// All was sent: `finish`, also when there is nothing and when the number equals the limit exactly.
#[tokio::test]
async fn t21_finish_when_all_was_sent() {
    let relay = Relay::with(|config| config.limits.limit_default = 6).await;
    let mut client = relay.client().await;
    assert_eq!(client.query(json!({})).await.hints, ["finish"]);
    client.store_all(&notes(3, 2)).await;
    for filter in [json!({}), json!({"kinds": [1]}), json!({"limit": 6}), json!({"limit": 100}), json!({"ids": []})] {
        assert_eq!(client.query(filter.clone()).await.hints, ["finish"], "{filter}");
    }
}

/// Where the relay's own limit cuts, the page goes on to the end of its last second, and `more` says that all the
/// rest is older: paging by `until` one below loses nothing and repeats nothing.
#[tokio::test]
async fn t21_a_page_never_ends_inside_a_second() {
    let relay = Relay::with(|config| config.limits.limit_default = 7).await;
    let mut client = relay.client().await;
    let notes = notes(8, 5);
    client.store_all(&notes).await;
    for filter in
        [json!({}), json!({"kinds": [1]}), json!({"authors": (0..3).map(|n| Keys::new(n).hex()).collect::<Vec<_>>()})]
    {
        let (pages, all) = page_through(&mut client, filter.clone()).await;
        assert_eq!(all, in_order(&notes), "{filter}");
        assert_eq!(pages, 4, "10 a page, the last one finishing: {filter}");
    }
}

/// Reads page by page as a client would; how many pages and which ids.
async fn page_through(client: &mut Client, mut filter: serde_json::Value) -> (usize, Vec<String>) {
    let mut all = Vec::new();
    for pages in 1.. {
        let page = client.query(filter.clone()).await;
        all.extend(page.ids());
        if page.hints == ["finish"] {
            return (pages, all);
        }
        assert_eq!(page.hints, ["more"], "{filter}");
        let oldest = page.events.last().expect("a page that is not the last has events")["created_at"].as_u64();
        filter["until"] = json!(oldest.expect("a number") - 1);
    }
    unreachable!("the loop is endless")
}

/// A client's own limit is kept exactly, and `finish` is never said when something is left.
#[tokio::test]
async fn t21_the_clients_limit_is_kept_exactly() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let notes = notes(4, 5);
    client.store_all(&notes).await;
    for limit in 1..20 {
        let page = client.query(json!({"limit": limit})).await;
        assert_eq!(page.ids(), in_order(&notes)[..limit]);
        assert!(!page.hints.contains(&"finish".to_owned()), "limit {limit}: {:?}", page.hints);
        if page.hints.contains(&"more".to_owned()) {
            assert_eq!(limit % 5, 0, "more is said only at the end of a second");
        }
    }
}

/// A second with more events than the relay gives by default comes whole, and is not called the end.
#[tokio::test]
async fn t21_a_crowded_second_comes_whole() {
    let relay = Relay::with(|config| {
        config.limits.limit_default = 5;
        config.limits.limit_max = 500;
    })
    .await;
    let mut client = relay.client().await;
    let notes = notes(2, 30);
    client.store_all(&notes).await;
    let page = client.query(json!({})).await;
    assert_eq!(page.ids(), in_order(&notes)[..30]);
    assert_eq!(page.hints, ["more"]);
    assert_eq!(client.query_ids(json!({"limit": 500})).await.len(), 60);
}

/// Several filters: `finish` only if every one is finished.
#[tokio::test]
async fn t21_one_unfinished_filter_is_enough() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let notes = notes(4, 1);
    client.store_all(&notes).await;
    let [all, one] = [json!({"limit": 10}), json!({"limit": 1})];
    assert_eq!(client.req("s", &[all.clone(), json!({"kinds": [7]})]).await.hints, ["finish"]);
    let both = client.req("s", &[json!({"kinds": [7]}), one.clone()]).await;
    assert_eq!(both.ids(), ids([&notes[3]]));
    assert!(!both.hints.contains(&"finish".to_owned()), "{:?}", both.hints);
}
